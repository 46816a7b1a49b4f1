"""The contract of a workload."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.errors import ContractError
from gossamer.submodel import Layout
from gossamer.testing.requirements import require, require_close, require_declared
from gossamer.workloads.base import Batch, Workload, add_sums, require_workload

Ints = NDArray[np.int64]
Tensors = Mapping[str, Tensor]
NUM_POSITIONS = 8  # samples of a client in the batches that are tried


def check_workload(workload: Workload) -> None:
    """Check a workload against `gossamer.workloads.base.Workload`.

    Args:
        workload: a small instance, with at least two clients, which should differ in size.

    Raises:
        ContractError: it breaks the contract.

    Example:
        >>> from gossamer.workloads.convex import LeastSquares
        >>> class Scaled(LeastSquares):
        ...     def loss(self, params, batch):
        ...         return super().loss(params, batch) * 2
        >>> check_workload(Scaled({"dim": 3, "num_samples": 5}, num_clients=2, partition="iid", seed=0))
        >>> class Detached(LeastSquares):
        ...     def loss(self, params, batch):
        ...         return super().loss(params, batch).detach()
        >>> check_workload(Detached({"dim": 3, "num_samples": 5}, num_clients=2, partition="iid", seed=0))
        Traceback (most recent call last):
        gossamer.errors.ContractError: loss must be differentiable by the parameters: compute it from them by ...
    """
    require_declared(require_workload, workload)
    _check_attributes(workload)
    _check_init(workload)
    _check_client_labels(workload)
    _check_batches(workload)
    _check_padded_batches(workload)
    _check_loss(workload)
    _check_holdings(workload)
    if workload.traits.supports_padding:
        _check_loss_of_padding(workload)
    if workload.traits.supports_stacking:
        loss_of = torch.vmap(lambda params, one: workload.loss(params, one | {"scale": 1.0}))
        _check_stacked_loss(workload, loss_of, "under torch.vmap: correct it, or set supports_stacking to False")
    if workload.traits.stacks_natively:
        _check_stacked_loss(
            workload,
            lambda params, batch: workload.loss(params, batch | {"scale": 1.0}),
            "of several clients in one call: correct it, or set stacks_natively to False",
        )
    for capacity in (1.0, 0.5):
        _check_evaluation(workload, capacity)


# ---- data


def _check_attributes(workload: Workload) -> None:
    sizes, layout = workload.num_samples, workload.layout
    require(isinstance(layout, Layout), f"layout is {layout!r}: make it by gossamer.submodel.Layout.of")
    require(isinstance(sizes, np.ndarray), f"num_samples is a {type(sizes).__name__}: make it a numpy array")
    require(sizes.dtype == np.int64, f"num_samples must be int64, not {sizes.dtype}: convert it by astype")
    require(
        sizes.shape == (workload.num_clients,),
        f"num_samples has shape {sizes.shape}, not one entry for each of num_clients = {workload.num_clients}",
    )
    require(
        sizes.min() >= 1, f"client {sizes.argmin()} has {sizes.min()} training samples: give every client at least one"
    )
    counts = {"num_labels": (workload.num_labels, 0), "num_statistics_chunks": (workload.num_statistics_chunks, 0)}
    counts["num_evaluation_chunks"] = (workload.num_evaluation_chunks, 1)
    for name, (value, low) in counts.items():
        require(value >= low, f"{name} = {value!r} must be {low} or more")
    digest = workload.digest()
    require(isinstance(digest, str), f"digest returned {digest!r}: return a string, see gossamer.workloads.digests")
    require(digest == workload.digest(), "digest must depend on the data alone: it is another one when asked again")


def _check_init(workload: Workload) -> None:
    row, layout = workload.init(3), workload.layout
    require(
        row.dtype in (torch.float32, torch.float64), f"init must return float32 or float64, not {row.dtype}: convert it"
    )
    require(
        row.shape == (layout.d,),
        f"init returned shape {tuple(row.shape)}, not ({layout.d},): make it by layout.flatten",
    )
    bad = int((~torch.isfinite(row)).sum())
    require(bad == 0, f"init returned {bad} values that are not finite: correct the initialisation")
    require(
        torch.equal(row, layout.flatten(layout.views(row))),
        "init must leave the numbers between parameters at zero: make the row by layout.flatten",
    )
    require(
        torch.equal(row, workload.init(3)),
        "init must depend on the seed alone: draw from a generator made from the seed",
    )
    whole, views, merges = workload.params_of(row), layout.views(row), workload.traits.merges_parameters
    require(
        all(torch.equal(whole[name], view) if name in whole else merges for name, view in views.items()),
        "params_of must return all parameters of the layout as they are in the row: add others to layout.views(row)",
    )


def _check_client_labels(workload: Workload) -> None:
    clients = np.arange(workload.num_clients, dtype=np.int64)[::-1].copy()
    labels = workload.client_labels(clients)
    expected = (workload.num_clients, workload.num_labels)
    require(labels.dtype == torch.bool, f"client_labels must be bool, not {labels.dtype}: convert it")
    require(
        labels.shape == expected,
        f"client_labels returned shape {tuple(labels.shape)}, not {expected}: return a row for each client asked for",
    )
    for row, client in enumerate(clients.tolist()):
        alone = workload.client_labels(clients[row : row + 1])[0]
        require(
            torch.equal(labels[row], alone),
            f"client_labels of client {client} depend on the others in the call: look them up by the client's number",
        )


def _some_clients(workload: Workload) -> Ints:
    """Return the largest client and the smallest one, of those that hold the same modules as most do."""
    everybody = np.arange(workload.num_clients, dtype=np.int64)
    holding = workload.client_holdings(everybody)
    alike = everybody[holding == np.bincount(holding).argmax()]
    sizes = workload.num_samples[alike]
    return np.array([alike[sizes.argmax()], alike[sizes.argmin()]], dtype=np.int64)


def _whole_batch(workload: Workload, round: int = 0) -> tuple[Ints, Ints, Batch]:
    """Return two clients, positions without padding, and what the workload makes of them."""
    clients = _some_clients(workload)
    num_positions = min(NUM_POSITIONS, int(workload.num_samples[clients].min()))
    positions = np.arange(num_positions, dtype=np.int64)[None].repeat(2, axis=0)
    return clients, positions, workload.batch(clients, positions, round=round)


def _check_batches(workload: Workload) -> None:
    clients, positions, batch = _whole_batch(workload)
    kept = clients.copy(), positions.copy()
    lead = positions.shape
    for name, value in batch.samples.items():
        require(
            value.shape[:2] == lead,
            f"batch sample {name!r} has shape {tuple(value.shape)}, not ({lead[0]}, {lead[1]}, ...): put clients and"
            " samples first",
        )
    for name, value in batch.client.items():
        require(
            value.shape[:1] == lead[:1],
            f"client constant {name!r} has shape {tuple(value.shape)}, not ({lead[0]}, ...): put clients first",
        )
    if "mask" in batch.samples:
        require((batch.samples["mask"] == 1).all(), "the mask must be 1 where nothing is padded: see Batch.samples")
    _require_same("batch must depend on its arguments alone", batch, workload.batch(clients, positions, round=0))
    backwards = workload.batch(clients[::-1].copy(), positions[:, ::-1].copy(), round=0)
    turned = Batch(
        {name: value.flip(0, 1) for name, value in backwards.samples.items()},
        {name: value.flip(0) for name, value in backwards.client.items()},
    )
    _require_same("a sample must not depend on its neighbours in the call", batch, turned)
    alone = workload.batch(clients[:1], positions[:1, :1], round=0)
    first = Batch(
        {name: value[:1, :1] for name, value in batch.samples.items()},
        {name: value[:1] for name, value in batch.client.items()},
    )
    _require_same("a sample must not depend on how many are asked for", first, alone)
    unchanged = all(map(np.array_equal, kept, (clients, positions)))
    require(unchanged, "batch must not change its arguments: work on a copy")


def _check_padded_batches(workload: Workload) -> None:
    clients, positions, whole = _whole_batch(workload)
    padded = positions.copy()
    padded[1, 1:] = -1
    batch = workload.batch(clients, padded, round=0)
    present = torch.from_numpy(padded >= 0)
    if present.all():
        return  # clients of one sample have nothing to pad
    require("mask" in batch.samples, f"a batch with padding must have the key 'mask', but has {sorted(batch.samples)}")
    mask = batch.samples["mask"]
    require(mask.dtype == torch.float32, f"the mask must be float32, not {mask.dtype}: convert it")
    require(
        torch.equal(mask, present.float()),
        "the mask must be 1 for samples and 0 for padding: make it of positions >= 0",
    )
    for name, value in whole.samples.items():
        if name != "mask":
            same = torch.equal(batch.samples[name][present], value[present])
            require(same, f"padding changes the samples {name!r}: assemble each sample by its own position")
            finite = torch.isfinite(batch.samples[name]).all()
            require(finite, f"padding of {name!r} must be finite: fill it with zeros, or with any sample")


def _require_same(message: str, batch: Batch, other: Batch) -> None:
    for values, others in zip(batch, other, strict=True):
        require(values.keys() == others.keys(), f"{message}: the keys are {sorted(values)}, then {sorted(others)}")
        for name, value in values.items():
            other_value = others[name]
            require(value.dtype == other_value.dtype, f"{message}: {name!r} is {value.dtype}, then {other_value.dtype}")
            require(torch.equal(value, other_value), f"{message}: {name!r} differs")


# ---- loss


def _merged(workload: Workload, batch: Batch, row: int) -> dict[str, Any]:
    """Return what `loss` receives for one client."""
    merged = {name: value[row] for values in batch for name, value in values.items()}
    return merged | ({"key": torch.tensor(row)} if workload.traits.uses_key else {}) | {"scale": 1.0}


def _loss_and_gradient(workload: Workload, params: Tensors, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
    loss = workload.loss(leaves, batch)
    require(loss.shape == (), f"loss must be a scalar, not of shape {tuple(loss.shape)}: take the mean over samples")
    dtype = workload.init(0).dtype
    require(loss.dtype == dtype, f"loss must be {dtype}, as the parameters are, not {loss.dtype}")
    require(torch.isfinite(loss), f"loss is {float(loss.detach())!r} on the initial model: correct it, or init")
    require(
        loss.requires_grad, "loss must be differentiable by the parameters: compute it from them by torch operations"
    )
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    require(any(grad is not None for grad in grads), "loss depends on no parameter: compute it from params")
    flat = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves.values(), grads, strict=True)]
    gradient = torch.cat([grad.flatten() for grad in flat])
    finite = torch.isfinite(gradient).all()
    require(finite, "the gradient of the loss is not finite on the initial model: correct the loss, or init")
    return loss.detach(), gradient


def _check_loss(workload: Workload) -> None:
    _, _, batch = _whole_batch(workload)
    row, layout = workload.init(0), workload.layout
    params, merged = layout.views(row), _merged(workload, batch, 0)
    kept = {name: value.clone() for name, value in merged.items() if isinstance(value, Tensor)}
    before = row.clone()
    found = _loss_and_gradient(workload, params, merged)
    changed = [name for name, value in kept.items() if not torch.equal(merged[name], value)]
    require(not changed, f"loss must not change the batch, but changed {changed}: work on a copy")
    require(torch.equal(row, before), "loss must not change the parameters: work on a copy")
    again = _loss_and_gradient(workload, params, merged)
    require(
        all(map(torch.equal, found, again)),
        f"loss must depend on its arguments alone: it is {found[0]}, then {again[0]}",
    )
    if "mask" in merged:
        bare = {name: value for name, value in merged.items() if name != "mask"}
        remedy = "loss must do without batch['mask'], which is left out where nothing is padded: use batch.get('mask')"
        try:
            unpadded, _ = _loss_and_gradient(workload, params, bare)
        except KeyError as error:
            raise ContractError(remedy) from error
        require_close(unpadded, found[0], remedy)
    if layout.cut_axes:  # the smaller model is any of the right shapes
        sub = layout.cut(0.5)
        part = {name: params[name][tuple(map(slice, shape))] for name, shape in zip(sub.names, sub.shapes, strict=True)}
        _loss_and_gradient(workload, part, merged | {"scale": 2.0})


def _check_holdings(workload: Workload) -> None:
    """Check that clients who lack modules can be trained on what they hold."""
    everybody = np.arange(workload.num_clients, dtype=np.int64)
    numbers, last = workload.client_holdings(everybody), max(0, len(workload.holdings) - 1)
    require(
        numbers.shape == everybody.shape and bool((numbers >= 0).all()) and bool((numbers <= last).all()),
        f"client_holdings returned {numbers.tolist()!r:.80}: return a number from 0 to {last} for each client",
    )
    views = workload.layout.views(workload.init(0))
    for number, holding in enumerate(workload.holdings):
        held = workload.layout.of_modules(holding.modules).names
        require(bool(held), f"holding {holding.name!r} has no parameters: name at least one module of the layout")
        for client in everybody[numbers == number][:1]:
            batch = workload.batch(np.array([client]), np.zeros((1, 1), dtype=np.int64))
            _loss_and_gradient(workload, {name: views[name] for name in held}, _merged(workload, batch, 0))
        try:
            workload.metrics(workload.evaluate({name: views[name] for name in held}, {}, 0))
        except (LookupError, RuntimeError, ValueError, ZeroDivisionError) as error:
            raise ContractError(
                f"evaluate and metrics fail on what holding {holding.name!r} has ({type(error).__name__}: {error}):"
                " measure what can be told by the parameters that are given, and leave out the rest"
            ) from error


def _check_loss_of_padding(workload: Workload) -> None:
    clients, positions, batch = _whole_batch(workload)
    params = workload.layout.views(workload.init(0))
    padded = workload.batch(clients, np.concatenate([positions, np.full_like(positions, -1)], axis=1), round=0)
    expected = _loss_and_gradient(workload, params, _merged(workload, batch, 0))
    found = _loss_and_gradient(workload, params, _merged(workload, padded, 0))
    message = (
        "loss must leave out what the mask marks as padding: weight by batch['mask'], or set supports_padding to False"
    )
    for value, other in zip(found, expected, strict=True):
        require_close(value, other, message)


def _check_stacked_loss(workload: Workload, loss_of: Callable[..., Tensor], where: str) -> None:
    """Compare a stacked computation with one client after another, at different parameters."""
    _, _, batch = _whole_batch(workload)
    rows = torch.stack([workload.init(0), workload.init(1)])
    views = {name: value.requires_grad_() for name, value in workload.layout.views(rows).items()}
    samples = {name: value for values in batch for name, value in values.items()}
    if workload.traits.uses_key:
        samples["key"] = torch.arange(2)
    try:
        losses = loss_of(views, samples)
    except RuntimeError as error:
        raise ContractError(f"loss fails ({error}) {where}") from error
    require(losses.shape == (2,), f"loss has shape {tuple(losses.shape)}, not one entry a client, {where}")
    grads = torch.autograd.grad(losses.sum(), list(views.values()), allow_unused=True)
    for row in range(2):
        alone, gradient = _loss_and_gradient(
            workload, {n: v[row] for n, v in views.items()}, _merged(workload, batch, row)
        )
        require_close(losses[row].detach(), alone, f"loss has another value {where}")
        mine = [view[row] * 0 if grad is None else grad[row] for view, grad in zip(views.values(), grads, strict=True)]
        stacked = torch.cat([grad.detach().flatten() for grad in mine])
        require_close(stacked, gradient, f"the gradient of the loss has another value {where}")


# ---- evaluation


def _check_evaluation(workload: Workload, capacity: float) -> None:
    layout, row = workload.layout.cut(capacity), workload.init(0)
    if layout.d != workload.layout.d:
        whole = workload.layout.views(row)
        corners = zip(layout.names, layout.shapes, strict=True)
        row = layout.flatten({name: whole[name][tuple(map(slice, shape))] for name, shape in corners})
    params, before = layout.views(row), row.clone()
    with torch.no_grad():
        total = _statistics(workload, params)
        parts = [workload.evaluate(params, total, chunk) for chunk in range(workload.num_evaluation_chunks)]
        again = workload.evaluate(params, total, 0)
    for part in parts:
        require(
            part.keys() == parts[0].keys(),
            f"evaluate must return the same names for every chunk, not {sorted(part)} and {sorted(parts[0])}",
        )
        for name, value in part.items():
            kind = type(value).__name__
            require(isinstance(value, np.ndarray), f"sum {name!r} must be a numpy array, not {kind}: convert it")
            require(value.dtype == np.float64, f"sum {name!r} must be float64, not {value.dtype}: convert it")
            shape = parts[0][name].shape
            require(value.shape == shape, f"sum {name!r} has shape {value.shape} in one chunk, {shape} in another")
    different = [name for name, value in parts[0].items() if not np.array_equal(again[name], value)]
    require(not different, f"evaluate is not repeatable: {different} differ; make it depend on its arguments alone")
    require(torch.equal(row, before), "evaluate must not change the parameters: work on a copy")
    metrics, twice = workload.metrics(add_sums(parts)), workload.metrics(add_sums(parts + parts))
    for name, metric in metrics.items():
        require(np.isfinite(metric), f"metric {name!r} is {metric!r} on the initial model: correct evaluate or metrics")
        require(
            np.isclose(metric, twice[name]),
            f"metric {name!r} changes from {metric!r} to {twice[name]!r} if all test data counts twice: return sums, of"
            " the number of samples, too, and divide in metrics",
        )


def _statistics(workload: Workload, params: Tensors) -> dict[str, Tensor]:
    """Return the statistics over all chunks of the training data."""
    parts = [workload.statistics(params, chunk) for chunk in range(workload.num_statistics_chunks)]
    for part in parts:
        require(
            part.keys() == parts[0].keys(),
            f"statistics must have the same names in every chunk, not {sorted(part)} and {sorted(parts[0])}",
        )
        for name, value in part.items():
            require(value.dtype == torch.float64, f"statistics {name!r} must be float64, not {value.dtype}: convert it")
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]} if parts else {}
