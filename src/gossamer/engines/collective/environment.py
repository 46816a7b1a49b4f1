"""What torchrun tells a process of itself."""

from __future__ import annotations

import os
from collections.abc import Iterable


def is_rank() -> bool:
    """Say whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_leader() -> bool:
    """Say whether this process is rank 0 of a torchrun job, or in none."""
    return not is_rank() or os.environ.get("RANK", "0") == "0"


def is_restarted() -> bool:
    """Say whether torchrun started this process in the place of one that failed."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def use_own_device(devices: Iterable[str]) -> None:
    """Let "cuda" be the device of this rank's number on its machine, if it is among the devices that modes name."""
    if "cuda" not in devices:
        return
    import torch

    if count := torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % count)
