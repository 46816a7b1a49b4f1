"""Checkpoints and logs that a side-car process writes, which nothing waits for; or the digests of the former."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from gossamer.profiling import recorder
from gossamer.profiling.offload import Offload
from gossamer.profiling.sidecar import Handler, SideCar
from gossamer.storage.checkpoint import Checkpoint, Checkpoints, Files, describe_file
from gossamer.storage.jsonl import LogFile, Position
from gossamer.storage.runlog import RunLog


class RemoteCheckpoints:
    """Has a side-car write commits, each once the one before it is durable; the rest is done by `Checkpoints`."""

    def __init__(self, checkpoints: Checkpoints, car: SideCar) -> None:
        self._checkpoints, self._car = checkpoints, car

    def commit(
        self,
        round: int,
        arrays: Mapping[str, Tensor],
        progress: Mapping[str, Any],
        logs: Mapping[str, Position],
        *,
        phase: int = 0,
        save_rows: Callable[[Path], Files] | None = None,
    ) -> None:
        """Hand over a commit, see `Checkpoints.commit`; what other processes hold of a state is not in it.

        Raises:
            EngineError: the side-car has ended.
            GossamerError: the commit before this one failed.
        """
        self._car.drain()
        message = {
            "round": round,
            "phase": phase,
            "progress": dict(progress),
            "logs": {name: asdict(position) for name, position in logs.items()},
            "arrays": list(arrays),
        }
        self._car.submit(message, list(arrays.values()))

    def latest(self) -> Checkpoint | None:
        """Return the newest intact commit, once those under way are durable."""
        self._car.drain()
        return self._checkpoints.latest()


Commits = Checkpoints | RemoteCheckpoints  # what the loop commits with, wherever it is written


def _committer(checkpoints: Checkpoints) -> Handler:
    def handle(message: dict[str, Any], arrays: list[Tensor]) -> tuple[dict[str, Any], list[Tensor]]:
        """Write one commit."""
        recorder.count_bytes(lambda: sum(value.nbytes for value in arrays))
        logs = {name: Position(**position) for name, position in message["logs"].items()}
        named = dict(zip(message["arrays"], arrays, strict=True))
        checkpoints.commit(message["round"], named, message["progress"], logs, phase=message["phase"])
        return {}, []

    return handle


def _described(path: Path) -> dict[str, Any]:
    """Describe a written file, see `describe_file`."""
    with recorder.span("digest"):
        found = describe_file(path)
        recorder.count_bytes(lambda: int(found["bytes"]))
        return found


def _described_by(car: SideCar, path: Path) -> dict[str, Any]:
    """Have a side-car describe a written file, whose bytes cross the link."""
    car.submit({"path": str(path)}, num_bytes=path.stat().st_size)
    return dict(car.result().message["described"])


def _digester(message: dict[str, Any], arrays: list[Tensor]) -> tuple[dict[str, Any], list[Tensor]]:
    """Describe a file, which both processes can read."""
    return {"described": _described(Path(message["path"]))}, []


class RemoteLogFile:
    """Has a side-car append to a log; whoever asks where the log ends waits until it has."""

    def __init__(self, log: LogFile, name: str, car: SideCar) -> None:
        self.path, self._log, self._name, self._car = log.path, log, name, car

    @property
    def position(self) -> Position:
        """Where the next line goes."""
        return Position(**self._ask("position")["position"])

    def append(self, record: Mapping[str, Any]) -> None:
        """Append a record; that the disk refuses it is told by the next call."""
        self._car.submit({"kind": "append", "log": self._name, "record": dict(record)})

    def check(self, position: Position | None = None) -> int:
        """Do what `LogFile.check` does, here, where it only reads."""
        self._car.drain()
        return self._log.check(position)

    def truncate(self, position: Position) -> None:
        """Remove what follows `position`, and sync."""
        self._ask("truncate", position=asdict(position))

    def sync(self) -> None:
        """Sync the log to the disk."""
        self._ask("sync")

    def close(self) -> None:
        """Close the log, which the side-car has open, too."""
        self._log.close()

    def _ask(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._car.submit({"kind": kind, "log": self._name, **fields})
        return self._car.result().message


def _logger(logs: Mapping[str, LogFile]) -> Handler:
    def handle(message: dict[str, Any], arrays: list[Tensor]) -> tuple[dict[str, Any], list[Tensor]]:
        """Do one thing with a log."""
        log = logs[message["log"]]
        if message["kind"] == "append":
            log.append(message["record"])
        elif message["kind"] == "truncate":
            log.truncate(Position(**message["position"]))
        elif message["kind"] == "sync":
            log.sync()
        return {"position": asdict(log.position)}, []

    return handle


@contextmanager
def stored_elsewhere(offload: Offload | None, log: RunLog, checkpoints: Checkpoints) -> Iterator[Commits]:
    """Within the block, have a side-car write what `offload` names; at its end all of it is on the disk.

    Yields:
        what to commit with; `log` is changed in place.

    Raises:
        EngineError: the side-car has ended.
    """
    checkpoints.describe = _described
    if offload is None:
        yield checkpoints
        return
    kinds = offload.stage.kinds
    files = {name: file for name, file in log.files.items() if isinstance(file, LogFile)}

    def make_handler() -> Handler:
        """Return what the side-car does."""
        return _logger(files) if "log" in kinds else _committer(checkpoints) if "checkpoint" in kinds else _digester

    car = SideCar(offload, make_handler)
    try:
        if "log" in kinds:
            log.files = {name: RemoteLogFile(file, name, car) for name, file in files.items()}
        if "checksum" in kinds:
            checkpoints.describe = partial(_described_by, car)
        yield RemoteCheckpoints(checkpoints, car) if "checkpoint" in kinds else checkpoints
    finally:
        try:
            car.drain()
        finally:
            car.close()
            checkpoints.describe = _described
            log.files = dict(files)
            for file in files.values():
                file.refresh()
