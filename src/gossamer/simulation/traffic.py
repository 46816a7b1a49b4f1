"""Messages between peers, and how long they take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gossamer.errors import ConfigError
from gossamer.round_record import RoundCosts
from gossamer.simulation.costs import Efforts
from gossamer.simulation.devices import Floats, Ints
from gossamer.topology import BlockAverage, Edges, Mixing

MAX_LINKS = 1_000_000  # that are listed one by one
MAX_ROOTS, MAX_DISTANCES = 64, 200_000  # peers that are tried as the root of a mean, and their distances to others


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


def exchanged(efforts: Efforts, traffic: Traffic, overlaps: bool = False) -> RoundCosts:
    """Return the costs of a round of messages between peers.

    When a peer has finished computing, it sends to its receivers through its own uplink; a message then takes its
    link's latency, and its bytes the link's bandwidth, where the topology knows them. Whoever has received everything
    through its downlink is done, and the round lasts as long as the slowest.

    Args:
        efforts: efforts of all n peers, with bytes, upload and download of one message.
        overlaps: whether peers send at once, and compute meanwhile.
    """
    up, ready = efforts.upload_seconds * traffic.sent, _ready(efforts, overlaps)
    sent = ready + efforts.latency_seconds + up
    if traffic.links is None:  # everybody waits for the slowest, in whatever group it is
        down, bytes_down = efforts.download_seconds * traffic.received, efforts.bytes_up * traffic.sent
        seconds = float(sent.max() + down.max())
    else:
        receiver, sender = traffic.links.receiver, traffic.links.sender
        complete = ready.copy()
        np.maximum.at(complete, receiver, sent[sender] + _on_the_way(efforts, traffic.links))
        bytes_down = np.bincount(receiver, weights=efforts.bytes_up[sender], minlength=len(up)).astype(np.float64)
        down = bytes_down / np.where(efforts.bytes_up > 0, efforts.bytes_up, 1.0) * efforts.download_seconds
        seconds = float((complete + down).max())
    return _add_up(efforts, efforts.bytes_up * traffic.sent, bytes_down, up, down, seconds)


def averaged(efforts: Efforts, links: Edges | None, overlaps: bool = False) -> RoundCosts:
    """Return the costs of a round that ends in the exact mean of all peers.

    Where nothing is known of links it is a ring all-reduce, in which every peer sends 2 (n - 1) / n of its payload.
    Else sums go over links to the best root, and the mean back from it, each along its quickest paths; a peer adds up
    what it receives before it sends.

    Args:
        efforts, overlaps: see `exchanged`.
        links: links of the round, with what is known of them; None: nothing.

    Raises:
        ConfigError: links do not connect all peers.
    """
    ready, n = _ready(efforts, overlaps), len(efforts.flops)
    if links is not None:
        return _by_tree(efforts, links, ready)
    share = 2 * (n - 1) / n
    up, down = efforts.upload_seconds * share, efforts.download_seconds * share
    latency = 2 * (n - 1) * float(efforts.latency_seconds.max())
    seconds = float(ready.max() + np.maximum(up, down).max()) + latency
    return _add_up(efforts, efforts.bytes_up * share, efforts.bytes_up * share, up, down, seconds)


def _by_tree(efforts: Efforts, links: Edges, ready: Floats) -> RoundCosts:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import dijkstra

    n, way = len(ready), _on_the_way(efforts, links)
    cost = way + (efforts.latency_seconds + efforts.upload_seconds)[links.sender]
    cost = cost + 1e-9 * cost.max() + 1e-12  # so that whoever is nearer to the root is so by more than rounding
    graph = coo_array((cost, (links.sender, links.receiver)), shape=(n, n)).tocsr()
    roots = np.unique(np.linspace(0, n - 1, max(1, min(MAX_ROOTS, MAX_DISTANCES // n))).astype(np.int64))
    there, parents = dijkstra(graph.T.tocsr(), indices=roots, return_predecessors=True)
    back, origins = dijkstra(graph, indices=roots, return_predecessors=True)
    best = int((there.max(1) + back.max(1)).argmin())
    if not np.isfinite(there[best].max() + back[best].max()):
        raise ConfigError("the links of a round do not connect all peers, so that they have no mean: leave merges out")
    root, parent, origin = int(roots[best]), parents[best], origins[best]
    others = np.delete(np.arange(n), root)
    num_children = np.bincount(parent[others], minlength=n)
    num_heirs = np.bincount(origin[others], minlength=n)
    seconds_of = dict(zip(zip(links.sender.tolist(), links.receiver.tolist(), strict=True), way.tolist(), strict=True))
    time = ready.copy()
    for peer in np.argsort(-there[best], kind="stable").tolist():  # the farthest first, so children before parents
        time[peer] += num_children[peer] * efforts.download_seconds[peer]
        if peer != root:
            sent = time[peer] + efforts.latency_seconds[peer] + efforts.upload_seconds[peer]
            time[parent[peer]] = max(time[parent[peer]], sent + seconds_of[peer, int(parent[peer])])
    for peer in np.argsort(back[best], kind="stable").tolist()[1:]:
        source = int(origin[peer])
        sent = time[source] + efforts.latency_seconds[source] + num_heirs[source] * efforts.upload_seconds[source]
        time[peer] = sent + seconds_of[source, peer] + efforts.download_seconds[peer]
    is_other = np.arange(n) != root
    num_sent, num_received = is_other + num_heirs, num_children + is_other
    return _add_up(
        efforts,
        efforts.bytes_up * num_sent,
        efforts.bytes_up * num_received,
        efforts.upload_seconds * num_sent,
        efforts.download_seconds * num_received,
        float(time.max()),
    )


def _ready(efforts: Efforts, overlaps: bool) -> Floats:
    """Return when each peer may send."""
    return np.zeros_like(efforts.compute_seconds) if overlaps else efforts.compute_seconds


def _on_the_way(efforts: Efforts, links: Edges) -> Floats:
    """Return how long each message is on its link, as far as the link is known."""
    latency, bandwidth = links.latency_seconds, links.bandwidth_bytes_per_second
    seconds = np.zeros(len(links.sender)) if latency is None else np.nan_to_num(latency)
    return seconds if bandwidth is None else seconds + np.nan_to_num(efforts.bytes_up[links.sender] / bandwidth)


def _add_up(
    efforts: Efforts, bytes_up: Floats, bytes_down: Floats, up: Floats, down: Floats, seconds: float
) -> RoundCosts:
    return RoundCosts(
        bytes_up=int(bytes_up.sum()),
        bytes_down=int(bytes_down.sum()),
        client_flops=float(efforts.flops.sum()),
        simulated_seconds=max(seconds, float(efforts.compute_seconds.max())),  # if both go on at the same time
        download_seconds=float(down.sum()),
        compute_seconds=float(efforts.compute_seconds.sum()),
        upload_seconds=float(up.sum()),
        num_samples=float(efforts.samples.sum()),
        num_uncounted_operations=efforts.num_uncounted,
    )
