"""A run's model as one safetensors file, with what it is in the file's header."""

from __future__ import annotations

import json
import os
from pathlib import Path

from gossamer.errors import ConfigError, storage_errors
from gossamer.results.loading import LoadedRun
from gossamer.storage.checkpoint import save_arrays
from gossamer.storage.runlog import describe_environment

SUFFIX = ".safetensors"


def export(
    run: LoadedRun,
    output: str | Path,
    *,
    capacity: float = 1.0,
    peer: int | None = None,
    client: int | None = None,
    force: bool = False,
) -> Path:
    """Write what `LoadedRun.state_dict` returns, and return the path.

    The header has, as text, ``gossamer_version``, ``round``, and as JSON ``metrics`` (the last record), ``facts`` of
    the data and ``workload``; ``capacity``, ``peer`` and ``client`` where they were given.

    Args:
        output: file to write, ``*.safetensors``.
        capacity, peer, client: see `LoadedRun.state_dict`.
        force: whether to overwrite a file.

    Raises:
        ConfigError: the file is there, or not named so; or see `LoadedRun.state_dict`.
        StorageError: the disk refuses.
    """
    output = Path(output)
    if output.suffix != SUFFIX:
        raise ConfigError(f"cannot write {str(output)!r}: give a name that ends in {SUFFIX}")
    if output.exists() and not force:
        raise ConfigError(f"{str(output)!r} is there already: choose another name, or overwrite it with --force")
    described = {
        "format": "pt",  # as the libraries that read such files expect of tensors of torch
        "gossamer_version": str(describe_environment()["versions"]["gossamer"]),
        "round": str(run.round),
        "metrics": json.dumps(run.metrics[-1] if run.metrics else {}),
        "facts": json.dumps(run.facts),
        "workload": json.dumps(run.config["workload"]),
    }
    described |= {} if capacity == 1.0 else {"capacity": str(capacity)}
    described |= {} if peer is None else {"peer": str(peer)}
    described |= {} if client is None else {"client": str(client)}
    arrays = run.state_dict(capacity=capacity, peer=peer, client=client)
    aside = output.with_name(f".{output.name}.writing")
    with storage_errors(output):
        try:
            save_arrays(aside, arrays, described)
            os.replace(aside, output)
        finally:
            aside.unlink(missing_ok=True)
    return output
