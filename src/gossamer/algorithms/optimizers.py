"""Optimizers of local steps, by the names, options, defaults and update rules of `torch.optim`.

An optimizer of your own, for ``train.optimizer: {name: "mine:SignSGD", beta: 0.9}`` if it stands in a file ``mine.py``:

    >>> import torch
    >>> from gossamer.algorithms.optimizers import Optimizer, OptimizerOptions, OptimizerTraits
    >>> class SignSGD(Optimizer):
    ...     class Options(OptimizerOptions):
    ...         beta: float = 0.9
    ...
    ...     traits = OptimizerTraits(moments=("mean",))
    ...
    ...     def step(self, x, grad, moments, lr):
    ...         x.sub_(moments["mean"].lerp_(grad, 1 - self.options.beta).sign_(), alpha=lr)
    >>> x, optimizer = torch.zeros(1, 2), SignSGD({})
    >>> optimizer.step(x, torch.tensor([[4.0, -2.0]]), optimizer.init(x), lr=0.5)
    >>> x.tolist()
    [[-0.5, 0.5]]
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor

from gossamer.options import Options, Traits, parse_options

NUM_STEPS = "num_steps"  # the moment that counts local steps
SECTION = "train.optimizer"


@dataclass(frozen=True, kw_only=True)
class OptimizerTraits(Traits):
    """What an optimizer keeps, and how weights decay.

    Attributes:
        moments: names of its arrays, each shaped like the model.
        counts_steps: whether it is also given ``moments["num_steps"]``, [s, 1]: the number of steps that each
            participant took since its moments began, the present one included, which engines count.
        decouples_weight_decay: whether weights shrink by ``lr * weight_decay`` before a step (AdamW), instead of
            `weight_decay` times the weight being part of the gradient.
    """

    moments: tuple[str, ...] = ()
    counts_steps: bool = False
    decouples_weight_decay: bool = False


class OptimizerOptions(Options):
    """Options that every optimizer has.

    Attributes:
        weight_decay: factor of the parameters that is added to their gradient, or, times the learning rate, share that
            they lose in a step (adamw, muon).
    """

    weight_decay: float = Field(default=0.0, ge=0)


class Optimizer(Protocol):
    """The rule of local steps, made as ``cls(options)``; derive your own from this class and write `step`.

    It keeps nothing itself: what it remembers of a participant are arrays that `init` makes, which local steps change
    in place, and which the algorithm drops after a round or keeps. Participants of a smaller capacity have rows of
    their window. The same row must get the same bits whichever rows stand beside it.

    Attributes:
        traits: see `OptimizerTraits`; options may change some on an instance.
        weight_decay: strength of weight decay, which is none of the matters of `step`.
        lr_factor: factor of the learning rate.
    """

    class Options(OptimizerOptions):
        """No options but weight decay."""

    traits: OptimizerTraits = OptimizerTraits()
    options: Any
    weight_decay: float
    lr_factor: float = 1.0

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = parse_options(type(self).Options, options, SECTION)
        self.weight_decay = self.options.weight_decay

    def init(self, x: Tensor) -> dict[str, Tensor]:
        """Return the moments of participants that have taken no step, by default zeros.

        Args:
            x: the models, [s, d].

        Returns:
            an array [s, d] of the type of x for each of ``traits.moments``, and "num_steps" [s, 1] if steps are
            counted.
        """
        moments = {name: torch.zeros_like(x) for name in self.traits.moments}
        return moments | ({NUM_STEPS: x.new_zeros(len(x), 1)} if self.traits.counts_steps else {})

    @abstractmethod
    def step(self, x: Tensor, grad: Tensor, moments: Mapping[str, Tensor], lr: float) -> None:
        """Take one step of one parameter of s participants, in place.

        Args:
            x: the parameter, [s, *shape]; rows need not lie next to each other in memory.
            grad: the gradient of x, weight decay included unless traits decouple it; not to be written to.
            moments: the moments of the parameter, shaped like x; "num_steps" is [s, 1].
            lr: learning rate.
        """
        ...

    def of_parameter(self, name: str, shape: tuple[int, ...]) -> Optimizer:
        """Return the optimizer of one parameter of a (sub-)model, which may depend on its name and shape."""
        return self


class SGD(Optimizer):
    """SGD with momentum, see `torch.optim.SGD`."""

    class Options(OptimizerOptions):
        """Options of SGD.

        Attributes:
            momentum: share of its last step that a step takes again.
            dampening: share of the gradient that momentum leaves out from the second step on.
            nesterov: whether momentum looks ahead.
        """

        momentum: float = Field(default=0.0, ge=0, lt=1)
        dampening: float = Field(default=0.0, ge=0, lt=1)
        nesterov: bool = False

        @model_validator(mode="after")
        def _have_momentum(self) -> SGD.Options:
            if self.nesterov and (not self.momentum or self.dampening):
                raise ValueError(
                    f"nesterov = True needs a momentum and no dampening, not {self.momentum} and {self.dampening}"
                )
            if self.dampening and not self.momentum:
                raise ValueError(f"dampening = {self.dampening} is that of a momentum, which is 0: set it, too")
            return self

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        moments = ("momentum",) if self.options.momentum else ()
        self.traits = OptimizerTraits(moments=moments, counts_steps=bool(self.options.dampening))

    @property
    def is_plain(self) -> bool:
        """Whether a step is ``x - lr * grad``."""
        return not self.options.momentum

    def step(self, x: Tensor, grad: Tensor, moments: Mapping[str, Tensor], lr: float) -> None:
        """Step along the gradient, or along the momentum."""
        momentum = self.options.momentum
        if momentum:
            buffer = moments["momentum"].mul_(momentum)
            if self.options.dampening:  # but the first gradient counts in full
                is_first = per_row(moments[NUM_STEPS] <= 1, x)
                buffer.add_(torch.where(is_first, grad, grad * (1 - self.options.dampening)))
            else:
                buffer.add_(grad)
            grad = grad.add(buffer, alpha=momentum) if self.options.nesterov else buffer
        x.sub_(grad, alpha=lr)


class Adam(Optimizer):
    """Adam, see `torch.optim.Adam`; one pass over memory, by torch's fused kernel."""

    class Options(OptimizerOptions):
        """Options of Adam.

        Attributes:
            betas: decay of the means of gradients, and of their squares.
            eps: number that is added to the root of the latter.
            amsgrad: whether the largest mean of squares so far takes the place of the present one.
        """

        betas: tuple[float, float] = (0.9, 0.999)
        eps: float = Field(default=1e-8, ge=0)
        amsgrad: bool = False

        @model_validator(mode="after")
        def _decay(self) -> Adam.Options:
            if not all(0 <= beta < 1 for beta in self.betas):
                raise ValueError(f"betas = {list(self.betas)}: give two numbers from 0 to below 1")
            return self

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        moments = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if self.options.amsgrad else ()))
        self.traits = replace(type(self).traits, moments=moments, counts_steps=True)

    def step(self, x: Tensor, grad: Tensor, moments: Mapping[str, Tensor], lr: float) -> None:
        """Step along the mean gradient, by coordinate, over the root of the mean square."""
        beta1, beta2 = self.options.betas
        torch._fused_adam_(
            list(x.unbind()),
            rows_like(x, grad),
            list(moments["exp_avg"].unbind()),
            list(moments["exp_avg_sq"].unbind()),
            list(moments["max_exp_avg_sq"].unbind()) if self.options.amsgrad else [],
            list(moments[NUM_STEPS].float().unbind()),
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=self.options.eps,
            amsgrad=self.options.amsgrad,
            maximize=False,
        )


