"""FedAvg without a framework, as one would write it by hand in plain torch.

With two processes or more, forked workers share the global vector and a buffer for
their sums ("bare-loop"); with one, everything runs in this process ("hand-loop").
"""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

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
    train_one_epoch,
)
from torch import Tensor


class LocalTrainer:
    """One process's share of the work: a model, trained for client after client."""

    def __init__(self, options: Options, data: ClientData, start: Tensor, total: Tensor) -> None:
        """Bind to the global vector `start` [d] and to the sum `total` [d]."""
        self.options, self.data, self.total = options, data, total
        self.model = build_model(options.model, options.seed)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)
        parameters = list(self.model.parameters())
        sizes = [p.numel() for p in parameters]
        self.slots = [
            (p, a.view_as(p), b.view_as(p))
            for p, a, b in zip(parameters, start.split(sizes), total.split(sizes), strict=True)
        ]

    def train(self, clients: list[int]) -> None:
        """Leave the clients' updates, weighted by their samples, in `total`."""
        self.total.zero_()
        for client in clients:
            images, labels = self.data.of(client)
            with torch.no_grad():
                for parameter, start, _ in self.slots:
                    parameter.copy_(start)
            batch_size = self.options.batch_size
            train_one_epoch(self.model, self.optimizer, images, labels, batch_size)
            with torch.no_grad():
                for parameter, start, total in self.slots:
                    total.add_(parameter - start, alpha=len(labels))


def serve(trainer: LocalTrainer, pipe: Connection, parents_ends: list[Connection]) -> None:
    """Train the clients that the parent names, round after round, until it closes.

    Replies True when a round's work is done. An error ends the process, with its
    traceback on stderr, and so closes the pipe.
    """
    for connection in parents_ends:  # inherited; open, they would hide the parent's end
        connection.close()
    while True:
        try:
            clients = pipe.recv()
        except EOFError:
            return
        trainer.train(clients)
        pipe.send(True)


@contextmanager
def workers(trainers: list[LocalTrainer]) -> Iterator[list[Connection]]:
    """Fork a worker for each trainer; yield the pipes to them."""
    context = multiprocessing.get_context("fork")
    pipes: list[Connection] = []
    processes = []
    try:
        for trainer in trainers:
            ours, theirs = context.Pipe()
            pipes.append(ours)
            args = (trainer, theirs, list(pipes))
            process = context.Process(target=serve, args=args, daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
        yield pipes
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join()


def train_in_parallel(pipes: list[Connection], clients: list[int]) -> None:
    """Deal the clients out to the workers and wait for all of them.

    Raises:
        RuntimeError: a worker died.
    """
    try:
        for rank, pipe in enumerate(pipes):
            pipe.send(clients[rank :: len(pipes)])
        for pipe in pipes:
            pipe.recv()
    except (EOFError, OSError) as error:
        raise RuntimeError("a worker died; its error, if any, is above") from error


def federate(options: Options, data: ClientData, model: Tensor, processes: int) -> RoundClock:
    """Run all rounds of FedAvg on the global vector `model` [d], in place."""
    model.share_memory_()
    totals = torch.zeros(processes, model.numel()).share_memory_()
    trainers = [LocalTrainer(options, data, model, total) for total in totals]
    weight = options.samples * options.per_round
    clock = RoundClock(options)

    def sampled_clients() -> Iterator[list[int]]:
        """Yield the clients of each round."""
        for number in range(options.total_rounds):
            generator = random.Random(f"{options.seed}/{number}")
            yield generator.sample(range(options.clients), options.per_round)

    def end_round() -> None:
        """Apply the mean update."""
        for total in totals:
            model.add_(total, alpha=1 / weight)
        clock.tick()

    if processes == 1:
        for clients in sampled_clients():
            trainers[0].train(clients)
            end_round()
    else:
        with workers(trainers) as pipes:
            for clients in sampled_clients():
                train_in_parallel(pipes, clients)
                end_round()
    return clock


def main() -> None:
    """Run the benchmark of the command line and print its JSON."""
    parser = make_parser("FedAvg by hand in plain torch.")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    options, own = read_options(parser)
    if own.processes < 1 or own.threads < 1:
        parser.error("--processes and --threads must be at least 1")
    if own.processes > 1 and own.threads > 1:
        parser.error("several processes have one torch thread each")
    torch.set_num_threads(own.threads)
    data = make_data(options.clients, options.samples, options.seed)
    model = flatten(build_model(options.model, options.seed).parameters())
    before = model.clone()
    clock = federate(options, data, model, own.processes)
    report(
        "hand-loop" if own.processes == 1 else "bare-loop",
        options,
        clock,
        before,
        model,
        packages=("torch",),
        processes=own.processes,
        threads=own.threads,
    )


if __name__ == "__main__":
    main()
