"""What capacities below 1 save of a model, looked at before a run is started for it."""

from __future__ import annotations

from collections.abc import Sequence

from gossamer.errors import ConfigError
from gossamer.simulation.costs import VariantCosts
from gossamer.storage.tables import aligned
from gossamer.submodel import Layout


def check_cuts(layout: Layout, costs: Sequence[VariantCosts]) -> tuple[str, ...]:
    """Warn, with a table, of capacities that cut away less than half of the share of the model that they name.

    Args:
        layout: layout of the whole model.
        costs: what a participant of each capacity costs.

    Raises:
        ConfigError: no capacity below 1 cuts anything.
    """
    whole = layout.num_parameters
    left = {one.capacity: layout.cut(one.capacity).num_parameters for one in costs if one.capacity < 1}
    if not left:
        return ()
    if all(number == whole for number in left.values()):
        raise ConfigError(
            f"submodel.capacities = {sorted({one.capacity for one in costs})} cut nothing of this model, none of whose"
            f" dimensions can be cut so far: everybody would train all {whole:,} parameters; set submodel.capacities to"
            " [1.0], or choose a wider model (of low-rank factors, a higher workload.lora.rank)"
        )
    if all(number / whole <= (1 + capacity) / 2 for capacity, number in left.items()):
        return ()
    rows = [
        (
            f"{one.capacity:g}",
            f"{number:,}",
            f"{number / whole:.1%}",
            f"{one.bytes_up:,}",
            f"{one.flops_per_sample:,.0f}",
        )
        for one in costs
        for number in [left.get(one.capacity, whole)]
    ]
    return (
        "submodel.capacities cut little of this model, most of which has no dimension that can be cut:\n"
        + aligned([("capacity", "parameters", "share", "bytes up", "FLOPs a sample"), *rows]),
    )
