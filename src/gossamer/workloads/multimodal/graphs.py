"""What models of videos and texts are: modules, and a graph of them for each task that they can do."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from gossamer.submodel.layout import LABEL_AXIS
from gossamer.workloads.base import DEFAULT_CONTEXT, ForwardContext
from gossamer.workloads.traits import ModelTraits

MODALITIES = ("video", "text")
Tensors = Mapping[str, Tensor]
Losses = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Facts:
    """What a model must know of the data.

    Attributes:
        num_tokens: words of the vocabulary.
        caption_length, question_length: most tokens of each.
        frame: channels, height and width.
        num_frames: frames of a video.
        num_labels: ``{name: classes}`` of the labels of videos.
        label_words: ``{name: (token, ...)}`` of labels whose classes are words of captions.
        vocabulary: the words by their numbers.
        has_label_axes: whether rows that tell classes lie along label axes, see `label_axis`.
    """

    num_tokens: int
    caption_length: int
    question_length: int
    frame: tuple[int, int, int]
    num_frames: int
    num_labels: Mapping[str, int]
    label_words: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    vocabulary: tuple[str, ...] = ()
    has_label_axes: bool = False

    def label_axis(self, label: str) -> str | None:
        """Return the axis along which a model's rows for the classes of a label lie."""
        return f"{LABEL_AXIS}:{label}" if self.has_label_axes else None

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        words = {name: list(tokens) for name, tokens in self.label_words.items()}
        lists = {"frame": list(self.frame), "vocabulary": list(self.vocabulary)}
        return asdict(self) | lists | {"num_labels": dict(self.num_labels), "label_words": words}

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> Facts:
        """Return what `as_json` was made of."""
        words = {name: tuple(tokens) for name, tokens in values["label_words"].items()}
        lists = {name: tuple(values[name]) for name in ("frame", "vocabulary")}
        return cls(**{**values, **lists, "label_words": words})


@dataclass(frozen=True)
class Graph:
    """The modules that a task needs, and the modalities that a sample must have for it.

    Attributes:
        modules: names of modules.
        modalities: names among `MODALITIES`.
        predicts: names of further modules, without which nothing is predicted: they are trained by other tasks.
    """

    modules: frozenset[str]
    modalities: frozenset[str]
    predicts: frozenset[str] = frozenset()


class VideoLanguageModel(Protocol):
    """A model of videos and texts as pure functions of its parameters, so that it can be trained stacked.

    The name of a parameter begins with that of its module and a dot.

    Attributes:
        traits: what it can and cannot do.
        shapes: ``{parameter: shape}`` in the order in which they lie in a row.
        axes: ``{parameter: (axis name | Dim | None, ...)}``.
        graphs: ``{task: graph}`` of what it can do, of the names that `gossamer.workloads.multimodal.tasks` knows.
    """

    traits: ModelTraits
    shapes: dict[str, tuple[int, ...]]
    axes: dict[str, tuple[Any, ...]]
    graphs: Mapping[str, Graph]

    def init(self, source: np.random.Generator) -> dict[str, Tensor]:
        """Return initial parameters, drawn from `source`."""
        ...

    def losses(
        self, tasks: Collection[str], params: Tensors, batch: Tensors, context: ForwardContext = DEFAULT_CONTEXT
    ) -> Losses:
        """Return the losses [b] of each task, and how much each sample counts in it, [b].

        Args:
            tasks: tasks whose modules are all in `params`, and whose modalities are in the batch.
            params: parameters of the (sub-)model, at least those of the tasks.
            batch: what there is of a batch, see `gossamer.workloads.multimodal.workload.VideoLanguage.batch`; labels
                are -1 where they are missing, see `gossamer.workloads.multimodal.objectives.label_losses`.
            context: its scale, and its key where a loss is random.
        """
        ...

    def predict(self, task: str, params: Tensors, batch: Tensors) -> dict[str, Tensor]:
        """Return what the metrics of a task are made of, see the task's class.

        Args:
            task: name of the task.
            params: parameters of the (sub-)model, at least those of the task.
            batch: videos and texts, see `losses`.
        """
        ...


def graph(modules: str, modalities: str, predicts: str = "") -> Graph:
    """Return a graph of names in one text each."""
    return Graph(frozenset(modules.split()), frozenset(modalities.split()), frozenset(predicts.split()))
