"""What a run directory keeps of its model besides commits: enough to build it where the data is not.

model.json         shapes and axes of the parameters, what the workload says of its data, and digests
model.safetensors  frozen parameters and buffers, if there are any
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gossamer.errors import CheckpointError, storage_errors
from gossamer.storage.checkpoint import describe_file, digest_of_json, save_arrays
from gossamer.storage.disk import write_atomically

FORMAT = 1
DESCRIPTION, CONSTANTS = "model.json", "model.safetensors"


def write_model(directory: Path, described: Mapping[str, Any], constants: Mapping[str, Tensor]) -> None:
    """Write what is the same in all rounds, each file at once.

    Args:
        described: JSON values.

    Raises:
        StorageError: the disk refuses a write.
    """
    files = {}
    if constants:
        aside = directory / f".{CONSTANTS}.writing"
        with storage_errors(directory / CONSTANTS):
            save_arrays(aside, constants)
            files[CONSTANTS] = describe_file(aside)
            os.replace(aside, directory / CONSTANTS)
    whole = {"format": FORMAT, "files": files, **described}
    write_atomically(directory / DESCRIPTION, json.dumps(whole | {"sha256": digest_of_json(whole)}, indent=1) + "\n")


def read_model(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what `write_model` wrote.

    Raises:
        CheckpointError: it is missing, malformed or altered.
    """
    path, remedy = directory / DESCRIPTION, "restore it, or resume the run where its data is, which writes it anew"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        if described.pop("sha256") != digest_of_json(described) or described["format"] != FORMAT:
            raise CheckpointError(f"{str(path)!r} was altered, or is of another format: {remedy}")
        for name, expected in described["files"].items():
            if describe_file(directory / name) != expected:
                raise CheckpointError(f"{str(directory / name)!r} was altered: {remedy}")
        constants = load_file(directory / CONSTANTS) if described["files"] else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"cannot read what the model of {str(directory)!r} is ({error}): {remedy}") from error
    return described, constants
