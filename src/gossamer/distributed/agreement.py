"""What all ranks must have alike, compared by digests when it is first used, and told by rank where it differs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from gossamer.distributed.environment import first_line
from gossamer.distributed.world import World, check_size
from gossamer.errors import ConfigError, EngineError
from gossamer.topology import Topology

DIGEST_BYTES, TEXT_BYTES = 16, 200


def agree(world: World, said: str, remedy: str, *, again: bool = False) -> None:
    """Check that all ranks say the same; a collective call the first time that something is said.

    Args:
        world: the group.
        said: what this rank has; only what stands at its beginning is shown where it differs.
        remedy: what to do where ranks differ.
        again: whether to compare what was compared before, too.

    Raises:
        ConfigError: ranks differ.
        EngineError: the others do not compare anything.
    """
    if (said in world.compared and not again) or world.size == 1:
        return
    # All messages have one size, because gloo ends the process where sizes differ.
    digest = hashlib.blake2b(said.encode(), digest_size=DIGEST_BYTES).digest()
    try:
        every = _gathered(world, digest + said.encode()[:TEXT_BYTES].ljust(TEXT_BYTES))
    except RuntimeError as error:
        raise EngineError(
            f"rank {world.rank} has {said[:TEXT_BYTES]} for the first time, and not all others came to compare it"
            f" ({first_line(error)}): {remedy}"
        ) from None
    if len(set(every)) > 1:
        texts = [each[DIGEST_BYTES:].decode(errors="ignore").strip() for each in every]
        raise ConfigError(f"the ranks do not agree: {_by_rank(texts)}: {remedy}")
    world.compared.add(said)


def agree_on(world: World, topology: Topology, tensors: Sequence[Tensor], wire: torch.dtype | None = None) -> None:
    """Check that all ranks have the same topology, and tensors of the same shapes and dtypes, `wire` when they travel.

    Raises:
        ConfigError: they differ, or the topology is of another number of peers.
    """
    check_size(world, topology)
    agree(world, described(topology), "build it with the same name, parameters and seed everywhere")
    agree(world, f"{shapes(tensors, wire)} over {topology.name}", "give tensors of the same shapes and dtypes")


@lru_cache(maxsize=64)  # a digest draws all rounds of a cycle
def described(topology: Topology) -> str:
    """Return a topology's name, parameters and digest, in a few words."""
    given = {"seed": topology.seed, **topology.options.model_dump(mode="json", exclude_defaults=True)}
    text = ", ".join(f"{name}={value}" for name, value in given.items())
    return f"topology {topology.name}({text[:100]}) [{topology.digest()[:12]}]"


def shapes(tensors: Sequence[Tensor], wire: torch.dtype | None = None) -> str:
    """Return the shapes and dtypes of tensors, as in ``2 tensors, float32 [3, 2], float32 [2]``."""
    listed = [f"{str(each.dtype).removeprefix('torch.')} {list(each.shape)}" for each in tensors]
    count = "" if len(listed) == 1 else f"{len(listed)} tensors, "
    sent = "" if wire is None else f" sent as {str(wire).removeprefix('torch.')}"
    return f"{count}{', '.join(listed)}{sent}"


def _gathered(world: World, message: bytes) -> list[bytes]:
    """Return the messages, of one length, of all ranks."""
    import torch.distributed as dist

    own = torch.frombuffer(bytearray(message), dtype=torch.uint8).to(device_of_messages(world))
    every = [torch.empty_like(own) for _ in range(world.size)]
    dist.all_gather(every, own)
    return [bytes(each.tolist()) for each in every]


def device_of_messages(world: World) -> torch.device:
    """Return where small messages lie that a program reads: the processor, unless the group has NCCL alone."""
    import torch.distributed as dist

    has_gloo = world.backend == "gloo" or "gloo" in str(dist.get_backend_config())
    return torch.device("cpu") if has_gloo else world.device


def _by_rank(said: Sequence[str]) -> str:
    """Return who says what, as in ``ranks 0, 2 have a; rank 1 has b``."""
    ranks: dict[str, list[int]] = {}
    for rank, text in enumerate(said):
        ranks.setdefault(text, []).append(rank)
    return "; ".join(
        f"rank{'s' if len(found) > 1 else ''} {', '.join(map(str, found))} {'have' if len(found) > 1 else 'has'} {text}"
        for text, found in ranks.items()
    )
