"""gossipy's simulator: every node sends its model to one other, which takes the mean of both and trains.

A round is one time step: all nodes send before any receives. Nodes mix before they train, and start from one model, so
that a round's mixing is that of the round before in the other runners.
"""

from __future__ import annotations

# ruff: noqa: E402
import sys
import types

# gossipy imports torchvision, for downloads only, without declaring it; its wheels fit few builds of torch.
sys.modules["torchvision"] = types.ModuleType("torchvision")

import torch
from common import LEARNING_RATE, RoundClock, flatten, make_data
from gossipy import set_seed
from gossipy.core import AntiEntropyProtocol, CreateModelMode, P2PNetwork
from gossipy.data import DataDispatcher
from gossipy.data.handler import ClassificationDataHandler
from gossipy.model import TorchModel
from gossipy.model.handler import TorchModelHandler
from gossipy.node import GossipNode
from gossipy.simul import GossipSimulator, SimulationEventReceiver
from peers_common import BATCH_SIZE, Options, build_model, make_parser, read_options, report
from torch import Tensor, nn


class Classifier(TorchModel):
    """A model with the method that gossipy asks for."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def init_weights(self) -> None:
        """Keep the weights: all nodes start from the same."""

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        return self.body(images)


class OnePeer(P2PNetwork):
    """Everybody sends to the peer that lies the last round's shift further on; the first round mixes equal models."""

    def __init__(self, options: Options) -> None:
        super().__init__(options.peers)
        self.shifts, self.round = options.shifts, 0

    def get_peers(self, node_id: int) -> list[int]:
        """Return the one receiver."""
        return [(int(node_id) + self.shifts[self.round - 1]) % self.size()]


class Watch(SimulationEventReceiver):
    """Stamps the end of every round, tells the network, and counts messages."""

    def __init__(self, options: Options, network: OnePeer) -> None:
        self.network, self.num_messages, self.clock = network, 0, RoundClock(options)

    def update_message(self, failed: bool, msg: object = None) -> None:
        """Count what was sent."""
        self.num_messages += not failed

    def update_timestep(self, t: int) -> None:
        """Stamp."""
        self.network.round = t + 1
        self.clock.tick()

    def update_end(self) -> None:
        """Nothing is left to do."""


def make_nodes(options: Options, network: P2PNetwork) -> dict[int, GossipNode]:
    """Return all nodes, each with its own data and a copy of the same model."""
    data = make_data(options.peers, BATCH_SIZE, options.seed)
    handler = TorchModelHandler(
        net=Classifier(build_model(options.model, options.seed)),
        optimizer=torch.optim.SGD,
        optimizer_params={"lr": LEARNING_RATE},
        criterion=nn.CrossEntropyLoss(),
        local_epochs=1,
        batch_size=BATCH_SIZE,
        create_model_mode=CreateModelMode.MERGE_UPDATE,
    )
    return {
        number: GossipNode(number, (data.of(number), None), 1, handler.copy(), network)
        for number in range(options.peers)
    }


def main() -> None:
    """Run the benchmark of the command line and print its JSON."""
    options, _ = read_options(make_parser("Decentralized SGD by gossipy."))
    torch.set_num_threads(options.threads)
    set_seed(options.seed)
    no_data = torch.zeros(options.peers, 1)  # nodes have their own, and there is nothing to evaluate
    dispatcher = DataDispatcher(ClassificationDataHandler(no_data, no_data, test_size=0), eval_on_user=False)
    network = OnePeer(options)
    nodes = make_nodes(options, network)
    before = flatten(nodes[0].model_handler.model.parameters())
    simulator = GossipSimulator(nodes, dispatcher, delta=1, protocol=AntiEntropyProtocol.PUSH)
    simulator.initialized = True  # `init_nodes` would train
    watch = Watch(options, network)
    simulator.add_receiver(watch)
    simulator.start(n_rounds=options.total_rounds)
    if watch.num_messages != options.peers * options.total_rounds:
        raise RuntimeError(f"gossipy: {watch.num_messages} messages in {options.total_rounds} rounds")
    merged = torch.stack([flatten(node.model_handler.model.parameters()) for node in nodes.values()]).mean(0)
    report("gossipy", options, watch.clock, before, merged, packages=("gossipy-dfl", "torch", "numpy"))


if __name__ == "__main__":
    main()
