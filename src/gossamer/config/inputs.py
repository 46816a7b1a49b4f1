"""What the results of a run depend on, and how a resume tells what was changed since the last commit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gossamer.errors import CheckpointError, ConfigError
from gossamer.planning.schedule import FOLLOW_END
from gossamer.storage.checkpoint import Checkpoints
from gossamer.storage.runlog import CHECKPOINTS, read_config

# Where a run that has begun may go on: what changes no bits, but for the device, which changes the last ones.
PROFILE, OFFLOAD = "profile", "offload"
KEYS = (
    "name", "workers", "block_size", "device", "address", "kit", "peer", "peers_file", "data", "straggler_seconds"
)  # fmt: skip
MOVABLE = (*(f"engine.{key}" for key in KEYS), PROFILE, OFFLOAD)
END = "rounds"  # may be changed, too, where nothing depends on it
BESIDE = ("name", "log", "checkpoint", "evaluation", "stop", "replay", END)  # what changes no bits of a replay
CHANGED = {
    "data": "the data, or their partition, are not those that the run was committed with: restore them",
    "topology": "the topology's file is not the one that the run was committed with: restore it",
}


def configuration_inputs(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the results depend on in a resolved configuration, as JSON values: all but `MOVABLE`.

    The number of rounds is among them only where what is done in a round depends on it, see `why_end_is_fixed`.
    """
    plain: dict[str, Any] = json.loads(json.dumps(config, default=str))
    if isinstance(engine := plain.get("engine"), dict):
        plain["engine"] = {key: value for key, value in engine.items() if f"engine.{key}" not in MOVABLE}
    for key in (PROFILE, OFFLOAD):
        plain.pop(key, None)
    if why_end_is_fixed(plain) is None:
        plain.pop(END, None)
    return plain


def why_end_is_fixed(config: Mapping[str, Any]) -> str | None:
    """Return why a run of a resolved configuration cannot go on longer; None: it can."""
    schedule = _entry(config, "train", "schedule", "name")
    if schedule in FOLLOW_END:
        return f"train.schedule {schedule!r} goes by the number of rounds"
    if _entry(config, "peers", "final_merge"):
        return "peers.final_merge merges in the last round"
    return None


def _entry(config: Any, *path: str) -> Any:
    """Return what stands at a path of keys; None where nothing does, as in a file that was damaged."""
    for key in path:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def require_end(config: Mapping[str, Any], rounds: int, done: int, stop_reason: str = "") -> None:
    """Check that a run of a resolved configuration can end after `rounds`, of which `done` are done.

    Args:
        stop_reason: why it has ended already, by ``stop``.

    Raises:
        ConfigError: it cannot.
    """
    if rounds < done:
        raise ConfigError(f"rounds = {rounds}, but {done} rounds are done: give {done} or more")
    if stop_reason and rounds != config[END]:
        raise ConfigError(
            f"rounds = {rounds} changes nothing, because the run has ended after {done} rounds: {stop_reason}: leave it"
            " out, or start another run without stop"
        )
    reason = why_end_is_fixed(config)
    if reason is not None and rounds != config[END]:
        raise ConfigError(
            f"rounds = {rounds}, but the run was begun for {config[END]}, and {reason}: start another run of {rounds}"
        )


def require_same(committed: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Check that inputs of a run are those of its last commit.

    Args:
        found: some of the inputs, by their names.

    Raises:
        CheckpointError: one of them differs.
    """
    for name, value in found.items():
        before = committed.get(name)
        if name == "configuration" and isinstance(before, Mapping):
            before, value = configuration_inputs(before), configuration_inputs(value)
        difference = _first_difference(before, value)
        if difference is not None and name in CHANGED:
            raise CheckpointError(CHANGED[name])
        if difference is not None:
            key, then, now = difference
            raise CheckpointError(
                f"config.yaml says {key} = {now}, but the run was committed with {then}: restore that entry"
            )


def require_replayed(directory: Path, found: Mapping[str, Any]) -> None:
    """Check that a run of real clients is one of the same experiment, so that a simulation can repeat it.

    Args:
        directory: of that run.
        found: inputs of the simulation, by their names.

    Raises:
        ConfigError: it is another experiment, or the directory holds no run.
        CheckpointError: its commits are damaged.
    """
    plain = [configuration_inputs(one) for one in (read_config(directory), found["configuration"])]
    own, other = ({key: value for key, value in one.items() if key not in BESIDE} for one in plain)
    if difference := _first_difference(own, other):
        key, then, now = difference
        raise ConfigError(
            f"replay {str(directory)!r} is a run of another experiment, in which {key} = {then}, not {now}: give a run"
            " of this one"
        )
    latest = Checkpoints(directory / CHECKPOINTS).latest()
    if latest is not None and latest.inputs.get("data") not in (None, found["data"]):
        raise ConfigError(
            f"replay {str(directory)!r} is a run on other data, or another partition: give a run on these"
        )


def _first_difference(committed: Any, found: Any, key: str = "") -> tuple[str, str, str] | None:
    """Return the dotted key of the first difference, and both values there."""
    if not (isinstance(committed, Mapping) and isinstance(found, Mapping)):
        texts = [json.dumps(value, sort_keys=True) for value in (committed, found)]
        return None if texts[0] == texts[1] else (key, texts[0], texts[1])
    for name in {**committed, **found}:
        below = f"{key}.{name}" if key else name
        if name not in committed:
            return below, "nothing", json.dumps(found[name])
        if name not in found:
            return below, json.dumps(committed[name]), "nothing"
        if difference := _first_difference(committed[name], found[name], below):
            return difference
    return None


def run_id(config: Mapping[str, Any]) -> str:
    """Return the id of a run: two of the same id train the same, so that what clients keep of one serves the other."""
    return hashlib.sha256(json.dumps(configuration_inputs(config), sort_keys=True).encode()).hexdigest()[:32]
