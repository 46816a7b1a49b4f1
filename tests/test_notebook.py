"""A notebook in a kernel of its own; skipped where the packages are missing (``pip install nbclient ipykernel``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

CELLS = [
    """
import numpy as np
import torch
from torch import nn
import gossamer
x = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
y = (x[:, 0] + x[:, 1] > 0).astype(np.int64)

class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))

    def forward(self, x):
        return self.layers(x)

seen = []
def train(workers):
    return gossamer.run(model=Net, data=(x[:240], y[:240], x[240:], y[240:]), rounds=3, train={"lr": 0.5},
                        clients={"num": 6, "per_round": 3}, engine={"workers": workers}, out=f"run-{workers}",
                        on_round=lambda record: seen.append((workers, record["round"])))
""",
    "alone = train(0)",
    "two = train(2)",
    """
same = all(torch.equal(alone.params[name], two.params[name]) for name in alone.params)
print(same, seen, alone.metrics[-1]["accuracy"] > 0.8)
""",
    "two",
    """
end = gossamer.run(model=Net(4), data=(x, y), rounds=5, clients=4, train={"lr": 0.5}, engine={"workers": 0},
                   out="ended", progress=False, on_round=lambda record: record["round"] == 1)
print(len(end.metrics), len(gossamer.resume("ended", model=Net, data=(x, y), progress=False).metrics))
""",
]


def printed(cell: Any) -> str:
    """Return what a cell wrote to its standard output."""
    return "".join(one["text"] for one in cell["outputs"] if one.get("name") == "stdout")


@pytest.fixture
def executed(tmp_path: Path) -> list[Any]:
    """Return the cells of a notebook with their outputs; the last one may fail."""
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source.strip()) for source in CELLS])
    notebook.cells[-1].metadata["tags"] = ["raises-exception"]
    client = nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    return list(notebook.cells)


def test_modules_and_arrays_of_a_notebook(executed: list[Any]) -> None:
    """On no worker and on two, with a bar, `on_round`, and another module than the run began with refused."""
    _, alone, two, compared, shown, resumed = executed
    for cell in (alone, two):
        *bars, end = printed(cell).strip().splitlines()
        assert any("/3 rounds" in bar for bar in bars), bars
        assert end.startswith("run: 3 rounds in ")
        assert "accuracy" in end
        assert [one for one in cell["outputs"] if one["output_type"] == "error"] == []
        assert [one["text"] for one in cell["outputs"] if one.get("name") == "stderr"] == []
    expected = [(workers, number) for workers in (0, 2) for number in (1, 2, 3)]
    assert printed(compared).strip() == f"True {expected} True"
    (result,) = (one["data"]["text/plain"] for one in shown["outputs"] if one["output_type"] == "execute_result")
    assert "run-2" in result
    assert printed(resumed) == ""
    (error,) = (one for one in resumed["outputs"] if one["output_type"] == "error")
    assert error["ename"] == "ConfigError"
    assert "is not the object that the run began with" in error["evalue"]
