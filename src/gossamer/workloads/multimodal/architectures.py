"""Clients whose models differ in architecture, where models stay with the clients."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field
from torch import Tensor

from gossamer.errors import ConfigError
from gossamer.options import Options
from gossamer.workloads.base import DEFAULT_CONTEXT, ForwardContext, Params
from gossamer.workloads.multimodal.encoders import Classifier
from gossamer.workloads.multimodal.modalities import TOLERANCE
from gossamer.workloads.plugins import Spec

NAME = re.compile("[a-z][a-z0-9-]*")
TAKEN = ("server", "public")  # what other modules begin with
WHERE = "workload.architectures"


class ArchitectureOptions(Options):
    """Options of one of several architectures.

    Attributes:
        share: share of the clients that have it.
        encoders: ``{modality: name of a model of images, or name and options}``; of modalities that are left out, the
            encoder is that of ``workload.encoders``.
    """

    share: float = Field(gt=0, le=1)
    encoders: dict[str, Spec] = {}


class Family:
    """Classifiers of several architectures, of which each client has one; it is told by the names of its parameters.

    Modules of an architecture have its name, and ``_``, before theirs: ``cnn_image``, ``cnn_fusion``.

    Attributes:
        members: ``{name of the architecture: its classifier}``.
        modalities: names of the modalities.
        width: numbers of a representation, which is the same for all.
        modules: names of the modules of all of them.
        shapes: ``{parameter: shape}`` of all of them, one architecture after another.
        axes: ``{parameter: (axis name | Dim | None, ...)}``; no two architectures share one but the labels'.
    """

    def __init__(
        self,
        given: Mapping[str, ArchitectureOptions],
        encoders: Mapping[str, Spec],
        input_shapes: Mapping[str, tuple[int, ...]],
        width: int,
        num_labels: int,
    ) -> None:
        """Make the classifiers.

        Args:
            given: what each architecture has of its own.
            encoders: ``{modality: encoder}`` of architectures that name none for it.
            input_shapes, width, num_labels: see `Classifier`.

        Raises:
            ConfigError: a name or the shares are wrong, or an encoder cannot be built.
        """
        require_architectures(given)
        self.members = {
            name: Classifier(
                {**encoders, **one.encoders}, input_shapes, width, num_labels, f"{WHERE}.{name}.encoders", f"{name}_"
            )
            for name, one in given.items()
        }
        self.modalities, self.width = tuple(input_shapes), width
        self.shapes = {name: shape for one in self.members.values() for name, shape in one.shapes.items()}
        self.axes = {name: axes for one in self.members.values() for name, axes in one.axes.items()}
        self.modules = tuple(module for one in self.members.values() for module in one.modules)

    def init(self, source: np.random.Generator) -> dict[str, Tensor]:
        """Return initial parameters of all architectures, drawn from `source` in their order."""
        return {name: value for one in self.members.values() for name, value in one.init(source).items()}

    def member(self, params: Params) -> Classifier:
        """Return the classifier that parameters are of: the first one with a module of theirs."""
        modules = {name.partition(".")[0] for name in params}
        return next(one for one in self.members.values() if modules.intersection(one.modules))

    def encode(self, params: Params, modality: str, x: Tensor, context: ForwardContext = DEFAULT_CONTEXT) -> Tensor:
        """Return what the client's own encoder makes of samples, see `Classifier.encode`."""
        return self.member(params).encode(params, modality, x, context)

    def logits(
        self, params: Params, samples: Mapping[str, Tensor], context: ForwardContext = DEFAULT_CONTEXT
    ) -> dict[str, Tensor]:
        """Return the logits of the client's own heads, see `Classifier.logits`."""
        return self.member(params).logits(params, samples, context)

    def held(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the modalities of which there is an encoder among parameters of these names."""
        found = {modality for one in self.members.values() for modality in one.held(names)}
        return tuple(name for name in self.modalities if name in found)


def require_architectures(given: Mapping[str, ArchitectureOptions]) -> None:
    """Check names and shares.

    Raises:
        ConfigError: a name cannot begin that of a module, or the shares do not sum to 1.
    """
    for name in given:
        if NAME.fullmatch(name) is None or name in TAKEN:
            raise ConfigError(
                f"{WHERE} has the name {name!r}, by which modules are called: give small letters, digits and hyphens,"
                f" and not {' or '.join(TAKEN)}"
            )
    total = sum(one.share for one in given.values())
    if abs(total - 1) > TOLERANCE:
        raise ConfigError(f"{WHERE} has shares that sum to {total:g}: give shares that sum to 1")
