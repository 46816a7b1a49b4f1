"""A model on a client's own test data: sums and numbers of samples are all that leaves it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from gossamer.algorithms.base import Arrays
from gossamer.engines.task import WHOLE, Task, Variant
from gossamer.errors import PolicyError
from gossamer.threads import one_thread
from gossamer.transport import Message
from gossamer.transport.policy import Policy
from gossamer.workloads.base import add_sums

EVALUATE, COUNTS = "evaluate", "counts"  # kinds of messages
MODEL, STATISTICS = "x", "statistics."  # names of the arrays of a request
PARTS = ("count", "squares", "sum")  # of the statistics of a layer, see `ForwardContext`
MAX_REASON = 300  # characters
ASKED = {"variant", "clients"}  # all that the body of a request may have


def counts_of(task: Task, message: Message, own: Collection[int], policy: Policy | None) -> dict[str, Any]:
    """Evaluate a model as a server asks, and return the body of the answer.

    Args:
        task: the client's.
        message: body: ``variant``, number of a variant, or `WHOLE`, and ``clients``, numbers of clients; arrays: the
            model [d], and what BatchNorm normalises by.
        own: clients that this node is.
        policy: what is refused besides; None: nothing.

    Returns:
        ``{"clients": {number: {name: [sum, number of samples]}}}``, see `Workload.client_counts`.

    Raises:
        PolicyError: the server asks for anything else.
    """
    body, dtype = message.body, task.workload.init(task.seed).dtype
    variant, clients = _variant_of(task, body), _clients_of(body, own)
    statistics = _checked(task, variant, message.arrays, dtype)
    params = variant.layout.views(message.arrays[MODEL])
    workload = task.workload
    with one_thread(), torch.no_grad():
        try:
            parts = [workload.evaluate(params, statistics, part) for part in range(workload.num_evaluation_chunks)]
        except RuntimeError as error:  # of torch
            raise PolicyError(f"the server's arrays are none by which the model can be evaluated: {error}") from None
    sums = add_sums(parts)
    if policy is not None:
        policy.check_evaluation(int(sums["count"].sum()) if "count" in sums else None)
    counted = {client: workload.client_counts(sums, client) for client in clients}
    return {"clients": {str(client): {n: list(pair) for n, pair in one.items()} for client, one in counted.items()}}


def reason_of(refusal: Message) -> str:
    """Return why a client refuses what it is asked, as it says: a line that is not too long."""
    given = str(refusal.body.get("reason"))[:MAX_REASON]
    return "".join(one if one.isprintable() else " " for one in given)


def _variant_of(task: Task, body: Mapping[str, Any]) -> Variant:
    """Return what is to be evaluated.

    Raises:
        PolicyError: more is asked for, or another one than there is.
    """
    if more := sorted(map(str, set(body) - ASKED)):
        raise PolicyError(
            f"the server asks for {more[0][:80]!r} of an evaluation: sums and numbers of samples are told"
        )
    index = body.get("variant")
    if type(index) is not int or not (index == WHOLE or 0 <= index < len(task.variants)):
        raise PolicyError(f"the server asks for variant {index!r:.80}, which the run has not: it must not be evaluated")
    return task.variant(index)


def _clients_of(body: Mapping[str, Any], own: Collection[int]) -> list[int]:
    """Return who is asked.

    Raises:
        PolicyError: it is somebody else.
    """
    clients = body.get("clients")
    if not isinstance(clients, list) or not all(type(one) is int and one in own for one in clients):
        raise PolicyError(f"the server asks for clients {clients!r:.80}, but this node is {sorted(own)[:20]}")
    return clients


def _checked(task: Task, variant: Variant, arrays: Mapping[str, Tensor], dtype: torch.dtype) -> Arrays:
    """Return the statistics among the arrays of a request.

    Raises:
        PolicyError: the arrays are not those of the variant.
    """
    layers = task.workload.norms if task.workload.num_statistics_chunks else ()
    expected = {MODEL, *(f"{STATISTICS}{layer}.{part}" for layer in layers for part in PARTS)}
    if set(arrays) != expected:
        named = sorted(set(arrays) ^ expected)[0]
        raise PolicyError(f"the server sends other arrays than an evaluation has, such as {named[:80]!r}: refused")
    model = arrays[MODEL]
    if model.dtype != dtype or tuple(model.shape) != (variant.layout.d,):
        raise PolicyError(
            f"the server sends a model of {model.dtype} and shape {tuple(model.shape)}, but it has {dtype} and shape"
            f" ({variant.layout.d},): it is not evaluated"
        )
    found = {name.removeprefix(STATISTICS): one for name, one in arrays.items() if name != MODEL}
    if any(one.dtype != torch.float64 or one.dim() > 1 for one in found.values()):
        raise PolicyError("the server sends statistics that are no float64 vectors: the model is not evaluated")
    return found
