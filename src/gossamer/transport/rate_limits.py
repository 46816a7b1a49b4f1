"""How often something may happen: a bucket of tokens that fills at a steady rate, as a pure function."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bucket:
    """A bucket of tokens.

    Attributes:
        level: number of tokens in it.
        time: second in which it was so.
    """

    level: float
    time: float


def take(bucket: Bucket, now: float, amount: float, per_second: float, burst: float) -> tuple[Bucket, float]:
    """Take tokens out of a bucket, if there are enough.

    Args:
        now: present time, seconds; an earlier one than the bucket's counts as that.
        amount: number of tokens wanted, `burst` at most.
        per_second: tokens that flow in.
        burst: tokens that it holds at most.

    Returns:
        the bucket then, and 0; or, where nothing was taken, the seconds until there are enough.
    """
    now = max(now, bucket.time)
    level = min(burst, bucket.level + (now - bucket.time) * per_second)
    if level >= amount:
        return Bucket(level - amount, now), 0.0
    return Bucket(level, now), (amount - level) / per_second
