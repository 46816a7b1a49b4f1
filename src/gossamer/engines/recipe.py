"""How another process becomes one that trains a task: from a recipe of plain JSON values."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from gossamer.engines.task import Task
from gossamer.memory import keep_freed_memory
from gossamer.registry import load_object, trusting


def rebuild(recipe: Mapping[str, Any], data: Any = None) -> Task:
    """Set this process up for training on one thread, and rebuild a task.

    Args:
        recipe: ``factory`` (``module:function``), its argument ``config``, and ``paths`` where modules of the user's
            own may lie, see `EngineSetup`.
        data: the workload's, where they were loaded elsewhere; None: they are loaded here.
    """
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    torch.set_num_threads(1)
    keep_freed_memory()
    sys.path += [path for path in recipe["paths"] if path not in sys.path]
    with trusting():  # as the process that sends the recipe checked
        task: Task = load_object(recipe["factory"])(recipe["config"], data)
    return task
