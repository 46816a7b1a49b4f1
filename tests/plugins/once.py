"""A data set that notes each time that it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gossamer.workloads.datasets import ImageData, digits


def digits_once(options: Mapping[str, Any]) -> ImageData:
    """Return the digits, and add a line to the file `log`."""
    with Path(options["log"]).open("a") as log:
        log.write("loaded\n")
    return digits({name: value for name, value in options.items() if name != "log"})
