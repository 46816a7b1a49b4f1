"""What a plug-in must keep to: call `check_workload` or `check_algorithm` from a test of your own.

    from contract import check_workload
    check_workload(MyWorkload({}, num_clients=10, partition="iid", seed=0))

An `AssertionError` says in one sentence what is wrong. A small workload suffices; some clients should differ in size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.algorithms import base
from gossamer.algorithms.base import Algorithm, Arrays
from gossamer.errors import ConfigError
from gossamer.submodel import Layout
from gossamer.workloads.base import Batch, Workload, add_sums

Ints = NDArray[np.int64]
Tensors = Mapping[str, Tensor]
CLOSE = 1e-4  # relative; kernels round differently from shape to shape


def check_workload(workload: Workload) -> None:
    """Check a workload against `gossamer.workloads.base.Workload`.

    Raises:
        AssertionError: it breaks the contract.
    """
    _check_attributes(workload)
    _check_init(workload)
    _check_client_labels(workload)
    _check_batches(workload)
    _check_padded_batches(workload)
    _check_loss(workload)
    if workload.supports_padding:
        _check_loss_of_padding(workload)
    if workload.supports_stacking:
        loss_of = torch.vmap(lambda params, one: workload.loss(params, one | {"scale": 1.0}))
        _check_stacked_loss(workload, loss_of, "under torch.vmap: correct it, or set supports_stacking = False")
    if workload.stacks_natively:
        _check_stacked_loss(
            workload,
            lambda params, batch: workload.loss(params, batch | {"scale": 1.0}),
            "of several clients in one call: correct it, or set stacks_natively = False",
        )
    for capacity in (1.0, 0.5):
        _check_evaluation(workload, capacity)


def check_algorithm(algorithm: Algorithm, layout: Layout) -> None:
    """Check an algorithm against `gossamer.algorithms.base.Algorithm`, on models of one layout.

    Raises:
        AssertionError: it breaks the contract.
    """
    try:
        base.check_algorithm(type(algorithm).__name__, algorithm)
    except ConfigError as error:
        raise AssertionError(str(error)) from None
    _check_states(algorithm, layout)
    _check_begin(algorithm, layout)
    _check_step(algorithm, layout)
    _check_end(algorithm, layout)
    _check_update(algorithm, layout)


# ---- workloads


def _check_attributes(workload: Workload) -> None:
    sizes = workload.num_samples
    assert isinstance(workload.layout, Layout), "layout must be a gossamer.submodel.Layout"
    assert isinstance(sizes, np.ndarray), "num_samples must be a numpy array"
    assert sizes.dtype == np.int64, f"num_samples must be int64, not {sizes.dtype}"
    assert sizes.shape == (workload.num_clients,), f"num_samples has shape {sizes.shape}, not one entry a client"
    assert sizes.min() >= 1, f"client {sizes.argmin()} has {sizes.min()} training samples: give every client some"
    for name in ("supports_padding", "supports_stacking", "stacks_natively", "has_images"):
        assert isinstance(getattr(workload, name), bool), f"{name} must be True or False"
    for name, least in (("num_labels", 0), ("num_statistics_chunks", 0), ("num_evaluation_chunks", 1)):
        assert getattr(workload, name) >= least, f"{name} must be {least} or more"


def _check_init(workload: Workload) -> None:
    row, layout = workload.init(3), workload.layout
    assert row.dtype in (torch.float32, torch.float64), f"init must return float32 or float64, not {row.dtype}"
    assert row.shape == (layout.d,), f"init returned shape {tuple(row.shape)}, not ({layout.d},)"
    assert bool(torch.isfinite(row).all()), "init returned a value that is not finite"
    assert torch.equal(row, layout.flatten(layout.views(row))), "init must leave the numbers between parameters at zero"
    assert torch.equal(row, workload.init(3)), "init must depend on the seed alone"


def _check_client_labels(workload: Workload) -> None:
    clients = np.arange(workload.num_clients, dtype=np.int64)[::-1].copy()
    labels = workload.client_labels(clients)
    expected = (workload.num_clients, workload.num_labels)
    assert labels.dtype == torch.bool, f"client_labels must be bool, not {labels.dtype}"
    assert labels.shape == expected, f"client_labels returned shape {tuple(labels.shape)}, not {expected}"
    for row, client in enumerate(clients.tolist()):
        alone = workload.client_labels(clients[row : row + 1])[0]
        assert torch.equal(labels[row], alone), f"client_labels of client {client} depend on the others in the call"


def _some_clients(workload: Workload) -> Ints:
    """Return the largest client and the smallest one."""
    return np.array([workload.num_samples.argmax(), workload.num_samples.argmin()], dtype=np.int64)


def _whole_batch(workload: Workload, round: int = 0) -> tuple[Ints, Ints, Batch]:
    """Return two clients, positions without padding, and what the workload makes of them."""
    clients = _some_clients(workload)
    positions = np.arange(min(8, int(workload.num_samples[clients].min())), dtype=np.int64)[None].repeat(2, axis=0)
    return clients, positions, workload.batch(clients, positions, round=round)


def _check_batches(workload: Workload) -> None:
    clients, positions, batch = _whole_batch(workload)
    kept = clients.copy(), positions.copy()
    lead = positions.shape
    for name, value in batch.samples.items():
        assert value.shape[:2] == lead, f"batch sample {name!r} has shape {tuple(value.shape)}, which starts not {lead}"
    for name, value in batch.client.items():
        assert value.shape[:1] == lead[:1], f"client constant {name!r} has shape {tuple(value.shape)}, not one a client"
    if "mask" in batch.samples:
        assert bool((batch.samples["mask"] == 1).all()), "the mask must be 1 where nothing is padded"
    _assert_same("batch must depend on its arguments alone", batch, workload.batch(clients, positions, round=0))
    backwards = workload.batch(clients[::-1].copy(), positions[:, ::-1].copy(), round=0)
    turned = Batch(
        {name: value.flip(0, 1) for name, value in backwards.samples.items()},
        {name: value.flip(0) for name, value in backwards.client.items()},
    )
    _assert_same("a sample must not depend on its neighbours in the call", batch, turned)
    alone = workload.batch(clients[:1], positions[:1, :1], round=0)
    first = Batch(
        {name: value[:1, :1] for name, value in batch.samples.items()},
        {name: value[:1] for name, value in batch.client.items()},
    )
    _assert_same("a sample must not depend on how many are asked for", first, alone)
    assert all(map(np.array_equal, kept, (clients, positions))), "batch must not change its arguments"


def _check_padded_batches(workload: Workload) -> None:
    clients, positions, whole = _whole_batch(workload)
    padded = positions.copy()
    padded[1, 1:] = -1
    batch = workload.batch(clients, padded, round=0)
    present = torch.from_numpy(padded >= 0)
    if present.all():
        return  # clients of one sample have nothing to pad
    assert "mask" in batch.samples, "a batch with padding must have the key 'mask'"
    mask = batch.samples["mask"]
    assert mask.dtype == torch.float32, f"the mask must be float32, not {mask.dtype}"
    assert torch.equal(mask, present.float()), "the mask must be 1 for samples and 0 for padding"
    for name, value in whole.samples.items():
        if name != "mask":
            assert torch.equal(batch.samples[name][present], value[present]), f"padding changes the samples {name!r}"
            assert bool(torch.isfinite(batch.samples[name]).all()), f"padding of {name!r} must be finite"


def _assert_same(message: str, batch: Batch, other: Batch) -> None:
    for values, others in zip(batch, other, strict=True):
        assert values.keys() == others.keys(), f"{message}: keys {sorted(values)} and {sorted(others)}"
        for name, value in values.items():
            assert value.dtype == others[name].dtype, f"{message}: {name!r} is {value.dtype} and {others[name].dtype}"
            assert torch.equal(value, others[name]), f"{message}: {name!r} differs"


def _merged(batch: Batch, row: int) -> dict[str, Any]:
    """Return what `loss` receives for one client."""
    return {name: value[row] for values in batch for name, value in values.items()} | {"scale": 1.0}


def _loss_and_gradient(workload: Workload, params: Tensors, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
    loss = workload.loss(leaves, batch)
    assert loss.shape == (), f"loss must be a scalar, not of shape {tuple(loss.shape)}"
    dtype = workload.init(0).dtype
    assert loss.dtype == dtype, f"loss must be {dtype}, as the parameters are, not {loss.dtype}"
    assert bool(torch.isfinite(loss)), f"loss is {float(loss.detach())!r} on the initial model"
    assert loss.requires_grad, "loss must be differentiable by the parameters"
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    assert any(grad is not None for grad in grads), "loss depends on no parameter"
    flat = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves.values(), grads, strict=True)]
    gradient = torch.cat([grad.flatten() for grad in flat])
    assert bool(torch.isfinite(gradient).all()), "the gradient of the loss is not finite on the initial model"
    return loss.detach(), gradient


def _check_loss(workload: Workload) -> None:
    _, _, batch = _whole_batch(workload)
    row, layout = workload.init(0), workload.layout
    params, merged = layout.views(row), _merged(batch, 0)
    kept = {name: value.clone() for name, value in merged.items() if isinstance(value, Tensor)}
    before = row.clone()
    found = _loss_and_gradient(workload, params, merged)
    assert all(torch.equal(merged[name], value) for name, value in kept.items()), "loss must not change the batch"
    assert torch.equal(row, before), "loss must not change the parameters"
    again = _loss_and_gradient(workload, params, merged)
    assert all(map(torch.equal, found, again)), "loss must depend on its arguments alone"
    if layout.cut_axes:  # the smaller model is any of the right shapes
        sub = layout.cut(0.5)
        part = {name: params[name][tuple(map(slice, shape))] for name, shape in zip(sub.names, sub.shapes, strict=True)}
        _loss_and_gradient(workload, part, merged | {"scale": 2.0})


def _check_loss_of_padding(workload: Workload) -> None:
    clients, positions, batch = _whole_batch(workload)
    params = workload.layout.views(workload.init(0))
    padded = workload.batch(clients, np.concatenate([positions, np.full_like(positions, -1)], axis=1), round=0)
    expected = _loss_and_gradient(workload, params, _merged(batch, 0))
    found = _loss_and_gradient(workload, params, _merged(padded, 0))
    for value, other in zip(found, expected, strict=True):
        _assert_close(value, other, "loss must leave out what the mask marks as padding")


def _check_stacked_loss(workload: Workload, loss_of: Callable[..., Tensor], where: str) -> None:
    """Compare a stacked computation with one client after another, at different parameters."""
    _, _, batch = _whole_batch(workload)
    rows = torch.stack([workload.init(0), workload.init(1)])
    views = {name: value.requires_grad_() for name, value in workload.layout.views(rows).items()}
    samples = {name: value for values in batch for name, value in values.items()}
    try:
        losses = loss_of(views, samples)
    except RuntimeError as error:
        raise AssertionError(f"loss fails ({error}) {where}") from error
    assert losses.shape == (2,), f"loss has shape {tuple(losses.shape)}, not one entry a client, {where}"
    grads = torch.autograd.grad(losses.sum(), list(views.values()), allow_unused=True)
    for row in range(2):
        alone, gradient = _loss_and_gradient(workload, {n: v[row] for n, v in views.items()}, _merged(batch, row))
        _assert_close(losses[row].detach(), alone, f"loss is another {where}")
        mine = [view[row] * 0 if grad is None else grad[row] for view, grad in zip(views.values(), grads, strict=True)]
        stacked = torch.cat([grad.detach().flatten() for grad in mine])
        _assert_close(stacked, gradient, f"the gradient of the loss is another {where}")


def _assert_close(value: Tensor, expected: Tensor, message: str) -> None:
    error = float((value - expected).norm() / expected.norm().clamp_min(1e-12))
    assert error <= CLOSE, f"{message}: relative error {error:.1e}"


def _check_evaluation(workload: Workload, capacity: float) -> None:
    layout, row = workload.layout.cut(capacity), workload.init(0)
    if layout.d != workload.layout.d:
        row = layout.flatten(
            {
                name: workload.layout.views(row)[name][tuple(map(slice, shape))]
                for name, shape in zip(layout.names, layout.shapes, strict=True)
            }
        )
    params, before = layout.views(row), row.clone()
    with torch.no_grad():
        pooled = [workload.statistics(params, chunk) for chunk in range(workload.num_statistics_chunks)]
        for statistics in pooled:
            assert statistics.keys() == pooled[0].keys(), "statistics must have the same names in every chunk"
            assert all(value.dtype == torch.float64 for value in statistics.values()), "statistics must be float64"
        total = {name: torch.stack([one[name] for one in pooled]).sum(0) for name in pooled[0]} if pooled else {}
        parts = [workload.evaluate(params, total, chunk) for chunk in range(workload.num_evaluation_chunks)]
        again = workload.evaluate(params, total, 0)
    for part in parts:
        assert part.keys() == parts[0].keys(), "evaluate must return the same names for every chunk"
        for name, value in part.items():
            assert isinstance(value, np.ndarray), f"sum {name!r} must be a numpy array, not {type(value).__name__}"
            assert value.dtype == np.float64, f"sum {name!r} must be float64, not {value.dtype}"
            assert value.shape == parts[0][name].shape, f"sum {name!r} has another shape in another chunk"
    assert all(np.array_equal(again[name], value) for name, value in parts[0].items()), "evaluate is not repeatable"
    assert torch.equal(row, before), "evaluate must not change the parameters"
    metrics, twice = workload.metrics(add_sums(parts)), workload.metrics(add_sums(parts + parts))
    for name, value in metrics.items():
        assert np.isfinite(value), f"metric {name!r} is {value!r} on the initial model"
        assert np.isclose(value, twice[name]), f"metric {name!r} changes if all test data counts twice: return sums"


# ---- algorithms


def _rows(layout: Layout, count: int, number: int) -> Tensor:
    """Return random rows [count, d] whose floats between parameters are zero."""
    source = torch.Generator().manual_seed(number)
    drawn = torch.randn(count, layout.d, generator=source)
    return torch.stack([layout.flatten(layout.views(row)) for row in drawn])


def _states(algorithm: Algorithm, layout: Layout, count: int) -> tuple[Arrays, Arrays]:
    """Return what `count` clients receive and keep, both random."""
    names = algorithm.init(_rows(layout, 1, 0)) if algorithm.traits.downlink is None else algorithm.traits.downlink
    received = {name: _rows(layout, 1, 10 + i).expand(count, -1) for i, name in enumerate(names)}
    return received, {name: _rows(layout, count, 20 + i) for i, name in enumerate(algorithm.traits.client_arrays)}


def _check_shapes(arrays: Tensors, names: set[str], shape: tuple[int, int], what: str) -> None:
    assert set(arrays) == names, f"{what} has the arrays {sorted(arrays)}, declared are {sorted(names)}"
    for name, value in arrays.items():
        assert value.dtype == torch.float32, f"{what}[{name!r}] must be float32, not {value.dtype}"
        assert value.shape == shape, f"{what}[{name!r}] has shape {tuple(value.shape)}, not {shape}"


def _check_states(algorithm: Algorithm, layout: Layout) -> None:
    x = _rows(layout, 1, 0)
    state = algorithm.init(x.clone())
    assert "x" in state, "init must return the model under 'x'"
    assert torch.equal(state["x"], x), "init must keep the initial model"
    _check_shapes(state, set(state), (1, layout.d), "init")
    for name in algorithm.traits.downlink or ():
        assert name in state, f"downlink names {name!r}, which init does not return"
    newcomers = algorithm.init_client(torch.zeros(3, layout.d))
    _check_shapes(newcomers, set(algorithm.traits.client_arrays), (3, layout.d), "init_client")


def _check_begin(algorithm: Algorithm, layout: Layout) -> None:
    received, kept = _states(algorithm, layout, 3)
    before = {name: value.clone() for name, value in (received | kept).items()}
    carry = algorithm.begin(received, kept)
    assert "x" in carry, "begin must return the local model under 'x'"
    _check_shapes(carry, set(carry), (3, layout.d), "begin")
    given = {value.untyped_storage().data_ptr() for value in (received | kept).values()}
    for name, value in carry.items():
        assert value.untyped_storage().data_ptr() not in given, f"begin must copy {name!r}: it is changed in place"
    for name, value in (received | kept).items():
        assert torch.equal(value, before[name]), f"begin must not change {name!r}, which belongs to the caller"


def _check_step(algorithm: Algorithm, layout: Layout) -> None:
    """Two steps on whole rows and on pieces of them, turned round, must give the same bits."""
    received, kept = _states(algorithm, layout, 3)
    grads, whole = [_rows(layout, 3, 30 + number) for number in range(2)], algorithm.begin(received, kept)
    names, order = set(whole), torch.arange(layout.d).flip(0)
    pieces = [{name: value[:, part].clone() for name, value in whole.items()} for part in order.split(7)]
    for grad in grads:
        given = grad.clone()
        whole = algorithm.step(whole, given, 0.1)
        assert set(whole) == names, f"step returned {sorted(whole)}, not the arrays of begin"
        for number, part in enumerate(order.split(7)):
            pieces[number] = algorithm.step(pieces[number], grad[:, part].clone(), 0.1)
    for number, part in enumerate(order.split(7)):
        for name, value in pieces[number].items():
            assert torch.equal(whole[name][:, part], value), f"step is not coordinatewise: {name!r} differs"


def _check_end(algorithm: Algorithm, layout: Layout) -> None:
    received, kept = _states(algorithm, layout, 3)
    before = {name: value.clone() for name, value in (received | kept).items()}
    carry = algorithm.step(algorithm.begin(received, kept), _rows(layout, 3, 30), 0.1)
    copies = {name: value.clone() for name, value in carry.items()}
    payload, private = algorithm.end(received, kept, carry, 1, 0.1)
    assert set(payload) == set(algorithm.traits.uplink), (
        f"the payload of end has the arrays {sorted(payload)}, declared are {sorted(algorithm.traits.uplink)}"
    )
    scalars = set(algorithm.traits.scalars)
    for names, width in ((scalars, 1), (set(payload) - scalars, layout.d)):
        _check_shapes({name: payload[name] for name in names}, names, (3, width), "the payload of end")
    _check_shapes(private, set(algorithm.traits.client_arrays), (3, layout.d), "the client state of end")
    for name, value in (received | kept).items():
        assert torch.equal(value, before[name]), f"end must not change {name!r}, which belongs to the caller"
    others = {value.untyped_storage().data_ptr() for value in (*received.values(), *kept.values(), *private.values())}
    for name, value in payload.items():
        assert value.untyped_storage().data_ptr() not in others, f"payload {name!r} must be a copy: it is overwritten"
    for row in range(3):
        one = slice(row, row + 1)
        mine = [{name: value[one] for name, value in arrays.items()} for arrays in (received, kept, copies)]
        alone = algorithm.end(*mine, 1, 0.1)
        for whole, part in zip((payload, private), alone, strict=True):
            for name, value in part.items():
                assert torch.equal(whole[name][one], value), f"end is not row-wise: {name!r} of row {row} differs"


def _check_update(algorithm: Algorithm, layout: Layout) -> None:
    held = torch.arange(layout.d) % 3 > 0
    payload = {name: _rows(layout, 1, 40 + number)[0] for number, name in enumerate(algorithm.traits.uplink)}
    scalars = {name: torch.full((1, 1), 2.5) for name in algorithm.traits.scalars}
    state = algorithm.init(_rows(layout, 1, 0))
    for mask in (None, held):  # in this order, so that there is something like a velocity by then
        inbox: dict[str, Any] = {n: (v if mask is None else v * mask)[None] for n, v in payload.items()}
        inbox |= scalars
        before = {name: value.clone() for name, value in state.items()}
        updated = algorithm.update(state, inbox | {"held": None if mask is None else mask[None]}, 10)
        _check_shapes(updated, set(updated), (1, layout.d), "update")
        assert set(updated) <= set(before), f"update returned {sorted(set(updated) - set(before))}, unknown to init"
        assert "x" in updated, "update must return the model under 'x'"
        assert not torch.equal(updated["x"], before["x"]), "update must change the model"
        if mask is not None:
            same = updated["x"][0][~mask] == before["x"][0][~mask]
            assert bool(same.all()), "update must leave the coordinates alone that nobody held"
        state = {name: updated.get(name, value).clone() for name, value in state.items()}
