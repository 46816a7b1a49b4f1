"""Image files of figures: their formats and their style."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.errors import ConfigError, storage_errors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.labelsize": 10,
    "axes.titlesize": 10,
    "legend.fontsize": 9,
    "legend.title_fontsize": 11,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "0.88",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "pdf.fonttype": 42,  # journals refuse type 3 fonts
    "svg.hashsalt": "gossamer",  # equal logs give equal files
}


def require_image(output: Path) -> str:
    """Return the format that the name of an image has.

    Raises:
        ConfigError: it is none of `FORMATS`.
    """
    suffix = output.suffix.removeprefix(".").lower()
    if suffix not in FORMATS:
        raise ConfigError(f"cannot tell the format of {str(output)!r}: give a name that ends in .png, .svg or .pdf")
    return suffix


def save(draw: Callable[[], Figure], output: Path, dpi: int = 150) -> Path:
    """Call `draw` in the style of all figures, write what it returns, and return the path; folders are made if needed.

    Raises:
        ConfigError: the format is unknown.
        StorageError: the file cannot be written.
    """
    import matplotlib

    suffix, buffer = require_image(output), io.BytesIO()
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(suffix)
    with matplotlib.rc_context(STYLE):
        draw().savefig(buffer, format=suffix, dpi=dpi, metadata=undated)
    with storage_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(buffer.getvalue())
    return output
