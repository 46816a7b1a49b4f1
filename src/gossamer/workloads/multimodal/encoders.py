"""Models that classify samples of several modalities: an encoder and a head for each, and a head for all together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gossamer.errors import ConfigError
from gossamer.submodel.layout import LABEL_AXIS, Dim, as_dim
from gossamer.workloads.base import DEFAULT_CONTEXT, ForwardContext, Model, Params, require_model
from gossamer.workloads.models import default_init
from gossamer.workloads.plugins import Spec, call_plug_in, plug_in

FUSION = "fusion"
JOINED = "all"  # what the head of all modalities together is called among the logits


class Classifier:
    """An encoder for each modality, as a model of images is, and linear heads, as pure functions of parameters.

    The encoder of a modality returns `width` numbers, and lies with its head in a module of the modality's name. The
    head of all modalities takes all of these, one after another, and lies in the module ``fusion``.

    Attributes:
        modalities: names of the modalities.
        modules: names of the modules.
        shapes: ``{parameter: shape}`` in the order in which they lie in a row.
        axes: ``{parameter: (axis name | Dim | None, ...)}``.
    """

    def __init__(
        self,
        encoders: Mapping[str, Spec],
        input_shapes: Mapping[str, tuple[int, ...]],
        width: int,
        num_labels: int,
        where: str,
        prefix: str = "",
        *,
        is_cut: bool = True,
    ) -> None:
        """Make the encoders.

        Args:
            encoders: ``{modality: name of a model, or name and options}``.
            input_shapes: ``{modality: shape of a sample}``, in the order of the modalities.
            width: numbers of a representation.
            num_labels: number of classes.
            where: dotted path of `encoders`, for errors.
            prefix: before the name of each module.
            is_cut: whether smaller capacities have narrower encoders; a server's are whole.

        Raises:
            ConfigError: a modality has no encoder, one that does not exist has, or it cannot be built.
        """
        self.modalities, self.prefix, self.width, self._is_cut = tuple(input_shapes), prefix, width, is_cut
        if different := sorted(set(encoders) ^ set(input_shapes)):
            raise ConfigError(
                f"{where} names {', '.join(encoders) or 'nothing'}, but the data have {', '.join(input_shapes)}: give"
                f" one encoder for each (see {different[0]!r})"
            )
        self.encoders = {
            name: _encoder(encoders[name], shape, width, f"{where}.{name}") for name, shape in input_shapes.items()
        }
        self.shapes, self.axes = dict[str, tuple[int, ...]](), dict[str, tuple[Any, ...]]()
        for name, encoder in self.encoders.items():
            module = prefix + name
            for one, shape in encoder.shapes.items():
                self.shapes[f"{module}.{one}"] = shape
                self.axes[f"{module}.{one}"] = tuple(self._axis(module, axis) for axis in encoder.axes[one])
            self._add_head(module, num_labels, width)
        if len(self.modalities) > 1:
            self._add_head(prefix + FUSION, num_labels, width * len(self.modalities))
        self.modules = tuple(dict.fromkeys(name.partition(".")[0] for name in self.shapes))

    def _axis(self, module: str, axis: Any) -> Dim:
        """Return an axis of an encoder, under a name of its own; representations, and what is not cut, are whole."""
        dim = as_dim(axis)
        is_cut = dim.axis not in (None, LABEL_AXIS) and self._is_cut
        return replace(dim, axis=f"{module}.{dim.axis}" if is_cut else None)

    def _add_head(self, module: str, num_labels: int, size: int) -> None:
        label = LABEL_AXIS if self._is_cut else None
        self.shapes[f"{module}.head.weight"], self.axes[f"{module}.head.weight"] = (num_labels, size), (label, None)
        self.shapes[f"{module}.head.bias"], self.axes[f"{module}.head.bias"] = (num_labels,), (label,)

    def init(self, source: np.random.Generator) -> dict[str, Tensor]:
        """Return initial parameters, drawn from `source`."""
        found = dict[str, Tensor]()
        for name, encoder in self.encoders.items():
            found |= {f"{self.prefix}{name}.{one}": value for one, value in encoder.init(source).items()}
        heads = {name: shape for name, shape in self.shapes.items() if ".head." in name and name not in found}
        return found | default_init(heads, source)

    def encode(self, params: Params, modality: str, x: Tensor, context: ForwardContext = DEFAULT_CONTEXT) -> Tensor:
        """Return what the encoder makes of samples x [b, ...] of a modality, float32 [b, width]."""
        start = f"{self.prefix}{modality}."
        own = {name.removeprefix(start): value for name, value in params.items() if name.startswith(start)}
        return self.encoders[modality].apply(own, x, context)

    def logits(
        self, params: Params, samples: Mapping[str, Tensor], context: ForwardContext = DEFAULT_CONTEXT
    ) -> dict[str, Tensor]:
        """Return the logits [b, num_labels] of each head for which there are samples and parameters, by modality.

        Args:
            params: parameters of some of the modules.
            samples: ``{modality: [b, ...]}``.
            context: how they are treated on their way.
        """
        held = [name for name in self.modalities if name in samples and f"{self.prefix}{name}.head.weight" in params]
        return self.heads(params, {name: self.encode(params, name, samples[name], context) for name in held})

    def heads(self, params: Params, encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the logits [b, num_labels] of each head for which something is encoded, [b, width], by modality."""
        found = {name: self._head(params, name, value) for name, value in encoded.items()}
        if len(encoded) == len(self.modalities) > 1 and f"{self.prefix}{FUSION}.head.weight" in params:
            found[JOINED] = self._head(params, FUSION, torch.cat(list(encoded.values()), dim=-1))
        return found

    def held(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the modalities of which there is an encoder among parameters of these names."""
        modules = {name.partition(".")[0] for name in names}
        return tuple(name for name in self.modalities if self.prefix + name in modules)

    def _head(self, params: Params, module: str, x: Tensor) -> Tensor:
        head = f"{self.prefix}{module}.head"
        return F.linear(x, params[f"{head}.weight"], params[f"{head}.bias"])


def _encoder(spec: Spec, shape: tuple[int, ...], width: int, where: str) -> Model:
    """Build the encoder of one modality.

    Raises:
        ConfigError: it is unknown, is no pure function of its parameters, or normalises by the moments of batches.
    """
    name, function, params = plug_in("model", spec, where)
    model: Model = call_plug_in(function, where, shape, width, **params)
    require_model(f"{where} {name!r}", model)
    if model.norms or model.traits.uses_key:
        raise ConfigError(
            f"{where} = {name!r} has BatchNorm or dropout, which encoders may not: take mlp, cnn or softmax"
        )
    return model
