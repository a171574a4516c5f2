"""Put the adapter into a model through PEFT, and take it out without residue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from tenfold.adapt.adalora.layer import ADAPTER, SvdLinear, initialise
from tenfold.adapt.adalora.plan import RankPlan
from tenfold.config.adalora import AdaLoraConfig
from tenfold.errors import ModelError
from tenfold.models.heads import PEFT_TASKS
from tenfold.models.layer_map import Slot
from tenfold.models.tied import untie


@dataclass(frozen=True)
class Matrix:
    """One adapted matrix.

    Args:
        slot: which of the model's matrices it is.
        layer: PEFT's layer in its place.
    """

    slot: Slot
    layer: SvdLinear

    @property
    def P(self) -> nn.Parameter:  # noqa: N802 (the paper's name)
        """Left singular vectors, ``[out, rank]``."""
        return self.layer.lora_B[ADAPTER].left

    @property
    def singular(self) -> nn.Parameter:
        """Lambda, ``[rank, 1]``."""
        return self.layer.lora_B[ADAPTER].singular

    @property
    def Q(self) -> nn.Parameter:  # noqa: N802 (the paper's name)
        """Right singular vectors, ``[rank, in]``."""
        return self.layer.lora_A[ADAPTER].weight

    @property
    def rank(self) -> int:
        """Triplets that exist, dropped ones included until they are removed."""
        return self.singular.shape[0]

    @property
    def tensors(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """Q, lambda, P: the order of the published code."""
        return self.Q, self.singular, self.P


def wrap(
    model: nn.Module,
    slots: Sequence[Slot],
    plan: RankPlan,
    config: AdaLoraConfig,
    *,
    task: str | None,
    beyond: Mapping[str, Any] | None = None,
) -> tuple[PeftModel, dict[str, Matrix], list[tuple[str, str]]]:
    """Put fresh adapters on the slots; everything else is frozen.

    A head that shares its weight with the input embedding gets one of its own, so that the adapter can be merged.

    Args:
        model: a transformers model without adapters.
        slots: the matrices to adapt.
        plan: their ranks and the scale.
        config: dropout and initialisation.
        task: what the model's head is for; decides which head PEFT trains in full.
        beyond: further keys of PEFT's configuration, of what an opened adapter trained beside the matrices.

    Returns:
        PEFT's model around `model`; the adapted matrices by name, in model order; the layers that were untied.

    Raises:
        ModelError: a model that already has adapters, or a layer that PEFT could not replace.
    """
    if isinstance(model, PeftModel) or hasattr(model, "peft_config"):
        raise ModelError(
            "the model already has an adapter",
            remedy="merge it (merge_and_unload), or open its folder with tenfold.adapt.adalora.open_adapter",
        )
    highest = max(plan.ranks.values())
    peft_config = PeftLoraConfig(
        task_type=PEFT_TASKS[task] if task is not None else None,
        r=highest,
        lora_alpha=plan.scale * highest,
        lora_dropout=config.dropout,
        target_modules=[slot.name for slot in slots],
        fan_in_fan_out=slots[0].layout == "conv1d",
        **(beyond or {}),
    )
    set_patterns(peft_config, plan.ranks, plan.scale)
    # PEFT's extension point for layers of one's own; it takes any base, whatever quantises it.
    peft_config._register_custom_module({nn.Module: SvdLinear})
    untied = untie(model, [slot.name for slot in slots])
    adapted = get_peft_model(model, peft_config, adapter_name=ADAPTER)
    found = {name: module for name, module in adapted.get_base_model().named_modules() if isinstance(module, SvdLinear)}
    if set(found) != {slot.name for slot in slots}:
        wrong = sorted(set(found) ^ {slot.name for slot in slots})
        raise ModelError(
            f"these layers could not be adapted alone: {', '.join(wrong[:5])}", remedy="choose other targets"
        )
    matrices = {slot.name: Matrix(slot, found[slot.name]) for slot in slots}
    for matrix in matrices.values():
        initialise(matrix.layer, ADAPTER, config.paper.init)
    return adapted, matrices, untied


def set_patterns(peft_config: PeftLoraConfig, ranks: Mapping[str, int], scale: float) -> None:
    """Write ranks that differ from ``r``, with an alpha that keeps the scale, so that PEFT opens what it saves."""
    others = {name: rank for name, rank in ranks.items() if rank != peft_config.r}
    peft_config.rank_pattern = others
    peft_config.alpha_pattern = {name: scale * rank for name, rank in others.items()}


def trainable(matrices: Mapping[str, Matrix]) -> list[Tensor]:
    """All tensors of the adapter."""
    return [tensor for matrix in matrices.values() for tensor in matrix.tensors]
