"""What is counted from round to round, the records of a phase and of a round, and who watches."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from gossamer.errors import ConfigError
from gossamer.plan import RoundPlan, TrainReport

Record = dict[str, Any]
LOWER = ("loss", "bits", "distance", "gap", "norm", "error", "perplexity", "seconds", "bytes", "flops", "rmse")


class Observer(Protocol):
    """Watches a run, for example to draw a progress bar."""

    def on_block(self, round: int, done: int, total: int) -> None:
        """`done` of `total` participants of a round (counted from 0) are trained, those of all phases added up."""
        ...

    def on_round(self, record: Mapping[str, Any]) -> None:
        """A round was logged; its ``"round"`` counts the rounds done."""
        ...


@dataclass
class Progress:
    """What the loop carries from phase to phase beside the engine's state; goes into every commit.

    Attributes:
        round: rounds that are done.
        phase: phases of the next one that are done.
        phases: their records, see `phase_record`.
        wall_seconds: since the run began, without the time between interruption and resumption.
        simulated_seconds, total_bytes_up, total_bytes_down, total_client_flops, total_samples: of the rounds that are
            done.
        best_value, num_stale: best value of the metric that the run watches, if any, and evaluations since then.
        stop_reason: why the run has ended before its last round; "": it has not.
    """

    round: int = 0
    phase: int = 0
    phases: list[Record] = field(default_factory=list)
    wall_seconds: float = 0.0
    simulated_seconds: float = 0.0
    total_bytes_up: int = 0
    total_bytes_down: int = 0
    total_client_flops: float = 0.0
    total_samples: float = 0.0
    best_value: float | None = None
    num_stale: int = 0
    stop_reason: str = ""

    @property
    def address(self) -> tuple[int, int]:
        """Round and phase."""
        return self.round, self.phase

    def end_phase(self, record: Record) -> None:
        """Count one more phase."""
        self.phase += 1
        self.phases = [*self.phases, record]

    def end_round(self) -> list[Record]:
        """Count one more round, whose phases are all done, and return their records."""
        done, self.phases = self.phases, []
        self.round, self.phase = self.round + 1, 0
        self.simulated_seconds += _total(done, "simulated_seconds")
        self.total_bytes_up += _total(done, "bytes_up")
        self.total_bytes_down += _total(done, "bytes_down")
        self.total_client_flops += _total(done, "client_flops")
        self.total_samples += _total(done, "num_samples")
        return done


def numbers(record: Mapping[str, Any], separator: str) -> Iterator[tuple[str, float]]:
    """Yield the finite numbers of a record by name, nested ones as ``outer<separator>inner``."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}{separator}{name}", number) for name, number in numbers(value, separator))
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            yield key, float(value)


def lower_is_better(metric: str) -> bool:
    """Say whether smaller values of a metric are better, by its name."""
    return any(word in metric for word in LOWER)


def describe_done(round: int, phase: int) -> str:
    """Say how many rounds, and phases of the next one, are done."""
    return f"phase {phase} of round {round + 1}" if phase else f"round {round}"


def describe_quorum(
    where: Mapping[str, int], counts: tuple[int, int, int], what: str, section: str, remedy: str, done: tuple[int, int]
) -> str:
    """Say that a quorum is missed.

    Args:
        where: round and phase, by name.
        counts: updates that there are, that were expected, and that are needed.
        what: what they are, such as "usable".
        section: of the configuration, which has the quorum.
        remedy: what to do instead of lowering it.
        done: round and phase that are committed.
    """
    place, (left, expected, needed) = ", ".join(f"{name} {number}" for name, number in where.items()), counts
    return (
        f"{place}: only {left} of {expected} updates are {what} and {section}.quorum asks for {needed}: {remedy}, or"
        f" lower {section}.quorum; {describe_done(*done)} is committed"
    )


def describe_stop(done: tuple[int, int], committed: tuple[int, int], num_phases: int, num_rounds: int) -> str:
    """Say where a run of `num_rounds` stopped, by (round, phase) of what is done and of what is committed."""
    if committed != done:
        where = f"amid round {done[0] + 1} of {num_rounds}, half of which cannot be kept"
        return f"stopped {where}: {describe_done(*committed)} is committed, what came after it is done again"
    is_trained = done[1] == num_phases  # but not evaluated
    where = f"the training of round {done[0] + 1}" if is_trained else describe_done(*done)
    return f"stopped after {where} of {num_rounds}"


def _total(phases: Sequence[Record], name: str) -> Any:
    return sum(record[name] for record in phases)


@dataclass
class Outcome:
    """What came of a phase's participants.

    Attributes:
        weights: float64 [p], aggregation weights.
        losses: float64 [p], mean training losses, whatever they are.
        usable: bool [p], whose update is used.
        dropped: ``{reason: number of those whose update is not}``, and of those who were wanted and did not train.
    """

    weights: NDArray[np.float64]
    losses: NDArray[np.float64]
    usable: NDArray[np.bool_]
    dropped: Counter[str]

    @classmethod
    def of(cls, plan: RoundPlan, dropped: Mapping[str, int]) -> Self:
        """Return that of participants who have yet to train; `dropped` are those who will not."""
        number = len(plan.client)
        return cls(plan.weight, np.full(number, np.nan), np.zeros(number, dtype=bool), Counter(dropped))

    def add(self, report: TrainReport) -> list[tuple[int, str]]:
        """Take a report; return which of the plan's rows are dropped, and why."""
        self.losses[report.rows], self.usable[report.rows] = report.loss, report.finite
        lost = [number for number, used in enumerate(report.finite) if not used]
        found = [(report.rows.start + number, report.reason(number)) for number in lost]
        self.dropped.update(reason for _, reason in found)
        return found

    @property
    def train_loss(self) -> float:
        """The mean training loss of those whose update is used, weighted as these are."""
        losses, weights = self.losses[self.usable], self.weights[self.usable]
        with np.errstate(invalid="ignore", over="ignore"):  # it may be infinite, or NaN
            return float(np.average(losses, weights=weights)) if len(losses) else math.nan


