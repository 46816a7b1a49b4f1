"""The Ray engine: blocks of clients, or of peers, on the actors of a cluster. The only place that imports ray."""

from __future__ import annotations


def ray_version() -> str:
    """Return the version of the Ray that can be imported.

    Raises:
        Exception: whatever a broken installation raises.
    """
    import ray

    return str(ray.__version__)
