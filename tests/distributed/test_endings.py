"""Each wrong input ends all ranks: with one sentence and exit code 2 on a rank that knows; see endings.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gossamer

HERE = Path(__file__).parent
LIMIT_SECONDS = 280
EXPECTED: dict[str, str] = {  # what rank 1, or both, or rank 0 in their name, say
    "another_file": r"rank 1 has configuration '\w+', but rank 0 has '\w+': start all ranks with the same command",
    "another_version": r"rank 1 has gossamer '0\.0\.1', but rank 0 has '[^']+': start all ranks with the same command",
    "another_topology": r"rank 1: its topology has the digest \w+, but rank 0's has \w+: give all ranks the same files",
    "other_data": r"rank 1: its data has the digest \w+, but rank 0's has \w+: give all ranks the same files",
    "more_ranks_than_clients": r"torchrun started 2 ranks, but there are only 1 clients: start 1 or fewer",
    "no_such_interface": r"GLOO_SOCKET_IFNAME = 'nowhere0' is no interface of .*: name one that ip -4 address lists",
    "no_cuda_device": r"trains capacity 1\.0 on device 'cuda', which this machine does not have .*: use cpu",
    "without_torchrun": r"WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not set .*: start it by torchrun",
    "nccl_without_devices": r"backend = 'nccl' needs CUDA devices, of which there are none here: give 'gloo'",
    "no_interface_of_ones_own": r"interface = 'nowhere0' is no network interface of .*: name one of .*lo",
    "weights_that_do_not_sum": r"rank 1: self_weight 0\.5 and src_weights {0: 0\.7} sum to 1\.2, not 1: correct them",
    "shapes_that_differ": r"rank 0 has float32 \[2\] .*; rank 1 has float32 \[3\] .*: give tensors of the same shapes",
    "a_rank_that_ends": r"rank 0 waited in vain for the others .*: see whether they still run, and call the same",
    "a_world_that_changed": r"joined a group of 2, which now has 0: call gossamer\.distributed\.init\(\) again",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, str]] | None]:
    """Return how the ranks of each case ended, and what they said."""
    folder = tmp_path_factory.mktemp("endings")
    environment = {**os.environ, "PYTHONPATH": str(Path(gossamer.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "endings.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert done.returncode == 0, done.stderr[-4000:]
    results: dict[str, list[tuple[int, str]] | None] = json.loads((folder / "endings.json").read_text())
    return results


@pytest.mark.parametrize("name", EXPECTED)
def test_a_sentence(found: dict[str, list[tuple[int, str]] | None], name: str) -> None:
    ranks = found[name]
    assert ranks is not None, "the ranks hung"
    said = [re.findall(r"^(?:rank \d: )?error: .*(?:\n .*)*", text, re.MULTILINE) for _, text in ranks]
    told = [" ".join(sentence.split()) for sentences in said for sentence in sentences]
    assert any(re.search(EXPECTED[name], sentence) for sentence in told), ranks
    assert all(len(sentences) <= 1 for sentences in said), ranks
    assert [code for code, _ in ranks] == ([2, 0] if name == "a_rank_that_ends" else [2, 2])
    assert "Traceback" not in "".join(text for _, text in ranks)


def test_other_errors_keep_their_traceback(found: dict[str, list[tuple[int, str]] | None]) -> None:
    assert found["an_error_of_ones_own"] is not None
    for code, text in found["an_error_of_ones_own"]:
        assert code == 1
        assert text.splitlines()[-1].endswith("ArithmeticError: cannot count")
