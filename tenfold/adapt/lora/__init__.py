"""LoRA through PEFT, with the size of the adapter given as a budget."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import nn

from tenfold.config.budget import trainable_parameters
from tenfold.config.lora import LoraConfig
from tenfold.errors import ConfigError, ModelError
from tenfold.models.heads import PEFT_TASKS
from tenfold.models.layer_map import Slot, layer_map
from tenfold.models.quantised import parameter_count
from tenfold.models.tied import untie

DEFAULT_RANK = 8


def attach(model: nn.Module, config: LoraConfig, *, task: str = "causal") -> PeftModel:
    """Put a fresh LoRA adapter on the targeted layers; the base is frozen and stays as it is.

    A head that shares its weight with the input embedding gets one of its own, so that the adapter can be merged.

    Args:
        model: a transformers model.
        config: rank or budget, scale, dropout, targets.
        task: what the model's head is for.

    Returns:
        PEFT's model around `model`.

    Raises:
        ConfigError: a target that matches nothing, or a budget below one rank.
        ModelError: the model already has an adapter, which the new one would replace.

    >>> from tenfold.models.tiny import tiny_model
    >>> attach(tiny_model("llama").model, LoraConfig(rank=2, targets=("q", "v"))).peft_config["default"].r
    2
    """
    if hasattr(model, "peft_config"):
        raise ModelError("the model already has an adapter", remedy="merge it first (tenfold.models.export.merge)")
    slots = layer_map(model).select(config.targets)
    rank = choose_rank(config, slots, parameters=parameter_count(model))
    peft_config = PeftLoraConfig(
        task_type=PEFT_TASKS[task],
        r=rank,
        lora_alpha=config.alpha if config.alpha is not None else 2 * rank,
        lora_dropout=config.dropout,
        target_modules=[slot.name for slot in slots],
        fan_in_fan_out=slots[0].layout == "conv1d",
    )
    untie(model, [slot.name for slot in slots])
    return get_peft_model(model, peft_config)


def choose_rank(config: LoraConfig, slots: tuple[Slot, ...], parameters: int) -> int:
    """The rank that the configuration asks for: given, or the largest whose parameters fit the budget.

    A rank costs ``in_features + out_features`` parameters in each adapted matrix.

    Args:
        config: with ``rank`` or ``budget``.
        slots: the adapted matrices.
        parameters: of the whole model; what a share is a share of.

    Raises:
        ConfigError: when the budget buys no rank.

    >>> slots = (Slot("q", "q", 0, 100, 60, "linear", "decoder"),)
    >>> choose_rank(LoraConfig(budget="1k"), slots, parameters=10**6)
    6
    """
    if config.budget is None:
        return config.rank or DEFAULT_RANK
    affordable = trainable_parameters(config.budget, parameters)
    cost = sum(slot.in_features + slot.out_features for slot in slots)
    rank = int(affordable // cost)
    if rank < 1:
        raise ConfigError(
            f"budget: {config.budget!r} is {affordable:,.0f} parameters, but one rank on the "
            f"{len(slots)} targeted matrices costs {cost:,}",
            remedy=f"give at least {cost / parameters:.3%} or fewer targets (targets: [q, v])",
        )
    return min(rank, min(min(slot.in_features, slot.out_features) for slot in slots))


def attached(model: PeftModel) -> dict[str, Any]:
    """What the adapter touched: matrices, trainable parameters, their share of the base, bytes."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trainable)
    base = parameter_count(model, lambda name: "lora_" not in name)
    names = {name.rpartition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    return {
        "method": "LoRA (PEFT)",
        "matrices": len(names),
        "rank": model.peft_config["default"].r,
        "trainable parameters": count,
        "share of the model": count / base,
        "bytes": sum(p.numel() * p.element_size() for p in trainable),
    }
