"""CreamFL: clients of unequal models and modalities learn from one another by representations of a public set."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from gossamer.aggregate.representations import CHUNK, ensemble
from gossamer.algorithms.base import Arrays, BaseAlgorithm, Draws, Steppers
from gossamer.algorithms.federated import FedAvg
from gossamer.algorithms.optimizers import NUM_STEPS, Adam
from gossamer.errors import ConfigError
from gossamer.submodel import Layout


class PublicSet(Protocol):
    """What `Workload.public_set` returns: samples that the server and all clients have, and how models see them.

    Representations are float32 [r, width], of length 1, as wide in all models and modalities. A workload has an entry
    [num_samples, width] of its layout for those of each modality, in a module of its own, which every client holds.

    Attributes:
        modalities: two names.
        num_samples: samples, each of which has both modalities.
        entries: ``{modality: name of the layout's entry}``.
        server_modules: modules of the server's own model, which no client holds.
    """

    modalities: tuple[str, ...]
    num_samples: int
    entries: Mapping[str, str]
    server_modules: tuple[str, ...]

    def held(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the modalities of which a client whose parameters have these names has an encoder."""
        ...

    def represent(self, params: Mapping[str, Tensor], modality: str, rows: Tensor) -> Tensor:
        """Return the representations of samples int64 [r] by the model in `params`, a client's or the server's."""
        ...

    def server_loss(self, params: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        """Return the loss (scalar) of the server's own model on samples int64 [r]."""
        ...


class CreamFL(FedAvg):
    """CreamFL (Yu et al., ICLR 2023, arXiv 2302.08888): only representations of a public set travel.

    A client receives the server's representations I_g and T_g of P public samples, takes its local steps on its own
    samples, and then goes through the public set once: for a sample k in batches, of each modality that it has,

        inter * CE(i T_g^T / temperature, k) + intra * CE([i . i_g^k, i . i_old^k] / temperature, 0),

    where i is its representation, T_g the server's of the other modality, and i_old that of the model with which it
    began the round. It sends its representations. The server combines them, see `ensemble`, learns to give the same
    (``distillation`` times the mean squared error), and learns from the public pairs themselves.

    A client's model stays with it; clients may differ in modalities, in architecture where the workload has several,
    and, by ``submodel.capacities``, in width.
    Representations are all that is sent: P * width numbers for each modality, up for those that the client has and
    down for both. [M] Here the server trains when a round ends, so that in the first round, when it has sent nothing
    yet (zeros), clients only train on their own samples, and count alike. [M] The server's optimizer is Adam, anew in
    every round; the clients' is that of local steps, ``train.groups`` included, with new moments.
    """

    class Options(BaseAlgorithm.Options):
        """Options of CreamFL.

        Attributes:
            inter, intra: weights of the two contrasts; with both 0, clients learn from their own samples alone.
            temperature: of both contrasts.
            public_batch_size: public samples of a step, at clients and at the server.
            distillation: weight of the mean squared error to the ensemble.
            server_lr: learning rate of the server.
            server_epochs: times that the server goes through the public set in a round, for each of its two losses.
            chunk: public samples whose similarities to all others are in memory at a time.
        """

        inter: float = Field(default=0.5, ge=0)
        intra: float = Field(default=0.5, ge=0)
        temperature: float = Field(default=0.5, gt=0)
        public_batch_size: int = Field(default=32, ge=2)
        distillation: float = Field(default=0.3, ge=0)
        server_lr: float = Field(default=1e-3, gt=0)
        server_epochs: int = Field(default=1, ge=1)
        chunk: int = Field(default=CHUNK, ge=1)

    options: CreamFL.Options

    traits = replace(
        FedAvg.traits,
        uplink={"x": "rows"},
        strategy="static",
        default_scaler=False,
        represents=True,
        no_offsets="a client's model is its own in all rounds",
        no_compression="clients send representations, which are compared with one another",
    )
    _layout: Layout
    _public: PublicSet

    def of_model(self, layout: Layout) -> CreamFL:
        """Return the algorithm for a layout."""
        bound = copy.copy(self)
        bound._layout = layout
        return bound

    def of_workload(self, workload: Any) -> CreamFL:
        """Return the algorithm for a workload, which must have a public set.

        Raises:
            ConfigError: it has none, or one that is too small.
        """
        if not workload.traits.has_public_set:
            raise ConfigError(
                "algorithm 'creamfl' sends representations of a public set, and the workload has none: choose one that"
                " has, such as audio-visual-digits with exchange: representations, or another algorithm"
            )
        bound = copy.copy(self)
        bound._public = workload.public_set()
        size = self.options.public_batch_size
        if bound._public.num_samples < size:
            raise ConfigError(
                f"algorithm 'creamfl' goes through the public set in batches of {size} samples, but it has"
                f" {bound._public.num_samples}: give it {size} or more, better hundreds, or lower"
                " algorithm.public_batch_size"
            )
        return bound

    def sent(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the entries of representations of those modalities whose encoders are among the names."""
        return tuple(self._public.entries[modality] for modality in self._public.held(names))

    def received(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the entries of all representations."""
        return tuple(self._public.entries.values())

    # ---- at a client

    def init(self, x: Tensor) -> Arrays:
        """Return the model of the server, with representations of zeros."""
        return {"x": x}

    def represent(self, params: Arrays, before: Arrays, steppers: Steppers, lr: float, generator: Draws) -> None:
        """Go through the public set once, and put the representations of all of it where they are sent from.

        Args:
            params: ``{name: tensor}`` of the client's model.
            before: that with which it began the round, and what the server sent.
            steppers: ``{name: (who takes the steps of a parameter, factor of their learning rate)}``.
            lr: learning rate.
            generator: random numbers of this client and round.
        """
        public, options = self._public, self.options
        held = public.held(tuple(params))
        sent = {modality: before[entry] for modality, entry in public.entries.items()}
        every = torch.arange(public.num_samples)
        with torch.no_grad():
            old = {modality: public.represent(before, modality, every) for modality in held}

        def loss(leaves: Mapping[str, Tensor], rows: Tensor) -> Tensor:
            """Return the contrasts of public samples int64 [r]."""
            total = torch.zeros((), device=old[held[0]].device)
            for modality in held:
                own, other = public.represent(leaves, modality, rows), sent[other_of(public, modality)]
                rows = rows.to(own.device)
                inter = inter_contrast(own, other, rows, options.temperature)
                intra = intra_contrast(own, sent[modality][rows], old[modality][rows], options.temperature)
                total = total + options.inter * inter + options.intra * intra
            return total

        if (options.inter or options.intra) and all(bool(value.any()) for value in sent.values()):
            order = torch.from_numpy(generator("public-pass").permutation(public.num_samples))
            models = {name: value for name, value in params.items() if name not in public.entries.values()}
            descend(models, batches(order, options.public_batch_size), loss, steppers, lr)
        with torch.no_grad():
            for modality in held:
                params[public.entries[modality]].copy_(public.represent(params, modality, every))

    def end(
        self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor], carry: Arrays, steps: int, lr: float
    ) -> tuple[Arrays, Arrays]:
        """Return each row, of which representations are sent; moments that the client keeps."""
        return {"x": carry["x"]}, self.private(carry)

    # ---- at the server

    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        """Combine the representations, train the server's model, and represent the public set for the next round.

        A client has sent nothing of a modality where its representations are zeros.
        """
        public, options = self._public, self.options
        known, sent = (self._layout.views(rows) for rows in (state["x"][0], inbox["x"]))
        targets = Arrays()
        for modality, entry in public.entries.items():
            rows = sent[entry][sent[entry].flatten(1).any(1)]
            if len(rows):
                targets[modality] = ensemble(rows, known[public.entries[other_of(public, modality)]], options.chunk)
        new = state["x"].clone()
        params = self._layout.views(new[0])
        own = {name: value for name, value in params.items() if name.partition(".")[0] in public.server_modules}

        def imitation(leaves: Mapping[str, Tensor], rows: Tensor) -> Tensor:
            """Return how far the server's representations are from the ensembles."""
            errors = [F.mse_loss(public.represent(leaves, name, rows), one[rows]) for name, one in targets.items()]
            return options.distillation * torch.stack(errors).sum()

        every = torch.arange(public.num_samples)
        server = FedAvg({}).with_optimizer(Adam({}), keeps_moments=False)
        steppers = dict.fromkeys(own, (server, 1.0))
        parts = list(batches(every, options.public_batch_size)) * options.server_epochs
        if targets and options.distillation:
            descend(own, parts, imitation, steppers, options.server_lr)
        descend(own, parts, public.server_loss, steppers, options.server_lr)
        with torch.no_grad():
            for modality, entry in public.entries.items():
                params[entry].copy_(public.represent(own, modality, every))
        return {"x": new}


def other_of(public: PublicSet, modality: str) -> str:
    """Return the other one of two modalities."""
    first, second = public.modalities
    return second if modality == first else first


def batches(order: Tensor, size: int) -> Iterator[Tensor]:
    """Yield pieces of an order int64 [P], of `size` and a shorter last one, that of a single sample left out."""
    yield from (piece for piece in torch.split(order, size) if len(piece) > 1)


def inter_contrast(own: Tensor, other: Tensor, rows: Tensor, temperature: float) -> Tensor:
    """Return ``CE(own T^T / temperature, k)``, the mean over samples: each finds itself in the other modality.

    Args:
        own: [r, width], representations of public samples.
        other: [P, width], the server's of all of them in the other modality.
        rows: int64 [r], which samples they are.
        temperature: of the softmax.
    """
    return F.cross_entropy(own @ other.T / temperature, rows)


def intra_contrast(own: Tensor, known: Tensor, old: Tensor, temperature: float) -> Tensor:
    """Return ``CE([own . known, own . old] / temperature, 0)``, the mean over samples: towards the server's.

    Args:
        own, known, old: [r, width], of the same samples: the client's, the server's, the client's of before.
        temperature: of the softmax.
    """
    logits = torch.stack([(own * known).sum(1), (own * old).sum(1)], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(own), dtype=torch.int64, device=own.device))


def descend(
    params: Arrays,
    parts: Iterable[Tensor],
    loss: Callable[[Mapping[str, Tensor], Tensor], Tensor],
    steppers: Steppers,
    lr: float,
) -> None:
    """Take a step in place along the gradient of the loss of each part, with new moments of the optimizer.

    Args:
        params: ``{name: tensor}``; those on which the loss does not depend stay as they are.
        parts: public samples of each step.
        loss: callback that returns the loss of parameters and samples.
        steppers: ``{name: (who takes the steps of a parameter, factor of their learning rate)}``.
        lr: learning rate.
    """
    carries = {name: {"x": value.detach()[None]} for name, value in params.items()}
    for name, carry in carries.items():
        optimizer = steppers[name][0].optimizer
        assert optimizer is not None
        carry.update(optimizer.init(carry["x"]))
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    for rows in parts:
        grads = torch.autograd.grad(loss(leaves, rows), list(leaves.values()), allow_unused=True)
        for (name, carry), grad in zip(carries.items(), grads, strict=True):
            if grad is not None:
                if NUM_STEPS in carry:
                    carry[NUM_STEPS].add_(1)
                algorithm, factor = steppers[name]
                algorithm.step(carry, grad[None], lr * factor)
