"""A plan on a model in memory: what its quality would be, by numbers that are rounded and computed with as before."""

from __future__ import annotations

from typing import Any

from tenfold.compress.fpx.digests import weights_digest
from tenfold.compress.fpx.packed_layers import REMEDY
from tenfold.compress.fpx.plan import Plan
from tenfold.compress.fpx.rounding import Rounding, format_of
from tenfold.errors import ModelError
from tenfold.models.layer_map import plain_model
from tenfold.models.quantised import refuse_quantised
from tenfold.models.simulated import MARK


def apply(model: Any, plan: Plan) -> None:
    """Round a model's weights and what its layers read to the formats of a plan, in place, until `remove`.

    The formats are simulated: it takes as long as before, or longer, so `tenfold.evaluate.speed` refuses the model.
    Adapters stay exact beside the rounded base. Another plan takes the place of one that is there; the same one again
    changes nothing. The original weights are held beside the rounded ones; training the rounded ones is lost.

    Args:
        model: that the plan was made for, in any floating type that holds its numbers.
        plan: the plan.

    Raises:
        ModelError: packed weights, adapters that are merged, another model than the plan's, or numbers that are not
            finite. Nothing is changed then.

    >>> import torch
    >>> from tenfold.compress.fpx.plan import plan
    >>> from tenfold.models.tiny import tiny_model
    >>> model, ids = tiny_model("llama").model, torch.arange(6, 70)
    >>> before = model(ids[None]).logits
    >>> apply(model, plan(model, [ids], budget="6bits"))
    >>> bool((model(ids[None]).logits == before).all())
    False
    >>> remove(model)
    >>> bool((model(ids[None]).logits == before).all())
    True
    """
    refuse_quantised(model, "apply", "open the model in its original precision (leave load out)")
    base = plain_model(model)
    there: _Applied | None = base.__dict__.get(MARK)
    if there is not None and there.plan == plan:
        return
    remove(model)
    refuse_other(model, plan)
    base.__dict__[MARK] = _Applied(plan, base)


def refuse_other(model: Any, plan: Plan) -> None:
    """Refuse a model that a plan was not made for.

    Raises:
        ModelError: other weights, or an adapter that is merged into them.
    """
    base = plain_model(model)
    _refuse_merged(base)
    if weights_digest(model) != plan.weights_hash:
        raise ModelError(
            f"the plan was made for other weights ({plan.model}, {plan.weights_hash[:12]}) than these of this "
            f"{base.config.get_text_config().model_type} model",
            remedy="apply it to the model that it was made for, or plan again",
        )


def remove(model: Any) -> None:
    """Put a model's own weights back, bit for bit; one without a plan stays as it is.

    Args:
        model: that `apply` was called on, also with adapters that came or went since.

    Raises:
        ModelError: an adapter was merged into the rounded weights, which would be lost; or the weights were packed
            (`tenfold.compress.fpx.packing.pack`), and the original ones are gone.
    """
    refuse_quantised(model, "remove: the original weights are gone", REMEDY)
    base = plain_model(model)
    if (there := base.__dict__.get(MARK)) is not None:
        _refuse_merged(base)
        del base.__dict__[MARK]
        there.rounding.undo()


def _refuse_merged(base: Any) -> None:
    merged = next((name for name, module in base.named_modules() if getattr(module, "merged", False)), None)
    if merged:
        raise ModelError(f"{merged}: its adapter is merged into the weight", remedy="call unmerge_adapter first")


class _Applied:
    """What stands on the model: the plan, and the way back."""

    def __init__(self, plan: Plan, base: Any) -> None:
        self.plan = plan
        self.rounding = Rounding(base, [(unit.unit, format_of(unit.format, plan.codec)) for unit in plan.units])

    def __str__(self) -> str:
        return f"{' and '.join(self.plan.palette)}, {self.plan.bits:.2f} bits"

    def __repr__(self) -> str:
        return f"{self.plan.codec} {self.plan.by_module}"
