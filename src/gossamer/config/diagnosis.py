"""What went wrong in a run that diverged or learned nothing, and which entries of its configuration mend it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gossamer.config.schema import Config
from gossamer.engines.task import Task, Variant
from gossamer.threads import one_thread

TRIAL_STEPS = 30
DIVERGED, STABLE = 1e2, 2.0  # largest loss of trial steps, relative to their first, that means so
GROWTH = 1.5  # of the training loss of a run that diverged
FALL = 0.9  # of the training loss of a run in which something was learned
HIGH = 1.25  # training loss, relative to that of equal probabilities, of a run whose steps were too long
MANY_DROPPED = 0.1  # of all updates
FEW_ROUNDS = 5  # in which a model may well learn nothing yet
COLLAPSE = 0.5  # of the best accuracy, which a run that diverged is below at its end
ACCURACIES = ("accuracy", "validation_accuracy")
UNUSABLE = ("not finite", "too large")  # reasons for which an update is dropped, see `TrainReport`


def scaler_diverges(task: Task, lr: float) -> bool:
    """Say whether trial steps of the smallest sub-model diverge with the Scaler, and do not without it.

    Without normalisation its factors of 1 / capacity multiply up from layer to layer, and in attention they reach what
    the softmax compares. The steps are plain SGD from the initial model on the data of the first client.
    """
    variant = task.variants[0]
    if not task.scaler or variant.layout.d == task.workload.layout.d:
        return False
    try:
        with one_thread():
            with_it, without = (_growth(task, variant, scale, lr) for scale in (1.0 / variant.capacity, 1.0))
    except Exception:  # a workload that cannot be asked outside of training: what is to be told matters more
        return False
    return with_it > DIVERGED and without < STABLE


def _growth(task: Task, variant: Variant, scale: float, lr: float) -> float:
    """Return the largest loss on the way, relative to the first one; infinite where one is not finite."""
    workload = task.workload
    x, number = workload.init(task.seed), int(workload.num_samples[0])
    row = task.cut(variant, 0, order=task.cutter.order(x)).read(x, x.new_zeros(variant.layout.d))
    params = {name: value.clone().requires_grad_() for name, value in variant.layout.views(row).items()}
    losses = []
    for step in range(TRIAL_STEPS):
        positions = (step * task.batch_size + np.arange(min(task.batch_size, number), dtype=np.int64)) % number
        batch = workload.batch(np.zeros(1, dtype=np.int64), positions[None])
        merged = {name: value[0] for name, value in {**batch.samples, **batch.client}.items()}
        loss = workload.loss(params, merged | {"scale": scale})
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            return math.inf
        grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        with torch.no_grad():
            for value, grad in zip(params.values(), grads, strict=True):
                value.sub_(torch.zeros_like(value) if grad is None else grad, alpha=lr)
    return max(losses) / losses[0]


def advice(config: Config, task: Task) -> str:
    """Return what keeps updates usable: the Scaler's option, where it is the likely cause, and the learning rate."""
    clip = "set train.clip_norm" if config.train.clip_norm is None else "lower train.clip_norm"
    slower = f"lower train.lr or {clip}"
    if not scaler_diverges(task, config.train.lr):
        return slower
    steps = f"trial steps of capacity {task.variants[0].capacity:g} diverge with the Scaler and not without"
    return f"set submodel.scaler to false ({steps}), or {slower}"


def diagnose(config: Config, task: Task, records: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return a sentence if the run diverged, or if it learned nothing; else nothing.

    Args:
        records: those of metrics.jsonl, with infinite numbers as such.
    """
    if not records:
        return ()
    found = next(_divergence(records), None)
    if found is not None:
        return (f"the run diverged: {found}: {advice(config, task)}",)
    stuck = _chance(task, records)
    if stuck is None or len(records) < FEW_ROUNDS:
        return ()
    return (f"the run learned nothing in {len(records)} rounds: {stuck}: {_lever(config, task, records)}",)


def _divergence(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield what shows that a run diverged."""
    losses = [math.nan if record["train_loss"] is None else record["train_loss"] for record in records]
    last_finite = max((number for number, loss in enumerate(losses, start=1) if math.isfinite(loss)), default=0)
    if last_finite < len(losses):
        yield f"the training loss is not finite since round {last_finite + 1}"
    unusable = sum(record["dropped"].get(reason, 0) for record in records for reason in UNUSABLE)
    total = unusable + sum(record["num_survivors"] for record in records)
    if unusable and unusable >= MANY_DROPPED * total:
        yield f"{unusable} of {total} updates were dropped, because they were not finite or far too large"
    last = min(losses[-3:])
    if len(losses) > 3 and losses[0] > 0 and last > GROWTH * losses[0]:
        yield f"the training loss rose from {losses[0]:.3g} in round 1 to {losses[-1]:.3g} in round {len(losses)}"
    for name in ACCURACIES:
        values = [record[name] for record in records if record.get(name) is not None]
        if len(values) > 3 and max(values[-3:]) < COLLAPSE * max(values):
            yield f"{name} fell from {max(values):.1%} to {values[-1]:.1%}"


def _chance(task: Task, records: Sequence[Mapping[str, Any]]) -> str | None:
    """Return what shows that no model was better than a guess; None: one was, or it cannot be told."""
    for name in ACCURACIES if len(task.workload.layout.labels or ()) < 2 else ():  # else whose accuracy?
        values = [record[name] for record in records if record.get(name) is not None]
        guess = 1.0 / max(1, task.workload.num_labels)
        if task.workload.num_labels > 1 and values and max(values) <= guess + min(0.5 * guess, 0.05):
            return f"{name} was never above {max(values):.1%}, and guessing gives {guess:.1%}"
    values = [record["bits_per_character"] for record in records if record.get("bits_per_character") is not None]
    if values and min(values) >= records[-1].get("unigram_bits", 0.0):
        return "no prediction was better than the frequencies of characters"
    return None


def _lever(config: Config, task: Task, records: Sequence[Mapping[str, Any]]) -> str:
    """Return what to change where nothing was learned."""
    guess = math.log(max(2, task.workload.num_labels))  # the loss of equal probabilities, and about that of a new model
    losses = [record["train_loss"] for record in records if record["train_loss"] is not None]
    lr = f"train.lr = {config.train.lr:g}"
    if (
        losses
        and losses[-1] < FALL * min(losses[0], guess)
        and config.submodel.scaler
        and min(config.submodel.capacities) < 1
    ):
        return (
            f"the training loss of sub-models fell from {losses[0]:.3g} to {losses[-1]:.3g}, but the whole model, and"
            " sub-models without the Scaler, are what is evaluated: set submodel.scaler to false, or add capacity 1 to"
            " submodel.capacities"
        )
    if losses and max(losses) > HIGH * guess:
        return f"lower {lr} or set train.clip_norm, because the training loss rose to {max(losses):.3g} on the way"
    return f"raise {lr}, or train for longer (rounds, train.epochs)"
