"""Loading a run: its metrics, and the model of its last commit as tensors or as a module that can be called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer.config.inputs import configuration_inputs, require_same
from gossamer.config.loading import parse
from gossamer.config.plugins import as_mapping
from gossamer.config.resolve import make_algorithm, split
from gossamer.config.schema import Config
from gossamer.engines.statistics import name_of, statistics_in
from gossamer.engines.task import PERSONAL
from gossamer.engines.training.mixing import merged_model
from gossamer.errors import CheckpointError, ConfigError, nearest, plugin_errors, warn
from gossamer.registry import OBJECT, errors_of_plug_ins, trusting
from gossamer.results.description import ModelDescription, read_description
from gossamer.storage.checkpoint import STATE, STORE, Checkpoint, read_latest
from gossamer.storage.client_store import CLIENTS, ClientStore
from gossamer.storage.runlog import CHECKPOINTS, read_config, read_metrics, run_directories
from gossamer.submodel import Layout
from gossamer.task import make_cutter
from gossamer.workloads.base import find_workload
from gossamer.workloads.buffers import MOMENTS
from gossamer.workloads.functional import module_of
from gossamer.workloads.models import pooled_moments

if TYPE_CHECKING:
    from pandas import DataFrame

ORDER = "order."


@dataclass(frozen=True, repr=False)
class LoadedRun:
    """A run as its last commit has it; nothing of its data is needed, nor read.

    Attributes:
        directory: run directory.
        config: resolved configuration.
        round: number of rounds that are done, at the commit.
        metrics: a record for each of these rounds.
        trust: whether the configuration may name any code, see `gossamer.registry`.
    """

    directory: Path
    config: dict[str, Any]
    round: int
    metrics: list[dict[str, Any]]
    trust: bool
    _commit: Checkpoint = field(compare=False)

    def __repr__(self) -> str:
        """Return one line: directory, rounds and size of the model."""
        size = sum(value.numel() for value in self.params.values())
        return f"LoadedRun({str(self.directory)!r}: {self.round} rounds, {size:,} parameters)"

    def frame(self) -> DataFrame:
        """Return the metrics as a pandas frame of a row for each round; nested names are dotted.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            from pandas import json_normalize
        except ImportError as error:
            raise ConfigError(
                f"frame() needs pandas, which cannot be imported ({error}): install it, or use .metrics"
            ) from error
        found: DataFrame = json_normalize(self.metrics)
        return found

    @property
    def params(self) -> dict[str, Tensor]:
        """``{name: tensor}`` of all parameters, frozen ones included; of peers those of the merged model."""
        found = self._values(1.0, None, None)
        return {name: found[name] for name in self._description.names}

    def state_dict(
        self, *, capacity: float = 1.0, peer: int | None = None, client: int | None = None
    ) -> dict[str, Tensor]:
        """Return all that a state dict of the model has: parameters, buffers and the moments of BatchNorm.

        Args:
            capacity: capacity of the sub-model, whose windows are those of the last round.
            peer: number of a peer, counted from 0; None: the merged model.
            client: number of a client, counted from 0, whose personal parameters take the place of the server's; None:
                the server's model. Of BatchNorm it has the moments of the client's own data, if the client was among
                those that were evaluated last.

        Raises:
            ConfigError: the run has no such sub-model, peer or client, or has not trained the client, or has not
                evaluated the model, so that moments are missing.
        """
        with trusting(self.trust), errors_of_plug_ins():
            found = self._state(capacity, peer, client)
        return found | {name: found[trained] for name, trained in self._description.aliases.items()}

    def model(self, *, capacity: float = 1.0, peer: int | None = None, client: int | None = None) -> nn.Module:
        """Return the model in evaluation mode, as a module on the CPU.

        It is the user's own module, loaded strictly, where the model is one and is whole. Anything else is a module
        whose state dict has the same names. Its inputs are those of training, see `normalize`.

        Args:
            capacity, peer, client: see `state_dict`.

        Raises:
            ConfigError: see `state_dict`; or the code builds another model by now, or cannot build it without data.
        """
        name, options = split(self.config["workload"])
        given = as_mapping(options.get("model")) or {}
        if str(given.get("name")).startswith(OBJECT):
            raise ConfigError(
                f"model {given['name']!r} was given in Python as an object, which no file holds: build it, and load"
                " what state_dict() returns into it"
            )
        with trusting(self.trust), errors_of_plug_ins():
            found = find_workload(name)
            if not hasattr(found, "build_model"):
                raise ConfigError(f"workload {name!r} has no method build_model: use state_dict() instead")
            with plugin_errors(f"model of workload {name!r}"):
                model = found.build_model(options, self._description.facts, self.config["seed"])
                return module_of(model, self._state(capacity, peer, client), is_whole=capacity == 1.0)

    def normalize(self, images: Tensor) -> Tensor:
        """Return samples of the data set, such as images [b, channels, height, width], as the model takes them.

        Raises:
            ConfigError: the workload is none of images and the like.
        """
        facts = self._description.facts
        if "mean" not in facts:
            raise ConfigError(f"workload {self.config['workload']['name']!r} does not normalise its inputs")
        if images.dtype == torch.int64:
            return images
        along, dtype = (-1, *[1] * (len(facts["input_size"]) - 1)), self._arrays["x"].dtype
        mean, std = (torch.tensor(facts[name], dtype=dtype).view(along) for name in ("mean", "std"))
        return (images.to(dtype) - mean) * (1 / std)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the workload says of its data: of images shape, number of labels, mean and std; of texts vocabulary."""
        return dict(self._description.facts)

    # ---- inside

    @cached_property
    def _arrays(self) -> Mapping[str, Tensor]:
        return self._commit.below(STATE)

    @cached_property
    def _description(self) -> ModelDescription:
        return read_description(self.directory)

    @cached_property
    def _parsed(self) -> Config:
        return parse(self.config)

    def _state(self, capacity: float, peer: int | None, client: int | None) -> dict[str, Tensor]:
        """Return parameters, constants and moments of a (sub-)model."""
        return self._values(capacity, peer, client) | self._moments(capacity, peer, client)

    def _values(self, capacity: float, peer: int | None, client: int | None) -> dict[str, Tensor]:
        """Return parameters, low-rank factors merged, and constants."""
        layout, row = self._row(capacity, peer, client)
        found = {name: value.clone() for name, value in layout.views(row).items()} | dict(self._description.constants)
        found |= {name: found[name].round().long() for name in self._description.integers}
        factors = {name: found.pop(name) for names in self._description.merging.values() for name in names[:2]}
        for weight, (a, b, scale) in self._description.merging.items():
            found[weight] = found[weight] + (scale * factors[b]) @ factors[a]
        return found

    def _row(self, capacity: float, peer: int | None, client: int | None) -> tuple[Layout, Tensor]:
        layout, x = self._description.layout, self._arrays["x"]
        if peer is not None and (self._parsed.peers is None or capacity != 1.0):
            reason = "the run has a server" if self._parsed.peers is None else f"capacity = {capacity} is of all peers"
            raise ConfigError(f"peer = {peer}, but {reason}: leave peer out")
        if peer is not None and not 0 <= peer < len(x):
            raise ConfigError(f"peer = {peer}, but the run has {len(x)} peers: give a number from 0 to {len(x) - 1}")
        row = merged_model(x) if peer is None else x[peer]
        row = row if client is None else self._personal(row, client)
        if capacity == 1.0:
            return layout, row
        known = self._parsed.submodel.capacities
        if capacity not in known:
            raise ConfigError(f"capacity = {capacity}, but the run has {sorted({*known, 1.0})}: give one of these")
        algorithm = make_algorithm(self._parsed).of_model(layout)
        kept = self._arrays.items()
        order = {name.removeprefix(ORDER): value for name, value in kept if name.startswith(ORDER)}
        cut = make_cutter(self._parsed, algorithm, layout).cut(capacity, max(self.round - 1, 0), client or 0, order)
        row = algorithm.of_capacity(layout, capacity).evaluated(row)
        return cut.sub, cut.read(row, row.new_zeros(cut.sub.d))

    def _personal(self, row: Tensor, client: int) -> Tensor:
        """Return the server's row [d] with what a client keeps in its place.

        Raises:
            ConfigError: there is no such client, or it keeps nothing.
        """
        clients = self._parsed.clients
        store = ClientStore(self.directory / CLIENTS, dtype=row.dtype)
        store.attach(self._commit.below(STORE))
        with closing(store):
            if clients is None or PERSONAL not in store.namespaces:
                reason = "the run has no server: give peer" if clients is None else "its clients keep no parameters"
                raise ConfigError(f"client = {client}, but {reason}, see clients.personal: leave client out")
            num = clients.num
            if not 0 <= client < num:
                raise ConfigError(
                    f"client = {client}, but the run has {num} clients: give a number from 0 to {num - 1}"
                )
            own, present = store.get(PERSONAL, torch.tensor([client]))
        if not bool(present):
            raise ConfigError(
                f"client = {client} has not been trained in {self.round} rounds, so that it keeps nothing yet: leave"
                " client out for the server's model, which it would start from"
            )
        return torch.where(own[0].isnan(), row, own[0])

    def _moments(self, capacity: float, peer: int | None, client: int | None) -> dict[str, Tensor]:
        """Return the running mean and variance of every BatchNorm layer, [channels]."""
        norms = self._description.norms
        if not norms:
            return {}
        name = name_of(capacity, peer, client)
        sums, taken = statistics_in(self._arrays, name)
        if not sums:
            key = "evaluation.num_peers" if peer is not None else "evaluation.by_capacity"
            key = "evaluation.num_clients" if client is not None else key
            is_whole = peer is None and client is None and capacity == 1.0
            remedy = "train on, until it is evaluated" if is_whole else f"raise or set {key}"
            raise ConfigError(
                f"the moments of BatchNorm are not known of {name} after round {self.round}, because"
                f" they are taken where a model is evaluated: {remedy}"
            )
        if taken != self.round:
            warn([f"the moments of BatchNorm are those of round {taken}, the parameters those of round {self.round}"])
        return {
            f"{layer}.{name}": value.to(self._arrays["x"].dtype)
            for layer in norms
            for name, value in zip(MOMENTS, pooled_moments(sums, f"{layer}."), strict=True)
        }


def load(directory: str | Path, *, run: str | None = None, trust: bool = False) -> LoadedRun:
    """Load a run as its last commit has it, finished or not.

    Args:
        directory: directory of a run, or of several (methods, seeds, a sweep).
        run: name of one of several, such as ``"fedrolex/seed-0"``; its first part does where it is the only one.
        trust: whether the configuration may name any code when the model is built, see `gossamer.run`.

    Raises:
        ConfigError: there is no such run.
        CheckpointError: it has no commit, or all of them are damaged, or its configuration was changed since.
    """
    where = find_run(Path(directory), run)
    config, commit = read_config(where), read_latest(where / CHECKPOINTS)
    if commit is None:
        raise CheckpointError(f"{str(where)!r} has no commit yet: wait for the first one")
    warn(commit.damaged)
    require_same(commit.inputs, {"configuration": configuration_inputs(config)})
    metrics = [record for record in read_metrics(where) if record["round"] <= commit.round]
    return LoadedRun(where, config, commit.round, metrics, trust, commit)


def find_run(directory: Path, name: str | None) -> Path:
    """Return the directory of the run `name` in a directory of runs, or that of a single one.

    Raises:
        ConfigError: there is none, or there are several.
    """
    if not directory.is_dir():
        raise ConfigError(f"no directory {str(directory)!r}: name one that 'gossamer run' made")
    runs = {str(path.relative_to(directory)): path for path in run_directories(directory)}
    if not runs:
        raise ConfigError(f"no run in or below {str(directory)!r}: name a directory that 'gossamer run' made")
    chosen = list(runs) if name is None else [one for one in runs if one == name or one.startswith(f"{name}/")]
    if len(chosen) == 1:
        return runs[chosen[0]]
    listed = _listed(list(runs))
    if name is None:
        raise ConfigError(f"{str(directory)!r} holds {len(runs)} runs: name one of them ({listed})")
    if chosen:
        raise ConfigError(f"run {name!r} of {str(directory)!r} is {len(chosen)} runs: give all of the name ({listed})")
    raise ConfigError(f"no run {name!r} in {str(directory)!r}{nearest(name, runs)} (there are: {listed})")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f", and {len(names) - 8} more" if len(names) > 8 else "")
