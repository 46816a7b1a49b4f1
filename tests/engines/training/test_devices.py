"""Training on another device than the processor.

No accelerator is at hand in tests. Torch's device "meta" computes shapes only, but as strictly as any other device it
refuses operations that mix it with tensors of the processor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from federation import SINGLY, STACKED, configure, mixed, modes
from gossamer import run
from gossamer.build import build
from gossamer.config.loading import parse
from gossamer.engines.training import trainer
from gossamer.engines.training.job import Job
from gossamer.errors import ConfigError
from gossamer.plan import Block

CNN = {"workload.model": {"name": "cnn", "width": 0.125}}
RESNET = {"workload.model": {"name": "preact-resnet18", "width": 0.0625}, "workload.dataset.shape": [3, 8, 8]}
CASES: dict[str, dict[str, Any]] = {
    "perceptron": {},
    "network": CNN,
    "residual network": RESNET,
    "clipped, with momentum": {"train.clip_norm": 0.5, "train.momentum": 0.9},
    "label masks": {"workload.label_mask": "zero"},
}


@pytest.mark.sweep(keep=0.34)
@pytest.mark.parametrize("stacked", [False, True], ids=["one-by-one", "stacked"])
@pytest.mark.parametrize("algorithm", ["fedrolex", "fedprox", "scaffold"])
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left_behind_on_the_processor(
    monkeypatch: pytest.MonkeyPatch, case: str, algorithm: str, stacked: bool
) -> None:
    levels = (0.5, 1.0) if algorithm == "fedrolex" else (1.0,)
    if stacked and case == "residual network":
        pytest.skip("it mixes samples, so short batches cannot be padded")
    if algorithm == "scaffold" and "momentum" in case:
        pytest.skip("SCAFFOLD goes without momentum")
    way = STACKED if stacked else SINGLY
    task = build(parse(configure(mixed(algorithm, levels, device="meta", **way) | CASES[case]))).task
    rows = task.algorithm.init(task.workload.init(0)[None])
    monkeypatch.setattr(trainer, "numbers", lambda values: 0.0 if values.dim() == 0 else [0.0] * len(values))
    monkeypatch.setattr(trainer, "on_processor", lambda arrays: arrays)
    hosted = trainer.Trainer(task, rows)
    for variant in task.variants:
        clients = np.arange(3)
        steps = -(-task.workload.num_samples[clients] // task.batch_size)
        order = np.argsort(-steps, kind="stable")
        job = Job(
            0,
            0,
            Block(variant.index, 0, 1, slice(0, 3)),
            clients[order],
            np.ones(3),
            steps[order].astype("i4"),
            0.1,
        )
        width = variant.layout.d
        received = {name: torch.randn(1, width) for name in rows}
        private = task.algorithm.init_client(torch.zeros(3, width))
        payload, kept, losses = hosted._train_locally(job, [received] * 3, private)
        assert len(losses) == 3
        for arrays in (payload, kept):
            for value in arrays.values():
                found = [value] if isinstance(value, torch.Tensor) else value
                assert {row.device.type for row in found} == {"meta"}
                assert sum(len(row) for row in found) == 3


def test_a_device_that_is_not_there(tmp_path: Any) -> None:
    config = configure(modes(device="cuda:63"))
    with pytest.raises(ConfigError, match=r"capacity 1\.0 on device 'cuda:63', which this machine does not have"):
        run(config, out=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"device.*as torch names it"):
        parse(configure(modes(device="abacus")))
