"""FedAvg on SuperNodes: every node trains in every round. The server's part writes its report into a file.

Needs benchmarks/rivals on PYTHONPATH, because it is sent to where it runs without `common`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from common import LEARNING_RATE, Options, RoundClock, build_model, flatten, make_data, report, train_one_epoch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client_app = ClientApp()
server_app = ServerApp()


def options_of(config: Any) -> Options:
    """Return the options that the run was given."""
    number, model = (lambda key: int(config[key])), str(config["model"])
    clients, samples, batch_size = number("clients"), number("samples"), number("batch-size")
    return Options(
        model, clients, clients, number("rounds"), number("warmup"), samples, batch_size, seed=number("seed")
    )


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train the received model on the node's part of the data."""
    torch.set_num_threads(1)
    options = options_of(context.run_config)
    model = build_model(options.model, options.seed)
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    images, labels = make_data(options.clients, options.samples, options.seed).of(
        int(context.node_config["partition-id"])
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    train_one_epoch(model, optimizer, images, labels, options.batch_size)
    metrics = MetricRecord({"num-examples": len(labels)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


class TimedFedAvg(FedAvg):
    """FedAvg that insists on every reply, and ticks a clock."""

    def __init__(self, options: Options, clock: RoundClock) -> None:
        super().__init__(
            fraction_train=1.0,
            fraction_evaluate=0.0,
            min_train_nodes=options.clients,
            min_available_nodes=options.clients,
        )
        self.num_clients, self.clock = options.clients, clock

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the replies.

        Raises:
            RuntimeError: a node failed or did not answer.
        """
        replies = list(replies)
        errors = [reply.error.reason for reply in replies if reply.has_error()]
        if errors or len(replies) != self.num_clients:
            raise RuntimeError(f"round {server_round}: {len(replies)} replies, with {len(errors)} errors: {errors[:1]}")
        averaged = super().aggregate_train(server_round, replies)
        self.clock.tick()
        return averaged


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds, and write the report."""
    torch.set_num_threads(1)
    options = options_of(context.run_config)
    initial = build_model(options.model, options.seed).state_dict()
    clock = RoundClock(options)
    strategy = TimedFedAvg(options, clock)
    trained = strategy.start(grid, ArrayRecord(initial), num_rounds=options.total_rounds).arrays.to_torch_state_dict()
    before, after = flatten(initial.values()), flatten(trained[name] for name in initial)
    path = Path(str(context.run_config["result"]))
    with path.with_suffix(".writing").open("w") as file:
        out, sys.stdout = sys.stdout, file
        try:
            report("flower", options, clock, before, after, ("flwr", "torch"), processes=options.clients)
        finally:
            sys.stdout = out
    path.with_suffix(".writing").replace(path)