def phase_record(plan: RoundPlan, costs: RoundCosts, outcome: Outcome, seconds: float) -> Record:
    """Return what a round's record is made of, of one of its phases: plain JSON values.

    Args:
        plan: its participants are those that train.
        costs: the phase's own.
        outcome: what came of the participants.
        seconds: wall-clock time of the phase.
    """
    return asdict(costs) | {
        "seconds": seconds,
        "num_participants": len(plan.client),
        "num_survivors": int(outcome.usable.sum()),
        "dropped": dict(+outcome.dropped),
        "lr": plan.lr,
        "train_loss": as_json(outcome.train_loss),
    }


def divided(whole: Mapping[str, float], parts: Mapping[str, Mapping[str, float]], kind: str = "capacity") -> Record:
    """Return the metrics of each part under the names of those of the `whole` model, without such as no part has."""
    found = {
        f"{name}_by_{kind}": {part: metrics[name] for part, metrics in parts.items() if name in metrics}
        for name in whole
    }
    return {name: values for name, values in found.items() if values}


def merged(*parts: Mapping[str, Any]) -> Record:
    """Return one record of several parts.

    Raises:
        ConfigError: two parts have one name, or one has a name that means something else in logs.
    """
    record = Record()
    for part in parts:
        for name in part:
            if name in record or name in ("run", "digest"):
                raise ConfigError(
                    f"the workload has a metric {name!r}, but in the record of a round that name is taken: rename the"
                    " metric"
                )
        record |= part
    return record


def as_json(number: float) -> float | str | None:
    """Return a number as logs hold it: ``"Infinity"`` or ``"-Infinity"`` if it is infinite, None if it is NaN."""
    if math.isfinite(number):
        return number
    return None if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def from_json(value: Any) -> Any:
    """Undo `as_json` anywhere inside of a value that was read from a log; None stays."""
    if isinstance(value, Mapping):
        return {key: from_json(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [from_json(entry) for entry in value]
    return float(value) if value in ("Infinity", "-Infinity") else value


def round_record(
    progress: Progress,
    phases: Sequence[Record],
    seconds: float,
    phase_seconds: Mapping[str, float],
    metrics: Mapping[str, Any],
    tokens_per_sample: int | None = None,
) -> Record:
    """Return a round's line of metrics.jsonl.

    Args:
        progress: totals, this round included.
        phases: of the round, see `phase_record`. Costs and dropped participants are added up; the simulated seconds of
            transfers and computation are sums over devices, see `RoundCosts`. All else is that of the last phase.
            ``num_uncounted_operations`` is there only where FLOPs are incomplete.
        seconds: wall-clock time of the round after its last phase.
        phase_seconds: time of each span since the last record.
        metrics: those of the workload.
        tokens_per_sample: number of tokens of a training sample; None: ``total_tokens`` is left out.

    Raises:
        ConfigError: a metric has the name of something else, see `merged`.
    """
    last, dropped = phases[-1], sum((Counter(record["dropped"]) for record in phases), Counter[str]())
    num_uncounted = max(one.get("num_uncounted_operations", 0) for one in phases)
    incomplete = {"num_uncounted_operations": num_uncounted} if num_uncounted else {}
    counted: Record = incomplete | {
        "round": progress.round,
        "wall_seconds": progress.wall_seconds,
        "round_seconds": _total(phases, "seconds") + seconds,
        "phase_seconds": dict(phase_seconds),
        "simulated_seconds": progress.simulated_seconds,
        "simulated_download_seconds": _total(phases, "download_seconds"),
        "simulated_compute_seconds": _total(phases, "compute_seconds"),
        "simulated_upload_seconds": _total(phases, "upload_seconds"),
        "total_bytes_up": progress.total_bytes_up,
        "total_bytes_down": progress.total_bytes_down,
        "total_client_flops": progress.total_client_flops,
        "total_samples": progress.total_samples,
        "num_participants": last["num_participants"],
        "num_survivors": last["num_survivors"],
        "num_dropped": sum(dropped.values()),
        "dropped": dict(dropped),
        "lr": last["lr"],
        "train_loss": from_json(last["train_loss"]),
    }
    if tokens_per_sample is not None:
        counted["total_tokens"] = progress.total_samples * tokens_per_sample
    return merged(counted, metrics)


@dataclass(frozen=True)
class RoundCosts:
    """What one phase of a round costs.

    Attributes:
        bytes_up, bytes_down, client_flops: sums over all that were chosen. A late one counts its whole download, its
            FLOPs up to the end of the phase, and no upload.
        simulated_seconds: advance of simulated time: the wait for an available participant, and the phase, which lasts
            as long as its slowest survivor, or to its deadline where fewer survive than it waits for.
        download_seconds, compute_seconds, upload_seconds: simulated seconds that devices spend so, added up like the
            bytes; latency is in none of them.
        num_samples: training samples that were gone through, counted like the FLOPs.
        num_uncounted_operations: kinds of operations that `client_flops`, and so the seconds, leave out.
    """

    bytes_up: int
    bytes_down: int
    client_flops: float
    simulated_seconds: float
    download_seconds: float
    compute_seconds: float
    upload_seconds: float
    num_samples: float = 0.0
    num_uncounted_operations: int = 0
