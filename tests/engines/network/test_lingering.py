"""What a client tells once a run is over, and it waits for another one."""

from __future__ import annotations

from pathlib import Path

from federation import configure, mixed
from gossamer.build import build
from gossamer.config.loading import parse
from gossamer.transport import SERVER, Address, Joined, Message, Server, Welcome
from nodes import client_in_thread

RUN = "ab"


def test_that_the_server_has_ended_is_no_news(tmp_path: Path) -> None:
    task, lines = build(parse(configure(mixed("fedrolex")))).task, list[str]()
    with Server("127.0.0.1:0", admit=lambda hello: Welcome({"run": RUN, "instance": "i", "config": {}})) as server:
        thread = client_in_thread(server.address, task, tmp_path, linger_seconds=0.5, tell=lines.append)
        while not (isinstance(event := server.receive(20), Joined) and event.hello.body["clients"]):
            assert event is not None
        server.send("a", Message("end", Address(RUN, 1, 0, SERVER), {"is_over": True}))
        while "the run is over" not in lines:
            assert thread.is_alive()
            thread.join(0.02)
    thread.join(20)
    assert not thread.is_alive()
    assert lines[:2] == ["joined as client 3", "the run is over"]
    assert set(lines[2:]) <= {"joined as client 3"}  # it may find the server once more before that has ended
