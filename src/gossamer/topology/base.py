"""Mixings: one round of averaging between peers.

Convention: ``W[i, j]`` is the weight that i gives to what j sends, so that ``(W X)[i] = sum_j W[i, j] X[j]``. No mixing
stores an n x n array, so shifts, matchings and block averages of a million peers are cheap.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from gossamer.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

State = TypeVar("State")
"""A torch tensor or numpy array, float32 or float64; `Mixing.apply` returns the kind of its argument."""

Stochasticity = Literal["doubly", "row", "column"]
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

MAX_DENSE = 5_000  # rows of the matrix of `Mixing.dense`, 200 MB
MAX_EDGES = 100_000_000


class Edges(NamedTuple):
    """The e links of a mixing between different peers, each `sender` -> `receiver`.

    Attributes:
        receiver, sender: int64 [e]; pairs are distinct.
        weight: float64 [e], ``W[receiver, sender]``.
        latency_seconds, bandwidth_bytes_per_second: float64 [e], of the link; nan where unknown; None: unknown for all.
    """

    receiver: Integers
    sender: Integers
    weight: Floats
    latency_seconds: Floats | None = None
    bandwidth_bytes_per_second: Floats | None = None


class Mixing(ABC):
    """One round of averaging between all peers; immutable.

    Attributes:
        n: number of peers (sites).
        kind: "shift", "matching", "block", "sparse" or "joint".
        stochasticity: "doubly" (keeps the mean and constants), "row" (keeps constants) or "column" (keeps the mean).
        is_symmetric: whether W equals its transpose.
        rows_per_site: rows of state of each peer; 1 except for joint mixings.
        has_links: whether latency or bandwidth of some links is known.
    """

    kind: ClassVar[str]
    rows_per_site: ClassVar[int] = 1
    n: int
    has_links: bool = False
    stochasticity: Stochasticity = "doubly"

    @property
    @abstractmethod
    def is_symmetric(self) -> bool:
        """Whether W equals its transpose."""

    @property
    @abstractmethod
    def max_degree(self) -> int:
        """Maximum number of messages that a peer sends, or receives, in the round."""

    @abstractmethod
    def edges(self) -> Edges:
        """Return all links between different peers, sorted by (receiver, sender).

        Raises:
            ConfigError: there are more than `MAX_EDGES`.
        """

    @abstractmethod
    def recv_ranks(self, i: int) -> list[int]:
        """Return the peers that i hears from, ascending."""

    @abstractmethod
    def send_ranks(self, i: int) -> list[int]:
        """Return the peers that i sends to, ascending."""

    @abstractmethod
    def lazy(self, share: float = 0.5) -> Mixing:
        """Return the mixing ``(1 - share) I + share W``; share = 1/2 makes every eigenvalue's real part >= 0."""

    @abstractmethod
    def transposed(self) -> Mixing:
        """Return the mixing with the transposed matrix."""

    @abstractmethod
    def _apply(self, x: Tensor) -> Tensor:
        """Return W x for a contiguous x [rows, d]."""

    @abstractmethod
    def _rows(self, x: Tensor, lo: int, hi: int) -> Tensor:
        """Return the rows of peers lo, ..., hi - 1 of W x."""

    @abstractmethod
    def _identity(self) -> tuple[Any, ...]:
        """Return the numbers and arrays that define this mixing among those of its kind."""

    def apply(self, x: State) -> State:
        """Return W x as a new array.

        Args:
            x: [n, ...], float32 or float64 (joint mixings: see `sparse.Joint`).

        Raises:
            ConfigError: x has another shape or type.
        """
        mixed: State = _on_torch(x, self.n, self.rows_per_site, self._apply)
        return mixed

    def rows(self, x: State, lo: int, hi: int) -> State:
        """Return the rows of peers lo, ..., hi - 1 of W x, computed from the whole x alone.

        Args:
            x: as for `apply`.
            lo, hi: 0 <= lo <= hi <= n.

        Raises:
            ConfigError: x has another shape or type, or the range is not within 0..n.
        """
        if not 0 <= lo <= hi <= self.n:
            raise ConfigError(f"rows {lo}:{hi} are not within 0:{self.n}: give a range of peers")
        mixed: State = _on_torch(x, self.n, self.rows_per_site, lambda whole: self._rows(whole, lo, hi))
        return mixed

    def start(self, x: State) -> State:
        """Return the initial state of a mixing, given one row for each peer, [n, d]."""
        return x

    def read(self, state: State) -> State:
        """Return the row of each peer, [n, d], from a state."""
        return state

    def self_weights(self) -> Floats:
        """Return the diagonal of W, float64 [n]."""
        edges = self.edges()
        return np.asarray(1.0 - np.bincount(edges.receiver, weights=edges.weight, minlength=self.n), dtype=np.float64)

    def dense(self) -> Floats:
        """Return W as float64 [n, n], for tests and pictures.

        Raises:
            ConfigError: n exceeds `MAX_DENSE`.
        """
        self._require_small("a dense matrix")
        edges = self.edges()
        matrix = np.diag(self.self_weights())
        matrix[edges.receiver, edges.sender] = edges.weight
        return matrix

    def digest(self) -> str:
        """Return 32 hexadecimal digits that identify the mixing on every machine."""
        digest = hashlib.blake2b(f"{self.kind} {self.n}".encode(), digest_size=16)
        for part in self._identity():
            digest.update(b"|" + (part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode()))
        return digest.hexdigest()

    def _require_small(self, what: str) -> None:
        if self.n * self.rows_per_site > MAX_DENSE:
            raise ConfigError(
                f"{what} of n = {self.n} peers exceeds the limit of {MAX_DENSE // self.rows_per_site} peers: use apply,"
                " rows or edges instead"
            )

    def _check_peer(self, i: int) -> int:
        if not 0 <= i < self.n:
            raise ConfigError(f"peer {i} is outside 0..{self.n - 1}: give the number of a peer")
        return i


