"""Averaging alone: peers start from different points and train nothing, which shows how fast a topology mixes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from gossamer import rng
from gossamer.errors import ConfigError
from gossamer.options import Options, parse_options
from gossamer.submodel.layout import Layout
from gossamer.threads import one_thread
from gossamer.workloads.base import Batch, Params, Sums, Workload
from gossamer.workloads.traits import WorkloadTraits

Ints = NDArray[np.int64]


class ConsensusOptions(Options):
    """Options of `Consensus`.

    Attributes:
        dim: coordinates of each peer's point.
        precision: precision of the points: ``"single"`` (float32) or ``"double"`` (float64). Metrics are in float64.
    """

    dim: int = Field(10, ge=1)
    precision: Literal["single", "double"] = "double"


class Consensus(Workload):
    """Average consensus; see `base.Workload` for the attributes and methods.

    Peer i starts from its own standard normal point, and the loss is 0 wherever it is, so that a round of DSGD is
    x <- W x and nothing else: the experiment by which Song et al., "Communication-Efficient Topologies for
    Decentralized Learning with O(1) Consensus Rate" (NeurIPS 2022), compare topologies.

    Raises (when built):
        ConfigError: an unknown or wrong option, or a partition.
    """

    Options = ConsensusOptions
    traits = WorkloadTraits(stacks_natively=True, has_peer_init=True, has_peer_metrics=True)

    def __init__(
        self, options: Mapping[str, Any], *, num_clients: int, partition: Mapping[str, Any] | str, seed: int
    ) -> None:
        """Set the size.

        Args:
            options: see `ConsensusOptions`.
            num_clients: number of peers.
            partition: ``"iid"``, the default; there is no data.
            seed: seed of the points.
        """
        self.options = parse_options(self.Options, options, "workload")
        if partition not in ("iid", {"name": "iid"}):
            raise ConfigError(f"peers.partition = {partition!r}, but this workload has no data to split: leave it out")
        self.num_clients, self.seed = num_clients, seed
        self.num_samples = np.ones(num_clients, dtype=np.int64)
        self.layout = Layout.of({"x": (self.options.dim,)}, {"x": (None,)})
        self._dtype = torch.float64 if self.options.precision == "double" else torch.float32

    def init(self, seed: int) -> Tensor:
        """Return zeros [layout.d] of the precision; `peer_init` takes their place."""
        return torch.zeros(self.layout.d, dtype=self._dtype)

    def peer_init(self, seed: int) -> Tensor:
        """Return a standard normal point of each peer, [num_clients, layout.d] of the precision."""
        points = rng.generator(seed, "consensus-start").standard_normal((self.num_clients, self.options.dim))
        rows = torch.zeros(self.num_clients, self.layout.d, dtype=self._dtype)
        self.layout.views(rows)["x"].copy_(torch.from_numpy(points))
        return rows

    def batch(self, clients: Ints, positions: Ints, round: int = 0, phase: int = 0) -> Batch:
        """Return one number a sample, ``"nothing"``: zeros [s, m] of the precision, which the loss does not read."""
        return Batch({"nothing": torch.zeros(positions.shape, dtype=self._dtype)}, {})

    def loss(self, params: Params, batch: Mapping[str, Any]) -> Tensor:
        """Return 0 with a gradient of 0.

        Args:
            params: ``"x"``: [dim], or [s, dim] of s peers at once.
            batch: not used.

        Returns:
            a scalar, or [s].
        """
        return (0.0 * params["x"]).sum(-1)

    def evaluate(self, params: Params, statistics: Mapping[str, Tensor], chunk: int) -> Sums:
        """Return the loss, ``{"loss": float64 [1]}``."""
        return {"loss": np.zeros(1)}

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Return ``loss``, 0."""
        return {"loss": float(sums["loss"][0])}

    def peer_metrics(self, rows: Tensor) -> dict[str, float]:
        """Return how far peers are from agreeing.

        Args:
            rows: [n, layout.d], a point a row.

        Returns:
            ``relative_distance``: |X - mean of X| / |X_0 - mean of X_0|, Frobenius norms, X_0 being where they started.
        """
        return {"relative_distance": self._distance(rows) / self._distance_at_start}

    @cached_property
    def _distance_at_start(self) -> float:
        return self._distance(self.peer_init(self.seed))

    def _distance(self, rows: Tensor) -> float:
        """Return the Frobenius norm of the points less their mean."""
        with one_thread():  # the same bits, however many threads there are
            x = self.layout.views(rows)["x"].double()
            return float((x - x.mean(0)).norm())
