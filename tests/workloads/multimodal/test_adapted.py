"""Adapters in some modules of a model of videos and texts: what is trained, sent and held, and what keeps its bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import gossamer
from federation import digest
from gossamer.cli.main import app
from gossamer.errors import ConfigError
from gossamer.testing import check_workload
from gossamer.workloads.multimodal.adapted import AdaptedModel
from gossamer.workloads.multimodal.workload import VideoLanguage
from video_language import SMALL, gradients, merged, nudged

LORA = {"rank": 4, "targets": ["text.*.query", "text.*.value"]}
SENSES = {"video+text": 0.5, "text": 0.5}
TASKS = ("retrieval", "masked-language")


def made(**options: Any) -> VideoLanguage:
    """Return a workload with factors in the text encoder alone."""
    given = {**SMALL, "modalities": SENSES, "tasks": TASKS, "lora": LORA} | options
    return VideoLanguage(given, num_clients=4, partition="iid", seed=0)


def federation(out: Path, **changes: Any) -> Any:
    """Run two rounds of four clients, two of them of text alone."""
    workload = {"name": "video-language", **SMALL, "modalities": SENSES, "tasks": TASKS, "lora": LORA}
    given = {
        "rounds": 2,
        "workload": workload | changes.pop("workload", {}),
        "clients": {"num": 4, "per_round": 4},
        "train": {"lr": 0.01, "batch_size": 8, "steps": 2, "optimizer": {"name": "adam"}},
        "engine": {"name": "local", "workers": changes.pop("workers", 0)},
    }
    return gossamer.run(given | changes, out=out)


def test_only_the_factors_of_their_module_are_there() -> None:
    workload = made()
    assert workload.layout.modules == ("text",)
    assert all(name.endswith((".lora_A", ".lora_B")) for name in workload.layout.names)
    assert {holding.modules for holding in workload.holdings} == {frozenset({"text"})}
    check_workload(workload)


def test_starts_as_the_base_and_is_what_merging_makes_of_it() -> None:
    workload, base = made(), made(lora=None)
    batch = merged(workload)
    assert isinstance(workload.model, AdaptedModel)
    start = workload.layout.views(workload.init(0))
    of_base = base.layout.views(base.init(0))
    assert float(workload.loss(start, batch)) == pytest.approx(float(base.loss(of_base, batch)), rel=1e-6)
    params = nudged(workload)
    whole = workload.params_of(workload.layout.flatten(params))
    assert [*whole] == [*of_base]
    assert float(workload.loss(params, batch)) == pytest.approx(float(base.loss(whole, batch)), rel=1e-4)
    assert abs(float(workload.loss(params, batch)) - float(base.loss(of_base, batch))) > 1e-3
    assert all(grad is not None and bool(grad.any()) for grad in gradients(workload, params, batch).values())


@pytest.mark.parametrize("capacities", [[1.0], [0.5, 1.0]], ids=["one rank", "rolling ranks"])
def test_the_base_keeps_its_bits(tmp_path: Path, capacities: list[float]) -> None:
    """Everything but the targets; the traffic is the factors'; workers change no bits."""
    changes = {} if capacities == [1.0] else {"submodel": {"capacities": capacities, "strategy": "rolling"}}
    runs = [federation(tmp_path / str(workers), workers=workers, **changes) for workers in (0, 2)]
    assert digest(runs[0].params) == digest(runs[1].params)
    workload = made()
    before = workload.params_of(workload.init(0))
    moved = {name for name, value in before.items() if not torch.equal(value, runs[0].params[name])}
    assert moved == {"text.layer0.attention.query.weight", "text.layer0.attention.value.weight"}
    ranks = [4] * 4 if capacities == [1.0] else [4, 4, 2, 2]
    sent = sum(2 * 2 * 16 * rank for rank in ranks)  # A and B of two targets of 16 x 16
    assert runs[0].metrics[-1]["total_bytes_up"] == 2 * 4 * sent