class AdamW(Adam):
    """Adam with decoupled weight decay, see `torch.optim.AdamW`."""

    class Options(Adam.Options):
        """Options of AdamW: those of Adam."""

        weight_decay: float = Field(default=0.01, ge=0)

    traits = OptimizerTraits(decouples_weight_decay=True)


class Adagrad(Optimizer):
    """Adagrad, see `torch.optim.Adagrad`."""

    class Options(OptimizerOptions):
        """Options of Adagrad.

        Attributes:
            lr_decay: the learning rate is divided by 1 + lr_decay times the number of steps before.
            initial_accumulator_value: sum of squares at the start.
            eps: number that is added to its root.
        """

        lr_decay: float = Field(default=0.0, ge=0)
        initial_accumulator_value: float = Field(default=0.0, ge=0)
        eps: float = Field(default=1e-10, ge=0)

    traits = OptimizerTraits(moments=("sum",), counts_steps=True)

    def init(self, x: Tensor) -> dict[str, Tensor]:
        """Return the sums of squares."""
        return super().init(x) | {"sum": torch.full_like(x, self.options.initial_accumulator_value)}

    def step(self, x: Tensor, grad: Tensor, moments: Mapping[str, Tensor], lr: float) -> None:
        """Step along the gradient over the root of the sum of squares."""
        torch._fused_adagrad_(
            list(x.unbind()),
            rows_like(x, grad),
            list(moments["sum"].unbind()),
            list(moments[NUM_STEPS].float().unbind()),
            lr=lr,
            lr_decay=self.options.lr_decay,
            weight_decay=0.0,
            eps=self.options.eps,
            maximize=False,
        )


