"""What benchmarks take from inside gossamer, in one place: the parts of a run, without its loop, logs and commits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from gossamer.build import Parts, build

try:
    from gossamer.config.loading import parse
except ImportError:  # releases before the configuration was a package
    from gossamer.config import parse


def parts_of(config: Mapping[str, Any]) -> Parts:
    """Return the parts of a run: its workload, task and planner, and what starts its engine."""
    return build(parse(config))


def resolved(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration as a run would write it down, everything resolved."""
    found: dict[str, Any] = parts_of(config).config.model_dump(mode="json")
    return found


def engine_of(parts: Parts) -> Any:
    """Start the engine of a run whose algorithm keeps no private state."""
    engine, _ = parts.start_engine(Path())
    return engine


def read_config(directory: Path) -> dict[str, Any]:
    """Return the resolved configuration that a run has written down."""
    found: dict[str, Any] = yaml.safe_load((directory / "config.yaml").read_text())
    return found


def initial_model(parts: Parts, seed: int) -> dict[str, Tensor]:
    """Return the parameters that a run starts from."""
    found: dict[str, Tensor] = parts.workload.layout.views(parts.workload.init(seed))
    return found