def test_a_module_can_be_frozen(tmp_path: Path) -> None:
    done = federation(tmp_path / "a", workload={"lora": None, "frozen": ["vision.*", "latents.*"]})
    workload = made(lora=None)
    before = workload.layout.views(workload.init(0))
    still = {name.partition(".")[0] for name, value in before.items() if torch.equal(value, done.params[name])}
    assert {"vision", "latents"} <= still
    assert not {"text", "universal"} & still
    assert {"recall1_text_to_video", "loss_retrieval"} & {*done.metrics[-1]}  # measured by frozen modules, too


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lora": {"rank": 4, "targets": ["speech.*"]}}, r"'speech\.\*' matches no parameter"),
        (
            {"lora": None, "frozen": ["visoin.*"]},
            r"frozen: 'visoin\.\*' matches no parameter; did you mean 'vision'\? \(the model's modules: contrast, deco",
        ),
        ({"lora": {"rank": 3, "targets": ["vision.*.mix"]}, "modalities": {"video+text": 1.0}}, r"used otherwise than"),
        ({"lora": {"rank": 4, "targets": ["contrast.*"]}}, r"client \d has text and does masked-language, of which"),
        ({"frozen": ["text.*"]}, r"says nothing beside workload\.lora"),
    ],
    ids=["unknown", "misspelt", "no linear layer", "nothing to train", "frozen too"],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        made(**options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """Return a run of all modules, and the path of its export with the seed left open."""
    folder = tmp_path_factory.mktemp("trained")
    done = federation(folder / "run", workload={"lora": None})
    exported = CliRunner().invoke(app, ["export", str(done.directory), "-o", str(folder / "end-0.safetensors")])
    assert exported.exit_code == 0, exported.output
    return done, str(folder / "end-{seed}.safetensors")


class TestGivenWeights:
    """A run that starts where another one ended."""

    @pytest.mark.parametrize("changes", [{"lora": None}, {}, {"lora": None, "frozen": ["vision.*"]}])
    def test_whole_models_start_as_the_file_says(self, trained: tuple[Any, str], changes: dict[str, Any]) -> None:
        """With and without factors and frozen modules."""
        done, path = trained
        workload = made(**changes, weights=path)
        started = workload.params_of(workload.init(0))
        assert digest(started) == digest(done.params)
        assert workload.digest() != made(**changes).digest()

    def test_training_goes_on_from_there(self, trained: tuple[Any, str], tmp_path: Path) -> None:
        """Workers make the same of it, and the frozen part of the file keeps its bits."""
        done, path = trained
        changes = {"lora": None, "frozen": ["vision.*"], "weights": path}
        runs = [federation(tmp_path / str(workers), workload=changes, workers=workers) for workers in (0, 2)]
        assert digest(runs[0].params) == digest(runs[1].params)
        kept = {name for name, value in done.params.items() if torch.equal(value, runs[0].params[name])}
        assert {name for name in done.params if name.startswith("vision.")} <= kept
        assert not any(name.startswith("text.") and name.endswith("query.weight") for name in kept)

    def test_other_models_and_files_are_refused(self, trained: tuple[Any, str], tmp_path: Path) -> None:
        larger = {**SMALL["model"], "stream": 32}
        with pytest.raises(ConfigError, match=r"workload\.weights: the model needs '.*' of shape .*, but .* has one"):
            made(lora=None, model=larger, weights=trained[1])
        with pytest.raises(ConfigError, match=r"workload\.weights: 'nowhere-0' cannot be read .*: give a file that"):
            made(lora=None, weights="nowhere-{seed}")
        broken = {name: value.clone() for name, value in trained[0].params.items()}
        broken[next(iter(broken))].fill_(float("nan"))
        save_file(broken, tmp_path / "broken.safetensors")
        with pytest.raises(
            ConfigError, match=r"workload\.weights: '.*' of '.*broken.*' has values that are not finite"
        ):
            made(lora=None, weights=str(tmp_path / "broken.safetensors"))
