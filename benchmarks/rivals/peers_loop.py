"""Decentralized SGD without a framework, as one would write it by hand in plain torch: a loop over the peers.

Every peer has a module and an optimizer of its own. Models are mixed in place, which is quicker than loading state
dicts, against a copy of what everybody sent.
"""

from __future__ import annotations

import torch
from common import LEARNING_RATE, ClientData, RoundClock, flatten, make_data
from peers_common import BATCH_SIZE, Options, build_model, make_parser, read_options, report
from torch import nn
from torch.nn import functional


class Peer:
    """A module, its optimizer and its parameters by name."""

    def __init__(self, options: Options) -> None:
        self.model: nn.Module = build_model(options.model, options.seed)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)
        self.parameters = dict(self.model.named_parameters())


def train(peers: list[Peer], data: ClientData) -> None:
    """Take one step of SGD with every peer."""
    for number, peer in enumerate(peers):
        images, labels = data.of(number)
        peer.optimizer.zero_grad()
        functional.cross_entropy(peer.model(images), labels).backward()
        peer.optimizer.step()


@torch.no_grad()
def mix(peers: list[Peer], shift: int) -> None:
    """Replace every peer's model by the mean of its own and that of the peer `shift` places before it."""
    sent = [{name: value.clone() for name, value in peer.parameters.items()} for peer in peers]
    for number, peer in enumerate(peers):
        received = sent[(number - shift) % len(peers)]
        for name, value in peer.parameters.items():
            value.lerp_(received[name], 0.5)


def main() -> None:
    """Run the benchmark of the command line and print its JSON."""
    options, _ = read_options(make_parser("Decentralized SGD by hand in plain torch."))
    torch.set_num_threads(options.threads)
    data = make_data(options.peers, BATCH_SIZE, options.seed)
    peers = [Peer(options) for _ in range(options.peers)]
    before = flatten(peers[0].model.parameters())
    clock = RoundClock(options)
    for shift in options.shifts:
        train(peers, data)
        mix(peers, shift)
        clock.tick()
    merged = torch.stack([flatten(peer.model.parameters()) for peer in peers]).mean(0)
    report("loop", options, clock, before, merged, packages=("torch",))


if __name__ == "__main__":
    main()
