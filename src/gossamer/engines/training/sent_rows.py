"""What peers send of their rows, and what is made of it where it arrives: codes, and what windows hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gossamer.aggregate.codec_base import Draws
from gossamer.algorithms.base import Arrays
from gossamer.engines.task import Task, Variant
from gossamer.engines.training.mixing import sparse_zeros
from gossamer.engines.training.peer_worker import Message, PeerState


class Windows:
    """What the windows of a round hold of peers' rows; both sides know the windows."""

    def __init__(self, task: Task, round: int, variants: Sequence[int]) -> None:
        """Bind a round.

        Args:
            task: task of the phase.
            round: number of the round.
            variants: number of the variant of each of the n peers.
        """
        self._task, self._round, self._variants = task, round, variants

    def length(self, name: str, row: Tensor, peer: int) -> int:
        """Return of how many numbers of a row [d] of this name a peer's window consists; of a scalar's, of its one."""
        return len(row) if name in self._task.scalars else self._variant(peer).layout.num_parameters

    def read(self, name: str, row: Tensor, peer: int) -> Tensor:
        """Return what a peer's window holds of a row [d]: [k], without padding."""
        if name in self._task.scalars:
            return row
        variant = self._variant(peer)
        out = self._task.cut(variant, self._round, peer).read(row, row.new_zeros(variant.layout.d))
        return out[variant.layout.coordinates]

    def write(self, name: str, row: Tensor, peer: int, held: Tensor) -> None:
        """Write into a row [d] what `read` has returned; what the window does not hold stays as it is."""
        if name in self._task.scalars:
            row.copy_(held)
            return
        variant = self._variant(peer)
        whole = held.new_zeros(variant.layout.d)
        whole[variant.layout.coordinates] = held
        self._task.cut(variant, self._round, peer).write(row, whole)

    def holders(self, dtype: torch.dtype, width: int, peers: Tensor) -> Tensor:
        """Return which coordinates the windows of some peers hold: ones and zeros, [k, width]."""
        found = torch.zeros(len(peers), width, dtype=dtype)
        for row, peer in zip(found, peers.tolist(), strict=True):
            variant = self._variant(peer)
            ones = torch.ones(variant.layout.d, dtype=dtype)
            self._task.cut(variant, self._round, peer).write(row, ones)
        return found

    def _variant(self, peer: int) -> Variant:
        return self._task.variants[self._variants[peer]]


def no_codes(task: Task, num_peers: int, dtype: torch.dtype) -> Arrays:
    """Return memory for the codes that travel in the place of payloads; those of windows, which differ, do not.

    Args:
        task: task of the run.
        num_peers: peers whose rows lie here.
        dtype: of the rows.
    """
    d = task.cutter.layout.num_parameters
    return {
        name: torch.zeros(num_peers, codec.row_bytes(d, dtype.itemsize), dtype=torch.uint8)
        for phase in task.phases
        if phase.is_whole
        for name, codec in phase.algorithm.traits.codecs.items()
    }


def sent_rows(task: Task, peers: PeerState) -> Arrays:
    """Return what peers send in a phase where all of them hold the whole model: rows, or codes in their place.

    Args:
        task: task of the phase.
        peers: arrays of the peers that lie here.
    """
    traits = task.algorithm.traits
    codes = {name: rows for name, rows in peers.codes.items() if name in traits.codecs}
    return {name: peers.payload(name) for name in traits.uplink} | codes


def received_rows(
    task: Task, message: Message, peers: PeerState, everyone: Arrays, heard: Tensor, windows: Windows | None
) -> tuple[Arrays, Tensor | None]:
    """Return the payloads of all n peers, [n, d], as `Mixer.update` takes them, and which coordinates they hold.

    Only the rows of the peers that lie here, and of those that were heard, are filled in.

    Args:
        task: task of the phase.
        message: see `gossamer.engines.peers.mix_message`.
        peers: arrays of the peers that lie here.
        everyone: what all n peers send, see `sent_rows`, with those rows filled in.
        heard: int64 [s], whose rows have come.
        windows: those of the round; None: all peers hold the whole model.
    """
    own = slice(peers.first, peers.first + len(peers.state["x"]))
    found = {
        name: _decoded(task, message, name, peers.payload(name), own, rows[heard], heard)
        if name in peers.codes and name in task.algorithm.traits.codecs
        else rows
        for name, rows in everyone.items()
    }
    if windows is None or peers.holders is None:
        return found, None
    holders = sparse_zeros((task.workload.num_clients, task.cutter.layout.d), torch.uint8)
    holders[own] = peers.holders
    holders[heard] = windows.holders(torch.uint8, task.cutter.layout.d, heard)
    return found, holders


def _decoded(
    task: Task, message: Message, name: str, payload: Tensor, own: slice, codes: Tensor, heard: Tensor
) -> Tensor:
    """Return a payload of all n peers, [n, d], from the rows `payload` of those `own`, and the codes of those heard."""
    layout = task.cutter.layout
    draws = Draws(seed=task.seed, round=message["round"], phase=message["phase"], peers=heard.numpy())
    rows = payload.new_zeros(len(heard), layout.d)
    codec = task.algorithm.traits.codecs[name]
    rows[:, layout.coordinates] = codec.decode(codes, layout.num_parameters, payload.dtype, **draws)
    found = sparse_zeros((task.workload.num_clients, layout.d), payload.dtype)
    found[own], found[heard] = payload, rows
    return found
