"""What a run that diverged or learned nothing says at its end, from real runs, and what sound runs do not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer.build import build
from gossamer.config import diagnosis
from gossamer.config.diagnosis import diagnose
from gossamer.config.loading import parse
from gossamer.errors import GossamerWarning, QuorumError
from gossamer.storage.runlog import read_events

DIGITS: dict[str, Any] = {
    "rounds": 5,
    "workload": {"dataset": {"name": "digits", "limit": 200}, "model": {"name": "mlp", "hidden": [16]}},
    "clients": {"num": 4, "per_round": 4},
    "train": {"lr": 0.1, "batch_size": 25},
    "engine": {"workers": 0},
}
PEERS: dict[str, Any] = {
    "rounds": 5,
    "workload": {"name": "least-squares", "num_samples": 20},
    "peers": {"num": 4, "topology": "ring"},
    "train": {"lr": 1.5, "steps": 1, "batch_size": 20},
    "engine": {"workers": 0},
}


class Attention(nn.Module):
    """A transformer over the rows of an image, as the Scaler makes it overflow."""

    def __init__(self, shape: tuple[int, int, int], num_labels: int) -> None:
        super().__init__()
        self.embed = nn.Linear(shape[2], 32)
        sizes: dict[str, Any] = {"dim_feedforward": 64, "dropout": 0.0, "batch_first": True, "norm_first": True}
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(32, 4, **sizes) for _ in range(3)))
        self.head = nn.Linear(32, num_labels)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x.squeeze(1))).mean(1))


def run(config: dict[str, Any], out: Path) -> list[str]:
    """Run and return the warnings, which events.jsonl has as well."""
    with pytest.warns(GossamerWarning) as told:
        gossamer.run(config, out=out)
    messages = [str(one.message) for one in told]
    assert [one["message"] for one in read_events(out) if one["kind"] == "warning"][-1] == messages[-1]
    return messages


class TestRealRuns:
    def test_a_loss_that_grows(self, tmp_path: Path) -> None:
        (told,) = run(PEERS, tmp_path / "run")
        assert told.startswith("the run diverged: the training loss rose from ")
        assert told.endswith(" in round 5: lower train.lr or set train.clip_norm")

    def test_a_learning_rate_at_which_nothing_is_learned(self, tmp_path: Path) -> None:
        (told,) = run(DIGITS | {"train": {"lr": 1e-6}}, tmp_path / "run")
        assert told.startswith("the run learned nothing in 5 rounds: accuracy was never above ")
        assert told.endswith("guessing gives 10.0%: raise train.lr = 1e-06, or train for longer (rounds, train.epochs)")

    def test_attention_and_the_scaler(self, tmp_path: Path) -> None:
        """All updates are lost; the Scaler is named first, and without it the same run goes on."""
        workload = DIGITS["workload"] | {"model": f"{__name__}:Attention", "local_evaluation": False}
        config = DIGITS | {
            "workload": workload,
            "algorithm": "heterofl",
            "submodel": {"capacities": [0.25, 0.125]},
            "train": {"lr": 0.1, "batch_size": 10, "epochs": 2},
        }
        with pytest.raises(QuorumError) as refused:
            gossamer.run(config, out=tmp_path / "lost", trust=True)
        told = str(refused.value)
        assert (
            ": set submodel.scaler to false (trial steps of capacity 0.125 diverge with the Scaler and not without)"
            in told
        )
        assert ", or lower train.lr or set train.clip_norm, or lower clients.quorum; round " in told
        without = config | {"submodel": config["submodel"] | {"scaler": False}}
        assert len(gossamer.run(without | {"rounds": 3}, out=tmp_path / "kept", trust=True).metrics) == 3

    def test_a_rate_that_is_too_high_for_the_quorum(self, tmp_path: Path) -> None:
        with pytest.raises(QuorumError, match=r"usable and .*: lower train.lr or set train.clip_norm, or lower"):
            gossamer.run(DIGITS | {"train": {"lr": 1e25}}, out=tmp_path / "run")

    @pytest.mark.filterwarnings("error::gossamer.errors.GossamerWarning")
    def test_a_sound_run_says_nothing(self, tmp_path: Path) -> None:
        gossamer.run(DIGITS | {"train": {"lr": 0.3, "epochs": 3}}, out=tmp_path / "clients")
        gossamer.run(PEERS | {"train": PEERS["train"] | {"lr": 0.3}}, out=tmp_path / "peers")


class TestRecords:
    """What is read off records alone."""

    def diagnose(self, *records: dict[str, Any], **more: Any) -> str:
        """Return the sentence about records, of a run of ten classes."""
        parts = build(parse(DIGITS | more))
        filled = [{"dropped": {}, "num_survivors": 4, "train_loss": 2.0} | record for record in records]
        return "".join(diagnose(parts.config, parts.task, filled))

    def test_a_loss_that_is_not_finite(self) -> None:
        losses = [2.0, math.inf, 3.0, None, math.inf]
        told = self.diagnose(*({"train_loss": loss, "accuracy": 0.1} for loss in losses))
        assert told.startswith("the run diverged: the training loss is not finite since round 4: lower")
        assert self.diagnose(*({"train_loss": loss} for loss in losses[:3])) == ""
        assert "not finite since round 1: " in self.diagnose(*[{"train_loss": None}] * 3)

    def test_dropped_updates(self) -> None:
        lost = {"dropped": {"not finite": 1, "too large": 1, "late": 9}, "num_survivors": 2}
        assert "4 of 8 updates were dropped" in self.diagnose(lost, lost)
        assert self.diagnose(lost | {"dropped": {"late": 9}}) == ""

    def test_an_accuracy_that_collapses(self) -> None:
        values = [0.8, 0.9, 0.3, 0.2, 0.1]
        told = self.diagnose(*({"accuracy": value} for value in values))
        assert told.startswith("the run diverged: accuracy fell from 90.0% to 10.0%: lower train.lr")
        assert self.diagnose(*({"accuracy": value} for value in [*values, 0.5])) == ""

    def test_few_rounds_tell_nothing(self) -> None:
        assert self.diagnose() == ""
        chance = {"accuracy": 0.1}
        assert self.diagnose(*[chance] * 4) == ""
        assert self.diagnose(*[chance] * 5).startswith("the run learned nothing")
        assert self.diagnose(*[chance] * 5, {"accuracy": 0.2}) == ""

    def test_a_loss_that_was_large_asks_for_smaller_steps(self) -> None:
        told = self.diagnose({"train_loss": 50.0, "accuracy": 0.1}, *[{"train_loss": 2.3}] * 4)
        assert "lower train.lr = 0.1 or set train.clip_norm, because the training loss rose to 50" in told

    def test_sub_models_that_learn_but_are_not_evaluated(self) -> None:
        records = [{"train_loss": 2.3 - 0.2 * number, "accuracy": 0.1} for number in range(5)]
        more = {"algorithm": "heterofl", "submodel": {"capacities": [0.25]}}
        told = self.diagnose(*records, **more)
        assert "fell from 2.3 to 1.5, but the whole model, and sub-models without the Scaler" in told

    def test_characters(self) -> None:
        assert "frequencies of characters" in self.diagnose(*[{"bits_per_character": 3.0, "unigram_bits": 2.9}] * 5)
        assert self.diagnose(*[{"bits_per_character": 2.8, "unigram_bits": 2.9}] * 5) == ""


class TestScaler:
    DEEP = {"dataset": {"name": "digits", "limit": 200}, "model": {"name": "mlp", "hidden": [64] * 3}}

    @pytest.mark.parametrize(("lr", "expected"), [(0.3, False), (1.0, True), (30.0, False)])
    def test_it_is_blamed_where_the_same_steps_are_stable_without_it(self, lr: float, expected: bool) -> None:
        """Not where all is well, nor where steps are too long anyway."""
        more = {"workload": self.DEEP, "algorithm": "heterofl", "submodel": {"capacities": [0.125]}}
        parts = build(parse(DIGITS | more | {"train": {"lr": lr, "batch_size": 25}}))
        assert diagnosis.scaler_diverges(parts.task, lr) is expected
        told = "set submodel.scaler to false (trial steps of capacity 0.125 diverge with the Scaler and not without)"
        assert diagnosis.advice(parts.config, parts.task).startswith(told) is expected

    def test_whole_models_have_none(self) -> None:
        parts = build(parse(DIGITS))
        assert not diagnosis.scaler_diverges(parts.task, 1e10)
        assert diagnosis.advice(parts.config, parts.task) == "lower train.lr or set train.clip_norm"

    def test_clipped_gradients(self) -> None:
        parts = build(parse(DIGITS | {"train": {"lr": 0.1, "clip_norm": 1.0}}))
        assert diagnosis.advice(parts.config, parts.task) == "lower train.lr or lower train.clip_norm"


def test_torch_keeps_its_threads() -> None:
    before = torch.get_num_threads()
    diagnosis.scaler_diverges(
        build(parse(DIGITS | {"algorithm": "heterofl", "submodel": {"capacities": [0.5]}})).task, 0.1
    )
    assert torch.get_num_threads() == before
