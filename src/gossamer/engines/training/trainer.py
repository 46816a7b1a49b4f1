"""Local training of one block of participants: one after another, or stacked."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer import rng
from gossamer.aggregate import scale_rows_, tree_sum, tree_sum_rows
from gossamer.algorithms.base import Algorithm, Arrays
from gossamer.algorithms.carries import carry_views, given_to_loss
from gossamer.engines.base import never
from gossamer.engines.task import PERSONAL, Task, Variant
from gossamer.engines.training.batches import Batches, local_positions, on
from gossamer.engines.training.compression import compress_, decoded_downlink
from gossamer.engines.training.job import BlockResult, Job
from gossamer.engines.training.personal import leave_out_, own_part, with_own
from gossamer.engines.training.rows import (
    Rows,
    chunks,
    equal_runs,
    numbers,
    on_processor,
    row_norms,
    stack_rows,
    usable,
)
from gossamer.engines.training.steps import (
    Stretch,
    add_product_,
    clip,
    clip_rows,
    differentiate,
    take_step,
)
from gossamer.profiling import recorder
from gossamer.submodel import Layout
from gossamer.workloads.leaves import Leaves


class Trainer:
    """Trains blocks against resident state arrays [1, d] and the round's order of channels; keeps the last shared cut.

    The mappings of both may be changed between rounds. Once `stop` is true, `Interrupted` is raised before a next step.
    """

    def __init__(
        self,
        task: Task,
        state: Mapping[str, Tensor],
        order: Mapping[str, Tensor] | None = None,
        stop: Callable[[], bool] = never,
    ) -> None:
        self.task, self._state, self._order, self._scalars = task, state, order, task.algorithm.traits.scalars
        self._batches = Batches(task, stop)
        self._factored = may_leave_products(task)
        self._received_at: tuple[int, int, int] | None = None
        self._received: Arrays = {}
        self._decoded_at: tuple[int, int] | None = None
        self._decoded: Arrays = {}

    def train(self, job: Job, client_state: Arrays, target: Tensor | None = None) -> BlockResult:
        """Train one block.

        Args:
            job: the block.
            client_state: ``{name: [s, d]}`` rows of the algorithm's client arrays.
            target: memory that may hold weighted rows of the first payload, row i from float i * d_sub on, where that
                spares a copy.
        """
        variant = self.task.variants[job.block.variant]
        shared, layout, working = variant.shares_window, variant.layout, variant.working_layout
        with recorder.span("extract"):
            if shared:
                received = [self._receive(job, int(job.client[0]), shared)] * len(job.client)
            else:
                received = [self._receive(job, int(client), shared) for client in job.client]
        residuals = {name: client_state[name] for name in self.task.residuals.values()}
        client_state = {name: rows for name, rows in client_state.items() if name not in residuals}
        if working is not layout:
            client_state = self._reordered({n: rows.clone() for n, rows in client_state.items()}, layout, working)
        if variant.personal:
            received = with_own(received, client_state.pop(PERSONAL), variant.personal_mask)
        payload, private, losses = self._train_locally(job, received, client_state)
        if variant.unsent:
            leave_out_(payload, self._scalars, variant.unsent_mask)
        lost = compress_(self.task, job, payload, residuals)
        norms = row_norms(payload)
        finite = usable(norms, itertools.repeat(math.inf if job.max_norm is None else job.max_norm))
        # Copies, because weighting overwrites payload rows and an algorithm may send what it also keeps.
        kept = {name: rows.clone() if isinstance(rows, Tensor) else torch.cat(rows) for name, rows in private.items()}
        self._reordered(kept, working, layout)
        targets = [target] + [None] * (len(payload) - 1)
        summed = {
            name: self._weighted(job, name, rows, finite, shared, memory)
            for (name, rows), memory in zip(payload.items(), targets, strict=True)
        }
        shaped = [parts for name, parts in summed.items() if name not in self._scalars]
        for value in (value for parts in shaped for value in parts if value is not None):
            working.reorder_(value, layout)
        return BlockResult(job.block, summed, losses, finite, norms, kept | lost)

    def train_peers(
        self, job: Job, rows: Arrays, bounds: list[float]
    ) -> tuple[Arrays, Arrays, list[float], list[float]]:
        """Train one block of peers, each of which starts from rows of its own.

        Args:
            job: the block.
            rows: ``{name: [s, d_sub]}`` ([s, 1] of scalars), the peers' state, cut to their windows.
            bounds: largest norm of what each may send and keep.

        Returns:
            payload and new state, shaped like `rows`; losses; norms of both together. Peers whose norm is not finite,
            or exceeds its bound, idle: what they send and keep is that of zero steps.
        """
        variant = self.task.variants[job.block.variant]
        algorithm, layout, working = variant.algorithm, variant.layout, variant.working_layout
        lr = variant.local_steps.rate(job.lr)
        if working is not layout:
            rows = self._reordered({name: value.clone() for name, value in rows.items()}, layout, working)
        *ended, losses = self._train_locally(job, rows, {})
        payload, site = (
            {name: value if isinstance(value, Tensor) else torch.cat(value) for name, value in arrays.items()}
            for arrays in ended
        )
        norms = row_norms({f"payload.{name}": value for name, value in payload.items()} | site)
        finite = usable(norms, bounds)
        if not all(finite):
            lost = ~torch.tensor(finite)
            own = {name: value[lost] for name, value in rows.items()}
            idle = algorithm.end(own, {}, algorithm.begin(own, {}), 0, lr)
            for arrays, instead in zip((payload, site), idle, strict=True):
                for name, value in arrays.items():
                    value[lost] = instead[name]
        return self._reordered(payload, working, layout), self._reordered(site, working, layout), losses, norms

    def _reordered(self, arrays: Arrays, source: Layout, target: Layout) -> Arrays:
        """Rewrite arrays in place from one order in memory to another, scalars aside, and return them."""
        for name, value in arrays.items():
            if name not in self._scalars:
                source.reorder_(value, target)
        return arrays

    def _train_locally(
        self, job: Job, received: list[Arrays] | Arrays, client_state: Arrays
    ) -> tuple[dict[str, Rows], dict[str, Rows], list[float]]:
        """Do the local steps, in the mode of the variant.

        Args:
            received: initial arrays: [1, d] for each participant, or [s, d] of all.
        """
        positions, mode = local_positions(self.task, job), self.task.variants[job.block.variant].mode
        client_state = on(mode.device, client_state)
        if mode.stacked:
            if isinstance(received, list):
                received = {name: stack_rows([one[name] for one in received]) for name in received[0]}
            ended = self._train_stacked(job, on(mode.device, received), positions, client_state)
        else:
            if not isinstance(received, list):
                received = [
                    {name: value[i : i + 1] for name, value in received.items()} for i in range(len(job.client))
                ]
            moved = {id(one): on(mode.device, one) for one in received}  # a shared cut is moved once
            ended = self._train_singly(job, [moved[id(one)] for one in received], positions, client_state)
        return ended if not mode.is_on_gpu else (on_processor(ended[0]), on_processor(ended[1]), ended[2])

    def _weighted(
        self, job: Job, name: str, rows: Rows, finite: list[bool], shared: bool, target: Tensor | None
    ) -> list[Tensor | None]:
        """Weight the rows of one payload and add them up tile by tile, where the uplink and their windows let it."""
        task, layout = self.task, self.task.variants[job.block.variant].working_layout
        kind = task.algorithm.traits.uplink[name]
        if kind == "mean":
            weights = torch.from_numpy(job.weight).to(chunks(rows)[0][1])
            per_label = task.count_labels and name not in self._scalars
            labels = task.workload.client_labels(job.client) * weights[:, None] if per_label else None
            alone = isinstance(rows, list) and name not in self._scalars and (job.block.tile == 1 or not shared)
            if target is not None and labels is None and alone:  # no sum will be made, so this is where they may stay
                targets = target[: len(rows) * layout.d].view(len(rows), 1, layout.d)
                rows = [torch.mul(row, w, out=out) for row, w, out in zip(rows, weights, targets, strict=True)]
            else:
                for part, chunk in chunks(rows):
                    scale_rows_(layout, chunk, weights[part], None if labels is None else labels[part])
        tiles = [slice(low, low + job.block.tile) for low in range(0, len(job.client), job.block.tile)]
        summed = shared and kind != "rows"
        if summed and isinstance(rows, Tensor) and all(finite):
            return [tree_sum_rows(rows[tile]) for tile in tiles]
        present = [row for _, chunk in chunks(rows) for row in chunk]
        kept = [row if ok else None for row, ok in zip(present, finite, strict=True)]
        return [tree_sum(kept[tile]) for tile in tiles] if summed else kept

    def _receive(self, job: Job, client: int, shared: bool) -> Arrays:
        """Return the downlink arrays [1, d_sub], cut to the client's window; a shared cut is made once a round."""
        downlink = self.task.algorithm.traits.downlink
        names = tuple(self._state) if downlink is None else downlink
        address, variant = (job.round, job.phase, job.block.variant), self.task.variants[job.block.variant]
        if shared and self._received_at == address:
            return self._received
        if self._decoded_at != address[:2]:  # all participants of a phase decode the same
            self._decoded = decoded_downlink(self.task, self._state, names, job.round, job.phase)
            self._decoded_at = address[:2] if self.task.communication.downlink else None
        state = self._decoded
        cut = self.task.cut(variant, job.round, client, self._order)
        layout, working = variant.layout, variant.working_layout
        if cut.is_full and working is layout:
            return state
        cut_rows = {name: cut.read(row[0], row.new_zeros(cut.sub.d))[None] for name, row in state.items()}
        for row in cut_rows.values():
            layout.reorder_(row, working)
        if shared:
            self._received_at, self._received = address, cut_rows
        return cut_rows

    def receive(self, job: Job, received: Arrays) -> None:
        """Take what a round's participants of a variant start from, [1, d_sub] each, cut elsewhere; not written to."""
        variant = self.task.variants[job.block.variant]
        layout, working = variant.layout, variant.working_layout
        if working is not layout:
            received = {name: layout.reorder_(row.clone(), working) for name, row in received.items()}
        self._received_at, self._received = (job.round, job.phase, variant.index), received

    def _train_singly(
        self, job: Job, received: list[Arrays], positions: NDArray[np.int64], client_state: Arrays
    ) -> tuple[dict[str, Rows], dict[str, Rows], list[float]]:
        variant = self.task.variants[job.block.variant]
        algorithm, layout, local = variant.algorithm, variant.working_layout, variant.local_steps
        lr = local.rate(job.lr)
        payload: dict[str, list[Tensor]] = defaultdict(list)
        private: dict[str, list[Tensor]] = defaultdict(list)
        losses = []
        for i in range(len(job.client)):
            mine = {name: rows[i : i + 1] for name, rows in client_state.items()}
            carry = algorithm.begin(received[i], mine)
            num_steps, rows = int(job.steps[i]), carry_views(layout, carry)
            stretch = [Stretch(None, num_steps, rows)]
            carries = {parameter: {name: view[0] for name, view in views.items()} for parameter, views in rows.items()}
            trained = {name: views["x"].detach().requires_grad_() for name, views in carries.items()}
            leaves = Leaves(trained, factored=self._factored)
            values = []
            for step, parts in enumerate(self._batches.of(job, slice(i, i + 1), positions, one_by_one=True)):

                def loss(batch: dict[str, Any], row: int = i, step: int = step) -> Tensor:
                    """Return the loss of a batch."""
                    return self._loss(job, row, step, given_to_loss(algorithm, leaves.params, carries), batch)  # noqa: B023

                value, grads, factors = differentiate(loss, parts, leaves, local, variant.mode.device)
                if local.clip_norm is not None:
                    grads = clip(grads, local.clip_norm)
                grads = {name: grad.unsqueeze(0) for name, grad in grads.items()}
                take_step(variant, stretch, grads, lr, step)
                for name, left, right in factors:
                    add_product_(carries[name]["x"], left, right, -lr)
                values.append(value)
            self._represent(job, i, carry["x"][0], received[i]["x"][0], lr)
            own = self._own_part(variant, carry["x"])
            sent, kept = algorithm.end(received[i], mine, carry, num_steps, lr)
            for lists, arrays in ((payload, sent), (private, kept | own)):
                for name, row in arrays.items():
                    lists[name].append(row)
            losses.append(numbers(torch.stack(values).sum()) / num_steps)
        return dict(payload), dict(private), losses

    def _represent(self, job: Job, row: int, x: Tensor, before: Tensor, lr: float) -> None:
        """Change the trained model [d_sub] of a row of the job as the algorithm says, see `Algorithm.represent`."""
        task, variant = self.task, self.task.variants[job.block.variant]
        if not task.algorithm.traits.represents:
            return

        def generator(purpose: str) -> np.random.Generator:
            """Return the client's own random numbers."""
            return rng.generator(task.seed, purpose, job.round, job.phase, int(job.client[row]))

        layout = variant.working_layout
        variant.algorithm.represent(layout.views(x), layout.views(before), variant.steppers, lr, generator)

    def _own_part(self, variant: Variant, x: Tensor) -> Arrays:
        """Return what clients keep, see `own_part`; what stays with peers stays in their rows."""
        return own_part(variant, x) if self.task.topology is None else {}

    def _loss(self, job: Job, row: int, step: int, params: Mapping[str, Tensor], batch: dict[str, Any]) -> Tensor:
        """Return the loss of one local step of one client: the workload's, unless the algorithm has its own."""
        task = self.task
        if not task.algorithm.traits.has_local_loss:
            return task.workload.loss(params, batch)

        def generator(purpose: str) -> np.random.Generator:
            """Return the step's own random numbers."""
            return rng.generator(task.seed, purpose, job.round, job.phase, int(job.client[row]), step)

        capacity = task.variants[job.block.variant].capacity
        return task.algorithm.local_loss(task, capacity, params, batch, generator)

    def _train_stacked(
        self, job: Job, rows: Arrays, positions: NDArray[np.int64], client_state: Arrays
    ) -> tuple[dict[str, Rows], dict[str, Rows], list[float]]:
        variant, s = self.task.variants[job.block.variant], len(job.client)
        algorithm, layout, local = variant.algorithm, variant.working_layout, variant.local_steps
        lr = local.rate(job.lr)
        if s == 1:  # a ghost: kernels of one row may round differently from those of two
            job = job._replace(client=job.client.repeat(2), weight=job.weight.repeat(2), steps=job.steps.repeat(2))
            positions = positions.repeat(2, axis=0)
            rows, client_state = (
                {name: value.repeat(2, 1) for name, value in arrays.items()} for arrays in (rows, client_state)
            )
        carry = algorithm.begin(rows, client_state)
        views = carry_views(layout, carry)
        total, leaves, active = carry["x"].new_zeros(len(job.client)), Leaves({}), 0
        carries, stretches, num_rows = dict[str, Arrays](), list[Stretch](), len(job.client)

        def loss(batch: dict[str, Any]) -> Tensor:
            """Return the losses of a batch."""
            if num_rows < len(job.client):
                batch = {key: value if key == "scale" else value[:num_rows] for key, value in batch.items()}
            return self._losses(given_to_loss(algorithm, leaves.params, carries), batch)

        for step, parts in enumerate(self._batches.of(job, slice(0, len(job.client)), positions, one_by_one=False)):
            count = int(np.count_nonzero(job.steps > step))
            if count != active:
                active, num_rows = count, max(count, 2)
                carries = {p: {name: view[:num_rows] for name, view in views[p].items()} for p in views}
                leaves = self._stacked_leaves({name: arrays["x"] for name, arrays in carries.items()})
                stretches = Stretch.of(views, job.steps[:active], by_length=variant.depends_on_length)
            values, grads, factors = differentiate(loss, parts, leaves, local, variant.mode.device)
            if local.clip_norm is not None:
                grads = clip_rows(grads, local.clip_norm)
            take_step(variant, stretches, grads, lr, step)
            for name, left, right in factors:
                add_product_(views[name]["x"], left, right, -lr, active)
            total[:active].add_(values[:active])
        for i in range(s):
            self._represent(job, i, carry["x"][i], rows["x"][i], lr)
        kept = self._own_part(variant, carry["x"])
        payload, private = end_rows(algorithm, rows, client_state, carry, job, lr)
        private |= kept
        mean_loss = total / torch.from_numpy(job.steps).to(total)
        own = slice(0, s)
        return (
            {name: value[own] for name, value in payload.items()},
            {name: value[own] for name, value in private.items()},
            numbers(mean_loss[own]),
        )

    def _stacked_leaves(self, x: Arrays) -> Leaves:
        """Return parameters that share the memory of `x`."""
        trained = {name: view.detach().requires_grad_() for name, view in x.items()}
        return Leaves(trained, factored=self._factored and self.task.workload.traits.stacks_natively)

    def _losses(self, params: Mapping[str, Tensor], batch: Mapping[str, Any]) -> Tensor:
        """Return the losses [s] of the clients of a batch, whose parameters are `params` [s, ...]."""
        workload, scale = self.task.workload, batch["scale"]
        if workload.traits.stacks_natively:
            return workload.loss(params, batch)
        arrays = {key: value for key, value in batch.items() if key != "scale"}
        of_one = torch.vmap(lambda params, batch: workload.loss(params, batch | {"scale": scale}))
        losses: Tensor = of_one(params, arrays)
        return losses


def end_rows(
    algorithm: Algorithm, rows: Arrays, client_state: Arrays, carry: Arrays, job: Job, lr: float
) -> tuple[Arrays, Arrays]:
    """Call `end` once for every run of clients with equal step counts."""
    pieces = []
    for low, high in equal_runs(job.steps):
        received, private, trained = (
            {name: value[low:high] for name, value in arrays.items()} for arrays in (rows, client_state, carry)
        )
        pieces.append(algorithm.end(received, private, trained, int(job.steps[low]), lr))
    if len(pieces) == 1:
        return pieces[0]
    payload = {name: torch.cat([piece[0][name] for piece in pieces]) for name in pieces[0][0]}
    return payload, {name: torch.cat([piece[1][name] for piece in pieces]) for name in pieces[0][1]}


def may_leave_products(task: Task) -> bool:
    """Say whether gradients of linear layers may be left in two factors: nothing but plain steps asks for them."""
    algorithm = task.algorithm
    leave = task.workload.traits.leaves_products and (
        algorithm.traits.leaves_products or not algorithm.traits.has_local_loss
    )
    return leave and algorithm.is_plain_sgd and all(one.local_steps.leaves_products for one in task.variants)
