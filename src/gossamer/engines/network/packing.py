"""Messages without what stays where it is, for algorithms of which only representations travel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gossamer.algorithms.base import Arrays
from gossamer.engines.task import Task, Variant
from gossamer.submodel import Cut

Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def is_packed(variant: Variant) -> bool:
    """Say whether rows of participants of a variant travel without the coordinates that are not sent, or received."""
    return variant.algorithm.traits.represents


def received_width(variant: Variant) -> int:
    """Return how many numbers of a row participants receive."""
    return variant.num_received if is_packed(variant) else variant.layout.d


def answer_specs(phase: Task, variant: Variant, dtype: torch.dtype) -> Specs:
    """Return dtype and shape of each payload of an answer, one row each."""
    width = variant.num_sent if is_packed(variant) else variant.layout.d
    return {name: (dtype, (1 if name in phase.scalars else width,)) for name in phase.algorithm.traits.uplink}


def cut_rows(cut: Cut, rows: Mapping[str, Tensor]) -> Arrays:
    """Return what lies of rows [1, d] in a window, [1, d_sub]; themselves where that is everything."""
    if cut.is_full:
        return dict(rows)
    return {name: cut.read(row[0], row.new_zeros(cut.sub.d))[None] for name, row in rows.items()}


def packed_model(variant: Variant, cut: Cut, rows: Mapping[str, Tensor]) -> Arrays:
    """Return what participants start from, of rows [1, d]: their window, or what they receive, [1, num_received]."""
    found = cut_rows(cut, rows)
    return {n: row[:, variant.received_coordinates] if is_packed(variant) else row for n, row in found.items()}


def unpacked_model(variant: Variant, rows: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> Arrays:
    """Return rows [1, d_sub] that participants of a packed variant start from.

    Args:
        variant: theirs.
        rows: what was sent of them, see `packed_model`.
        initial: rows [1, d_sub] with which the run began; the server changes nothing of them that it does not send.
    """
    found = {name: initial[name].clone() for name in rows}
    for name, row in rows.items():
        found[name][:, variant.received_coordinates] = row
    return found


def packed_answer(phase: Task, index: int, payload: Mapping[str, Tensor]) -> Arrays:
    """Return copies of what is sent, [num_sent], of a payload's rows [d_sub] of a participant of a variant."""
    variant = phase.variants[index]
    packs = is_packed(variant)
    return {
        name: row[variant.sent_coordinates].clone() if packs and name not in phase.scalars else row.clone()
        for name, row in payload.items()
    }


def unpacked_answer(phase: Task, index: int, arrays: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the rows [d_sub] of a payload of a participant of a variant, with zeros where nothing is sent."""
    variant, found = phase.variants[index], list[Tensor]()
    for name, sent in arrays.items():
        row = sent
        if is_packed(variant) and name not in phase.scalars:
            row = sent.new_zeros(variant.layout.d)
            row[variant.sent_coordinates] = sent
        found.append(row)
    return found
