"""The contract of an algorithm, of a server's clients or of peers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gossamer.algorithms.base import Algorithm, Arrays
from gossamer.algorithms.checks import require_algorithm, require_phases
from gossamer.submodel import Layout
from gossamer.testing.requirements import random_rows, require, require_arrays, require_declared

NUM_ROWS = 3  # participants
LR = 0.1
SMALL = Layout.of(
    {"hidden.weight": (3, 5), "hidden.bias": (3,), "output.weight": (2, 3)},
    {"hidden.weight": ("hidden", None), "hidden.bias": ("hidden",), "output.weight": ("label", "hidden")},
)


def check_algorithm(algorithm: Algorithm, layout: Layout = SMALL) -> None:
    """Check an algorithm against `gossamer.algorithms.base.Algorithm`, or `PeerAlgorithm` if its downlink is None.

    Args:
        algorithm: the algorithm, made with any options; one that needs the model, bound to `layout` by its `of_model`.
        layout: layout of the models that it is tried on.

    Raises:
        ContractError: it breaks the contract.

    Example:
        >>> from gossamer.algorithms.federated import FedAvg
        >>> class Halved(FedAvg):
        ...     def end(self, state, client_state, carry, steps, lr):
        ...         payload, private = super().end(state, client_state, carry, steps, lr)
        ...         return {"x": payload["x"] / 2}, private
        >>> check_algorithm(Halved({}))
        >>> class Centred(FedAvg):
        ...     def end(self, state, client_state, carry, steps, lr):
        ...         payload, private = super().end(state, client_state, carry, steps, lr)
        ...         return {"x": payload["x"] - payload["x"].mean(0)}, private
        >>> check_algorithm(Centred({}))
        Traceback (most recent call last):
        gossamer.errors.ContractError: end is not row-wise: 'x' of row 0 differs when it is given alone: ...
    """
    require_declared(require_algorithm, algorithm)
    require_declared(require_phases, algorithm)
    for phase in range(algorithm.traits.num_phases):
        one, is_last = algorithm.of_phase(phase), phase == algorithm.traits.num_phases - 1
        received, kept = _inputs(one, layout, _check_states(one, layout))
        _check_begin(one, layout, received, kept)
        _check_step(one, layout, received, kept)
        ended = _check_end(one, layout, received, kept)
        if one.traits.downlink is None:
            _check_update_of_peers(one, layout, received, *ended, must_move=is_last)
        elif not one.traits.represents:  # what a server makes of representations depends on a workload
            _check_update(one, layout, must_move=is_last)


def _copies(arrays: Mapping[str, Tensor]) -> Arrays:
    return {name: value.clone() for name, value in arrays.items()}


def _memory(*arrays: Mapping[str, Tensor]) -> set[int]:
    """Return the addresses of the memory that arrays lie on."""
    return {value.untyped_storage().data_ptr() for each in arrays for value in each.values()}


def _require_unchanged(arrays: Mapping[str, Tensor], before: Mapping[str, Tensor], what: str) -> None:
    for name, value in arrays.items():
        require(
            torch.equal(value, before[name]),
            f"{what} must not change {name!r}, which belongs to the caller: work on a copy",
        )


def _require_known(arrays: Arrays, state: Mapping[str, Tensor], what: str) -> None:
    unknown = sorted(set(arrays) - set(state))
    require(not unknown, f"{what} returned {unknown}, unknown to init: return them there, too, or leave them out")


def _require_shapes(algorithm: Algorithm, layout: Layout, arrays: Arrays, names: set[str], what: str) -> None:
    """Require arrays of `NUM_ROWS` rows, of width 1 where they are scalars."""
    require(
        set(arrays) == names,
        f"{what} has the arrays {sorted(arrays)}, declared are {sorted(names)}: return those, or correct the traits",
    )
    scalars = names & set(algorithm.traits.scalars)
    for some, width in ((scalars, 1), (names - scalars, layout.d)):
        require_arrays({name: arrays[name] for name in some}, some, (NUM_ROWS, width), what, torch.float32)


def _check_begin(algorithm: Algorithm, layout: Layout, received: Arrays, kept: Arrays) -> None:
    before = _copies(received | kept)
    carry = algorithm.begin(received, kept)
    require("x" in carry, f"begin returned {sorted(carry)}: it must return the local model under 'x'")
    _require_shapes(algorithm, layout, carry, set(carry), "begin")
    for name in carry if algorithm.traits.downlink is not None else ("x",):  # peers may read what they do not change
        is_alias = bool(_memory({name: carry[name]}) & _memory(received, kept))
        require(not is_alias, f"begin must copy {name!r}, because steps change it in place: return a clone")
    _require_unchanged(received | kept, before, "begin")


def _check_step(algorithm: Algorithm, layout: Layout, received: Arrays, kept: Arrays) -> None:
    """Two steps on whole rows and on pieces of them, in another order, must give the same bits."""
    before, whole = _copies(received | kept), algorithm.begin(received, kept)
    names, order = set(whole), torch.arange(layout.d).flip(0)
    parts = torch.split(order, 7)
    scalars = {name for name, value in whole.items() if value.shape[1] == 1 != layout.d}
    pieces = [{n: v.clone() if n in scalars else v[:, part].clone() for n, v in whole.items()} for part in parts]
    for grad in [random_rows(layout, NUM_ROWS, 30 + number) for number in range(2)]:
        whole = algorithm.step(whole, grad.clone(), LR)
        require(
            set(whole) == names,
            f"step returned {sorted(whole)}, begin {sorted(names)}: return the arrays that it was given",
        )
        for number, part in enumerate(parts):
            pieces[number] = algorithm.step(pieces[number], grad[:, part].clone(), LR)
    _require_unchanged(received | kept, before, "step")
    for number, part in enumerate(parts):
        for name in names - scalars:
            require(
                torch.equal(whole[name][:, part], pieces[number][name]),
                f"step is not coordinatewise: {name!r} differs when it is given some coordinates alone: use neither"
                " sums nor norms over coordinates there",
            )


def _trained(algorithm: Algorithm, layout: Layout, received: Arrays, kept: Arrays) -> Arrays:
    return algorithm.step(algorithm.begin(received, kept), random_rows(layout, NUM_ROWS, 30), LR)


def _check_row_wise(
    end: Callable[..., tuple[Arrays, Arrays]], arguments: list[Arrays], found: tuple[Arrays, ...]
) -> None:
    """Compare the result of `end` for all rows with that for each row alone."""
    for row in range(NUM_ROWS):
        one = slice(row, row + 1)
        alone = end(*({name: value[one].clone() for name, value in arrays.items()} for arrays in arguments), 1, LR)
        for whole, part in zip(found, alone, strict=True):
            for name, value in part.items():
                require(
                    torch.equal(whole[name][one], value),
                    f"end is not row-wise: {name!r} of row {row} differs when it is given alone: compute each row from"
                    " that row only",
                )


def _check_states(algorithm: Algorithm, layout: Layout) -> Arrays:
    """Check the initial state, and that of newcomers; return the first."""
    of_peers = algorithm.traits.downlink is None
    x = random_rows(layout, NUM_ROWS if of_peers else 1, 0)
    state = algorithm.init(x.clone())
    require("x" in state, f"init returned {sorted(state)}: it must return the model under 'x'")
    require(torch.equal(state["x"], x), "init must keep the initial model: return x as it is given")
    if of_peers:
        _require_shapes(algorithm, layout, state, set(state), "init")
    else:
        require_arrays(state, set(state), (1, layout.d), "init", torch.float32)
    for name in algorithm.traits.downlink or ():
        require(
            name in state, f"traits.downlink names {name!r}, which init does not return: return it, or leave it out"
        )
    newcomers = algorithm.init_client(torch.zeros(NUM_ROWS, layout.d))
    _require_shapes(algorithm, layout, newcomers, set(algorithm.traits.client_arrays), "init_client")
    return state


def _inputs(algorithm: Algorithm, layout: Layout, state: Arrays) -> tuple[Arrays, Arrays]:
    """Return what participants receive, of peers their state, and what clients keep; all but peers' models random."""
    if algorithm.traits.downlink is None:
        arrays = [name for name, value in state.items() if name != "x" and value.shape[1] == layout.d]
        return state | {name: random_rows(layout, NUM_ROWS, 10 + number) for number, name in enumerate(arrays)}, {}
    received = {
        name: random_rows(layout, 1, 10 + number).expand(NUM_ROWS, -1)
        for number, name in enumerate(algorithm.traits.downlink)
    }
    kept = {n: random_rows(layout, NUM_ROWS, 20 + i) for i, n in enumerate(algorithm.traits.client_arrays)}
    return received, kept | {n: torch.full((NUM_ROWS, 1), 2.0) for n in kept if n in algorithm.traits.scalars}


