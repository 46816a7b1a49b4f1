"""Counter-based randomness: every draw is addressed by (seed, purpose, round, phase, participant).

No generator state is stored, so a draw is the same on every engine, after any restart and in any order.
The bit generator is Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def stable_hash(*parts: Any) -> int:
    """Return a 64-bit hash of `parts` that is the same in every process and Python version."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def generator(
    seed: int, purpose: str, round: int = 0, phase: int = 0, participant: int = 0, extra: int = 0
) -> np.random.Generator:
    """Return a new numpy generator for one address.

    Args:
        seed: seed of the experiment.
        purpose: use of the numbers, such as ``"sample-clients"``.
        round, phase, participant: position in the run; 0 where they do not apply.
        extra: further coordinate of 64 bits, such as an epoch or a hash of a width group.
    """
    key = stable_hash(seed, purpose)
    counter = np.array([0, participant, (round << 16) | phase, extra & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([key, 0], dtype=np.uint64), counter=counter))


def philox_4x32(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Apply Philox4x32-10 to many counters at once.

    Args:
        counter: uint64 [..., 4], each entry below 2**32.
        key: two 32-bit words.

    Returns:
        uint64 [..., 4], each entry a random 32-bit word.
    """
    c0, c1, c2, c3 = (counter[..., i] for i in range(4))
    for i in range(10):
        k0 = np.uint64((key[0] + i * _WEYL[0]) & 0xFFFFFFFF)
        k1 = np.uint64((key[1] + i * _WEYL[1]) & 0xFFFFFFFF)
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ k1,
            product0 & _LOW,
        )
    return np.stack([c0, c1, c2, c3], axis=-1)


def bits(
    seed: int, purpose: str, round: int, phase: int, participants: NDArray[np.int64], count: int, extra: int = 0
) -> NDArray[np.uint64]:
    """Draw `count` 64-bit words for each participant.

    Returns:
        uint64 [len(participants), count]; row i depends on participants[i] alone, not on the others in the call.
    """
    key = stable_hash(seed, purpose, round, phase, extra)
    num_blocks = (count + 1) // 2
    who = np.asarray(participants, dtype=np.uint64)[:, None]
    counter = np.empty((len(who), num_blocks, 4), dtype=np.uint64)
    counter[..., 0] = np.arange(num_blocks, dtype=np.uint64)
    counter[..., 1] = 0
    counter[..., 2] = who & _LOW
    counter[..., 3] = who >> _SHIFT
    words = philox_4x32(counter, (key & 0xFFFFFFFF, key >> 32))
    pairs = (words[..., 0::2] << _SHIFT) | words[..., 1::2]
    return pairs.reshape(len(who), 2 * num_blocks)[:, :count]


def uniforms(
    seed: int, purpose: str, round: int, phase: int, participants: NDArray[np.int64], count: int, extra: int = 0
) -> NDArray[np.float64]:
    """Draw `count` numbers in [0, 1) for each participant; float64 [len(participants), count], rows as of `bits`."""
    words = bits(seed, purpose, round, phase, participants, count, extra)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutations(
    seed: int,
    purpose: str,
    round: int,
    phase: int,
    participants: NDArray[np.int64],
    sizes: NDArray[np.int64],
    extra: int = 0,
) -> NDArray[np.int64]:
    """Shuffle ``range(sizes[i])`` for every participant i.

    Returns:
        int64 [p, max(sizes)]; row i holds a permutation of 0..sizes[i]-1 followed by -1.
    """
    longest = int(sizes.max(initial=0))
    keys = bits(seed, purpose, round, phase, participants, longest, extra)
    beyond = np.arange(longest)[None, :] >= np.asarray(sizes)[:, None]
    keys = np.where(beyond, np.uint64(0xFFFFFFFFFFFFFFFF), keys)
    order = np.argsort(keys, axis=1, kind="stable").astype(np.int64)
    order[beyond] = -1
    return order


def choose(seed: int, purpose: str, round: int, population: int, count: int, phase: int = 0) -> NDArray[np.int64]:
    """Choose `count` distinct members of ``range(population)``; int64 [count], ascending."""
    picked = generator(seed, purpose, round, phase).choice(population, size=count, replace=False, shuffle=False)
    return np.sort(picked.astype(np.int64))
