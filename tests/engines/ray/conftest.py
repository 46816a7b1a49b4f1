"""One Ray of four CPUs for all tests here, which must therefore run in one process: xdist's group "ray"."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gossamer.engines.ray.cluster import start_ray


@pytest.fixture(scope="session")
def one_ray() -> Iterator[None]:
    """Start Ray; runs in this process find and use it."""
    leave = start_ray(None, 4)
    yield
    leave()