def _on_torch(x: Any, num_peers: int, rows_per_peer: int, kernel: Callable[[Tensor], Tensor]) -> Any:
    """Apply a kernel for flat rows, [rows, d], to a state [rows, ...] or [peers, rows_per_peer, ...]."""
    import torch

    kind = x.dtype if isinstance(x, np.ndarray | torch.Tensor) else type(x).__name__
    if str(kind).removeprefix("torch.") not in ("float32", "float64"):
        raise ConfigError(f"cannot mix {kind}: give a float32 or float64 tensor or array")
    tensor = torch.from_numpy(np.require(x, requirements=["C", "W"])) if isinstance(x, np.ndarray) else x
    by_peer = rows_per_peer > 1 and tuple(tensor.shape[:2]) == (num_peers, rows_per_peer)
    num_rows = num_peers * rows_per_peer
    if not by_peer and (tensor.ndim == 0 or tensor.shape[0] != num_rows):
        raise ConfigError(f"cannot mix a state of shape {tuple(tensor.shape)}: give {num_rows} rows")
    width = math.prod(tensor.shape[2 if by_peer else 1 :])
    with torch.no_grad():
        mixed = kernel(tensor.detach().reshape(num_rows, width).contiguous())
    mixed = mixed.reshape(len(mixed) // (rows_per_peer if by_peer else 1), *tensor.shape[1:])
    return mixed.numpy() if isinstance(x, np.ndarray) else mixed


def check_num_edges(num_edges: int) -> None:
    """Refuse to list more than `MAX_EDGES` edges.

    Raises:
        ConfigError: there are more.
    """
    if num_edges > MAX_EDGES:
        raise ConfigError(
            f"a list of {num_edges} edges exceeds the limit of {MAX_EDGES}: use apply, rows, send_ranks or"
            " recv_ranks instead"
        )


def sorted_edges(receiver: Integers, sender: Integers, weight: Floats) -> Edges:
    """Return the edges in the order of (receiver, sender)."""
    order = np.lexsort((sender, receiver))
    return Edges(receiver[order], sender[order], weight[order])
