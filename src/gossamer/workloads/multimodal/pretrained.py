"""A model whose video or text encoder is a pretrained one of a local folder, frozen or with low-rank factors.

What is pretrained is constant: participants have it from the folder, so that it is neither trained, sent nor counted as
parameters. Low-rank factors (LoRA, arXiv 2106.09685) are modules of the model, whose rank a smaller capacity cuts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.func import functional_call

from gossamer.errors import ConfigError, nearest
from gossamer.options import Options, parse_options
from gossamer.workloads.base import DEFAULT_CONTEXT, ForwardContext, WithConstants
from gossamer.workloads.models import WHERE, DeclaredModel
from gossamer.workloads.multimodal.blocks import Params, Tokens, glorot, linear, mean_of
from gossamer.workloads.multimodal.clips import PAD
from gossamer.workloads.multimodal.graphs import Facts, Graph, Losses, Tensors
from gossamer.workloads.multimodal.hugging_face import load_encoder, spelled, word_pieces
from gossamer.workloads.multimodal.objectives import contrastive, contrastive_logits, label_losses
from gossamer.workloads.traits import ModelTraits

A, B, RANK_AXIS = ".lora_A", ".lora_B", "lora-rank"


class FactorOptions(Options):
    """Options of low-rank factors beside the pretrained weights of both encoders.

    Attributes:
        rank: of each product B A.
        alpha: the product is multiplied by ``alpha / rank``.
        targets: patterns of the names of linear layers, of which each must fit one.
    """

    rank: int = Field(4, ge=1)
    alpha: float = Field(8.0, gt=0)
    targets: tuple[str, ...] = ("*query", "*value", "*q_proj", "*v_proj")


class PretrainedOptions(Options):
    """Options of `Pretrained`.

    Attributes:
        vision_path: folder of an image encoder that takes ``pixel_values``, as ViT does; None: a linear layer instead.
        text_path: folder of a text encoder and its tokenizer, as BERT; None: embeddings of words instead.
        lora: low-rank factors in both; None: they stay as they are.
        stream: channels of an encoder that is not pretrained.
        contrast: channels of the embeddings that retrieval compares.
        temperature: of the softmax over similarities.
    """

    vision_path: str | None = None
    text_path: str | None = None
    lora: FactorOptions | None = None
    stream: int = Field(48, ge=1)
    contrast: int = Field(32, ge=1)
    temperature: float = Field(0.07, gt=0)

    @model_validator(mode="after")
    def _have_one(self) -> PretrainedOptions:
        if self.vision_path is None and self.text_path is None:
            raise ValueError("nothing of it is pretrained: give vision_path or text_path")
        return self


class Adapted:
    """A frozen module, with or without low-rank factors in some of its linear layers.

    Attributes:
        size: channels of its last hidden states.
        config: the library's description of it.
        constants: its parameters and buffers.
    """

    def __init__(self, name: str, module: nn.Module, lora: FactorOptions | None) -> None:
        """Take the module.

        Args:
            name: of the module of the model, with which the names of factors begin.

        Raises:
            ConfigError: none of its linear layers is called as `lora` says.
        """
        self.name, self._module, self._lora = name, module, lora
        self.config: Any = vars(module)["config"]
        self.size: int = self.config.hidden_size
        self.constants: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        layers = {layer: part for layer, part in module.named_modules() if isinstance(part, nn.Linear)}
        targets = () if lora is None else lora.targets
        self._adapted = {
            layer: part for layer, part in layers.items() if any(fnmatchcase(layer, pattern) for pattern in targets)
        }
        if lora is not None and not self._adapted:
            raise ConfigError(
                f"{WHERE}.lora.targets = {list(targets)} name no linear layer of the {name} encoder"
                f"{nearest(targets[0].replace('*', '') if targets else '', tuple(layers), cutoff=0.3)}"
                f" (it has {', '.join(list(layers)[:6])}, ...)"
            )

    def declare(self, model: DeclaredModel) -> None:
        """Declare the factors."""
        rank = 0 if self._lora is None else self._lora.rank
        for layer, part in self._adapted.items():
            own = f"{self.name}.{layer}"
            model.shapes[own + A], model.axes[own + A] = (rank, part.in_features), (RANK_AXIS, None)
            model.shapes[own + B], model.axes[own + B] = (part.out_features, rank), (None, RANK_AXIS)

    def __call__(self, params: Params, **inputs: Tensor) -> Tensor:
        """Return the last hidden states, float32 [b, n, size]."""
        weights = dict(self.constants)
        if self._lora is not None:
            for layer in self._adapted:
                own, factor = f"{self.name}.{layer}", self._lora.alpha / self._lora.rank
                product = params[own + B] @ params[own + A]
                weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + factor * product
        found: Tensor = functional_call(self._module, weights, (), inputs).last_hidden_state
        return found


class Pretrained(DeclaredModel, WithConstants):
    """Compares a video, as the mean of its frames, with a text; and tells labels of videos.

    Frames are resized to what the image encoder takes, and normalised as those of the data set are.
    """

    Options: ClassVar[Any] = PretrainedOptions
    traits = ModelTraits(supports_stacking=False)

    def __init__(self, facts: Facts, **params: Any) -> None:
        """Load what is pretrained, and declare the rest.

        Raises:
            ConfigError: an unknown or wrong option, or a folder that holds no model.
        """
        super().__init__()
        self.options = options = parse_options(PretrainedOptions, params, WHERE)
        self.facts = facts
        self.vision: Adapted | None = None
        self.text: Adapted | None = None
        if options.vision_path is not None:
            module = load_encoder(options.vision_path, f"{WHERE}.vision_path")
            self.vision = Adapted("vision", module, options.lora)
            self.vision.declare(self)
        else:
            self.add("vision.pixels", (options.stream, int(np.prod(facts.frame))), (None, None))
        if options.text_path is not None:
            where = f"{WHERE}.text_path"
            self.text = Adapted("text", load_encoder(options.text_path, where), options.lora)
            self.pieces = word_pieces(options.text_path, facts.vocabulary, where)
            self.text.declare(self)
        else:
            self.words = Tokens("text", options.stream, facts.num_tokens, facts.caption_length)
            self.words.declare(self)
        sizes = {name: options.stream if one is None else one.size for name, one in self._sides.items()}
        for side, name in (("video", "vision"), ("text", "text")):
            self.add(f"contrast.{side}", (options.contrast, sizes[name]), (None, None))
        for label, count in facts.num_labels.items():
            self.add(f"recognition.{label}", (count, sizes["vision"]), (facts.label_axis(label), None))
        held = frozenset(name.partition(".")[0] for name in self.shapes)
        self.graphs = {
            "retrieval": Graph(held - {"recognition"}, frozenset({"video", "text"})),
            "recognition": Graph(held & {"vision", "recognition"}, frozenset({"video"})),
        }

    @property
    def _sides(self) -> dict[str, Adapted | None]:
        return {"vision": self.vision, "text": self.text}

    @property
    def constants(self) -> dict[str, Tensor]:
        """What is pretrained."""
        sides = [(name, one.constants) for name, one in self._sides.items() if one is not None]
        return {f"{name}.{parameter}": value for name, own in sides for parameter, value in own.items()}

    def convert(self, dtype: torch.dtype) -> None:
        """Have what is pretrained in another floating-point type."""
        for one in filter(None, self._sides.values()):
            one.constants = {n: v.to(dtype) if v.is_floating_point() else v for n, v in one.constants.items()}

    def whole(self, params: Params) -> dict[str, Tensor]:
        """Return all parameters: those given, and what is pretrained."""
        return {**self.constants, **params}

    def init(self, source: np.random.Generator) -> dict[str, Tensor]:
        """Return initial parameters; of factors, A as a linear layer of torch begins, and B at 0."""
        drawn = glorot({name: shape for name, shape in self.shapes.items() if not name.endswith((A, B))}, source)
        for name, shape in self.shapes.items():
            if name.endswith(A):
                uniform = torch.from_numpy(source.random(shape, dtype=np.float32))
                drawn[name] = uniform.mul_(2).sub_(1).div_(shape[1] ** 0.5)
            elif name.endswith(B):
                drawn[name] = torch.zeros(shape)
        return {name: drawn[name] for name in self.shapes}

    def seen(self, params: Params, video: Tensor) -> Tensor:
        """Return the mean of the features of frames [b, frames, channels, h, w], [b, size]."""
        if self.vision is None:
            return F.gelu(linear(params, "vision.pixels", video.flatten(-3))).mean(-2)
        frames, config = video.flatten(0, 1), self.vision.config
        frames = frames.expand(-1, config.num_channels, -1, -1) if frames.shape[1] == 1 else frames
        side = config.image_size if isinstance(config.image_size, int) else tuple(config.image_size)
        frames = F.interpolate(frames, size=side, mode="bilinear", align_corners=False)
        states = self.vision(params, pixel_values=frames).mean(-2)
        return states.view(*video.shape[:2], -1).mean(1)

    def read(self, params: Params, caption: Tensor) -> Tensor:
        """Return the mean of the states of captions int64 [b, n], [b, size]."""
        if self.text is None:
            return mean_of(self.words(params, caption), caption != PAD)
        tokens, there = spelled(caption, self.pieces)
        return mean_of(self.text(params, input_ids=tokens, attention_mask=there.to(torch.int64)), there)

    def embedded(self, params: Params, batch: Mapping[str, Tensor], visual: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings of both sides, [b, contrast], of length 1."""
        pairs = ("video", visual), ("text", self.read(params, batch["caption"]))
        video, text = (F.normalize(linear(params, f"contrast.{side}", one), dim=-1) for side, one in pairs)
        return video, text

    def losses(
        self, tasks: Collection[str], params: Tensors, batch: Tensors, context: ForwardContext = DEFAULT_CONTEXT
    ) -> Losses:
        """Return the losses of tasks, see `VideoLanguageModel`."""
        visual, found = self.seen(params, batch["video"]), Losses()
        if "recognition" in tasks:
            losses, has_any = label_losses(self._logits(params, visual), batch)
            found["recognition"] = losses, batch["has_video"] * has_any
        if "retrieval" in tasks:
            weights, caption = batch["has_video"] * batch["has_text"], batch["caption"]
            same = (caption[:, None] == caption[None]).all(-1)
            pairs = self.embedded(params, batch, visual)
            logits = contrastive_logits(*pairs, same, weights > 0, self.options.temperature)
            found["retrieval"] = contrastive(logits), weights
        return found

    @torch.no_grad()
    def predict(self, task: str, params: Tensors, batch: Tensors) -> dict[str, Tensor]:
        """Return what the metrics of a task are made of, see `VideoLanguageModel`."""
        visual = self.seen(params, batch["video"])
        if task == "recognition":
            return self._logits(params, visual)
        return dict(zip(("video", "text"), self.embedded(params, batch, visual), strict=True))

    def _logits(self, params: Params, visual: Tensor) -> dict[str, Tensor]:
        return {label: linear(params, f"recognition.{label}", visual) for label in self.facts.num_labels}