def _check_end(algorithm: Algorithm, layout: Layout, received: Arrays, kept: Arrays) -> tuple[Arrays, Arrays]:
    """Check `end` after one step, of peers also after none; return what it makes of one."""
    of_peers, names, before = algorithm.traits.downlink is None, set(algorithm.traits.uplink), _copies(received | kept)
    if of_peers:
        idle, _ = algorithm.end(received, kept, algorithm.begin(received, kept), 0, LR)
        _require_shapes(algorithm, layout, idle, names, "the payload of end after 0 steps")
    carry = _trained(algorithm, layout, received, kept)
    copies = _copies(carry)
    payload, private = algorithm.end(received, kept, carry, 1, LR)
    _require_shapes(algorithm, layout, payload, names, "the payload of end")
    if of_peers:
        _require_known(private, received, "end")
    declared = set(private) if of_peers else set(algorithm.traits.client_arrays)
    _require_shapes(algorithm, layout, private, declared, "the state of end")
    _require_unchanged(received | kept, before, "end")
    for name in () if of_peers else payload:
        is_alias = bool(_memory({name: payload[name]}) & _memory(received, kept, private))
        require(not is_alias, f"payload {name!r} must be a copy, because it is overwritten: return a clone")
    _check_row_wise(algorithm.end, [received, kept, copies], (payload, private))
    return payload, private


