"""Read the adapters that users already have: PEFT's AdaLoRA, plain LoRA, and folders saved while we train."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft.tuners import lora
from peft.utils import CONFIG_NAME, load_peft_weights
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tenfold.adapt.adalora.mathematics import decompose
from tenfold.errors import ModelError

PREFIX = "base_model.model."
READ = (".lora_A", ".lora_B", ".lora_E", ".ranknum", ".lora_A.weight", ".lora_B.weight", ".left", ".singular")
"""Ends of the names of an adapter's tensors that are read, or rightly left (VeLoRA's projection of activations too)."""
MERGE = "merge it into its base with PEFT (merge_and_unload), and adapt the result"
VARIANTS = (
    "use_dora", "lora_bias", "use_qalora", "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config",
    "monteclora_config", "target_parameters", "layer_replication",
)  # fmt: skip
"""What makes a LoRA more than ``W + scale * B @ A``."""


@dataclass(frozen=True)
class Stored:
    """An adapter's triplets as they lie in a folder.

    Args:
        triplets: for each matrix P ``[out, rank]``, lambda ``[rank]`` and Q ``[rank, in]``; without rank-0 matrices.
        scale: of the update ``scale * P @ diag(lambda) @ Q``.
        others: further tensors in full, such as a task head, under PEFT's names.
        beyond: what PEFT's configuration trains beyond the matrices: whole modules, biases, rows of the embedding.
    """

    triplets: dict[str, tuple[Tensor, Tensor, Tensor]]
    scale: float
    others: dict[str, Tensor]
    beyond: dict[str, Any]


def read_adapter(folder: Path, model: nn.Module) -> Stored:
    """Read a PEFT folder of an AdaLoRA or LoRA adapter as triplets.

    AdaLoRA's are taken as they are, with the scale by which PEFT computes, ``alpha / (init_r + 1e-5)``. A LoRA's
    ``B @ A`` is decomposed exactly into singular triplets, which is what AdaLoRA's scores and penalty expect. PiSSA and
    OLoRA took their start out of the base's weights, and so does PEFT when it opens them (0.21.2): here the start is
    taken out of the update instead, which doubles its rank and leaves the base as it is.

    Args:
        folder: with ``adapter_config.json`` and the weights.
        model: the base that the adapter was trained on; only read.

    Raises:
        ModelError: no such folder, another kind of adapter, or a variant that is not a low-rank update of this base.
    """
    path = folder / CONFIG_NAME
    if not path.exists():
        raise ModelError(f"{folder}: no {CONFIG_NAME}", remedy="give the folder of a PEFT LoRA or AdaLoRA adapter")
    config = json.loads(path.read_text(encoding="utf-8"))
    _check_kind(folder, config)
    kind = config["peft_type"]
    tensors = load_peft_weights(str(folder), device="cpu")
    ours = {key for key in tensors if ".lora_" in key}
    others = {key: value for key, value in tensors.items() if key not in ours}
    ends = (".lora_A", ".lora_A.weight")
    names = [key.removesuffix(end) for key in sorted(ours) for end in ends if key.endswith(end)]
    strange = sorted(key for key in ours if not key.endswith(READ) and ".lora_velora_" not in key)
    if strange:
        raise ModelError(f"{folder}: cannot read {', '.join(strange[:3])}", remedy=MERGE)
    triplets, scale = {}, _scale(config)
    for name in names:
        start = _mutated_start(config, model, name)
        one = _one(tensors, name, kind, _scale(config, name) / scale, start)
        if len(one[1]) > 0:
            triplets[name.removeprefix(PREFIX)] = one
    if not triplets:
        raise ModelError(f"{folder}: no low-rank weights in it", remedy="give the folder of a LoRA or AdaLoRA adapter")
    beyond = {key: config[key] for key in ("modules_to_save", "bias", "trainable_token_indices") if config.get(key)}
    return Stored(triplets, scale, others, beyond)


def _check_kind(folder: Path, config: Mapping[str, Any]) -> None:
    kind, start = config.get("peft_type"), str(config.get("init_lora_weights")).lower()
    if kind == "ADALORA":  # PEFT accepts LoRA's variants and starts for it, and ignores them
        return
    variants = [key for key in VARIANTS if config.get(key)]
    if kind != "LORA" or variants:
        what = f"{kind} with {', '.join(variants)}" if variants else str(kind)
        raise ModelError(f"{folder}: a {what} adapter", remedy=f"only LoRA and AdaLoRA adapters can be opened; {MERGE}")
    if start == "loftq":
        raise ModelError(
            f"{folder}: a LoftQ adapter, whose base is a quantised copy of the weights and no low-rank change of them",
            remedy="save that base with PEFT (model.unload().save_pretrained), set init_lora_weights to true in the "
            "adapter's configuration, and open it on that base",
        )
    if start == "corda" or start.startswith("pissa_niter"):
        why = "which PEFT draws anew each time" if start != "corda" else "which is not in the folder"
        raise ModelError(
            f"{folder}: a {start} adapter, whose base was changed by its start, {why}",
            remedy="save it as plain LoRA, with PEFT's path_initial_model_for_weight_conversion",
        )


def _mutated_start(config: Mapping[str, Any], model: nn.Module, name: str) -> tuple[Tensor, Tensor] | None:
    """B and A that PEFT takes out of the base's weight when it opens this adapter; None where it takes nothing."""
    start = config.get("init_lora_weights") if config["peft_type"] == "LORA" else None
    if not isinstance(start, str) or not (start.startswith("pissa") or start.lower() == "olora"):
        return None
    try:
        base: Any = model.get_submodule(name.removeprefix(PREFIX))
    except AttributeError:  # not of this model, as the check of the sizes will say
        return None
    if not base.weight.is_floating_point():
        raise ModelError(f"{name}: {start} on a quantised weight cannot be taken back exactly", remedy=MERGE)
    rank, alpha = _rank_and_alpha(config, name)
    again = PeftLoraConfig(
        init_lora_weights=start,
        use_rslora=bool(config.get("use_rslora")),
        fan_in_fan_out=isinstance(base, Conv1D),
    )
    layer = lora.Linear(copy.deepcopy(base), "default", config=again, r=rank, lora_alpha=alpha)
    return layer.lora_B["default"].weight.detach().cpu(), layer.lora_A["default"].weight.detach().cpu()


