"""Siblings that engines multiply as one matrix, and which therefore need one number format."""

from __future__ import annotations

from tenfold.models.layer_map import LayerMap, Slot

_FUSED = (("q", "k", "v"), ("gate", "up"))
"""Roles that vLLM and its like multiply as one matrix."""


def fused_name(slot: Slot, found: LayerMap) -> str:
    """The name of what a layer is multiplied with; its own where it stands alone.

    >>> from tenfold.models.layer_map import layer_map
    >>> from tenfold.models.tiny import tiny_model
    >>> found = layer_map(tiny_model("llama").model)
    >>> fused_name(found.slots[1], found)
    'model.layers.0.self_attn.q_proj+k_proj+v_proj'
    """
    parent = slot.name.rpartition(".")[0]
    roles = next((roles for roles in _FUSED if slot.role in roles), ())
    there = [other for other in found.slots if other.role in roles and other.name.rpartition(".")[0] == parent]
    if len(there) < 2 or slot.layer is None:
        return slot.name
    return f"{parent}.{'+'.join(other.name.rpartition('.')[2] for other in there)}"
