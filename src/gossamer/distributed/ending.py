"""How a process of torchrun ends by an error of gossamer that its program does not catch: in a sentence."""

from __future__ import annotations

import os
import sys
from types import TracebackType

from gossamer.errors import GossamerError


def end_in_a_sentence() -> None:
    """Let errors of gossamer that nobody catches end this process without a traceback, with their exit code."""
    tell_others = sys.excepthook

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Be Python's hook for errors that nobody catches."""
        if not isinstance(error, GossamerError):
            tell_others(kind, error, trace)
            return
        print(f"rank {os.environ.get('RANK', '0')}: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code)

    sys.excepthook = tell
