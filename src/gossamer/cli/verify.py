"""``gossamer offload DIR --verify``: runs an experiment with and without a side-car, and compares."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from gossamer.profiling.advice import Verdict
    from gossamer.profiling.replay import Interval
    from gossamer.profiling.trace import Round
    from gossamer.profiling.verification import Verification

TURNS = (False, True, True, False, False, True)  # whether each run has a side-car


def stage_to_verify(verdicts: list[Verdict]) -> str:
    """Return the kind of the first judged stage that a side-car can do.

    Raises:
        ConfigError: there is none.
    """
    from gossamer.config.offload import ENGINES
    from gossamer.errors import ConfigError
    from gossamer.profiling.offload import stage_named

    kinds = [stage_named(one.stage).kinds[0] for one in verdicts]
    found = next((kind for kind in kinds if kind in ENGINES["local"]), None)
    if found is None:
        judged = " and ".join(one.stage for one in verdicts) or "none"
        raise ConfigError(
            f"--verify: a side-car can do {', '.join(ENGINES['local'])}, and the stages that were recorded are {judged}"
        )
    return found


def verification(directory: Path, device: str, kind: str, rounds: int) -> Verification:
    """Run the experiment of a recorded run some more, in turns without and with a side-car.

    Args:
        directory: of the run.
        device: see `read_device`.
        kind: stage that the side-car does, such as ``aggregate``.
        rounds: of each run, of which the first does not count.

    Raises:
        ConfigError: the run, or the device, cannot be verified.
    """
    import torch

    from gossamer import experiment
    from gossamer.config.offload import OffloadOptions, offload_of
    from gossamer.errors import ConfigError
    from gossamer.profiling.handing import measured_handing
    from gossamer.profiling.trace import read_trace
    from gossamer.profiling.verification import verify
    from gossamer.storage.runlog import read_config

    config = read_config(directory)
    if config["engine"]["name"] != "local":
        raise ConfigError(
            f"--verify runs on engine local, and this run is of {config['engine']['name']!r}: leave it out"
        )
    options = {"stage": kind, "device": str(Path(device).absolute()) if "/" in device else device}
    offload = offload_of(OffloadOptions.model_validate(options))
    assert offload is not None
    offload = offload._replace(costs=measured_handing().applied(offload.costs, kind))
    found: dict[bool, list[Round]] = {False: [], True: []}
    ends: list[Mapping[str, Tensor]] = []
    changes: dict[str, Any] = {"rounds": rounds, "profile": True, "stop": None}
    with tempfile.TemporaryDirectory() as folder:
        for turn, is_moved in enumerate(TURNS):
            given = {
                **config,
                **changes,
                "log": {**config["log"], "sinks": []},
                "offload": options if is_moved else None,
            }
            run = experiment.run(given, out=Path(folder) / str(turn))
            found[is_moved] += read_trace(run.directory).rounds[1:]
            ends.append(run.params)
    same = all(torch.equal(one[name], ends[0][name]) for one in ends for name in ends[0])
    return verify(found[False], found[True], offload, same_bits=same)


def render(found: Verification, stage: str, device: str, as_json: bool) -> str:
    """Return a table and a sentence, or JSON."""
    from gossamer.storage.tables import aligned

    if as_json:
        plain: Mapping[str, Any] = asdict(found) | {
            name: None if one is None else one._asdict()
            for name, one in (("predicted", found.predicted), ("measured", found.measured))
        }
        return json.dumps({**plain, "stage": stage, "error": found.error, "outcome": found.outcome}, indent=2)

    def row(name: str, one: Interval | None) -> tuple[str, ...]:
        """Return a row of the table."""
        return (name, "-", "-") if one is None else (name, f"{one.mean:+.1%}", f"{one.lo:+.1%} to {one.hi:+.1%}")

    sides = [
        f"{len(side.seconds)} rounds {name} ({side.num_rejected} rejected; a thread waited for a processor for"
        f" {side.delay:.1%} of a round)"
        for name, side in (("without", found.plain), ("with a side-car", found.moved))
    ]
    rows = [("round", "change", "90 % interval"), row("predicted", found.predicted), row("measured", found.measured)]
    error = "" if found.error is None else f", the error is {100 * found.error:+.1f} points"
    bits = "the same bits" if found.same_bits else "NOT the same bits, which is a fault"
    told = f"{stage} on {device}: {found.outcome}{error}. {'; '.join(sides)}. All runs end with {bits}."
    return f"{aligned(rows)}\n\n{told}"
