"""pfl's simulation with PyTorch: FedAvg, the cohort spread over torchrun's processes.

    torchrun --standalone --nproc_per_node 2 pfl_round.py

One torch thread a process, gloo between them. Without torchrun, one process.
"""

from __future__ import annotations

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # pfl takes any GPU; this compares CPUs

import dataclasses
import random
import sys

import numpy as np
import torch
from common import (
    LEARNING_RATE,
    Options,
    RoundClock,
    build_model,
    flatten,
    make_data,
    make_parser,
    read_options,
    report,
)
from pfl.aggregate.base import get_num_devices_weight_name
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.common_types import Population
from pfl.context import CentralContext
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.internal.ops import pytorch_ops
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn import functional


class Classifier(nn.Module):
    """A model with the two methods that pfl asks for."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy of a batch."""
        return functional.cross_entropy(self.body(images), labels)

    def metrics(self, images: Tensor, labels: Tensor) -> dict[str, object]:
        """Refuse: this benchmark evaluates nothing."""
        raise RuntimeError("an evaluation ran, and would be timed")


class FederatedAveragingOnly(FederatedAveraging):
    """FedAvg that never evaluates; pfl's own would do so in the first round."""

    def get_next_central_contexts(
        self, *args: object, **kwargs: object
    ) -> tuple[tuple[CentralContext, ...] | None, PyTorchModel, Metrics]:
        """Return the next round's contexts, with evaluation switched off."""
        contexts, model, metrics = super().get_next_central_contexts(*args, **kwargs)
        if contexts is not None:
            contexts = tuple(dataclasses.replace(context, do_evaluation=False) for context in contexts)
        return contexts, model, metrics


class RoundTimer(TrainingProcessCallback):
    """Ticks a clock at every round's end and checks who took part."""

    def __init__(self, clock: RoundClock, per_round: int) -> None:
        self.clock = clock
        self.per_round = per_round

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Note the time.

        Raises:
            RuntimeError: the round trained another number of clients than asked for.
        """
        self.clock.tick()
        trained = aggregate_metrics[get_num_devices_weight_name(Population.TRAIN)]
        if trained != self.per_round:
            raise RuntimeError(f"round {central_iteration}: {trained} clients, not {self.per_round}")
        return False, Metrics()


def make_dataset(options: Options) -> FederatedDataset:
    """Return the clients' data sets, made once, and dealt without replacement.

    All processes must draw the same sequence, so the order depends on the seed alone.
    """
    data = make_data(options.clients, options.samples, options.seed)
    datasets = [PyTorchTensorDataset(data.of(client), user_id=str(client)) for client in range(options.clients)]
    order = list(range(options.clients))
    random.Random(options.seed).shuffle(order)
    sampler = get_user_sampler("minimize_reuse", order)
    return FederatedDataset(datasets.__getitem__, sampler)


def federate(options: Options, model: PyTorchModel, data: FederatedDataset) -> RoundClock:
    """Run all rounds. Clients are of equal size, so an unweighted mean is FedAvg."""
    clock = RoundClock(options)
    FederatedAveragingOnly().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=options.total_rounds,
            evaluation_frequency=options.total_rounds,
            train_cohort_size=options.per_round,
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(training_data=data, val_data=data),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_batch_size=options.batch_size,
            local_num_epochs=1,
            local_learning_rate=LEARNING_RATE,
        ),
        callbacks=[RoundTimer(clock, options.per_round)],
        send_metrics_to_platform=False,
    )
    return clock


def main() -> None:
    """Run the benchmark of the command line; the first process prints its JSON."""
    options, _ = read_options(make_parser("FedAvg in pfl's simulation."))
    torch.set_num_threads(1)
    np.random.seed(options.seed)  # pfl's generators start from numpy's global one
    module = Classifier(build_model(options.model, options.seed))
    model = PyTorchModel(
        model=module,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
    )
    before = flatten(module.parameters())
    clock = federate(options, model, make_dataset(options))
    world = pytorch_ops.distributed
    if world.global_rank == 0:
        report(
            "pfl",
            options,
            clock,
            before,
            flatten(module.parameters()),
            packages=("pfl", "torch"),
            processes=world.world_size,
            threads=1,
        )
    sys.stdout.flush()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    os._exit(0)  # gloo's threads may abort a process that has reported and winds down


if __name__ == "__main__":
    main()
