"""What is asked of a compression without training, looked at before anything is read, written or measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.compress.losparse.calibration import weight_of
from tenfold.compress.losparse.factors import stored
from tenfold.compress.losparse.layer import LowRankRowsLinear, replaceable
from tenfold.compress.losparse.mathematics import rank_for
from tenfold.compress.losparse.plan import RankAndRows, check_buys, choices_of
from tenfold.config.budget import Budget
from tenfold.config.losparse import LoSparseConfig
from tenfold.errors import ConfigError, DataError, ModelError
from tenfold.models.layer_map import layer_map
from tenfold.models.quantised import refuse_quantised
from tenfold.models.simulated import refuse_simulated

PLACE_BYTES = 4
"""Of each row of a compressed matrix, for its place."""

Price = Callable[[str, RankAndRows], float]


def check_asked(model: Any, config: LoSparseConfig, tokenizer: Callable[[], Any] | None = None) -> None:
    """Refuse what a configuration asks of a model that its matrices, by name and size, do not have.

    Args:
        model: with weights or without any, on the meta device.
        config: of the stage.
        tokenizer: not asked for.

    Raises:
        ConfigError: targets that match nothing, a budget that buys nothing, or low-rank parts that are above it.
        ModelError: a model that is compressed already, packed, or has adapters.

    >>> from tenfold.models.tiny import tiny_model
    >>> check_asked(tiny_model("llama").model, LoSparseConfig())
    >>> try:
    ...     check_asked(tiny_model("llama").model, LoSparseConfig(budget="1"))
    ... except ConfigError as error:
    ...     print(error.remedy)
    give 64 or more (0.087%)
    """
    names, _ = matrices_of(model, config.targets)
    budget = check_budget(model, names, config.allowed, elastic=config.elastic)
    if (share := config.paper.low_rank) is not None:
        price = price_of(model, config.allowed, elastic=config.elastic)
        shapes = {name: weight_of(model.get_submodule(name)).shape for name in names}
        taken = sum(price(name, RankAndRows(rank_for(share, *shape), 0)) for name, shape in shapes.items())
        if taken > budget:
            raise low_rank_error(share, taken, budget)


def low_rank_error(share: float, taken: float, budget: float) -> ConfigError:
    """Why low-rank parts of a share that the user chose cannot be, in the unit of the budget."""
    return ConfigError(
        f"paper.low_rank: low-rank parts of {share:g} of each matrix hold {taken:,.0f}, above the budget of "
        f"{budget:,.0f}",
        remedy="lower paper.low_rank, which leaves something for rows, or raise budget",
    )


def matrices_of(model: Any, targets: Sequence[str]) -> tuple[list[str], list[str]]:
    """The matrices that targets name and that can be replaced, in model order; and what is left out, with reasons.

    Raises:
        ConfigError: targets that match nothing that can be replaced.
        ModelError: a model that is compressed already, packed, or has adapters.
    """
    refuse_quantised(model, "compress", "open the model in its original precision (leave load out)")
    refuse_simulated(model, "compress", "take the plan back first (fpx.remove), and plan the compressed model")
    if hasattr(model, "peft_config"):
        raise ModelError("the model has an adapter", remedy="merge it (merge_and_unload), and compress the result")
    if done := next((name for name, one in model.named_modules() if isinstance(one, LowRankRowsLinear)), ""):
        raise ModelError(
            f"{done}: this model is compressed already",
            remedy="start from the model before that, with a smaller budget; or make it dense (losparse.to_dense)",
        )
    found = layer_map(model)
    notes = list(found.left_out(targets))
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(weight := module._parameters.get("weight"), nn.Parameter):
            owners.setdefault(id(weight), []).append(name)
    names: list[str] = []
    others: dict[str, list[str]] = {}
    for slot in found.select(targets):
        module = model.get_submodule(slot.name)
        twins = owners.get(id(module._parameters.get("weight")), [])
        if not replaceable(module):
            others.setdefault(type(module).__name__, []).append(slot.name)
        elif len(twins) > 1:
            other = next(name for name in twins if name != slot.name)
            notes.append(f"{slot.name}: shares its weight with {other}, so it stays as it is")
        else:
            names.append(slot.name)
    for kind, left in others.items():
        more = f" and {len(left) - 1} more" if left[1:] else ""
        notes.append(f"matrices of the kind {kind} stay as they are: {left[0]}{more}")
    if not names:
        raise ConfigError("targets: nothing that can be replaced: " + "; ".join(notes), "name other matrices")
    return names, notes


def price_of(model: nn.Module, budget: Budget, *, elastic: bool) -> Price:
    """What a choice costs of a matrix by its name, in the unit of a budget: numbers, or bytes."""
    price = matrix_bytes if budget.unit == "bytes" else _numbers
    return lambda name, choice: price(model.get_submodule(name), choice, elastic=elastic)


def matrix_bytes(module: Any, choice: RankAndRows, *, elastic: bool = False) -> int:
    """What is stored of a matrix, its bias and the places of its rows included."""
    out = len(weight_of(module))
    size: int = module.weight.element_size()
    numbers = _numbers(module, choice, elastic=elastic) + (out if module.bias is not None else 0)
    return numbers * size + (PLACE_BYTES * out if choice.kept < out else 0)


def _numbers(module: Any, choice: RankAndRows, *, elastic: bool) -> int:
    out, inner = weight_of(module).shape
    return stored(out, inner, *choice, elastic=elastic)


def check_budget(model: nn.Module, names: Sequence[str], budget: Budget, *, elastic: bool = False) -> float:
    """What a budget allows for matrices, in numbers or, where it is given in them, in bytes.

    Raises:
        ConfigError: no budget of weights, or one that buys nothing of any matrix.
    """
    if not isinstance(budget, Budget) or budget.unit not in ("share", "count", "bytes"):
        raise ConfigError(
            f"budget: must be a share, a count or bytes, got {budget!r}",
            remedy='give Budget(0.5, "share"), or parse_budget("50%") of tenfold.config.budget',
        )
    if budget.unit == "share" and not 0 < budget.amount <= 1:
        raise ConfigError(f"budget: a share must be above 0 and at most 1, got {budget.amount:g}", "give 0.5, say")
    price = price_of(model, budget, elastic=elastic)
    costs: dict[str, Tensor] = {}
    dense = 0
    for name in names:
        out, inner = weight_of(model.get_submodule(name)).shape
        choices = choices_of(out, inner, elastic=elastic)
        costs[name] = torch.tensor([price(name, choice) for choice in choices], dtype=torch.float64)
        dense += out * inner
    allowed = budget.amount * (dense if budget.unit == "share" else 1)
    check_buys(costs, allowed)
    return allowed


def check_passages(model: Any, passages: Sequence[Tensor]) -> None:
    """Refuse passages that the model cannot read, before it does.

    Raises:
        DataError: none, or one that is not a tensor of token ids of this model, ``[tokens]``; names the first.
    """
    if len(passages) == 0:
        raise DataError("no passage to calibrate on", remedy="give texts")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for index, ids in enumerate(passages):
        if not isinstance(ids, Tensor) or ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
            kind = f"{ids.dtype} of {list(ids.shape)}" if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
            raise DataError(
                f"passage {index}: must be a tensor of token ids, [tokens], got {kind}",
                remedy="give tokenizer(text, return_tensors='pt').input_ids[0]",
            )
        if len(ids) == 0:
            raise DataError(f"passage {index}: holds no token", remedy="leave it out")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocabulary:
            raise DataError(
                f"passage {index}: token {low if low < 0 else high} is not in the vocabulary of {vocabulary}",
                remedy="take the tokenizer of this model",
            )
