"""Rows of mixings and weights of one call, without any process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gossamer import topology
from gossamer.distributed.neighbors import Neighbors, of_mixing, of_round, of_weights
from gossamer.errors import ConfigError
from gossamer.registry import BUILTIN

NUM_PEERS = {"hypercube": 8, "hyper-hypercube": 8, "torus": 9}
PARAMETERS: dict[str, dict[str, Any]] = {"random-regular": {"degree": 3}}


def matrix(rows: list[Neighbors], num_rows: int) -> Any:
    """Return the dense matrix of what all processes do."""
    n = len(rows)
    found = np.zeros((n, num_rows, n, num_rows))
    for rank, near in enumerate(rows):
        for row, weight in enumerate(near.self_weights):
            found[rank, row, rank, row] = weight
        for other, weights in near.sources.items():
            assert rank in rows[other].destinations
            for row, weight in enumerate(weights):
                found[rank, row, other, rows[other].sent_row] += weight * rows[other].destinations[rank]
        assert all(rank in rows[other].sources for other in near.destinations)
    return found.reshape(n * num_rows, n * num_rows)


@pytest.mark.parametrize("name", [name for name in BUILTIN["topology"] if name != "file"])
def test_all_rows_are_the_matrix(name: str) -> None:
    n = NUM_PEERS.get(name, 10)
    graph = topology.build(name, n, seed=1, **PARAMETERS.get(name, {}))
    for round in range(5):
        mixing = graph.mixing(round)
        rows = [of_mixing(mixing, rank) for rank in range(n)]
        np.testing.assert_allclose(matrix(rows, mixing.rows_per_site), mixing.dense(), rtol=0, atol=1e-15)


def test_a_round_must_be_given_where_rounds_differ() -> None:
    with pytest.raises(ConfigError, match="give round=0, 1, 2"):
        of_round(topology.build("one-peer-exp", 4), None, 0)
    assert of_round(topology.build("ring", 4), None, 0).sources.keys() == {1, 3}


class TestWeights:
    def test_given(self) -> None:
        near = of_weights(1, 4, 0.5, {3: 0.25, 0: 0.25}, [2, 0])
        assert near == Neighbors((0.5,), {0: (0.25,), 3: (0.25,)}, {0: 1.0, 2: 1.0})
        assert [*near.sources] == [0, 3]

    @pytest.mark.parametrize(
        ("src_weights", "dst_weights", "words"),
        [
            ({0: 0.6}, [0], r"rank 1: self_weight 0.5 and src_weights \{0: 0.6\} sum to 1.1, not 1"),
            ({0: 1.0}, {2: 0.4}, r"rank 1: self_weight 0.5 and dst_weights \{2: 0.4\} sum to 0.9, not 1"),
            ({1: 0.5}, [0], "src_weights names 1: give ranks of others, 0 to 3"),
            ({0: 0.5}, [4], "dst_weights names 4"),
            ({0: float("nan")}, [0], "sum to nan"),
        ],
    )
    def test_refused(self, src_weights: Any, dst_weights: Any, words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            of_weights(1, 4, 0.5, src_weights, dst_weights)

    def test_scaled_twice_is_nobodys_to_check(self) -> None:
        assert of_weights(1, 4, 0.5, {0: 0.7}, {2: 3.0}).destinations == {2: 3.0}
