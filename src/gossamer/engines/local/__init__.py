"""The local engine: in process, or several worker processes over shared memory."""

from gossamer.engines.local.engine import LocalEngine

__all__ = ["LocalEngine"]
