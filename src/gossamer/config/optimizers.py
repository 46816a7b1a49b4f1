"""The optimizer of local steps: made from a configuration, and given to the algorithm where theory allows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from gossamer import registry
from gossamer.algorithms.base import Algorithm, BaseAlgorithm
from gossamer.algorithms.grouped import Group, Grouped
from gossamer.algorithms.optimizers import SECTION, SGD, Optimizer, OptimizerTraits
from gossamer.config.schema import Config
from gossamer.config.train import TrainedGroup
from gossamer.errors import ConfigError, plugin_errors, require_attributes
from gossamer.options import check_traits
from gossamer.submodel import Layout

STATES = ("reset", "keep")


class Given(NamedTuple):
    """An optimizer, and whether its moments are kept from round to round; None: as the algorithm does by default."""

    name: str
    optimizer: Optimizer
    state: str | None

    @property
    def momentum(self) -> float:
        """Momentum of SGD, which any algorithm may ask for."""
        return float(self.optimizer.options.momentum) if isinstance(self.optimizer, SGD) else 0.0

    @property
    def is_shorthand(self) -> bool:
        """Whether ``train.momentum`` and ``train.weight_decay`` would say the same."""
        if type(self.optimizer) is not SGD or self.state is not None:
            return False
        return not self.optimizer.options.nesterov and not self.optimizer.options.dampening


def make_optimizer(config: Config) -> Given:
    """Make the optimizer of a configuration, resolved or not.

    Raises:
        ConfigError: it is unknown, its options are wrong or given twice, it lacks a method, or its traits are wrong.
    """
    train = config.train
    options = dict(train.optimizer)
    name, state = options.pop("name"), options.pop("state", None)
    if state not in (None, *STATES):
        raise ConfigError(f"train.optimizer.state = {state!r}: give 'reset' or 'keep'")
    make: Any = registry.resolve("optimizer", name)
    require_optimizer(f"optimizer {name!r}", make)
    if train.momentum and make is not SGD:
        raise ConfigError(
            f"train.momentum = {train.momentum} is that of SGD, but train.optimizer is {name!r}: leave it out, or see"
            " the optimizer's own options"
        )
    for option, value in (("momentum", train.momentum), ("weight_decay", train.weight_decay)):
        if value and option in options:
            raise ConfigError(
                f"train.{option} = {value} and train.optimizer.{option} = {options[option]!r} say the same: give one of"
                " them"
            )
        if value:
            options[option] = value
    optimizer = _made(name, make, options)
    if any(group.optimizer is not None for group in train.groups):
        optimizer = Grouped(optimizer, [_group(number, group) for number, group in enumerate(train.groups)])
    return Given(name, optimizer, state)


def _made(name: str, make: Any, options: Mapping[str, Any]) -> Optimizer:
    with plugin_errors(f"optimizer {name!r}"):
        optimizer: Optimizer = make(options)
    require_optimizer(f"optimizer {name!r}", optimizer)
    return optimizer


def _group(number: int, given: TrainedGroup) -> Group:
    """Return a group of parameters with its optimizer, if it has one.

    Raises:
        ConfigError: the optimizer is unknown, or its options are wrong.
    """
    if given.optimizer is None:
        return Group(given.match, None)
    options = dict(given.optimizer)
    name = options.pop("name")
    if "state" in options:
        raise ConfigError(
            f"train.groups[{number}].optimizer has a state, which is one for all parameters: give train.optimizer.state"
        )
    make: Any = registry.resolve("optimizer", name)
    require_optimizer(f"optimizer {name!r}", make)
    try:
        return Group(given.match, _made(name, make, options))
    except ConfigError as error:
        raise ConfigError(str(error).replace(SECTION, f"train.groups[{number}].optimizer")) from error


def require_optimizer(plugin: str, found: Any) -> None:
    """Check the methods and the traits of the class of an optimizer, or of an instance.

    Raises:
        ConfigError: it lacks a method, or its traits are missing or contradicted.
    """
    methods = [name for name in vars(Optimizer) if not name.startswith("_") and name != "Options"]
    require_attributes(plugin, found, methods, "derive it from gossamer.algorithms.optimizers.Optimizer")
    check_traits(plugin, found, OptimizerTraits, Optimizer)


def with_optimizer(config: Config, algorithm: Algorithm, given: Given) -> Algorithm:
    """Return the algorithm with the optimizer of its local steps.

    Raises:
        ConfigError: the algorithm has a reason against it, or against what else is not plain SGD.
    """
    for option in _beyond_sgd(config, given):
        name, reason = config.algorithm["name"], algorithm.traits.sgd_only
        if reason is not None:
            raise ConfigError(
                f"algorithm {name!r} does not go with {option}, because {reason}: leave it out, or choose another"
                " algorithm"
            )
        if not algorithm.takes_optimizer:
            raise ConfigError(
                f"algorithm {name!r} does not go with {option}, because its local steps are its own: leave it out, or"
                " change its gradients by a method 'gradient' in the place of 'step'"
            )
    if given.is_shorthand:
        return algorithm
    keeps_moments = (given.state or ("keep" if config.peers is not None else "reset")) == "keep"
    bound = algorithm.with_optimizer(given.optimizer, keeps_moments)
    for phase in range(bound.traits.num_phases):
        if bound.of_phase(phase).optimizer is not given.optimizer:
            raise ConfigError(
                f"algorithm {config.algorithm['name']!r} does not go with train.optimizer = {given.name!r}, because its"
                f" phase {phase} makes steps of its own: leave it out"
            )
    return bound


def require_moments(name: str, algorithm: Algorithm, layout: Layout) -> None:
    """Refuse an algorithm whose own methods lose the optimizer's moments.

    Args:
        name: what errors call the algorithm.
        layout: of the models that it is tried on, which are 0.

    Raises:
        ConfigError: `begin` or `end` does.
    """
    if not (isinstance(algorithm, BaseAlgorithm) and algorithm.takes_optimizer and algorithm.moment_names):
        return
    x = torch.zeros(1, layout.d)
    state, downlink, private = algorithm.init(x), algorithm.traits.downlink, algorithm.init_client(x)
    received = {name: state[name] for name in (state if downlink is None else downlink)}
    carry = algorithm.begin(received, private)
    if lost := [one for one in algorithm.moment_names if one not in carry]:
        raise ConfigError(
            f"algorithm {name!r} does not go with an optimizer that has moments, because its method 'begin' leaves out"
            f" {lost}: add self.moments(...) to what it returns, or take sgd without momentum"
        )
    payload, kept = algorithm.end(received, private, carry, 1, 1.0)
    if lost := [one for one in algorithm.moment_names if algorithm.keeps_moments and one not in {*payload, *kept}]:
        raise ConfigError(
            f"algorithm {name!r} does not go with an optimizer whose moments are kept, because its method 'end' leaves"
            f" out {lost}: return self.private(carry), of peers self.kept(carry), or set optimizer.state to reset"
        )


def _beyond_sgd(config: Config, given: Given) -> Iterator[str]:
    """Yield the options that ask for other steps than those of SGD at one learning rate."""
    train = config.train
    if not given.is_shorthand:
        yield f"train.optimizer = {dict(train.optimizer)}"
    for option, is_given in (
        ("lr_by_capacity", bool(train.lr_by_capacity)),
        ("groups", bool(train.groups)),
        ("local_schedule", not train.local_schedule.is_flat),
    ):
        if is_given:
            yield f"train.{option}"
