"""Exact export as plain LoRA, for everything that reads PEFT's adapter folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from tenfold.adapt.adalora.attaching import Matrix
from tenfold.adapt.adalora.layer import ADAPTER
from tenfold.adapt.adalora.mathematics import decompose, fold
from tenfold.adapt.adalora.plan import RankPlan
from tenfold.core.importance import allocate
from tenfold.errors import ConfigError, RunError
from tenfold.models.folders import write_folder
from tenfold.models.gguf import source_of
from tenfold.models.source import REFERENCE

RankLayout = Literal["padded", "compact"]
Order = Literal["score", "singular_value"]
PREFIX = "base_model.model."


def export(
    model: PeftModel,
    matrices: Mapping[str, Matrix],
    masks: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    scale: float,
    folder: Path,
    *,
    layout: RankLayout = "padded",
    order: Order | None = None,
    triplets: int | None = None,
    base: str | None = None,
) -> Path:
    r"""Write the adapter as plain LoRA with a scale of exactly 1: :math:`B'=\frac{\alpha}{r_0}P\Lambda`, :math:`A'=Q`.

    ``padded`` fills every matrix with zeros to the highest rank and needs no patterns, which every reader gets right.
    ``compact`` keeps true ranks with identical ``rank_pattern`` and ``alpha_pattern``; llama.cpp reads it wrongly.
    An adapter named ``ref`` (the policy that DPO started from, as TRL keeps it) goes into the subfolder ``ref``.
    Matrices that keep no triplet are left out. Triplets are in ``order``, so that the first columns of B and rows of A
    are an adapter of any smaller rank.

    Args:
        model: PEFT's model.
        matrices: by name.
        masks: what is kept, for each matrix ``bool[rank]``.
        scores: for each matrix ``[rank]``; empty where nothing was scored.
        scale: :math:`\alpha/r_0`.
        folder: written whole or not at all; replaced if tenfold wrote it, refused if it holds anything else.
        layout: as above.
        order: by ``score``, or by exact ``singular_value`` of each update. Default: score where there are scores.
        triplets: export only this many, the best of all matrices together in the order asked for.
        base: where the model came from. Default: what PEFT noted, a converted GGUF by its source.

    Returns:
        The folder.

    Raises:
        RunError: when no triplet is left, or scores are asked for that are not there.
        ConfigError: ``triplets`` below 1.
    """
    if order == "score" and not scores:
        raise RunError("no scores: nothing was allocated yet", remedy="train first, or export by singular_value")
    found, worth = _sorted(matrices, masks, scores, scale, order or ("score" if scores else "singular_value"))
    if triplets is not None:
        if triplets < 1:
            raise ConfigError(f"triplets: {triplets} is below 1")
        counts = {name: int(mask.sum()) for name, mask in allocate(worth, triplets).masks.items()}
        found = {name: (B[:, : counts[name]], A[: counts[name]]) for name, (B, A) in found.items()}
    found = {name: (B, A) for name, (B, A) in found.items() if A.shape[0] > 0}
    if not found:
        raise RunError("no triplet is left in any matrix", remedy="train first, or raise the budget")
    ranks = {name: A.shape[0] for name, (_, A) in found.items()}
    highest = max(ranks.values())
    config = _plain_config(model, found, matrices, highest, base)
    if layout == "compact":
        patterns = {name: rank for name, rank in ranks.items() if rank != highest}
        config.rank_pattern, config.alpha_pattern = patterns, dict(patterns)
    tensors = {key: value for key, value in get_peft_model_state_dict(model).items() if ".lora_" not in key}
    tensors |= _padded(found, highest if layout == "padded" else 0)
    reference = _reference(model, matrices)
    with write_folder(folder, "adapter") as partial:
        _write(partial, config, tensors)
        if reference:
            rank = max(A.shape[0] for _, A in reference.values())
            _write(partial / REFERENCE, _plain_config(model, reference, matrices, rank, base), _padded(reference, rank))
    return folder


@torch.no_grad()
def affordable(
    matrices: Mapping[str, Matrix], kept: Mapping[str, Tensor], scores: Mapping[str, Tensor], plan: RankPlan
) -> dict[str, Tensor]:
    """What of the kept triplets an export writes: all that the budget pays for, the best of the others.

    They are more where training ended before the final phase (early stopping), where the weights of an earlier
    checkpoint were loaded back, and where an opened adapter was not trained.

    Args:
        matrices: by name.
        kept: for each matrix ``bool[rank]``.
        scores: for each matrix ``[rank]``; where empty, triplets rank by the norm of what they add to the weight.
        plan: budget, costs, floors and caps.

    Returns:
        For each matrix ``bool[rank]``.
    """
    costs = plan.unit_costs
    if sum(int(mask.sum()) * costs[name] for name, mask in kept.items()) <= plan.end:
        return dict(kept)
    worth = dict(scores) or {
        name: m.singular.detach().abs().flatten() * m.P.detach().norm(dim=0) * m.Q.detach().norm(dim=1)
        for name, m in matrices.items()
    }
    kept = {name: mask.to(worth[name].device) for name, mask in kept.items()}
    return allocate(worth, plan.end, costs, plan.floor, plan.cap, previous=kept).masks


@torch.no_grad()
def _sorted(
    matrices: Mapping[str, Matrix],
    masks: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    scale: float,
    order: Order,
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """B, A and the worth of each kept triplet of each matrix, best first, in float32."""
    found, worth = {}, {}
    for name, matrix in matrices.items():
        index = masks[name].to(matrix.singular.device).nonzero().flatten()
        P, Q = matrix.P.detach()[:, index].float(), matrix.Q.detach()[index].float()
        B, A = fold(P, matrix.singular.detach()[index].float(), Q, scale)
        if order == "score":
            value = scores[name].to(index.device)[index]
            best = value.sort(descending=True, stable=True).indices
            found[name], worth[name] = (B[:, best], A[best]), value[best]
        else:
            left, values, right = decompose(B, A)
            found[name], worth[name] = (left * values, right), values
    return found, worth


def _plain_config(
    model: PeftModel, found: Mapping[str, object], matrices: Mapping[str, Matrix], rank: int, base: str | None
) -> PeftLoraConfig:
    live = model.peft_config[ADAPTER]
    noted = live.base_model_name_or_path
    return PeftLoraConfig(
        task_type=live.task_type,
        base_model_name_or_path=base or (source_of(noted) if noted else None) or noted,
        inference_mode=True,
        r=rank,
        lora_alpha=rank,
        lora_dropout=live.lora_dropout,
        target_modules=list(found),
        fan_in_fan_out=matrices[next(iter(found))].slot.layout == "conv1d",
        modules_to_save=live.modules_to_save,
        bias=live.bias,
        trainable_token_indices=live.trainable_token_indices,
    )


def _padded(found: Mapping[str, tuple[Tensor, Tensor]], rank: int) -> dict[str, Tensor]:
    """Tensors under PEFT's names, filled up with zeros to a rank."""
    tensors = {}
    for name, (B, A) in found.items():
        missing = max(0, rank - A.shape[0])
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.nn.functional.pad(B, (0, missing))
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.nn.functional.pad(A, (0, 0, 0, missing))
    return tensors


@torch.no_grad()
def _reference(model: PeftModel, matrices: Mapping[str, Matrix]) -> dict[str, tuple[Tensor, Tensor]]:
    """B and A of each matrix of the adapter that DPO started from; empty where that changes nothing of the base."""
    if REFERENCE not in model.peft_config:
        return {}
    found = {}
    for name, matrix in matrices.items():
        A, B = matrix.layer.lora_A[REFERENCE].weight, matrix.layer.lora_B[REFERENCE].weight
        found[name] = (B.float() * matrix.layer.scaling[REFERENCE], A.float())
    return found if any(bool(B.any()) for B, _ in found.values()) else {}


def _write(folder: Path, config: PeftLoraConfig, tensors: Mapping[str, Tensor]) -> None:
    config.save_pretrained(str(folder))
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    save_file(plain, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
