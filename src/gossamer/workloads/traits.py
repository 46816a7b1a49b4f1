"""What a workload and its model can and cannot do, in one frozen dataclass each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from gossamer.options import Traits


@dataclass(frozen=True, kw_only=True)
class WorkloadTraits(Traits):
    """What a workload can and cannot do; what depends on its model or options is set on the instance.

    Attributes:
        supports_padding: whether `Workload.loss` honours ``batch["mask"]``, which stacking clients of unequal batches
            needs (False where a layer mixes samples, as BatchNorm does while training).
        supports_stacking: whether `Workload.loss` works under `torch.vmap`.
        stacks_natively: whether `Workload.loss` also takes parameters and batches with a leading client dimension and
            then returns one loss a client, which avoids the overhead of vmap.
        has_images: whether samples are images [*, channels, height, width], for which channels-last may pay.
        leaves_products: whether `Workload.loss` may be given `Leaves` that are factored; if not, a plain dict is given.
        tokens_per_sample: tokens that a training sample is made of, by which a record has ``total_tokens``; None: it is
            not made of tokens.
        merges_parameters: whether `Workload.params_of` returns merged parameters in the place of some of a row's.
        uses_key: whether `Workload.loss` draws random numbers, by ``batch["key"]``.
        has_public_set: whether there are samples that everybody has, and modules for what is known of them,
            ``public_set()``, see `gossamer.algorithms.creamfl.PublicSet`.
        has_peer_init: whether peers start from models of their own, `Workload.peer_init`.
        has_peer_metrics: whether there are metrics of all peers' models, `Workload.peer_metrics`.
    """

    hooks: ClassVar[Mapping[str, str]] = {
        "has_peer_init": "peer_init",
        "has_peer_metrics": "peer_metrics",
        "has_public_set": "public_set",
    }

    supports_padding: bool = True
    supports_stacking: bool = True
    stacks_natively: bool = False
    has_images: bool = False
    leaves_products: bool = False
    tokens_per_sample: int | None = None
    merges_parameters: bool = False
    uses_key: bool = False
    has_public_set: bool = False
    has_peer_init: bool = False
    has_peer_metrics: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelTraits(Traits):
    """What a model can and cannot do; see `WorkloadTraits` for what a workload takes over from its model.

    Attributes:
        adaptable: whether ``F.linear``, ``F.embedding`` and ``torch.addmm`` (as its left matrix) are called with the
            parameters themselves wherever one participant is trained alone, so that low-rank factors can stand beside.
        always_frozen: patterns of the parameters that the model has as constants, beside `workload.frozen`.
        terms_share: share of the training loss that is what the model adds to it, see `ForwardContext.terms`; the rest
            is the cross entropy.
        takes_tokens: whether samples may be whole numbers, int64 [b, length]; others are float32.
    """

    supports_stacking: bool = True
    stacks_natively: bool = False
    has_images: bool = False
    uses_key: bool = False
    adaptable: bool = False
    always_frozen: tuple[str, ...] = ()
    terms_share: float = 0.0
    takes_tokens: bool = False
