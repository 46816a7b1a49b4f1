"""Options of the workload of videos and texts."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gossamer.options import Options
from gossamer.workloads.multimodal.labels import LabelOptions
from gossamer.workloads.multimodal.modalities import MissingOptions
from gossamer.workloads.parts import LoRAOptions
from gossamer.workloads.plugins import Spec


class VideoLanguageOptions(Options):
    """Options of `VideoLanguage`.

    Attributes:
        dataset: name of a data set of clips, or a mapping of ``name`` and its options.
        model: name of a model, or a mapping of ``name`` and its options.
        tasks: tasks of the run; None: all that the model can do.
        modalities: ``{names joined by +: share of the clients that have these}``.
        client_tasks: likewise of tasks: a client does those of its share; None: everybody does all that it can. Who
            does none of the tasks of a module holds none of it.
        task_weights: ``{task: factor of its loss}``, of tasks of the run; 1 where it is left out.
        missing: modalities that samples lack.
        labels: labels and answers that training samples lack, or have wrong.
        partition_label: label by which partitions by class divide; None: that of the data set.
        frozen, lora: what is not trained, and low-rank factors, see `gossamer.workloads.supervised.SupervisedOptions`;
            a pattern such as ``"text.*"`` names a module.
        weights: path of a file in which the model's parameters start, as ``gossamer export`` writes it of a run of the
            same model; ``{seed}`` in it is the seed of the run. None: they are drawn.
        label_axes: whether rows of a model that tell a class are averaged over those clients alone that have samples of
            it, of each label, where ``submodel.mask_labels`` is on.
        evaluate: tasks that are measured; None: all of the run.
        shuffles: random orders of the frames in which videos are measured besides, see `VideoLanguage.metrics`.
        without: modalities without which all metrics are measured besides.
    """

    dataset: Spec = "moving-digits"
    model: Spec = "mplug-2"
    tasks: tuple[str, ...] | None = None
    modalities: dict[str, float] = {"video+text": 1.0}
    client_tasks: dict[str, float] | None = None
    task_weights: dict[str, Annotated[float, Field(ge=0)]] = {}
    missing: MissingOptions = Field(default_factory=lambda: MissingOptions.model_validate({}))
    labels: LabelOptions = LabelOptions.model_validate({})
    partition_label: str | None = None
    frozen: tuple[str, ...] = ()
    lora: LoRAOptions | None = None
    weights: str | None = None
    label_axes: bool = False
    evaluate: tuple[str, ...] | None = None
    shuffles: int = Field(0, ge=0)
    without: tuple[str, ...] = ()
