"""Models, data and partitions that are given in Python, in the place of what a configuration names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gossamer.config import loading as configuration
from gossamer.workloads.given import given_data, given_model, given_partition


def put_in(config: dict[str, Any], model: Any, data: Any, partition: Any) -> dict[str, Any]:
    """Write the names of objects into a configuration, in place; return ``{name: object}`` for `registry.giving`.

    Raises:
        GossamerError: an object is none that could be used.
    """
    objects: dict[str, Any] = {}
    for key, given in (
        ("model", None if model is None else given_model(model)),
        ("dataset", None if data is None else given_data(data)),
    ):
        if given is not None:
            config |= configuration.with_value({"workload": config.get("workload", {})}, ["workload", key], given.spec)
            objects |= given.objects
    if partition is not None:
        divided, num = given_partition(partition)
        objects |= divided.objects
        for section in ("clients", "peers"):
            if isinstance(below := config.get(section), Mapping):
                filled = {"num": num} if num is not None and below.get("num") is None else {}
                config[section] = {**below, **filled, "partition": divided.spec}
    return objects
