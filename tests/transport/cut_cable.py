"""Run in a network namespace of its own: both ends of a connection notice that the cable is cut, and it works again."""

from __future__ import annotations

import json
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from gossamer.errors import Disconnected
from gossamer.transport import Address, Client, Gone, Joined, Message, Received, Server


def cable(state: str) -> None:
    subprocess.run(["ip", "link", "set", "lo", state], check=True)


def seconds_until_noticed(client: Client) -> float:
    began = time.monotonic()
    try:
        client.receive(20)
    except Disconnected:
        return time.monotonic() - began
    raise AssertionError("the client notices nothing")


def main() -> None:
    cable("up")
    message = Message("update", Address("run", 0, 0, 0), {}, {"x": torch.ones(1 << 24)})
    with Server("127.0.0.1:0") as server, Client(server.address, name="a") as client, ThreadPoolExecutor(1) as pool:
        assert isinstance(server.receive(20), Joined)
        cable("down")
        began = time.monotonic()
        at_client = pool.submit(seconds_until_noticed, client)
        assert isinstance(server.receive(20), Gone)
        at_server = time.monotonic() - began
        seconds = {"server": at_server, "client": at_client.result(20)}
        cable("up")
        client.reconnect(20)
        assert isinstance(server.receive(20), Joined)
        sending = pool.submit(client.send, message)
        while not server.traffic()["a"].received_bytes:
            time.sleep(0.001)
        cable("down")
        began = time.monotonic()
        try:
            sending.result(20)
            seconds["sending"] = 0.0
        except Disconnected:
            seconds["sending"] = time.monotonic() - began
        cable("up")
        client.reconnect(20)
        client.send(message)  # taken now, or before the cut
        received = [event for _ in range(8) if isinstance(event := server.receive(0.2), Received)]
        assert len(received) == 1
        assert server.dropped.total() <= 1
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
