"""FjORD: every local step trains a prefix of the client's sub-model, of a width drawn anew (ordered dropout)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from gossamer.algorithms.federated import FedAvg
from gossamer.errors import ConfigError
from gossamer.submodel import Cutter, Layout

Params = Mapping[str, Tensor]
Batch = Mapping[str, Any]


class Setting(Protocol):
    """What a loss asks of the run that it belongs to; an engine's task has it."""

    @property
    def workload(self) -> Any:
        """The workload."""

    @property
    def cutter(self) -> Cutter:
        """Cuts sub-models from the whole model."""

    @property
    def capacities(self) -> tuple[float, ...]:
        """All capacity levels of the run, ascending."""

    @property
    def scaler(self) -> bool:
        """Whether activations are multiplied by 1 / capacity while training."""


class FjORD(FedAvg):
    """FjORD (Horvath et al., arXiv 2102.13451): ordered dropout, with or without self-distillation.

    A client whose limit is p_max draws, at each local step, a width p uniformly from the capacity levels of the run
    that are at most p_max, and takes one step on the first channels of that share. It sends the change of its whole
    sub-model of p_max, which is averaged over the holders of each coordinate, as in HeteroFL.

    With ``distillation`` the loss of a step is

        CE(z_pmax, y) + alpha * KL(softmax(z_pmax) || softmax(z_p)),

    averaged over the batch, where z are logits and z_pmax is a constant in the second term: the largest prefix learns
    from labels, the drawn one from the largest. The second term is nothing where p = p_max. [M] The paper writes
    (1 - alpha) CE + alpha KL with a temperature T and settles on alpha = T = 1; the sum above is what its authors'
    public code trains then, and T is 1 here. [M] The paper rounds widths up; here a prefix has the length of the
    sub-model of that capacity, rounded down.

    Coordinates beyond the prefix have the gradient 0 at that step, so momentum and weight decay still move them.
    [M] The paper has no Scaler, so it is off by default; with ``submodel.scaler`` a prefix is scaled by 1 / p, as
    HeteroFL would.
    """

    class Options(FedAvg.Options):
        """Options of FjORD.

        Attributes:
            distillation: whether sub-models also learn from the largest model that a client can train.
            alpha: weight of the distillation term.
        """

        distillation: bool = False
        alpha: float = Field(default=1.0, ge=0)

        @model_validator(mode="after")
        def _used(self) -> FjORD.Options:
            if "alpha" in self.model_fields_set and not self.distillation:
                raise ValueError(f"alpha = {self.alpha} weights distillation: set distillation, or leave alpha out")
            return self

    options: FjORD.Options

    traits = replace(
        FedAvg.traits,
        strategy="static",
        capacities="given",
        default_label_mask="zero",
        default_scaler=False,
        no_offsets="a narrower width is made of the first channels of a wider one",
        has_local_loss=True,
        leaves_products=True,
        stackable=False,  # widths differ from client to client within a step
    )

    def local_loss(
        self,
        task: Setting,
        capacity: float,
        params: Params,
        batch: Batch,
        generator: Callable[[str], np.random.Generator],
    ) -> Tensor:
        """Return the loss (scalar) of one local step of one client.

        Args:
            task: the run.
            capacity: p_max, the client's limit.
            params: ``{name: tensor}`` of its sub-model.
            batch: the step's batch, see `Workload.loss`.
            generator: returns the random numbers of this very step for a named purpose.

        Raises:
            ConfigError: distillation is asked for, but the workload has no logits.
        """
        levels = [level for level in task.capacities if level <= capacity]
        drawn = levels[int(generator("fjord-width").integers(len(levels)))]
        distillation, workload = self.options.distillation, task.workload
        if distillation and not (hasattr(workload, "logits") and hasattr(workload, "loss_of_logits")):
            raise ConfigError(
                f"algorithm.distillation = true needs logits, but workload {type(workload).__name__!r} has no methods"
                " 'logits' and 'loss_of_logits': add them, or set algorithm.distillation to false"
            )
        narrow, its_batch = params, batch
        if drawn != capacity:
            narrow = prefix(params, task.cutter.layout, task.cutter.sub_layout(drawn))
            its_batch = {**batch, "scale": 1.0 / drawn if task.scaler else 1.0}
        if not distillation:
            loss: Tensor = workload.loss(narrow, its_batch)
            return loss
        teacher = workload.logits(params, batch)
        loss = workload.loss_of_logits(teacher, batch)
        if drawn == capacity:
            return loss
        student = workload.logits(narrow, its_batch)
        return loss + self.options.alpha * divergence(teacher.detach(), student, counted(batch))

    def mean_passes(self, capacities: Sequence[float], capacity: float) -> dict[float, float]:
        """Return the expected number of forward and backward passes of a step, by the width that they go through.

        Args:
            capacities: all capacity levels of the run.
            capacity: the client's limit, one of them.
        """
        levels = [level for level in sorted(capacities) if level <= capacity]
        passes = dict.fromkeys(levels, 1.0 / len(levels))
        return passes | {capacity: 1.0} if self.options.distillation else passes


def prefix(params: Params, whole: Layout, narrow: Layout) -> dict[str, Tensor]:
    """Return views of the first channels of every cuttable dimension of a sub-model.

    Args:
        params: ``{name: tensor}`` of a sub-model whose channels are the first ones, or of the whole model.
        whole: layout of the whole model.
        narrow: layout of the smaller sub-model, so that lengths are rounded once, from the whole model's widths.
    """
    views = {}
    for name, dims, shape in zip(whole.names, whole.axes, narrow.shapes, strict=True):
        view = params[name]
        for place, (dim, size) in enumerate(zip(dims, shape, strict=True)):
            if size == view.shape[place]:
                continue
            if dim.outer == 1:
                view = view.narrow(place, 0, size)
            else:  # such as the fused projections of attention: the first channels of each part
                parts = view.reshape(*view.shape[:place], dim.outer, -1, *view.shape[place + 1 :])
                view = parts.narrow(place + 1, 0, size // dim.outer).flatten(place, place + 1)
        views[name] = view
    return views


def counted(batch: Batch) -> Tensor:
    """Return bool, of the shape of ``batch["y"]``: which labels count, those of no padded sample and not negative."""
    labels: Tensor = batch["y"]
    counts, mask = labels >= 0, batch.get("mask")
    return counts if mask is None else counts & (mask > 0).view(-1, *(1,) * (labels.dim() - 1))


def divergence(teacher: Tensor, student: Tensor, counts: Tensor) -> Tensor:
    """Return KL(softmax(teacher) || softmax(student)) of logits [..., k], averaged over what counts (0 if none).

    Classes that are left out on both sides (logits of minus infinity) add nothing.

    Args:
        counts: bool [...].
    """
    expected, found = F.log_softmax(teacher, -1), F.log_softmax(student, -1)
    ratio = (expected - found).masked_fill(expected == -np.inf, 0.0)
    values = (expected.exp() * ratio).sum(-1)
    return torch.where(counts, values, 0.0).sum() / counts.sum().clamp_min(1)
