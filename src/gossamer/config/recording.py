"""The section ``profile``: whether and what is recorded of where the time goes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from gossamer.errors import ConfigError
from gossamer.options import Options
from gossamer.profiling.recorder import recording
from gossamer.storage.runlog import TRACE


class RecordingOptions(Options):
    """What is recorded of where the time goes, for ``gossamer profile``; ``true``: spans alone. It changes no bits.

    Attributes:
        torch: whether torch.profiler runs whenever a process trains, on engine local; ``gossamer profile --chrome`` and
            ``--perfetto`` put what it saw below the spans.
    """

    torch: bool = False


def _read(value: Any) -> Any:
    """Read true as a section in which nothing is given, and false as none."""
    return ({} if value else None) if isinstance(value, bool) else value


Recording = Annotated[RecordingOptions | None, BeforeValidator(_read)]


def require_torch_profiler(config: Any) -> None:
    """Refuse torch.profiler where those who train do not run it.

    Raises:
        ConfigError: they are not processes of engine local.
    """
    if config.profile is not None and config.profile.torch and config.engine.name != "local":
        raise ConfigError(
            f"profile.torch = true does not go with engine {config.engine.name!r}, whose processes do not run"
            " torch.profiler: choose engine local, or profile: true"
        )


def recorded(options: RecordingOptions | None, directory: Path) -> AbstractContextManager[None]:
    """Return a context that records a run into its directory; None: it records nothing."""
    if options is None:
        return recording(None)
    return recording(directory / TRACE, torch=options.torch)
