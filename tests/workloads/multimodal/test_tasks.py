"""What is measured: recalls by hand, the order of frames, and a third party's model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import gossamer
from gossamer.errors import ConfigError
from gossamer.testing import check_workload
from gossamer.workloads.multimodal.tasks import ranks
from gossamer.workloads.multimodal.workload import VideoLanguage
from video_language import SMALL, nudged, workload

POOLED = (("name", "mean_pool:MeanPool"),)


def test_ranks_by_hand() -> None:
    """Row by row: best of all, second, and tied with another, which counts against it."""
    similarity = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.5, 0.4], [0.3, 0.7, 0.7]])
    assert ranks(similarity).tolist() == [0, 1, 1]


def test_an_embedding_that_tells_all_captions_apart_finds_all() -> None:
    made = workload(tasks=("retrieval",))
    measure, clips = made._measures["retrieval"], made.data.test
    alike = torch.nn.functional.one_hot(torch.arange(len(clips))).float()
    found = measure.metrics(measure.sums({"video": alike, "text": alike}, clips))
    assert set(found.values()) == {1.0}
    constant = torch.ones_like(alike)
    assert set(measure.metrics(measure.sums({"video": constant, "text": constant}, clips)).values()) == {0.0}


def test_captions_that_are_right() -> None:
    made = workload(tasks=("captioning",))
    measure, clips = made._measures["captioning"], made.data.test
    found = measure.metrics(measure.sums({"tokens": clips.caption}, clips))
    baseline = found.pop("cider_d_bigram")
    assert 0.5 < baseline < 3.0
    right = {"caption_accuracy": 1.0, "object_recall": 1.0}
    assert found == right | {"cider_d": pytest.approx(10.0), "bleu_4": pytest.approx(100.0)}


def test_objects_are_found_word_by_word() -> None:
    """Captions of other clips: the digit of the next clip is another one for one clip of twelve."""
    made = workload(tasks=("captioning",))
    measure, clips = made._measures["captioning"], made.data.test
    found = measure.metrics(measure.sums({"tokens": clips.caption.roll(-1, 0)}, clips))
    assert found["object_recall"] == pytest.approx(11 / 12)
    assert found["caption_accuracy"] == 0.0


def test_a_model_without_time_does_not_rely_on_it() -> None:
    made = workload(model=POOLED, shuffles=3)
    found = made.metrics(made.evaluate(nudged(made), {}, 0))
    drops = {name: value for name, value in found.items() if name.endswith("_drop")}
    assert len(drops) > 8
    assert max(abs(value) for name, value in drops.items() if not name.startswith("loss")) < 1e-6
    assert max(abs(value) for value in drops.values()) < 1e-5


def test_a_model_with_time_sees_another_order() -> None:
    made = workload(tasks=("recognition",), shuffles=2)
    found = made.metrics(made.evaluate(nudged(made), {}, 0))
    assert abs(found["loss_recognition_drop"]) > 1e-6
    assert found["loss_recognition_shuffled"] == pytest.approx(found["loss"] - found["loss_recognition_drop"])


def test_without_a_modality_metrics_are_those_of_clips_that_all_lack_it() -> None:
    made = workload(without=("video", "text"))
    params = nudged(made)
    found = made.metrics(made.evaluate(params, {}, 0))
    lacking = {name for name in found if "_without_" in name}
    assert {name.partition("_without_")[2] for name in lacking} == {"video", "text"}
    assert not any(name.startswith("loss") for name in lacking)
    assert found["motion_accuracy_without_text"] == found["motion_accuracy"]
    for modality in ("video", "text"):
        blind = VideoLanguage({**SMALL, "missing": {"test": {modality: 1.0}}}, num_clients=4, partition="iid", seed=0)
        expected = blind.metrics(blind.evaluate(params, {}, 0))
        for name in lacking:
            if name.endswith(f"_{modality}"):
                assert found[name] == expected[name.partition("_without_")[0]], name


def test_a_modality_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"workload.without names 'vidoe', .*did you mean 'video'"):
        workload(without=("vidoe",))


def test_a_third_party_s_model_keeps_the_contract() -> None:
    check_workload(workload(model=POOLED))


def test_a_third_party_s_model_is_trained_from_a_file(tmp_path: Path) -> None:
    """Named in YAML, cut by capacity, held by modality, and better at what it is trained for."""
    file = tmp_path / "pool.yaml"
    file.write_text(
        """
        rounds: 6
        workload:
          name: video-language
          dataset: {name: moving-digits, num_train: 240, num_pools: 1}
          model: mean_pool:MeanPool
          modalities: {video+text: 0.5, video: 0.5}
        clients: {num: 4, per_round: 4}
        train: {lr: 0.02, batch_size: 20, epochs: 2, optimizer: {name: adam}}
        algorithm: heterofl
        submodel: {capacities: [0.5, 1.0]}
        engine: {name: local, workers: 0}
        """
    )
    done = gossamer.run(file, out=tmp_path / "run")
    first, last = done.metrics[0], done.metrics[-1]
    assert last["train_loss"] < first["train_loss"] - 0.1
    assert last["loss_recognition"] < math.log(10) + math.log(12)  # of guesses
