"""What is asked of a plan for a file, looked at before anything is read or measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tenfold.compress.fpx.plan import Plan, too_small
from tenfold.compress.fpx.units import stored_tensors, units_of
from tenfold.config.budget import parse_budget
from tenfold.config.fpx import FpxConfig
from tenfold.errors import ConfigError, MissingDependencyError
from tenfold.models.gguf_types import BLOCK_TYPES, gguf_format
from tenfold.models.gguf_write import gguf_sizes

PALETTE = ("q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "iq4_nl", "q3_k", "q2_k")
"""Types that llama.cpp has fast code for on most devices."""


def writable_palette() -> tuple[str, ...]:
    """Types of files that can be written here."""
    try:
        gguf_format("q4_k").weight(torch.zeros(1, 256))
    except MissingDependencyError:
        return BLOCK_TYPES
    return PALETTE


def refuse_unplannable(model: Any, config: FpxConfig, tokenizer: Callable[[], Any]) -> None:
    """Refuse what no file of this model can be.

    Args:
        model: with weights or without any, on the meta device.
        config: of the stage.
        tokenizer: gives that of the model.

    Raises:
        ConfigError: a budget below the smallest file (names it), or the plan of another model.
        DataError: a plan that is missing or cannot be read.
        ModelError: an architecture, a layer or a tokenizer that GGUF has no place for; names it.

    >>> from tenfold.models.tiny import tiny_model
    >>> opened = tiny_model("llama")
    >>> try:
    ...     refuse_unplannable(opened.model, FpxConfig(budget="1bits", palette=("q4_0",)), lambda: opened.tokenizer)
    ... except ConfigError as error:
    ...     print(error.problem)
    budget: 1bits is 13,448 bytes, and the smallest plan of q4_0 takes 67,840
    """
    if config.plan is not None and config.plan.startswith("${"):  # an earlier stage makes it, with formats of its own
        gguf_sizes(model, "f16", tokenizer())
        return
    known = known_plan(model, config.plan)
    palette = known.palette if known else config.palette or writable_palette()
    least = smallest_file(model, tokenizer(), palette)
    numbers = sum(tensor.numel() for _, tensor in stored_tensors(model))
    budget = parse_budget(config.budget)
    allowed = math.floor(budget.amount * (numbers / 8 if budget.unit == "bits" else 1) + 1e-9)
    if allowed < least:
        raise too_small(config.budget, allowed, least, numbers, palette)


def smallest_file(model: Any, tokenizer: Any, palette: Sequence[str]) -> int:
    """Bytes of the file in which each matrix has the smallest type of a palette.

    Args:
        model: as `refuse_unplannable`.
        tokenizer: of the model.
        palette: of GGUF types.

    Raises:
        ConfigError, ModelError: as `tenfold.models.gguf_write.gguf_sizes`.
    """
    each = [{one.module: one for one in gguf_sizes(model, name).tensors if one.module} for name in palette]
    types = {module: min((sizes[module] for sizes in each), key=lambda size: size.bytes).asked for module in each[0]}
    return gguf_sizes(model, types, tokenizer).total


def known_plan(model: Any, path: str | None) -> Plan | None:
    """The plan of an earlier run on a model of this shape; None without one.

    Raises:
        ConfigError: of another model, or of formats that are not those of GGUF.
        DataError: missing or unreadable.
    """
    if path is None:
        return None
    plan = Plan.load(path)
    if plan.codec != "gguf":
        formats = " and ".join(plan.palette)
        raise ConfigError(
            f"plan: {path} is of {formats}, which GGUF files do not have", remedy="give one that codec='gguf' made"
        )
    kind = model.config.get_text_config().model_type
    planned, there = (
        {weight.name: (weight.out, weight.inner) for unit in units for weight in unit.weights}
        for units in (plan.units, units_of(model))
    )
    if plan.model != kind or planned != there:
        raise ConfigError(
            f"plan: {path} is of a {plan.model} model with other matrices than this {kind} model has",
            remedy="give the plan of an earlier run on this very model, or leave plan out",
        )
    return plan