class RMSprop(Optimizer):
    """RMSprop, see `torch.optim.RMSprop`."""

    class Options(OptimizerOptions):
        """Options of RMSprop.

        Attributes:
            alpha: decay of the mean of squares.
            eps: number that is added to its root.
            momentum: decay of the sum of steps.
            centered: whether the mean of squares is that of the distance from the mean gradient.
        """

        alpha: float = Field(default=0.99, ge=0, le=1)
        eps: float = Field(default=1e-8, ge=0)
        momentum: float = Field(default=0.0, ge=0, lt=1)
        centered: bool = False

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        given = {"square_avg": True, "grad_avg": self.options.centered, "momentum_buffer": self.options.momentum > 0}
        self.traits = OptimizerTraits(moments=tuple(name for name, is_used in given.items() if is_used))

    def step(self, x: Tensor, grad: Tensor, moments: Mapping[str, Tensor], lr: float) -> None:
        """Step along the gradient over the root of the mean square."""
        alpha, momentum = self.options.alpha, self.options.momentum
        scale = moments["square_avg"].mul_(alpha).addcmul_(grad, grad, value=1 - alpha)
        if self.options.centered:
            mean = moments["grad_avg"].lerp_(grad, 1 - alpha)
            scale = scale.addcmul(mean, mean, value=-1)
        scale = scale.sqrt().add_(self.options.eps)
        if momentum:
            x.sub_(moments["momentum_buffer"].mul_(momentum).addcdiv_(grad, scale), alpha=lr)
        else:
            x.addcdiv_(grad, scale, value=-lr)


class Muon(Optimizer):
    """Muon of weight matrices, see `torch.optim.Muon`; AdamW of all other parameters.

    A step goes along the momentum, made nearly orthogonal by Newton-Schulz iterations in bfloat16, as torch's does:
    matrices of several participants are gone through one after another. Their momentum is kept as "exp_avg".
    """

    class Options(OptimizerOptions):
        """Options of Muon.

        Attributes:
            momentum: decay of the mean of gradients.
            nesterov: whether that mean looks ahead.
            ns_coefficients: of the polynomial of a Newton-Schulz iteration.
            ns_steps: number of these.
            eps: least norm of a matrix that they begin with.
            adjust_lr_fn: how the learning rate depends on the shape [o, i]: times ``sqrt(max(1, o / i))`` ("original")
                or ``0.2 sqrt(max(o, i))`` ("match_rms_adamw").
            adamw: options of AdamW for all other parameters, and ``lr_factor``, by which ``train.lr`` is multiplied.
        """

        weight_decay: float = Field(default=0.1, ge=0)
        momentum: float = Field(default=0.95, ge=0, lt=1)
        nesterov: bool = True
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315)
        ns_steps: int = Field(default=5, ge=1, lt=100)
        eps: float = Field(default=1e-7, gt=0)
        adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original"
        adamw: RestOptions = Field(default_factory=lambda: RestOptions())

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self._rest = AdamW(self.options.adamw.model_dump(exclude={"lr_factor"}))
        self._rest.lr_factor = self.options.adamw.lr_factor
        self.traits = self._rest.traits

    def of_parameter(self, name: str, shape: tuple[int, ...]) -> Optimizer:
        """Return this optimizer of a matrix, AdamW of anything else."""
        return self if len(shape) == 2 else self._rest

    def step(self, x: Tensor, grad: Tensor, moments: Mapping[str, Tensor], lr: float) -> None:
        """Step along the orthogonalized momentum of each matrix."""
        momentum, (o, i) = self.options.momentum, x.shape[1:]
        buffers = moments["exp_avg"].lerp_(grad, 1 - momentum)
        updates = grad.lerp(buffers, momentum) if self.options.nesterov else buffers
        is_original = self.options.adjust_lr_fn == "original"
        lr *= math.sqrt(max(1, o / i)) if is_original else 0.2 * math.sqrt(max(o, i))
        for weight, update in zip(x, updates, strict=True):
            weight.sub_(self._orthogonalized(update), alpha=lr)

    def _orthogonalized(self, update: Tensor) -> Tensor:
        """Return the nearly orthogonal matrix next to a matrix, in bfloat16."""
        a, b, c = self.options.ns_coefficients
        found = update.bfloat16()
        if is_tall := len(found) > found.shape[1]:
            found = found.T
        found = found.div(found.norm().clamp(min=self.options.eps))
        for _ in range(self.options.ns_steps):
            gram = found @ found.T
            found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
        return found.T if is_tall else found


class RestOptions(AdamW.Options):
    """Options of AdamW beside Muon; lr_factor: factor of the learning rate."""

    lr_factor: float = Field(default=1.0, gt=0)


Muon.Options.model_rebuild()


def per_row(value: Tensor, x: Tensor) -> Tensor:
    """Return numbers [s, 1] so that they are broadcast to the rows of x [s, ...]."""
    return value.view(-1, *(1,) * (x.dim() - 1))


def rows_like(x: Tensor, grad: Tensor) -> list[Tensor]:
    """Return the rows of a gradient in the memory order of those of x, as fused kernels want them."""
    rows = list(grad.unbind())
    return [
        row if row.stride() == like.stride() else torch.empty_like(like).copy_(row)
        for row, like in zip(rows, x.unbind(), strict=True)
    ]
