"""Videos and texts over clients that have some of the modalities, and do some of the tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer import rng
from gossamer.errors import ConfigError, DataError, nearest, require_attributes
from gossamer.options import parse_options
from gossamer.submodel.layout import Layout
from gossamer.workloads.base import Batch, Blueprint, ForwardContext, Params, Sums, WithConstants, Workload
from gossamer.workloads.digests import digest_of
from gossamer.workloads.functional import blueprint_of
from gossamer.workloads.holdings import Holding, assigned
from gossamer.workloads.multimodal.adapted import AdaptedModel
from gossamer.workloads.multimodal.altered import altered, altered_metrics, with_first_question
from gossamer.workloads.multimodal.clips import PAD, ClipData
from gossamer.workloads.multimodal.graphs import MODALITIES, Facts, VideoLanguageModel
from gossamer.workloads.multimodal.labels import classes_of, given_clips, held_labels
from gossamer.workloads.multimodal.modalities import missing_rates, parse_shares, presence
from gossamer.workloads.multimodal.objectives import sum_of, weighted_mean
from gossamer.workloads.multimodal.options import VideoLanguageOptions
from gossamer.workloads.multimodal.tasks import flat, measure_of
from gossamer.workloads.partitions import divide
from gossamer.workloads.plugins import call_plug_in, plug_in
from gossamer.workloads.starting import load_parameters
from gossamer.workloads.traits import WorkloadTraits

Ints = NDArray[np.int64]
ATTRIBUTES = ("traits", "shapes", "axes", "graphs", "init", "losses", "predict")
ANSWERING = "question-answering"
WEIGHT = "weight."  # before the name of a task: how much its loss counts


class Kind(NamedTuple):
    """Clients of the same modalities and tasks. Attributes: name; modalities; tasks: those that they can do."""

    name: str
    modalities: tuple[str, ...]
    tasks: tuple[str, ...]


class VideoLanguage(Workload):
    """Training of a model of videos and texts, see `gossamer.workloads.multimodal.graphs`.

    A client holds the modules of those tasks that it does and for which it has the modalities.

    Raises (when built):
        ConfigError: an unknown or wrong option, or clients that can do no task.
        DataError: the data is malformed, or cannot be divided as asked.
    """

    Options = VideoLanguageOptions
    traits = WorkloadTraits()

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        num_clients: int,
        partition: Mapping[str, Any] | str,
        seed: int,
        data: ClipData | None = None,
        dtype: torch.dtype = torch.float32,
        stands_for: tuple[int, int] | None = None,
    ) -> None:
        """Make the data, divide them and lay out the model.

        Args:
            options: see `VideoLanguageOptions`.
            num_clients: number of clients that share the training data.
            partition: name of a partition, or a mapping of ``name`` and its parameters.
            seed: seed of the partition, of who has what, and of what is missing.
            data: the clips, if they are made already.
            dtype: that of parameters and videos.
            stands_for: number of a client, and of all clients of the run: the one client that there is here has the
                modalities and tasks of that one; None: there are as many clients as `num_clients`.
        """
        self.options = parse_options(VideoLanguageOptions, options, "workload")
        self.num_clients, self.seed, self.dtype = num_clients, seed, dtype
        self.data = self._load() if data is None else data
        missing, classes = self.options.missing, classes_of(self.data, self.options.partition_label)
        self._train = given_clips(self.data, self.options.labels, seed)
        self.partition = divide(partition, num_clients, seed, *classes)
        self.num_samples = self.partition.num_samples
        self.model = self.build_model(options, self._facts().as_json(), seed)
        if isinstance(self.model, WithConstants):
            self.model.convert(dtype)
        adapted = isinstance(self.model, AdaptedModel)
        self._start = {} if adapted else self._started(self.options, self.model, seed)
        self.layout = Layout.of(self.model.shapes, self.model.axes)
        self.num_labels = self.layout.num_labels
        self.tasks = self._known("workload.tasks", self.options.tasks or tuple(self.model.graphs))
        self._known("workload.task_weights", tuple(self.options.task_weights), self.tasks)
        self._kinds, self._kind_of_client = self._divide_kinds(num_clients if stands_for is None else stands_for[1])
        if stands_for is not None:
            self._kind_of_client = self._kind_of_client[stands_for[0] : stands_for[0] + 1]
        self.holdings = tuple(Holding(kind.name, self._modules(kind.tasks)) for kind in self._kinds)
        self._without = self._known("workload.without", self.options.without, MODALITIES)
        self.measured = self._known("workload.evaluate", self.options.evaluate or self.tasks)
        self._measures = {task: measure_of(task, self.data) for task in self.measured}
        self._present = {
            split: self._presence(split, rates, len(clips))
            for split, rates, clips in (("train", missing.train, self._train), ("test", missing.test, self.data.test))
        }
        self.num_evaluation_chunks = -(-len(self.data.test) // self.data.pool)
        model = self.model.traits
        self.traits = WorkloadTraits(
            supports_stacking=model.supports_stacking,
            stacks_natively=model.stacks_natively,
            uses_key=model.uses_key,
            merges_parameters=self.options.lora is not None,
        )
        if isinstance(self.model, AdaptedModel):
            self.model.convert(dtype)
            few = self._fetch("test", torch.arange(min(2, len(self.data.test))), MODALITIES)
            self.model.check(self.layout.views(self.init(seed)), with_first_question(few))

    # ---- what is asked for

    def _load(self) -> ClipData:
        name, function, params = plug_in("clips", self.options.dataset, "workload.dataset")
        data = call_plug_in(function, "workload.dataset", params)
        if not isinstance(data, ClipData):
            raise DataError(
                f"data set {name!r} returned {type(data).__name__}: return gossamer.workloads.multimodal.clips.ClipData"
            )
        return data

    def _facts(self) -> Facts:
        train = self.data.train
        frames, *frame = train.video.shape[1:]
        lengths, data = (train.caption.shape[-1], train.question.shape[-1]), self.data
        words = {name: tuple(map(data.vocabulary.index, known)) for name, known in data.label_words.items()}
        shape, vocabulary = (int(frame[0]), int(frame[1]), int(frame[2])), data.vocabulary
        axes = self.options.label_axes
        return Facts(len(vocabulary), *lengths, shape, frames, data.num_labels, words, vocabulary, axes)

    @classmethod
    def build_model(cls, options: Mapping[str, Any], facts: Mapping[str, Any], seed: int) -> Any:
        """Build the model without the data, see `Workload`."""
        parsed = parse_options(VideoLanguageOptions, options, "workload")
        name, function, params = plug_in("video-language-model", parsed.model, "workload.model")
        model: VideoLanguageModel = call_plug_in(function, "workload.model", Facts.of_json(facts), **params)
        require_attributes(f"workload.model {name!r}", model, ATTRIBUTES)
        if not parsed.frozen and parsed.lora is None:
            return model
        if parsed.lora is not None and params.get("lora") is not None:
            raise ConfigError(
                f"workload.lora and workload.model.lora both put low-rank factors beside model {name!r}: leave one out"
            )
        source = partial(rng.generator, seed, "init-model")
        return AdaptedModel(model, parsed.frozen, parsed.lora, source, cls._started(parsed, model, seed))

    @staticmethod
    def _started(options: VideoLanguageOptions, model: Any, seed: int) -> dict[str, Tensor]:
        """Return the parameters of a model that start as those of a file."""
        if options.weights is None:
            return {}
        return load_parameters(options.weights, model.shapes, "workload.weights", seed)

    def blueprint(self) -> Blueprint:
        """Return what `build_model` takes of the data, and what is constant in the model."""
        return blueprint_of(self.model, self._facts().as_json())

    def params_of(self, row: Tensor) -> dict[str, Tensor]:
        """Return the whole model of a flat row [d]: frozen parameters included, low-rank factors merged."""
        params = super().params_of(row)
        return self.model.whole(params) if isinstance(self.model, AdaptedModel) else params

    def _known(self, where: str, names: tuple[str, ...], known: Any = None) -> tuple[str, ...]:
        known = tuple(self.model.graphs if known is None else known)
        for name in names:
            if name not in known:
                raise ConfigError(f"{where} names {name!r}, which is none of {', '.join(known)}{nearest(name, known)}")
        return tuple(name for name in known if name in names)

    def _divide_kinds(self, num_clients: int) -> tuple[list[Kind], NDArray[np.int16]]:
        """Return the kinds of clients, as name, modalities and tasks, and the kind of each client.

        Raises:
            ConfigError: some clients can do no task.
        """
        given, everything = self.options.client_tasks, {"+".join(self.tasks): 1.0}
        senses = parse_shares(self.options.modalities, MODALITIES, "workload.modalities")
        jobs = parse_shares(given or everything, self.tasks, "workload.client_tasks")
        sense_of, job_of = (
            assigned(kinds.shares.tolist(), num_clients, self.seed, f"assign-{what}").astype(np.int64)
            for what, kinds in (("modalities", senses), ("tasks", jobs))
        )
        found, numbers = list[Kind](), dict[tuple[int, int], int]()
        for sense, job in product(range(len(senses.names)), range(len(jobs.names))):
            members = np.flatnonzero((sense_of == sense) & (job_of == job))
            if not len(members):
                continue
            has, wanted = (
                tuple(name for name, held in zip(known, kinds.holds[number], strict=True) if held)
                for known, kinds, number in ((MODALITIES, senses, sense), (self.tasks, jobs, job))
            )
            able = tuple(task for task in wanted if self.model.graphs[task].modalities <= frozenset(has))
            tasks = tuple(task for task in able if self.model.graphs[task].modules)
            if able and not tasks:
                raise ConfigError(
                    f"client {members[0]} has {senses.names[sense]} and does {' and '.join(able)}, of which"
                    " workload.lora or workload.frozen leaves nothing to train: train some of their modules"
                )
            name = senses.names[sense]
            if not tasks:
                raise ConfigError(
                    f"client {members[0]} has {name} and would do {' and '.join(wanted)}, none of which it can do"
                    " without the other modalities: add a task that needs no others to workload.tasks"
                    f" (of {', '.join(self.model.graphs)})"
                )
            numbers[sense, job] = len(found)
            found.append(Kind(name if given is None else f"{name}: {jobs.names[job]}", has, tasks))
        of_client = [numbers[pair] for pair in zip(sense_of.tolist(), job_of.tolist(), strict=True)]
        return found, np.array(of_client, dtype=np.int16)

    def _modules(self, tasks: tuple[str, ...]) -> frozenset[str]:
        return frozenset[str]().union(*(self.model.graphs[task].modules for task in tasks))

    def _presence(self, split: str, rates: Any, count: int) -> dict[str, Tensor]:
        """Return which samples of a split have each modality, float32 [count]."""
        chances = missing_rates(rates, MODALITIES, f"workload.missing.{split}")
        found = presence(np.ones((count, len(MODALITIES)), dtype=bool), chances, self.seed, f"missing-{split}")
        return {name: torch.from_numpy(found[:, i].astype(np.float32)) for i, name in enumerate(MODALITIES)}

    # ---- the contract

    def init(self, seed: int) -> Tensor:
        """Return initial parameters as a flat row [d]; in float64 they are those of float32."""
        drawn = self.model.init(rng.generator(seed, "init-model"))
        return self.layout.flatten({**drawn, **self._start}).to(self.dtype)

    def digest(self) -> str:
        """Return a digest of the data, their partition, who has what, and what of the model is given or not trained."""
        given: tuple[Any, ...] = (self._train.labels, self._train.answer) if self._train is not self.data.train else ()
        if isinstance(self.model, WithConstants):
            given += (self.model.constants,)
        if self.options.weights is not None:
            given += (self.layout.views(self.init(self.seed)),)
        return digest_of(self.data, self.partition, self._kind_of_client.astype(np.int64), self._present, *given)

    def client_labels(self, clients: Ints) -> Tensor:
        """Return bool [s, num_labels]: the classes of each client's samples, of each label axis as `Layout.labels`."""
        axes = {axis.partition(":")[2]: start for axis, start in self.layout.labels or ()}
        return held_labels(
            [self.partition.of_client(client) for client in clients], self._train.labels, axes, self.num_labels
        )

    def client_holdings(self, clients: Ints) -> NDArray[np.int16]:
        """Return int16 [s]: the number among `holdings` of what each client holds."""
        return self._kind_of_client[clients]

    def batch(self, clients: Ints, positions: Ints, round: int = 0, phase: int = 0) -> Batch:
        """Assemble samples for a block of clients of the same holding, see `Workload`.

        Returns:
            samples, of the modalities that the clients have: ``"video"``: float32 [s, m, frames, channels, h, w], and
            its labels, int64 [s, m], -1 where one is missing; ``"caption"``: int64 [s, m, n], ``"question"``: int64
            [s, m, q], one of each video's, and ``"answer"``: int64 [s, m], `PAD` where it is missing; ``"has_video"``
            and ``"has_text"``: float32 [s, m], 0 where a sample lacks it; and, only where a row is padded, ``"mask"``;
            client constants ``"weight.<task>"``: float32 [s], of the tasks that they do.
        """
        _, modalities, tasks = self._kinds[self._kind_of_client[clients[0]]]
        padding = positions < 0
        rows = self.partition.indices[self.partition.offsets[clients][:, None] + np.maximum(positions, 0)]
        samples = self._fetch("train", torch.from_numpy(rows), modalities)
        if "text" in modalities:
            turn = (torch.from_numpy(rows) + round) % samples["question"].shape[2]
            samples["answer"] = samples["answer"].gather(2, turn[..., None])[..., 0]
            index = turn[..., None, None].expand(-1, -1, 1, samples["question"].shape[-1])
            samples["question"] = samples["question"].gather(2, index)[:, :, 0]
        if padding.any():
            samples["mask"] = torch.from_numpy((~padding).astype(np.float32))
        factors = {task: self.options.task_weights.get(task, 1.0) for task in tasks}
        return Batch(samples, {WEIGHT + task: torch.full((len(clients),), f) for task, f in factors.items()})

    def _fetch(self, split: str, rows: Tensor, modalities: tuple[str, ...]) -> dict[str, Tensor]:
        """Return clips of a split, of these modalities, all questions of each; what is missing is 0 or `PAD`."""
        clips = self._train if split == "train" else self.data.test
        present, found = {name: self._present[split][name][rows] for name in modalities}, dict[str, Tensor]()
        if "video" in modalities:
            shown = present["video"][(...,) + (None,) * 4]
            pixels = clips.video[rows].to(self.dtype).div_(255)
            found["video"] = pixels.sub_(self.data.mean).div_(self.data.std).mul_(shown.to(self.dtype))
            found |= {name: label[rows] for name, label in clips.labels.items()}
        if "text" in modalities:
            absent = present["text"] == 0
            for name, tokens in (("caption", clips.caption), ("question", clips.question), ("answer", clips.answer)):
                found[name] = tokens[rows]
                found[name][absent] = PAD
        return found | {f"has_{name}": value for name, value in present.items()}

    def loss(self, params: Params, batch: Mapping[str, Any]) -> Tensor:
        """Return the sum of the tasks' mean losses, each times its weight, see `Workload`."""
        tasks = [task for task in self.tasks if WEIGHT + task in batch]
        held = dict(batch)
        if (mask := held.get("mask")) is not None:
            held |= {name: batch[name] * mask for name in ("has_video", "has_text") if name in batch}
        context = ForwardContext(batch.get("scale", 1.0), key=batch.get("key"))
        found = self.model.losses(tasks, params, held, context)
        if ANSWERING in found:
            losses, weights = found[ANSWERING]
            found[ANSWERING] = losses, weights * (held["answer"] != PAD)
        return sum_of([weighted_mean(*found[task]) * batch[WEIGHT + task] for task in tasks])

    @torch.no_grad()
    def evaluate(self, params: Params, statistics: Mapping[str, Tensor], chunk: int) -> Sums:
        """Return sums over one pool of test clips, of the tasks whose modules are in `params`."""
        pool = slice(chunk * self.data.pool, (chunk + 1) * self.data.pool)
        rows = torch.arange(len(self.data.test))[pool]
        batch = self._fetch("test", rows, MODALITIES)
        found = self._pool(params, batch, rows)
        for prefix, other in altered(batch, self.options.shuffles, self._without, self.seed, chunk):
            found |= {prefix + name: value for name, value in self._pool(params, other, rows).items()}
        return found

    def _pool(self, params: Params, batch: dict[str, Tensor], rows: Tensor) -> Sums:
        held, found = {name.partition(".")[0] for name in params}, Sums()
        for task in self.measured:
            if self.model.graphs[task].modules | self.model.graphs[task].predicts <= held:
                found |= self._measured(task, params, batch, rows)
        return found

    def _measured(self, task: str, params: Params, batch: Mapping[str, Tensor], rows: Tensor) -> Sums:
        one, clips = with_first_question(batch), self.data.test
        here = replace(
            clips,
            video=clips.video[rows],
            caption=clips.caption[rows],
            question=clips.question[rows],
            answer=clips.answer[rows],
            labels={name: label[rows] for name, label in clips.labels.items()},
        )
        if task == ANSWERING:
            each = [
                self.model.predict(task, params, {**one, "question": batch["question"][:, i]})["logits"]
                for i in range(batch["question"].shape[1])
            ]
            predicted = {"logits": torch.stack(each, dim=1)}
        else:
            predicted = self.model.predict(task, params, one)
        loss = weighted_mean(*self.model.losses([task], params, one, ForwardContext(training=False))[task])
        sums: Sums = self._measures[task].sums(predicted, here)
        return flat({f"loss.{task}": float(loss) * len(rows), f"count.{task}": float(len(rows))}) | sums

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Turn added-up sums into metrics: the mean loss of all tasks, and what `tasks` says of each of them.

        With the option `shuffles`, ``<metric>_shuffled`` is the mean over orders of the frames, at test time alone
        (HiTeA, arXiv 2212.14546), and ``<metric>_drop`` by how much the metric is better in the right order: its
        temporal reliance. With the option `without`, ``<metric>_without_<modality>`` is measured on clips that lack it.
        """
        found = self._metrics_of(sums)
        return found | altered_metrics(found, sums, self.options.shuffles, self._without, self._metrics_of)

    def _metrics_of(self, sums: Sums) -> dict[str, float]:
        done = [task for task in self.measured if f"loss.{task}" in sums]
        losses = {task: float(sums[f"loss.{task}"].sum() / sums[f"count.{task}"].sum()) for task in done}
        found = {"loss": sum(losses.values())} | {f"loss_{task.replace('-', '_')}": v for task, v in losses.items()}
        for task in done:
            found |= self._measures[task].metrics(sums)
        return found
