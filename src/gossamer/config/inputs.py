"""What the results of a run depend on, and how a resume tells what was changed since the last commit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gossamer.errors import CheckpointError

# Where a run that has begun may go on: what changes no bits.
MOVABLE = tuple(f"engine.{key}" for key in ("name", "workers", "block_size", "address", "straggler_seconds"))
CHANGED = {
    "data": "the data, or their partition, are not those that the run was committed with: restore them",
    "topology": "the topology's file is not the one that the run was committed with: restore it",
}


def configuration_inputs(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the results depend on in a resolved configuration, as JSON values: all but `MOVABLE`."""
    plain: dict[str, Any] = json.loads(json.dumps(config, default=str))
    if isinstance(engine := plain.get("engine"), dict):
        plain["engine"] = {key: value for key, value in engine.items() if f"engine.{key}" not in MOVABLE}
    return plain


def require_same(committed: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Check that inputs of a run are those of its last commit.

    Args:
        found: some of the inputs, by their names.

    Raises:
        CheckpointError: one of them differs.
    """
    for name, value in found.items():
        difference = _first_difference(committed.get(name), value)
        if difference is not None and name in CHANGED:
            raise CheckpointError(CHANGED[name])
        if difference is not None:
            key, before, now = difference
            raise CheckpointError(
                f"config.yaml says {key} = {now}, but the run was committed with {before}: restore that entry"
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
