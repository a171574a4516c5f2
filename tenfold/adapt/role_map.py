"""One number of each matrix, as a map of roles and layers that a reader of a report can look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TypeVar

from tenfold.models.layer_map import Slot

Number = TypeVar("Number", int, float)


def by_role(slots: Mapping[str, Slot], values: Mapping[str, Number]) -> dict[str, list[Number | None]]:
    """Role -> the value in each layer, None where the role has none there.

    Roles of an encoder beside a decoder are ``encoder.q``; names within the block stand for roles that a block has
    several times, as with experts.

    Args:
        slots: the matrices by name.
        values: of each of them.

    >>> slots = {name: Slot(name, "q", layer, 4, 4, "linear", "decoder") for name, layer in (("a", 0), ("b", 2))}
    >>> by_role(slots, {"a": 7, "b": 8})
    {'q': [7, None, 8]}
    """
    both = {slot.stack for slot in slots.values()} == {"encoder", "decoder"}
    rows = {name: f"{slot.stack}.{slot.role}" if both else slot.role for name, slot in slots.items()}
    places = Counter((row, slots[name].layer) for name, row in rows.items())
    several = {row for (row, _), count in places.items() if count > 1}  # experts, or two MLPs in a block
    found: dict[str, dict[int, Number]] = {}
    for name, row in rows.items():
        layer = slots[name].layer or 0
        row = name.partition(f".{layer}.")[2] or name if row in several else row
        found.setdefault(row, {})[layer] = values[name]
    layers = 1 + max(layer for of_row in found.values() for layer in of_row)
    return {row: [of_row.get(layer) for layer in range(layers)] for row, of_row in found.items()}
