"""Flower's simulation on Ray: FedAvg, two actors of one CPU and one torch thread.

Settings chosen for speed: no evaluation, no telemetry, no dashboard, logs at ERROR;
an actor keeps its model, optimizer and data between messages.
"""

from __future__ import annotations

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"

import functools
import logging
import random
import tempfile
import traceback
from collections.abc import Iterable
from typing import Any, cast

import ray
import torch
from common import (
    LEARNING_RATE,
    ClientData,
    Options,
    RoundClock,
    build_model,
    flatten,
    make_data,
    make_parser,
    read_options,
    report,
    settle,
    train_one_epoch,
)
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn

NUM_ACTORS = 2

client_app = ClientApp()


@functools.cache
def actor_state(
    model: str, clients: int, samples: int, seed: int
) -> tuple[nn.Module, torch.optim.Optimizer, ClientData]:
    """Return what an actor keeps between messages; made with its first one."""
    torch.set_num_threads(1)
    module = build_model(model, seed)
    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)
    data = make_data(clients, samples, seed)
    settle()
    return module, optimizer, data


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train the received model on the data of the node's partition."""
    config = cast("dict[str, Any]", message.content.config_records["config"])
    model, optimizer, data = actor_state(config["model"], config["clients"], config["samples"], config["seed"])
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    images, labels = data.of(int(context.node_config["partition-id"]))
    train_one_epoch(model, optimizer, images, labels, config["batch-size"])
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": len(labels)}),
        }
    )
    return Message(content=content, reply_to=message)


class TimedFedAvg(FedAvg):
    """FedAvg that samples a fixed number, insists on every reply and ticks a clock."""

    def __init__(self, options: Options, clock: RoundClock) -> None:
        super().__init__(
            fraction_train=options.per_round / options.clients,
            fraction_evaluate=0.0,
            min_train_nodes=options.per_round,
            min_available_nodes=options.clients,
        )
        self.per_round = options.per_round
        self.clock = clock

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the replies.

        Raises:
            RuntimeError: a client failed or did not answer.
        """
        replies = list(replies)
        errors = [reply.error.reason for reply in replies if reply.has_error()]
        if errors or len(replies) != self.per_round:
            raise RuntimeError(
                f"round {server_round}: {len(replies)} replies to {self.per_round} "
                f"messages, with {len(errors)} errors: {errors[:1]}"
            )
        averaged = super().aggregate_train(server_round, replies)
        self.clock.tick()
        return averaged


def make_server_app(
    options: Options,
    clock: RoundClock,
    initial: ArrayRecord,
    final: list[ArrayRecord],
    pull_interval: float | None,
) -> ServerApp:
    """Return the server; it runs in a thread of this process and fills `final`."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        """Run all rounds."""
        if pull_interval is not None:
            grid.pull_interval = pull_interval  # type: ignore[attr-defined]
        config = ConfigRecord(
            {
                "model": options.model,
                "clients": options.clients,
                "samples": options.samples,
                "batch-size": options.batch_size,
                "seed": options.seed,
            }
        )
        result = TimedFedAvg(options, clock).start(grid, initial, num_rounds=options.total_rounds, train_config=config)
        final.append(result.arrays)

    return app


def simulate(server_app: ServerApp, clients: int) -> None:
    """Run the simulation; what Flower writes to its home goes with it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        os.environ["FLWR_HOME"] = home
        run_simulation(
            server_app=server_app,
            client_app=client_app,
            num_supernodes=clients,
            backend_config={
                "init_args": {
                    "num_cpus": NUM_ACTORS,
                    "logging_level": "ERROR",
                    "log_to_driver": False,
                },
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            },
        )


def main() -> None:
    """Run the benchmark of the command line and print its JSON."""
    parser = make_parser("FedAvg in Flower's Ray simulation.")
    parser.add_argument(
        "--pull-interval",
        type=float,
        default=None,
        help="seconds between the server's looks for replies, if not Flower's own 0.1",
    )
    options, own = read_options(parser)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    random.seed(options.seed)
    initial = build_model(options.model, options.seed).state_dict()
    final: list[ArrayRecord] = []
    clock = RoundClock(options)
    arrays = ArrayRecord(initial)
    server_app = make_server_app(options, clock, arrays, final, own.pull_interval)
    try:
        simulate(server_app, options.clients)
        trained = final[0].to_torch_state_dict()
        report(
            "flower",
            options,
            clock,
            flatten(initial.values()),
            flatten(trained[name] for name in initial),
            packages=("flwr", "ray", "torch"),
            processes=NUM_ACTORS,
            threads=1,
            pull_interval=own.pull_interval,
        )
    except BaseException:
        # The server's thread may still wait for replies that cannot come any more,
        # and would keep the process alive.
        traceback.print_exc()
        ray.shutdown()
        os._exit(1)


if __name__ == "__main__":
    # Ray would pickle whatever is defined in __main__ by value, with every message,
    # and the actors would lose their state. From here it travels by name.
    import flower_round

    flower_round.main()
