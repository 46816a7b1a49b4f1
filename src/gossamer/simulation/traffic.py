"""Messages between peers, and how long they take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gossamer.round_record import RoundCosts
from gossamer.simulation.costs import Efforts
from gossamer.simulation.devices import Floats, Ints
from gossamer.topology import BlockAverage, Edges, Mixing

MAX_LINKS = 1_000_000  # that are listed one by one


@dataclass(frozen=True)
class Traffic:
    """Who sends how many messages to whom in a round.

    Attributes:
        sent, received: int64 [n], messages of each peer.
        links: the single messages, with what is known of the links; None: too many, and nothing is known of them.
    """

    sent: Ints
    received: Ints
    links: Edges | None

    @classmethod
    def of(cls, mixing: Mixing) -> Traffic:
        """Return the traffic of a mixing; the links of large groups that all hear each other are not listed."""
        if isinstance(mixing, BlockAverage) and mixing.n * (mixing.size - 1) > MAX_LINKS:
            messages = np.full(mixing.n, mixing.size - 1, dtype=np.int64)
            return cls(messages, messages, None)
        links = mixing.edges()
        sent, received = (np.bincount(end, minlength=mixing.n) for end in (links.sender, links.receiver))
        return cls(sent, received, links)


def reduced(efforts: Efforts) -> RoundCosts:
    """Return the costs of a round that ends in a ring all-reduce: every peer sends 2 (n - 1) / n of its payload."""
    share = 2 * (len(efforts.flops) - 1) / len(efforts.flops)
    up, down = efforts.upload_seconds * share, efforts.download_seconds * share
    latency = 2 * (len(efforts.flops) - 1) * float(efforts.latency_seconds.max())
    seconds = float(efforts.compute_seconds.max() + np.maximum(up, down).max()) + latency
    return _add_up(efforts, efforts.bytes_up * share, efforts.bytes_up * share, up, down, seconds)


def exchanged(efforts: Efforts, traffic: Traffic) -> RoundCosts:
    """Return the costs of a round of messages between peers.

    When a peer has finished computing, it sends to its receivers through its own uplink; a message then takes its
    link's latency, and its bytes the link's bandwidth, where the topology knows them. Whoever has received everything
    through its downlink is done, and the round lasts as long as the slowest.

    Args:
        efforts: efforts of all n peers, with bytes, upload and download of one message.
    """
    if traffic.links is None:  # everybody waits for the slowest, in whatever group it is
        up, down = efforts.upload_seconds * traffic.sent, efforts.download_seconds * traffic.received
        seconds = float((efforts.compute_seconds + efforts.latency_seconds + up).max() + down.max())
        sent_bytes = efforts.bytes_up * traffic.sent
        return _add_up(efforts, sent_bytes, sent_bytes, up, down, seconds)
    receiver, sender, _, latency, bandwidth = traffic.links
    up = efforts.upload_seconds * traffic.sent
    sent = efforts.compute_seconds + efforts.latency_seconds + up
    on_the_way = np.zeros(len(sender)) if latency is None else np.nan_to_num(latency)
    if bandwidth is not None:
        on_the_way = on_the_way + np.nan_to_num(efforts.bytes_up[sender] / bandwidth)
    complete = efforts.compute_seconds.copy()
    np.maximum.at(complete, receiver, sent[sender] + on_the_way)
    bytes_down: Floats = np.bincount(receiver, weights=efforts.bytes_up[sender], minlength=len(up)).astype(np.float64)
    own = np.where(efforts.bytes_up > 0, efforts.bytes_up, 1.0)
    down = bytes_down / own * efforts.download_seconds
    return _add_up(efforts, efforts.bytes_up * traffic.sent, bytes_down, up, down, float((complete + down).max()))


def _add_up(
    efforts: Efforts, bytes_up: Floats, bytes_down: Floats, up: Floats, down: Floats, seconds: float
) -> RoundCosts:
    return RoundCosts(
        bytes_up=int(bytes_up.sum()),
        bytes_down=int(bytes_down.sum()),
        client_flops=float(efforts.flops.sum()),
        simulated_seconds=seconds,
        download_seconds=float(down.sum()),
        compute_seconds=float(efforts.compute_seconds.sum()),
        upload_seconds=float(up.sum()),
        num_uncounted_operations=efforts.num_uncounted,
    )
