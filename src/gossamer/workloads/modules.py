"""Any plain `torch.nn.Module` as the model of a workload: its forward pass runs as written, its axes are traced."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.errors import ConfigError, GossamerError
from gossamer.submodel.layout import Axes, AxisSpec, Layout, num_kernel_dims, with_kernels
from gossamer.submodel.tracing import Attention, Keep, trace_axes
from gossamer.threads import one_thread
from gossamer.workloads.base import DEFAULT_CONTEXT, ForwardContext, WithConstants
from gossamer.workloads.buffers import Watched, as_buffer, axes_of_buffer, changing_buffers
from gossamer.workloads.mending import Mending
from gossamer.workloads.module_checks import is_equal, is_same_function
from gossamer.workloads.seeding import seed_of, seeded
from gossamer.workloads.traits import ModelTraits

BatchNorm = nn.modules.batchnorm._BatchNorm
TRIED = 3  # samples on which a module is tried
CLOSE = 1e-4  # relative; kernels round differently from shape to shape


class ModuleModel(WithConstants):
    """A plain module as a `gossamer.workloads.base.Model`.

    A workload wraps a module class, or a function that returns a module, by itself. Wrap it yourself to choose what is
    cut: name a function ``(input_shape, num_labels, **options) -> ModuleModel``.

    Parameters with ``requires_grad = False`` are constants, as buffers are: neither trained, nor sent, nor counted, nor
    cut. They come from the build that parameters start from, for which torch, numpy and `random` are seeded.

    The module is in training mode for the training loss, and in evaluation mode while metrics are computed.

    BatchNorm keeps no running moments: it normalises by those of the batch while training, and by pooled ones for
    evaluation (static BatchNorm, Diao et al., arXiv 2010.01264), unless the module's own ``train`` leaves the layer in
    evaluation mode: then the moments that it is built with are constants, and it normalises by them. A channel of which
    a batch has a single value, as in ``BatchNorm1d`` and a batch of one, becomes its bias (PyTorch refuses it), and
    what stands before gets no gradient from that batch. Dropout (`torch.nn`'s, ``F.dropout*``, and that of attention)
    follows the context's key, and is off without one, in evaluation too. Other random draws in the forward pass are
    refused, because they would not depend on the seed alone; and so are buffers that the forward pass changes.

    With `keeps_buffers` these, running moments of BatchNorm included, are entries of a row, of which the forward pass
    returns new ones; participants are trained one by one.

    Sub-models: only where a capacity below 1 is asked for, the module is traced, see `trace_axes`, and tried at half
    its width. Its own code runs on the sub-model's parameters, so it must take sizes that a capacity cuts from its
    tensors (``x.shape``, ``-1`` in a reshape) and not from attributes. Calls that cannot be written so are mended:
    layer norms, root-mean-square norms, grouped convolutions and `torch.nn.MultiheadAttention` (so the transformer
    layers of PyTorch, too) take their sizes from weights and inputs; its softmax keeps the scale of full width. Where
    heads of your own are narrowed, give ``F.scaled_dot_product_attention`` its scale, or it will take the sub-model's.
    The scaler of HeteroFL multiplies the inputs of linear layers and convolutions (`torch.nn`'s, or ``F.linear`` and
    ``F.conv*`` of a parameter) that sum over a cut width: with ReLU the same as scaling each cut layer's output.

    Attributes:
        traits, shapes, norms: see `gossamer.workloads.base.Model`; `shapes` are those of the trained parameters.
        frozen: ``{name: tensor}`` of the parameters that are not trained.
        buffers: names of the buffers that the forward pass changes, and that `shapes` has besides.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        input_shape: tuple[int, ...],
        num_labels: int,
        *,
        attention: Attention | None = None,
        keep: Keep = (),
        seed: int = 0,
        samples: Tensor | None = None,
        keeps_buffers: bool = False,
    ) -> None:
        """Build the module and try it.

        Args:
            build: returns a new module of full width; all that it draws comes from the global generators of torch,
                numpy and `random`.
            input_shape, num_labels: shape of one sample; width of the logits, float32 [b, num_labels].
            attention, keep: see `trace_axes`; attention None: fewer heads if the module takes them, else narrower ones.
            seed: seed of those generators.
            samples: a few samples to try it on; None: Gaussian ones.
            keeps_buffers: whether buffers that the forward pass changes are entries of the model.

        Raises:
            ConfigError: the module cannot be trained as it is; the message says why.
        """
        self._build, self._num_labels, self._kept_constant = build, num_labels, frozenset[str]()
        self._attention, self._keep = attention, keep
        self._axes: Axes | None = None
        self._dtype = torch.float32
        self._drops, self._convolved = False, frozenset[str]()  # whether there was dropout; what was convolved with
        noise = torch.randn(TRIED, *input_shape, generator=torch.Generator().manual_seed(0))
        self._samples, self.keeps_buffers = noise if samples is None else samples, keeps_buffers
        if keeps_buffers:
            with one_thread():
                self.buffers = changing_buffers(self._built(seed), self._samples)
        self._take(seed)
        self._check_build()
        with one_thread():
            self._check_forwards()
            stacks = not self.buffers and self._agrees(self._stacked)
            convolves = any(num_kernel_dims(specs) == 2 for specs in self.whole_axes.values())
            has_images = convolves and self._agrees(self._channels_last)
        self.traits = ModelTraits(supports_stacking=stacks, has_images=has_images, uses_key=self._drops)

    @property
    def axes(self) -> dict[str, tuple[AxisSpec, ...]]:
        """The axes of the trained parameters, traced when they are first asked for.

        Raises:
            ConfigError: the module cannot be cut; the message says why.
        """
        if self._axes is None:
            try:
                with one_thread():
                    self._find_axes()
            except BaseException:
                self._axes = None
                raise
        return dict(self._axes or {})

    @property
    def whole_axes(self) -> dict[str, tuple[AxisSpec, ...]]:
        """Axes for whole models, of which kernels of convolutions alone are known and nothing can be cut."""
        return with_kernels({name: (None,) * len(shape) for name, shape in self.shapes.items()}, self._convolved)

    def init(self, source: np.random.Generator) -> dict[str, Tensor]:
        """Return the trained parameters of a module whose draws are seeded from `source`."""
        seed = seed_of(source)
        module = self._module if seed == self._seed else self._built(seed)
        return {name: value.clone() for name, value in self._entries(module).items() if name in self.shapes}

    def reseed(self, source: np.random.Generator) -> None:
        """Take buffers and frozen parameters from the module whose parameters `init` returns for the same source."""
        seed = seed_of(source)
        if seed != self._seed:
            self._take(seed)

    def keep_constant(self, names: Collection[str]) -> None:
        """Take parameters out of training, as if they required no gradient."""
        self._kept_constant, self._axes = frozenset(names), None
        self._take(self._seed)

    def convert(self, dtype: torch.dtype) -> None:
        """Have parameters and floating-point buffers in another type, see `WithConstants`.

        Raises:
            ConfigError: the forward pass fails on them.
        """
        self._dtype, self._axes = dtype, None
        self._take(self._seed)
        if self._samples.is_floating_point():
            self._samples = self._samples.to(dtype)
        with one_thread():
            self._check_forwards()

    @torch.no_grad()
    def try_out(self, params: Mapping[str, Tensor], apply: Callable[[Mapping[str, Tensor], Tensor], Tensor]) -> Tensor:
        """Return what `apply` makes of parameters and a few samples of noise."""
        with one_thread():
            return apply(params, self._samples)

    @property
    def constants(self) -> dict[str, Tensor]:
        """Frozen parameters, and buffers that never change."""
        buffers = self._module.named_buffers()
        return self.frozen | {name: value for name, value in buffers if name not in self.buffers}

    def _entries(self, module: nn.Module) -> dict[str, Tensor]:
        """Return all parameters of a module, and the buffers that change, as numbers."""
        entries = {name: value.detach() for name, value in module.named_parameters()}
        return entries | {name: module.get_buffer(name).to(self._dtype) for name in self.buffers}

    @property
    def template(self) -> nn.Module:
        """The module whose buffers and frozen parameters are used; not to be changed."""
        return self._module

    def build(self) -> nn.Module:
        """Return a new module, as it was written, that draws what the template drew."""
        with seeded(self._seed):
            return self._build()

    def whole(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return all parameters in the module's order: those given, and those that are frozen."""
        every = self.frozen | dict(params)
        return {name: every[name] for name, _ in self._module.named_parameters()}

    def apply(self, params: Mapping[str, Tensor], x: Tensor, context: ForwardContext = DEFAULT_CONTEXT) -> Tensor:
        """Return logits [b, num_labels] of x [b, *input_shape], see `gossamer.workloads.base.Model`."""
        constants = self.frozen
        if x.device.type != "cpu":
            constants = {name: value.to(x.device) for name, value in self.constants.items()}
        if self._module.training != context.training:
            self._module.train(context.training)
        axes = self.axes if context.is_scaled else self._axes or {}
        given = constants | dict(params)
        given |= {name: as_buffer(given[name], self._module.get_buffer(name)) for name in self.buffers}
        with Mending(given, axes, context) as mending:
            named = {f"module.{name}": value for name, value in given.items()}
            output: tuple[Tensor, dict[str, Tensor]] = torch.func.functional_call(self._watched, named, (x,))
        logits, after = output
        if context.updates is not None:
            context.updates.update(after)
        self._drops, self._convolved = self._drops or mending.dropout.num_calls > 0, self._convolved | mending.convolved
        return logits

    # ---- the module

    def _built(self, seed: int) -> nn.Module:
        """Build a module from a seed, without the running moments of BatchNorm layers that are trained."""
        with seeded(seed):
            module = self._build().train()
        for name, param in module.named_parameters():
            if name in self._kept_constant:
                param.requires_grad_(False)
        for layer in module.modules():
            if isinstance(layer, BatchNorm) and layer.training and not self.keeps_buffers:
                layer.running_mean = layer.running_var = layer.num_batches_tracked = None
                layer.track_running_stats = False
        return module if self._dtype == torch.float32 else module.to(self._dtype)

    def _take(self, seed: int) -> None:
        """Build the module whose buffers and frozen parameters are used, and see what it has.

        Raises:
            ConfigError: it has nothing to train, or something that cannot be.
        """
        self._seed, self._module = seed, self._built(seed)
        self._watched = Watched(self._module, self.buffers)
        self._name = name = type(self._module).__name__
        trained, self.frozen = dict[str, Tensor](), dict[str, Tensor]()
        for key, param in self._module.named_parameters():
            if nn.parameter.is_lazy(param):
                raise ConfigError(
                    f"model {name!r}: parameter {key!r} has no size before the first batch: give its size"
                )
            (trained if param.requires_grad else self.frozen)[key] = param.detach()
            if param.requires_grad and param.dtype != self._dtype:
                raise ConfigError(f"model {name!r}: parameter {key!r} is {param.dtype}: make it float32")
        if not trained and not self._kept_constant:
            what = "parameters that require a gradient" if self.frozen else "parameters"
            raise ConfigError(f"model {name!r} has no {what}: there is nothing to train")
        trained |= {key: value for key, value in self._entries(self._module).items() if key in self.buffers}
        self._params, self.shapes = trained, {key: tuple(value.shape) for key, value in trained.items()}
        layers = dict(self._module.named_modules())
        norms = {key: layer for key, layer in layers.items() if isinstance(layer, BatchNorm) and layer.training}
        self.norms = tuple(key for key, layer in norms.items() if layer.running_mean is None)
        for key, layer in layers.items():
            if key in norms and layer.weight is None:
                raise ConfigError(f"model {name!r}: {key!r} has no weight: build it with affine=True")

    def _check_build(self) -> None:
        """Check that the module follows from its seed."""
        again = self._built(self._seed)
        other = dict(again.named_buffers()) | self._entries(again)
        for name, value in (self._params | self.constants).items():
            if name not in other or not is_equal(value, other[name].detach()):
                raise ConfigError(
                    f"model {self._name!r} is not built alike twice from one seed ({name!r} differs): draw random"
                    " numbers from the global generators of torch, numpy or random, which are seeded, and leave no"
                    " memory uninitialised"
                )

    def _check_forwards(self) -> None:
        for training in (True, False):
            self._check_forward(ForwardContext(training=training, key=torch.tensor(1) if training else None))

    def _check_forward(self, context: ForwardContext) -> None:
        """Check that the forward pass returns logits and depends on parameters and inputs alone."""
        name, where = f"model {self._name!r}", "" if context.training else " in evaluation mode"
        state = {key: value.clone() for key, value in (self._params | self.constants).items()}
        runs = []
        for seed in (0, 0, 1):
            x = self._samples.clone()
            try:
                with seeded(seed), torch.no_grad():
                    runs.append(self.apply(self._params, x, context))
            except GossamerError:
                raise
            except Exception as error:
                raise ConfigError(f"{name} fails{where} on a batch of shape {tuple(x.shape)}: {error}") from error
            if not torch.equal(x, self._samples):
                raise ConfigError(
                    f"{name} changes its input in place{where}, and so the data: let it work on a copy, as by x.clone()"
                )
        expected = len(self._samples), self._num_labels
        if not isinstance(runs[0], Tensor) or runs[0].shape != expected:
            found = tuple(runs[0].shape) if isinstance(runs[0], Tensor) else type(runs[0]).__name__
            raise ConfigError(f"{name} returns {found}{where}: return one tensor of logits, here {expected}")
        for key, value in (self._params | self.constants).items():
            if not is_equal(value, state[key]) and key in self.shapes:
                raise ConfigError(
                    f"{name}: the forward pass changes the parameter {key!r} in place{where}, which only training may"
                    " do: do without it (nn.Embedding: max_norm=None)"
                )
        changed = [key for key, value in self.constants.items() if not is_equal(value, state[key])]
        if changed:
            remedy = "set workload.buffers to averaged or personal, or do" if context.training else "do"
            raise ConfigError(
                f"{name}: the forward pass changes the buffer {', '.join(map(repr, changed))}{where}, but only"
                f" parameters are sent and averaged: {remedy} without it"
            )
        if not is_equal(runs[0], runs[1]):
            raise ConfigError(
                f"{name} returns something else{where} when it is given the same again: let it keep nothing from call"
                " to call, and draw no random numbers"
            )
        if not is_equal(runs[0], runs[2]):
            raise ConfigError(
                f"{name} draws random numbers in its forward pass{where}, which would not depend on the seed alone: do"
                " without them (nn.LSTM and the like: dropout=0, and nn.Dropout between layers)"
            )

    def _agrees(self, way: Callable[[dict[str, Tensor], Tensor], Tensor]) -> bool:
        """Whether another way to run the module works and gives the same logits."""
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of slowness, which is measured elsewhere
            expected = self.apply(self._params, self._samples, ForwardContext(key=torch.tensor(1)))
            try:
                found = way(self._params, self._samples)
            except Exception:
                return False
        return bool((found - expected).norm() <= CLOSE * expected.norm())

    def _stacked(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
        two = {name: torch.stack([value, value]) for name, value in params.items()}
        keyed = torch.vmap(lambda params, x, key: self.apply(params, x, ForwardContext(key=key)))
        logits: Tensor = keyed(two, torch.stack([x, x]), torch.ones(2, dtype=torch.int64))[1]
        return logits

    def _channels_last(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
        layout = Layout.of(self.shapes, self.whole_axes).as_channels_last
        images = x.contiguous(memory_format=torch.channels_last)
        return self.apply(layout.views(layout.flatten(params)), images, ForwardContext(key=torch.tensor(1)))

    # ---- sub-models

    def _find_axes(self) -> None:
        """Trace the module, and try it on a sub-model."""
        self._trace(self._attention or "heads")
        try:
            self._check_sub_model()
        except ConfigError:
            if self._attention is not None or not self._narrows_heads():
                raise

    def _trace(self, attention: Attention) -> None:
        try:
            traced = trace_axes(self._module, self._samples, attention=attention, keep=self._keep)
            traced = with_kernels(traced, self._convolved)
        except GossamerError as error:
            raise ConfigError(f"model {self._name!r}: {error}") from error
        except Exception as error:
            raise ConfigError(
                f"model {self._name!r} cannot be traced ({error}), so no capacity below 1 can cut it: train whole"
                " models, or declare the axes by hand in a model of your own"
            ) from error
        self._axes = {
            name: traced[name] if name in traced else axes_of_buffer(name, shape, traced)
            for name, shape in self.shapes.items()
        }

    def _check_sub_model(self) -> None:
        """Run a sub-model of half the width, and compare it with the whole model that has nothing else."""
        assert self._axes is not None
        layout = Layout.of(self.shapes, self._axes)
        sub = layout.cut(0.5)
        if sub.shapes == layout.shapes:
            return  # nothing can be cut, which is judged where the capacities are known
        views = sub.views(torch.full((sub.d,), 0.01, dtype=self._dtype))
        remedy = (
            "take sizes from tensors (x.shape, or -1 in a reshape) instead of attributes,"
            f" or keep some of its axes whole ({', '.join(layout.cut_axes)}), see ModuleModel"
        )
        try:
            with torch.no_grad():
                shape = tuple(self.apply(views, self._samples).shape)
        except Exception as error:
            raise ConfigError(f"model {self._name!r} fails at half its width ({error}): {remedy}") from error
        if shape != (len(self._samples), self._num_labels):
            raise ConfigError(f"model {self._name!r} returns shape {shape} at half its width: {remedy}")
        if not is_same_function(self.apply, layout, self._params, self._samples):
            raise ConfigError(
                f"model {self._name!r} is another function at half its width, not the whole one without the rest, as"
                f" where channels are regrouped or multiplied by what depends on their number: {remedy}"
            )

    def _narrows_heads(self) -> bool:
        """Say whether the channels in every head can be cut, and leave it so if they can."""
        try:
            self._trace("head-dim")
            self._check_sub_model()
        except ConfigError:
            return False
        return True
