"""When a run ends before its last round: a metric is good enough, or has not become better for long."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from gossamer.errors import ConfigError, nearest
from gossamer.options import Options
from gossamer.round_record import Progress, lower_is_better


class StopOptions(Options):
    """When a run ends before its last round; only rounds of `evaluation.every` count.

    Attributes:
        metric: key of the records, dotted where nested, such as accuracy or accuracy_peers.min.
        target: value with which the run ends once the metric reaches it.
        patience: evaluations in a row without a better value than the best one, after which the run ends.
        min_delta: what a value must be better by than the best one.
        mode: whether larger values are better ("max") or smaller ones ("min"); None: by the metric's name.
    """

    metric: str
    target: float | None = None
    patience: int | None = Field(default=None, ge=1)
    min_delta: float = Field(default=0.0, ge=0)
    mode: Literal["min", "max"] | None = None

    @model_validator(mode="after")
    def _stops(self) -> StopOptions:
        if self.target is None and self.patience is None:
            raise ValueError(f"stop.metric = {self.metric!r} ends nothing by itself: give stop.target or stop.patience")
        if self.min_delta and self.patience is None:
            raise ValueError(f"stop.min_delta = {self.min_delta} changes nothing without stop.patience: leave it out")
        return self

    @property
    def sign(self) -> float:
        """1 where larger values are better, else -1."""
        lower = lower_is_better(self.metric) if self.mode is None else self.mode == "min"
        return -1.0 if lower else 1.0


def watch(
    options: StopOptions | None,
    evaluate_every: int,
    progress: Progress,
    record: Mapping[str, Any],
    on_event: Callable[..., None],
) -> None:
    """Count a round in `progress`, and note there, and by an event, why the run shall end, if so.

    Args:
        options: what is watched; None: nothing.
        evaluate_every: number of rounds between those that count. Then the last round of a run, which is evaluated
            besides, counts for nothing, as if the run went on.
        record: record of the round.

    Raises:
        ConfigError: it does not have the metric.
    """
    if options is None or progress.round % evaluate_every:
        return
    known, name = dict(_flat(record)), options.metric
    if name not in known:
        raise ConfigError(f"stop.metric = {name!r} is not logged{nearest(name, known)} (there are: {', '.join(known)})")
    value = known[name]
    is_known, sign = isinstance(value, int | float) and math.isfinite(value), options.sign
    best = progress.best_value
    if is_known and (best is None or sign * value > sign * best + options.min_delta):
        progress.best_value, progress.num_stale = float(value), 0
    else:
        progress.num_stale += 1
    if is_known and options.target is not None and sign * value >= sign * options.target:
        progress.stop_reason = f"{name} {value:.6g} reached stop.target = {options.target:g}"
    elif options.patience is not None and progress.num_stale >= options.patience:
        progress.stop_reason = f"{name} {_standstill(options, progress)}"
    if progress.stop_reason:
        on_event("ended", round=progress.round, reason=progress.stop_reason)


def _standstill(options: StopOptions, progress: Progress) -> str:
    """Say since when a metric got no better."""
    patience = f"for stop.patience = {options.patience} evaluations"
    if progress.best_value is None:
        return f"has no value {patience}"
    enough = f" by more than stop.min_delta = {options.min_delta:g}" if options.min_delta else ""
    return f"got no better than {progress.best_value:.6g}{enough} {patience}"


def _flat(record: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what is logged by dotted name, numbers or not."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value