def _check_update(algorithm: Algorithm, layout: Layout, *, must_move: bool) -> None:
    held = torch.arange(layout.d) % 3 > 0
    payload = {
        name: random_rows(layout, NUM_ROWS if kind == "rows" else 1, 40 + number)
        for number, (name, kind) in enumerate(algorithm.traits.uplink.items())
    }
    scalars = {name: torch.full((1, 1), 2.5) for name in algorithm.traits.scalars if name in payload}
    state = algorithm.init(random_rows(layout, 1, 0))
    for mask in (None, held):  # in this order, so that there is something like a velocity by then
        inbox: dict[str, Any] = {name: value if mask is None else value * mask for name, value in payload.items()}
        payload = {
            name: value if len(value) == 1 else 2 * value for name, value in payload.items()
        }  # others, if models
        inbox |= scalars | {"held": None if mask is None else mask[None]}
        inbox |= {"weights": torch.arange(1.0, NUM_ROWS + 1)} if "rows" in algorithm.traits.uplink.values() else {}
        if algorithm.traits.scores_models:
            inbox |= {"metrics": lambda model: {"accuracy": float(model.sum()), "loss": float(model.abs().sum())}}
        before = _copies(state)
        updated = algorithm.update(state, inbox, 10)
        require_arrays(updated, set(updated), (1, layout.d), "update", torch.float32)
        _require_known(updated, before, "update")
        if must_move:
            require("x" in updated, f"update returned {sorted(updated)}: it must return the model under 'x'")
            require(not torch.equal(updated["x"], before["x"]), "update must change the model: apply inbox['x'] to it")
        if mask is not None and "x" in updated:
            same = updated["x"][0][~mask] == before["x"][0][~mask]
            require(
                same.all(),
                f"update must leave the coordinates alone that nobody held, but changed {int((~same).sum())} of"
                f" {len(same)}: see inbox['held']",
            )
        state = {name: updated.get(name, value).clone() for name, value in state.items()}


def _check_update_of_peers(
    algorithm: Algorithm, layout: Layout, state: Arrays, payload: Arrays, changed: Arrays, *, must_move: bool
) -> None:
    """Update all rows and columns at once, and some of them alone: the bits must be the same."""
    scalars = set(algorithm.traits.scalars)
    kept = {name: value for name, value in (state | changed).items() if name not in algorithm.traits.uplink}
    mixed = {name: value.roll(1, 0).add(value).div(2) for name, value in payload.items()}

    def update(rows: slice, columns: Tensor) -> Arrays:
        """Return what `update` makes of some rows and coordinates."""

        def part(arrays: Arrays) -> Arrays:
            """Return the same entries of every array of a mapping."""
            return {n: (v[rows] if n in scalars else v[rows][:, columns]).clone() for n, v in arrays.items()}

        inbox = part(mixed) | {"sent": part(payload), "held": None, "lr": LR}
        return algorithm.update(part(kept), inbox, NUM_ROWS)

    everything = torch.arange(layout.d)
    updated = update(slice(None), everything)
    returns_models = "x" in updated or not (must_move or "x" in algorithm.traits.uplink)
    require(returns_models, f"update returned {sorted(updated)}: it must return the models under 'x'")
    _require_known(updated, state, "update")
    _require_shapes(algorithm, layout, updated, set(updated), "update")
    for row in range(NUM_ROWS):
        for name, value in update(slice(row, row + 1), everything).items():
            require(
                torch.equal(updated[name][row : row + 1], value),
                f"update is not row-wise: {name!r} of peer {row} differs when it is given alone: leave mixing to the"
                " topology",
            )
    for columns in torch.split(everything.flip(0), 7):
        for name, value in update(slice(None), columns).items():
            require(
                name in scalars or torch.equal(updated[name][:, columns], value),
                f"update is not coordinatewise: {name!r} differs when it is given some coordinates alone: use neither"
                " sums nor norms over coordinates there",
            )
