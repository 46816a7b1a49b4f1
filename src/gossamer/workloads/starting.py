"""Parameters that start as those of an earlier run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gossamer.errors import ConfigError

SEED = "{seed}"  # in a path: the run's seed


def load_parameters(path: str, shapes: Mapping[str, tuple[int, ...]], where: str, seed: int = 0) -> dict[str, Tensor]:
    """Return parameters in a file, float32, of the names and shapes given; others in it are not looked at.

    Args:
        path: of a file that ``gossamer export`` wrote, in which ``{seed}`` stands for the seed.
        shapes: ``{name: shape}`` of what is wanted.
        where: name of the option, for errors.
        seed: of the run.

    Raises:
        ConfigError: it cannot be read, or lacks some, has them of other shapes, or with values that are not finite.
    """
    file = Path(path.replace(SEED, str(seed)))
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{where}: {str(file)!r} cannot be read ({error}): give a file that gossamer export wrote"
        ) from None
    for name, shape in shapes.items():
        has = tuple(found[name].shape) if name in found else None
        if has != tuple(shape):
            what = "no such parameter" if has is None else f"one of shape {has}"
            raise ConfigError(
                f"{where}: the model needs {name!r} of shape {tuple(shape)}, but {str(file)!r} has {what}: give the"
                " sizes of the model that was exported"
            )
        if not found[name].isfinite().all():
            raise ConfigError(f"{where}: {name!r} of {str(file)!r} has values that are not finite: export another run")
    return {name: found[name].float() for name in shapes}
