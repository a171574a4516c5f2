"""A plan on a model in memory for real: weights in few bits, multiplied by torch's kernels for them."""

from __future__ import annotations

from typing import Any, NoReturn

from tenfold.compress.fpx.apply import refuse_other
from tenfold.compress.fpx.packed_layers import REMEDY, CodedLinear, packed_like, refuse_unpackable
from tenfold.compress.fpx.plan import Plan
from tenfold.errors import ConfigError, ModelError
from tenfold.kernels.packed_matrix import packed_format
from tenfold.models.layer_map import plain_model, plain_modules
from tenfold.models.quantised import PACKED_MARK, refuse_quantised
from tenfold.models.simulated import refuse_simulated


def pack(model: Any, plan: Plan) -> None:
    """Store a model's weights in the formats of a plan, in place, and multiply with them as they are stored.

    The original weights are gone, so that it cannot be undone, and the memory is that of the packed ones. Which kernel
    is the fastest, for one token and for many, is measured for each shape (`tenfold.kernels.packed_choice`). On a GPU
    most products are with expanded matrices: that saves memory, not time.

    Adapters stay exact beside the packed base, and new ones learn on it; the packed weights themselves do not, nor
    can they be saved. Where a table of embeddings is the head as well, both read the one packed matrix.

    Args:
        model: that the plan was made for, where it is to run.
        plan: of kernels: ``fpx.plan(..., codec="kernels")``.

    Raises:
        ConfigError: a plan of other formats, or a model that simulates one.
        ModelError: packed weights, adapters that are merged, another model than the plan's, or a layer that no packed
            one can stand for. Nothing is changed then.

    >>> import torch
    >>> from tenfold.compress.fpx.plan import plan
    >>> from tenfold.models.memory import weight_bytes
    >>> from tenfold.models.tiny import tiny_model
    >>> model, ids = tiny_model("llama").model, torch.arange(6, 70)
    >>> found = plan(model, [ids], budget="9bits", codec="kernels")
    >>> pack(model, found)
    >>> round(weight_bytes(model) / found.bytes, 2)
    1.0
    """
    if plan.codec != "kernels":
        raise ConfigError(
            f"pack: the plan is of {', '.join(plan.palette)} ({plan.codec}), which no kernel here multiplies in",
            remedy="plan with codec='kernels', or simulate this one (fpx.apply)",
        )
    refuse_quantised(model, "pack", REMEDY)
    refuse_simulated(model, "pack", "remove the plan first")
    refuse_other(model, plan)
    modules = dict(plain_modules(model))
    refuse_unpackable(modules, [unit.unit for unit in plan.units])
    base = plain_model(model)
    for unit in plan.units:
        form = packed_format(unit.format)
        for weight in unit.weights:
            stored = modules[weight.modules[0]].weight.data
            matrix = form.pack(stored.T if weight.transposed else stored)
            for name in weight.modules:
                layer = packed_like(modules[name], matrix)
                _replace(base, modules.pop(name), layer)
                if isinstance(layer, CodedLinear):
                    layer.settle(layer.typed.dtype)
    base.__dict__[PACKED_MARK] = " and ".join(sorted(set(plan.formats.values())))
    base.__dict__["save_pretrained"] = _refuse_saving


def _replace(base: Any, module: Any, layer: Any) -> None:
    """Wherever a module stands, also within an adapter's layer and more than once."""
    for parent in base.modules():
        for name, child in parent._modules.items():
            if child is module:
                parent._modules[name] = layer


def _refuse_saving(*_: Any, **__: Any) -> NoReturn:
    raise ModelError("the model cannot be saved: its weights are packed for this process", remedy=REMEDY)
