"""A peer's run that begins amid the rounds, from a row that somebody else has kept."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from torch import Tensor

from gossamer.engines.network.lanes import When
from gossamer.errors import CheckpointError
from gossamer.round_record import Progress
from gossamer.storage.checkpoint import STATE, Checkpoints
from gossamer.storage.runlog import CHECKPOINTS, RunLog


def begin_at(
    directory: Path, config: Mapping[str, Any], inputs: Mapping[str, Any], at: When, state: Mapping[str, Tensor]
) -> None:
    """Make a run directory whose only commit is of a phase that the peer has not trained itself.

    Args:
        directory: to be made.
        config: resolved configuration of the peer.
        inputs: see `gossamer.storage.checkpoint.Checkpoints`.
        at: rounds, and phases of the next one, that are done.
        state: the peer's state arrays, [1, d].

    Raises:
        StorageError: the disk refuses a write.
    """
    with closing(RunLog.create(directory, config)) as log:
        arrays = {STATE + name: rows for name, rows in state.items()}
        progress = vars(Progress(round=at[0], phase=at[1]))
        log.sync()
        checkpoints = Checkpoints(directory / CHECKPOINTS, inputs=inputs)
        checkpoints.commit(at[0], arrays, progress, log.positions(), phase=at[1])


def go_on_from(directory: Path, at: When, state: Mapping[str, Tensor]) -> None:
    """Commit a phase that the peer has not trained itself, for it to go on from there.

    Args:
        directory: of the peer's run, which has a commit.
        at, state: see `begin_at`.

    Raises:
        CheckpointError: it has none that is intact.
        StorageError: the disk refuses a write.
    """
    latest = Checkpoints(directory / CHECKPOINTS).latest()
    if latest is None:
        raise CheckpointError(f"no commit in {str(directory)!r}: start the peer once more")
    arrays = {**latest.arrays, **{STATE + name: rows for name, rows in state.items()}}
    progress = latest.progress | {"round": at[0], "phase": at[1], "phases": []}
    checkpoints = Checkpoints(directory / CHECKPOINTS, inputs=latest.inputs)
    checkpoints.commit(at[0], arrays, progress, latest.logs, phase=at[1])
