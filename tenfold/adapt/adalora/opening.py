"""Read the adapters that users already have: PEFT's AdaLoRA, plain LoRA, and folders saved while we train."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, load_peft_weights
from peft.utils.other import get_pattern_key
from torch import Tensor

from tenfold.adapt.adalora.mathematics import decompose
from tenfold.errors import ModelError

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Stored:
    """An adapter's triplets as they lie in a folder.

    Args:
        triplets: for each matrix P ``[out, rank]``, lambda ``[rank]`` and Q ``[rank, in]``; without rank-0 matrices.
        scale: of the update ``scale * P @ diag(lambda) @ Q``.
        others: further tensors in full, such as a task head, under PEFT's names.
    """

    triplets: dict[str, tuple[Tensor, Tensor, Tensor]]
    scale: float
    others: dict[str, Tensor]


def read_adapter(folder: Path) -> Stored:
    """Read a PEFT folder of an AdaLoRA or LoRA adapter as triplets.

    AdaLoRA's are taken as they are, with the scale by which PEFT computes, ``alpha / (init_r + 1e-5)``. A LoRA's
    ``B @ A`` is decomposed exactly into singular triplets, which is what AdaLoRA's scores and penalty expect.

    Args:
        folder: with ``adapter_config.json`` and the weights.

    Raises:
        ModelError: no such folder, another kind of adapter, or a variant that is not a plain low-rank update.
    """
    path = folder / CONFIG_NAME
    if not path.exists():
        raise ModelError(f"{folder}: no {CONFIG_NAME}", remedy="give the folder of a PEFT LoRA or AdaLoRA adapter")
    config = json.loads(path.read_text(encoding="utf-8"))
    kind = config.get("peft_type")
    variants = [key for key in ("use_dora", "lora_bias", "target_parameters", "layer_replication") if config.get(key)]
    if kind not in ("LORA", "ADALORA") or variants:
        what = f"{kind} with {', '.join(variants)}" if variants else str(kind)
        raise ModelError(f"{folder}: a {what} adapter", remedy="only plain LoRA and AdaLoRA adapters can be opened")
    tensors = load_peft_weights(str(folder), device="cpu")
    ours = {key for key in tensors if ".lora_" in key}
    others = {key: value for key, value in tensors.items() if key not in ours}
    names = [
        key.removesuffix(end) for key in sorted(ours) for end in (".lora_A", ".lora_A.weight") if key.endswith(end)
    ]
    triplets, scale = {}, _scale(config)
    for name in names:
        one = _one(tensors, name, kind, _scale(config, name) / scale)
        if len(one[1]) > 0:
            triplets[name.removeprefix(PREFIX)] = one
    if not triplets:
        raise ModelError(f"{folder}: no low-rank weights in it", remedy="give the folder of a LoRA or AdaLoRA adapter")
    return Stored(triplets, scale, others)


def _scale(config: Mapping[str, Any], name: str = "") -> float:
    """Of one matrix as PEFT computes it; of the adapter's default where no matrix is named."""
    if config["peft_type"] == "ADALORA":
        alpha = config["lora_alpha"]
        return (alpha if alpha > 0 else float(config["init_r"])) / (config["init_r"] + 1e-5)
    key = name.removeprefix(PREFIX)
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(ranks, key), config["r"])
    alpha = alphas.get(get_pattern_key(alphas, key), config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _one(tensors: Mapping[str, Tensor], name: str, kind: str, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """P, lambda and Q of one matrix, at the adapter's scale."""
    if kind == "ADALORA":
        return tensors[f"{name}.lora_B"], tensors[f"{name}.lora_E"].flatten(), tensors[f"{name}.lora_A"]
    if f"{name}.lora_B.left" in tensors:
        left, singular = tensors[f"{name}.lora_B.left"], tensors[f"{name}.lora_B.singular"]
        return left, singular.flatten() * factor, tensors[f"{name}.lora_A.weight"]
    P, values, Q = decompose(tensors[f"{name}.lora_B.weight"] * factor, tensors[f"{name}.lora_A.weight"])
    return P, values, Q


@torch.no_grad()
def fill(parameters: tuple[Tensor, Tensor, Tensor], triplet: tuple[Tensor, Tensor, Tensor]) -> None:
    """Copy Q, lambda and P of a matrix from stored P, lambda and Q."""
    Q, singular, P = parameters
    for target, value in ((P, triplet[0]), (singular, triplet[1][:, None]), (Q, triplet[2])):
        target.copy_(value)
