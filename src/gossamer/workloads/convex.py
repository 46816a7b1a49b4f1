"""Least squares and logistic regression on generated data: quick to evaluate exactly, and with a known optimum.

The data of client i depends on the seed, the options and i alone. It is generated when it is first asked for, many
clients at a time, and kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from gossamer import rng
from gossamer.errors import ConfigError, warn
from gossamer.options import Options, parse_options
from gossamer.submodel.layout import Layout
from gossamer.threads import one_thread
from gossamer.workloads.base import Batch, Params, Sums, Workload, add_sums
from gossamer.workloads.traits import WorkloadTraits

BLOCK = 64  # clients that are generated together: their numbers come from one generator
CHUNK_FEATURES = 1 << 20  # numbers that are evaluated at a time
GRADIENT_NORM = 1e-13  # at an optimum, relative to that at zero where it exceeds 1
FLAT = 1e-9  # a curvature that determines nothing; features have variance 1
HALVINGS = 30
NO_OPTIMUM = (
    "optimality_gap and squared_distance are not measured, because the samples of all clients do not determine one"
    " optimum: give more samples than workload.dim, or regularise"
)
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class ConvexOptions(Options):
    """Options of every workload of this module.

    Attributes:
        dim: coordinates of the model.
        num_samples: samples of each client.
        heterogeneity: standard deviation of each coordinate of the clients' own models around the common one.
        precision: that of parameters, samples and losses: ``"single"`` (float32) or ``"double"`` (float64). Metrics
            and the optimum are computed in double precision from the samples as they are stored.
    """

    dim: int = Field(10, ge=1)
    num_samples: int = Field(50, ge=1)
    heterogeneity: float = Field(0.0, ge=0)
    precision: Literal["single", "double"] = "double"


class LeastSquaresOptions(ConvexOptions):
    """Options of `LeastSquares`; see also `ConvexOptions`.

    Attributes:
        noise: standard deviation of the targets around the predictions of the client's own model.
    """

    noise: float = Field(1.0, ge=0)


class LogisticRegressionOptions(ConvexOptions):
    """Options of `LogisticRegression`; see also `ConvexOptions`.

    Attributes:
        regulariser: ``"none"``, ``"l2"`` (R/2 |x|^2) or ``"nonconvex"`` (R sum_j x_j^2 / (1 + x_j^2)).
        regularisation: R.
    """

    num_samples: int = Field(1000, ge=1)
    heterogeneity: float = Field(0.2, ge=0)
    regulariser: Literal["none", "l2", "nonconvex"] = "nonconvex"
    regularisation: float = Field(0.001, ge=0)

    @model_validator(mode="after")
    def _used(self) -> LogisticRegressionOptions:
        if self.regulariser == "none" and "regularisation" in self.model_fields_set:
            raise ValueError(
                f"regularisation = {self.regularisation} has no effect without a regulariser: leave it out"
            )
        return self


class Optimum(NamedTuple):
    """The minimiser of the mean over clients of their mean losses. Attributes: x: float64 [dim]; loss: there."""

    x: Tensor
    loss: float


class _LinearPredictor(Workload):
    """What the workloads of this module share: a model x [dim] predicts h.x of a sample with the features h."""

    Options: type[ConvexOptions]
    traits = WorkloadTraits(stacks_natively=True, has_peer_metrics=True)

    def __init__(
        self, options: Mapping[str, Any], *, num_clients: int, partition: Mapping[str, Any] | str, seed: int
    ) -> None:
        """Make room for the data.

        Args:
            options: see `Options`.
            num_clients: number of clients.
            partition: ``"iid"``, the default; every client generates its own data.
            seed: seed of the data.
        """
        self.options = parse_options(self.Options, options, "workload")
        if partition not in ("iid", {"name": "iid"}):
            raise ConfigError(
                f"clients.partition = {partition!r}, but every client of this workload generates its own data: leave it"
                " out, and set workload.heterogeneity to make clients differ"
            )
        self.num_clients, self.seed = num_clients, seed
        self.num_samples = np.full(num_clients, self.options.num_samples, dtype=np.int64)
        shape = (num_clients, self.options.num_samples, self.options.dim)
        self.layout = Layout.of({"x": shape[2:]}, {"x": (None,)})
        self.num_evaluation_chunks = min(num_clients, -(-math.prod(shape) // CHUNK_FEATURES))
        self._dtype = torch.float64 if self.options.precision == "double" else torch.float32
        try:  # memory is taken up where it is written to
            self._features = torch.empty(shape, dtype=self._dtype)
            self._targets = torch.empty(shape[:2], dtype=self._dtype)
        except RuntimeError as error:
            raise ConfigError(
                f"the samples of {num_clients} clients, {shape[1]} each of dim {shape[2]}, do not fit into memory:"
                " lower clients.num, workload.num_samples or workload.dim"
            ) from error
        self._is_generated = np.zeros(-(-num_clients // BLOCK), dtype=bool)

    @cached_property
    def planted(self) -> Floats:
        """The model x* that the data is generated from, standard normal, float64 [dim]; not quite the optimum."""
        return rng.generator(self.seed, "convex-planted").standard_normal(self.options.dim)

    def _generate(self, clients: Ints) -> None:
        """Make sure that the data of `clients` is there."""
        blocks = np.unique(clients // BLOCK)
        for block in blocks[~self._is_generated[blocks]].tolist():
            part = slice(block * BLOCK, min((block + 1) * BLOCK, self.num_clients))
            shape = (part.stop - part.start, self.options.num_samples, self.options.dim)
            shift = rng.generator(self.seed, "convex-shift", participant=block).standard_normal(shape[::2])
            features = rng.generator(self.seed, "convex-features", participant=block).standard_normal(shape)
            own = self.planted + self.options.heterogeneity * shift
            source = rng.generator(self.seed, "convex-targets", participant=block)
            targets = self._observe(np.einsum("cmd,cd->cm", features, own), source)
            self._features[part] = torch.from_numpy(features)
            self._targets[part] = torch.from_numpy(targets)
            self._is_generated[block] = True

    def _observe(self, predictions: Floats, source: np.random.Generator) -> Floats:
        """Draw targets [c, m] of samples of which the clients' own models predict `predictions` [c, m]."""
        raise NotImplementedError

    def _losses(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of every sample."""
        raise NotImplementedError

    def _penalty(self, x: Tensor) -> Tensor | float:
        """Return the regulariser [...] of models x [..., dim]."""
        return 0.0

    def init(self, seed: int) -> Tensor:
        """Return zeros [layout.d] of the precision: all clients and all seeds start from the same model."""
        return torch.zeros(self.layout.d, dtype=self._dtype)

    def batch(self, clients: Ints, positions: Ints, round: int = 0, phase: int = 0) -> Batch:
        """Assemble samples for a block of clients.

        Args:
            clients: int64 [s].
            positions: int64 [s, m], sample numbers within each client's own data; -1 is padding.
            round, phase: not used.

        Returns:
            samples ``"features"``: [s, m, dim] and ``"target"``: [s, m] of the precision and, only where a row is
            padded, ``"mask"``: float32 [s, m]. A padded sample is zero.

        Raises:
            IndexError: a position beyond the client's samples.
        """
        if (positions >= self.options.num_samples).any():
            raise IndexError(f"position {positions.max()} exceeds the {self.options.num_samples} samples of a client")
        self._generate(clients)
        picked = torch.from_numpy(clients)[:, None], torch.from_numpy(np.maximum(positions, 0))
        samples = {"features": self._features[picked], "target": self._targets[picked]}
        padding = positions < 0
        if padding.any():
            for value in samples.values():
                value[torch.from_numpy(padding)] = 0.0
            samples["mask"] = torch.from_numpy((~padding).astype(np.float32))
        return Batch(samples, {})

    def loss(self, params: Params, batch: Mapping[str, Any]) -> Tensor:
        """Return the mean loss of the samples that are not padding (0 if there are none), plus the regulariser.

        Args:
            params: ``"x"``: [dim], or [s, dim] of s clients at once.
            batch: ``"features"``, ``"target"`` and optionally ``"mask"`` of `batch`, with or without the leading s.

        Returns:
            a scalar, or [s].
        """
        predictions = (batch["features"] @ params["x"].unsqueeze(-1)).squeeze(-1)
        losses = self._losses(predictions, batch["target"])
        mask: Tensor | None = batch.get("mask")
        if mask is None:
            return losses.mean(-1) + self._penalty(params["x"])
        mean = torch.where(mask > 0, losses, 0.0).sum(-1) / mask.sum(-1).clamp_min(1.0)
        return mean + self._penalty(params["x"])

    def _chunk(self, chunk: int) -> dict[str, Tensor]:
        """Return all samples, float64, of the clients of an evaluation chunk."""
        low, high = (self.num_clients * (chunk + end) // self.num_evaluation_chunks for end in (0, 1))
        self._generate(np.arange(low, high, dtype=np.int64))
        return {"features": self._features[low:high].double(), "target": self._targets[low:high].double()}

    def _sum_of_losses(self, x: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return self.loss({"x": x}, batch).sum()

    @torch.no_grad()
    def evaluate(self, params: Params, statistics: Mapping[str, Tensor], chunk: int) -> Sums:
        """Return sums over the clients of a chunk, of all their samples.

        Args:
            params: ``"x"``: [dim].
            statistics: not used.
            chunk: number of the chunk.

        Returns:
            float64 ``"loss"`` [1], the clients' mean losses; ``"gradient"`` [dim], theirs; ``"count"`` [1]; and ``"x"``
            [dim], the model as often as there are clients.
        """
        x, batch = params["x"].double(), self._chunk(chunk)
        gradient, loss = torch.func.grad_and_value(self._sum_of_losses)(x, batch)
        count = len(batch["target"])
        return {
            "loss": loss.reshape(1).numpy(),
            "gradient": gradient.numpy(),
            "count": np.array([float(count)]),
            "x": x.numpy() * count,
        }

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Turn added-up sums into metrics.

        Returns:
            ``loss``, the mean over clients of their mean losses, and ``gradient_norm``, the Euclidean norm of its
            gradient; where there is an `optimum` x* also ``optimality_gap``, the loss less that of x*, and
            ``squared_distance``, |x - x*|^2.
        """
        loss, gradient, x = (sums[name] / sums["count"] for name in ("loss", "gradient", "x"))
        found = {"loss": float(loss[0]), "gradient_norm": float(np.linalg.norm(gradient))}
        if self.optimum is not None:
            found["optimality_gap"] = found["loss"] - self.optimum.loss
            found["squared_distance"] = float(np.square(x - self.optimum.x.numpy()).sum())
        return found

    def peer_metrics(self, rows: Tensor) -> dict[str, float]:
        """Return metrics of all peers' own models.

        Args:
            rows: [n, layout.d], a model a row.

        Returns:
            ``peers_squared_distance``, the mean over peers of |x_i - x*|^2; {} where there is no `optimum` x*.
        """
        if self.optimum is None:
            return {}
        with one_thread():  # the same bits, however many threads there are
            errors = self.layout.views(rows)["x"].double() - self.optimum.x
            return {"peers_squared_distance": float(errors.square().sum(-1).mean())}

    @property
    def is_convex(self) -> bool:
        """Whether the loss is convex."""
        return True

    @cached_property
    def optimum(self) -> Optimum | None:
        """The model of the least loss; None where the loss is not convex, or the samples determine no single model."""
        if not self.is_convex:
            return None
        with one_thread():
            x = self._minimise()
            if x is None:
                warn([NO_OPTIMUM])
                return None
            parts = [self.evaluate({"x": x}, {}, chunk) for chunk in range(self.num_evaluation_chunks)]
        return Optimum(x, float(add_sums(parts)["loss"][0]) / self.num_clients)

    def _minimise(self) -> Tensor | None:
        """Newton's method from zero, steps halved until the gradient shrinks; one step is the normal equations.

        Returns:
            the minimiser; None where there is none, or where there are many.
        """
        x = torch.zeros(self.options.dim, dtype=torch.float64)
        gradient, hessian = self._derivatives(x)
        enough = GRADIENT_NORM * max(1.0, float(gradient.norm()))
        while gradient.norm() > enough:
            if torch.linalg.eigvalsh(hessian)[0] < FLAT:
                return None
            step = torch.linalg.solve(hessian, gradient)
            for halving in range(HALVINGS):
                nearer = x - step / 2**halving
                found = self._derivatives(nearer)
                if found[0].norm() < gradient.norm():
                    break
            else:
                return x  # as near as rounding allows
            x, (gradient, hessian) = nearer, found
        return x

    def _derivatives(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient [dim] and the Hessian [dim, dim] of the mean over clients of their mean losses."""
        gradient, hessian = torch.zeros_like(x), x.new_zeros(len(x), len(x))
        for chunk in range(self.num_evaluation_chunks):
            batch = self._chunk(chunk)
            gradient += torch.func.grad(self._sum_of_losses)(x, batch)
            hessian += torch.func.jacrev(torch.func.grad(self._sum_of_losses))(x, batch)
        return gradient / self.num_clients, hessian / self.num_clients


class LeastSquares(_LinearPredictor):
    """Least squares: the mean over samples of (a.x - b)^2 / 2; see `base.Workload` for the attributes and methods.

    Client i has standard normal features a and targets b = a.x*_i + noise N(0, 1), where x*_i = x* + heterogeneity
    N(0, I) and x* is standard normal. With the defaults and 300 peers it is the problem on which Song et al.,
    "Communication-Efficient Topologies for Decentralized Learning with O(1) Consensus Rate" (NeurIPS 2022), run DSGD.

    Raises (when built):
        ConfigError: an unknown or wrong option, or a partition.
    """

    Options = LeastSquaresOptions
    options: LeastSquaresOptions

    def _observe(self, predictions: Floats, source: np.random.Generator) -> Floats:
        return predictions + self.options.noise * source.standard_normal(predictions.shape)

    def _losses(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return (predictions - targets).square() / 2


class LogisticRegression(_LinearPredictor):
    """Logistic regression: the mean over samples of log(1 + exp(-y h.x)), plus a regulariser.

    Client i has standard normal features h and labels y = +-1 with P(y = 1) = 1 / (1 + exp(-h.x*_i)), where x*_i = x* +
    heterogeneity N(0, I) and x* is standard normal: the data model that is usual for gradient tracking (DSGT). With the
    defaults and 300 peers it is the problem on which Song et al., "Communication-Efficient Topologies for Decentralized
    Learning with O(1) Consensus Rate" (NeurIPS 2022), run DSGT. See `base.Workload` for the attributes and methods.

    The optimum is known without a regulariser and with ``"l2"``.

    Raises (when built):
        ConfigError: an unknown or wrong option, or a partition.
    """

    Options = LogisticRegressionOptions
    options: LogisticRegressionOptions

    @property
    def is_convex(self) -> bool:
        """Whether the loss is convex."""
        return self.options.regulariser != "nonconvex"

    def _observe(self, predictions: Floats, source: np.random.Generator) -> Floats:
        return np.where(predictions + source.logistic(size=predictions.shape) > 0, 1.0, -1.0)

    def _losses(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return -F.logsigmoid(targets * predictions)

    def _penalty(self, x: Tensor) -> Tensor | float:
        if self.options.regulariser == "none":
            return 0.0
        squares = x.square()
        if self.options.regulariser == "l2":
            return self.options.regularisation / 2 * squares.sum(-1)
        return self.options.regularisation * (squares / (1 + squares)).sum(-1)
