"""Models of named parameters, and sub-models of modules, as modules that can be called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.workloads.base import Blueprint, ForwardContext, Model, WithConstants
from gossamer.workloads.buffers import MOMENTS
from gossamer.workloads.module_checks import require_same_state, shapes_of
from gossamer.workloads.modules import BatchNorm, ModuleModel
from gossamer.workloads.parts import PartlyTrained


class FunctionalModule(nn.Module):
    """A (sub-)model with its parameters: in evaluation mode as it is evaluated, in training mode as it is trained.

    The names in its state dict are those of the run; BatchNorm layers have ``running_mean`` and ``running_var`` beside
    their parameters, which training does not change.
    """

    def __init__(self, model: Model, state: Mapping[str, Tensor]) -> None:
        """Take the parameters, constants and moments of `state`."""
        super().__init__()
        self._functional = model
        self._moments = {f"{layer}.{name}" for layer in model.norms for name in MOMENTS}
        buffers = model.buffers if isinstance(model, WithConstants) else ()
        for name, value in state.items():
            *path, last = name.split(".")
            place: nn.Module = self
            for part in path:
                if part not in dict(place.named_children()):
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            if name in model.shapes and name not in buffers:
                place.register_parameter(last, nn.Parameter(value.clone()))
            else:
                place.register_buffer(last, value.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of inputs, see `gossamer.workloads.base.Model.apply`."""
        params = dict(self.named_parameters()) | dict(self.named_buffers())
        moments = {name: params.pop(name) for name in self._moments}
        if self.training:
            return self._functional.apply(params, x, ForwardContext(key=torch.randint(1 << 62, ())))
        return self._functional.apply(params, x, ForwardContext(training=False, moments=moments))


def blueprint_of(model: Model, facts: Mapping[str, Any]) -> Blueprint:
    """Return what a model needs to be built without the data, of which `facts` are known."""
    divided = model.divided if isinstance(model, PartlyTrained) else model
    merging = model.merging if isinstance(model, PartlyTrained) else {}
    if isinstance(divided, ModuleModel):
        aliases = _aliases(divided.template)
        known = {*divided.shapes, *aliases}
        constants = {name: value for name, value in divided.template.state_dict().items() if name not in known}
        whole = tuple(name for name in divided.buffers if not divided.template.get_buffer(name).is_floating_point())
        return Blueprint(facts, constants, aliases, merging, model.norms, whole)
    constants = model.constants if isinstance(model, PartlyTrained) else {}
    return Blueprint(facts, constants, {}, merging, model.norms)


def module_of(model: Model, state: Mapping[str, Tensor], *, is_whole: bool) -> nn.Module:
    """Return a module in evaluation mode: the user's own where the model is a whole one, or else a `FunctionalModule`.

    Args:
        state: parameters, low-rank factors merged, constants and moments.
        is_whole: whether no parameter is narrower than in the whole model, as with factors of a lower rank.

    Raises:
        ConfigError: the state is not that of the model.
    """
    divided = model.divided if isinstance(model, PartlyTrained) else model
    is_whole = is_whole or (isinstance(model, PartlyTrained) and bool(model.merging))
    if not is_whole:
        return FunctionalModule(model, state).eval()
    if isinstance(divided, ModuleModel):
        return _loaded(divided, state)
    moments = {f"{layer}.{name}" for layer in divided.norms for name in MOMENTS}
    found = shapes_of({name: value for name, value in state.items() if name not in moments})
    require_same_state(type(divided).__name__, divided.shapes, found)
    return FunctionalModule(divided, state).eval()


def _aliases(module: nn.Module) -> dict[str, str]:
    """Return further names of parameters, such as of tied weights, and the first names of these."""
    first = {id(value): name for name, value in module.named_parameters()}
    every = module.named_parameters(remove_duplicate=False)
    return {name: first[id(value)] for name, value in every if name != first[id(value)]}


def _loaded(model: ModuleModel, state: Mapping[str, Tensor]) -> nn.Module:
    """Return a new module as it was written, in evaluation mode, with all of `state`.

    Raises:
        ConfigError: the module has other parameters or buffers.
    """
    module = model.build()
    every = {**state, **{name: state[first] for name, first in _aliases(module).items() if first in state}}
    for name in model.norms:  # some are built without moments
        layer = module.get_submodule(name)
        assert isinstance(layer, BatchNorm)
        layer.track_running_stats = True
        layer.running_mean, layer.running_var = (torch.zeros(layer.num_features) for _ in range(2))
    own = module.state_dict()
    unlisted = {name: every.pop(name) for name in model.buffers if name in every and name not in own}
    require_same_state(type(module).__name__, shapes_of(own), shapes_of(every))
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if name in every and value.is_floating_point():  # trained in another precision than it is built in, maybe
            value.data = value.data.to(every[name].dtype)
    module.load_state_dict(every)
    for name, value in unlisted.items():
        module.get_buffer(name).data = value
    return module.eval()
