"""What Python calls: `run` and `resume`, with objects in the place of names, callbacks and a line of progress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gossamer import experiment
from gossamer.config import loading as configuration
from gossamer.config.objects import put_in
from gossamer.experiment import Hooks, Run
from gossamer.registry import giving
from gossamer.reports.progress import LineDisplay, RunObserver
from gossamer.round_record import Observer

OnRound = Callable[[Mapping[str, Any]], Any]


def run(
    source: str | Path | Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    hooks: Hooks | None = None,
    trust: bool = False,
    *,
    model: Any = None,
    data: Any = None,
    partition: Any = None,
    on_round: OnRound | None = None,
    progress: bool | None = None,
    **sections: Any,
) -> Run:
    """Run an experiment.

    Objects that have no name (all but classes and functions of modules that can be imported) are known to this process
    alone: such a run is resumed from Python with the same objects, and models and partitions of this kind do not run on
    Ray, whose actors import what they train.

    Args:
        source: path of a YAML file, or a dict; None: `sections` alone.
        overrides: ``key.path=value`` strings, which are applied last.
        out: the directory to make; None: ``runs/<name>-<time>``.
        hooks: see `gossamer.experiment.Hooks`.
        trust: whether the configuration may name any code, because it is your own, see `gossamer.registry`.
        model: a name, a `torch.nn.Module` class, a function that returns a module, or a module, whose parameters the
            run starts from, see `gossamer.workloads.given.given_model`.
        data: a name, a torch data set or a pair (train, test) of them, or arrays or tensors ``(x_train, y_train,
            x_test, y_test)``, see `gossamer.workloads.given_data.read_data`; None: those of `source`, or, where
            it names none, scikit-learn's digits, of which a model of your own warns.
        partition: a name, or the sample numbers of each client (then their number may be left out of `clients`), see
            `gossamer.workloads.given.given_partition`.
        on_round: called with the record of every round, a line of ``metrics.jsonl``. If what it returns is true, the
            run ends after that round as if it had no more of them, and `resume` would train the rest. If it raises, the
            run is committed first.
        progress: whether a line of standard output says how far it is; None: in a notebook.
        sections: sections of the configuration, such as ``rounds=10, clients={"num": 20, "per_round": 5}``; they are
            merged into `source`. A bare number of clients means that all of them take part in every round.

    Raises:
        GossamerError: its message says what is wrong and what to do; work done is committed.
    """
    objects: dict[str, Any] = {}
    if isinstance(num := sections.get("clients"), int) and not isinstance(num, bool):
        sections["clients"] = {"num": num, "per_round": num}
    if source is None or sections or any(one is not None for one in (model, data, partition)):
        source = configuration.merge(configuration.load({} if source is None else source), sections)
        objects = put_in(source, model, data, partition)
    callback = _Callback(hooks or Hooks(), on_round, progress)
    with giving(objects):
        return callback.checked(lambda: experiment.run(source, overrides, out, callback.hooks, trust))


def resume(
    directory: str | Path,
    hooks: Hooks | None = None,
    overrides: Sequence[str] = (),
    restart: bool = False,
    trust: bool = False,
    *,
    model: Any = None,
    data: Any = None,
    partition: Any = None,
    on_round: OnRound | None = None,
    progress: bool | None = None,
) -> Run:
    """Continue a run from its last commit, or all unfinished runs of an experiment.

    Args:
        directory: of the run or the experiment.
        hooks, on_round, progress, trust: see `run`.
        overrides: ``key=value`` strings, for this time, see `gossamer.experiment.resume`.
        restart: whether to erase the log of a run that cannot be continued, and to train it anew.
        model, data, partition: the objects that the run began with, if there were any.

    Raises:
        ConfigError: the directory holds no run, an override is of another key, or an object is not the same.
        CheckpointError: no commit is valid, or configuration, data or logs are not those of the last one.
    """
    objects = put_in({}, model, data, partition)
    callback = _Callback(hooks or Hooks(), on_round, progress)
    with giving(objects):
        return callback.checked(lambda: experiment.resume(directory, callback.hooks, overrides, restart, trust))


class _Callback:
    """Calls what a caller gave after every round, and shows progress.

    Attributes:
        hooks: the caller's, with these two.
    """

    def __init__(self, hooks: Hooks, on_round: OnRound | None, progress: bool | None) -> None:
        self._hooks, self._on_round = hooks, on_round
        self._display = LineDisplay() if progress or (progress is None and "ipykernel" in sys.modules) else None
        self._is_ended = False
        self._error: Exception | None = None
        self.hooks = hooks
        if on_round is not None or self._display is not None:
            self.hooks = Hooks(self._observer, hooks.spans, lambda: self._is_ended or hooks.is_ended())

    def checked(self, call: Callable[[], Run]) -> Run:
        """Return what a call returns.

        Raises:
            Exception: what `on_round` raised.
        """
        with suppress(_Stopped):
            run = call()
        if self._error is not None:
            raise self._error
        return run

    def _observer(self, name: str, num_rounds: int) -> Observer:
        """Return what watches the next single run."""
        if self._error is not None:
            raise _Stopped
        self._is_ended = False
        others = [self._hooks.observer(name, num_rounds)]
        others += [RunObserver(self._display, name, num_rounds)] if self._display is not None else []
        return _Observers([one for one in others if one is not None], self._after)

    def _after(self, record: Mapping[str, Any]) -> None:
        """Call what the caller gave."""
        if self._on_round is not None:
            try:
                self._is_ended = bool(self._on_round(record)) or self._is_ended
            except Exception as error:
                self._error, self._is_ended = error, True


class _Stopped(Exception):
    """No further run is to begin."""


class _Observers:
    """Tells several observers, and calls a function after every round."""

    def __init__(self, observers: Sequence[Observer], after: Callable[[Mapping[str, Any]], None]) -> None:
        self._observers, self._after = observers, after

    def on_block(self, round: int, done: int, total: int) -> None:
        """Tell the observers."""
        for one in self._observers:
            one.on_block(round, done, total)

    def on_round(self, record: Mapping[str, Any]) -> None:
        """Tell the observers, and call the function."""
        for one in self._observers:
            one.on_round(record)
        self._after(record)
