"""All weights of a model trainable, in float32."""

from __future__ import annotations

from typing import Any

from tenfold.config.full import FullConfig
from tenfold.errors import ModelError
from tenfold.models.quantised import refuse_quantised

UNPACKED = "open the model unquantised (without load), or train an adapter (stage lora or adalora)"


def attach(model: Any, config: FullConfig, *, task: str = "causal") -> Any:
    """Make every weight trainable.

    Args:
        model: a transformers model; half precision becomes float32: steps are smaller than what bfloat16 tells apart.
        config: read by the other methods' `attach` only.
        task: likewise.

    Returns:
        The same model.

    Raises:
        ModelError: weights in whole numbers, which have no gradient.

    >>> from tenfold.models.tiny import tiny_model
    >>> all(p.requires_grad for p in attach(tiny_model("llama").model, FullConfig()).parameters())
    True
    """
    refuse_quantised(model, "not all of the model can be trained", UNPACKED)
    whole = [name for name, parameter in model.named_parameters() if not parameter.is_floating_point()]
    if whole:
        raise ModelError(
            f"{whole[0]}: packed weights have no gradient, so not all of the model can be trained",
            remedy=UNPACKED,
        )
    return model.float().requires_grad_(True)
