"""Models of videos and texts of which parts are trained: frozen modules, and low-rank factors in some of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.errors import ConfigError
from gossamer.workloads.base import DEFAULT_CONTEXT, ForwardContext
from gossamer.workloads.mending import Mending
from gossamer.workloads.multimodal.graphs import Losses, Tensors, VideoLanguageModel
from gossamer.workloads.parts import LoRAOptions, PartlyTrained, layer_of

CLOSE = 1e-4  # relative; sums round differently in another order


class AdaptedModel(PartlyTrained):
    """A `VideoLanguageModel` of which some parameters are constants, with or without factors beside them.

    The factors of a layer are of its module, so a participant holds those of the modules that its tasks need, and
    nothing of a module of which nothing is trained.

    Attributes:
        graphs: those of the model, of the modules that are trained in part or as a whole.
    """

    def __init__(
        self,
        model: VideoLanguageModel,
        frozen: Sequence[str],
        lora: LoRAOptions | None,
        source: Callable[[], np.random.Generator],
        start: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Divide a model, see `PartlyTrained`."""
        super().__init__(model, frozen, lora, source, start)  # type: ignore[arg-type]  # apply is not called
        self._whole, trained = model, {name.partition(".")[0] for name in self.shapes}
        self.graphs = {
            task: replace(graph, modules=graph.modules & trained, predicts=graph.predicts & trained)
            for task, graph in model.graphs.items()
        }

    def losses(
        self, tasks: Collection[str], params: Tensors, batch: Tensors, context: ForwardContext = DEFAULT_CONTEXT
    ) -> Losses:
        """Return what the model does, see `VideoLanguageModel`, of all parameters."""
        device = next(iter(params.values())).device

        def call(own: dict[str, Tensor], context: ForwardContext) -> Losses:
            """Run the model."""
            return self._whole.losses(tasks, own, batch, context)

        return self._called(params, device, context, call)

    def predict(self, task: str, params: Tensors, batch: Tensors) -> dict[str, Tensor]:
        """Return what the model does, see `VideoLanguageModel`, of all parameters."""
        device = next(iter(params.values())).device
        return self._called(params, device, DEFAULT_CONTEXT, lambda own, _: self._whole.predict(task, own, batch))

    @torch.no_grad()
    def check(self, params: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Check, on a few samples, that factors beside each target are what merging makes of them.

        Raises:
            ConfigError: one has another effect, because its weight is not that of a linear layer or an
                embedding.
        """
        tasks, source = list(self.graphs), torch.Generator().manual_seed(0)
        own = {  # of which none is 0, so that every weight has an effect
            name: value + 0.05 * torch.randn(value.shape, generator=source).to(value.dtype)
            for name, value in self.whole(params).items()
        }
        for name in self.targets:
            a, b = (params[f"{layer_of(name)}.lora_{side}"] for side in "AB")
            b = torch.full_like(b, 0.1)
            with Mending(own, {}, ForwardContext(factors={name: (a, b)})):
                found = self._whole.losses(tasks, own, batch)
            expected = self._whole.losses(tasks, {**own, name: own[name] + b @ a}, batch)
            pairs = [(found[task][0], expected[task][0]) for task in tasks]
            if any((one - two).norm() > CLOSE * two.norm() for one, two in pairs):
                raise ConfigError(
                    f"workload.lora: {name!r} is used otherwise than as the weight of a linear layer or an embedding,"
                    " so no factors can stand beside it: leave it out of targets"
                )