def _rank_and_alpha(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    key = name.removeprefix(PREFIX)
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(ranks, key), config["r"])
    return rank, alphas.get(get_pattern_key(alphas, key), config["lora_alpha"])


def _scale(config: Mapping[str, Any], name: str = "") -> float:
    """Of one matrix as PEFT computes it; of the adapter's default where no matrix is named."""
    if config["peft_type"] == "ADALORA":
        alpha = config["lora_alpha"]
        return (alpha if alpha > 0 else float(config["init_r"])) / (config["init_r"] + 1e-5)
    rank, alpha = _rank_and_alpha(config, name)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _one(
    tensors: Mapping[str, Tensor], name: str, kind: str, factor: float, start: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """P, lambda and Q of one matrix, at the adapter's scale."""
    if kind == "ADALORA":
        return tensors[f"{name}.lora_B"], tensors[f"{name}.lora_E"].flatten(), tensors[f"{name}.lora_A"]
    if f"{name}.lora_B.left" in tensors:
        left, singular = tensors[f"{name}.lora_B.left"], tensors[f"{name}.lora_B.singular"]
        return left, singular.flatten() * factor, tensors[f"{name}.lora_A.weight"]
    B, A = tensors[f"{name}.lora_B.weight"] * factor, tensors[f"{name}.lora_A.weight"]
    if start is not None and (len(start[0]), start[1].shape[1]) == (len(B), A.shape[1]):  # else the model is another
        B, A = torch.cat([B, -factor * start[0].to(B.dtype)], 1), torch.cat([A, start[1].to(A.dtype)])
    return decompose(B, A)


@torch.no_grad()
def fill(parameters: tuple[Tensor, Tensor, Tensor], triplet: tuple[Tensor, Tensor, Tensor]) -> None:
    """Copy Q, lambda and P of a matrix from stored P, lambda and Q."""
    Q, singular, P = parameters
    for target, value in ((P, triplet[0]), (singular, triplet[1][:, None]), (Q, triplet[2])):
        target.copy_(value)
