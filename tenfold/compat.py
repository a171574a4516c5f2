"""The only place that looks at what versions of other libraries have and lack."""

from __future__ import annotations

import warnings
from typing import Any

UPSTREAM_WARNINGS = (
    # peft 0.21.2 reads a property that transformers 5.23 renamed (2026-11): nobody who sees it can mend it.
    (FutureWarning, r"`is_gradient_checkpointing` is deprecated"),
    # trl 1.16 gives an argument a value of its own under the name that transformers 5.23 gave up (2026-11).
    (FutureWarning, r"`gradient_checkpointing` is deprecated"),
)
"""Warnings that one library raises about another: category and the beginning of the message."""


def quiet_upstream() -> None:
    """Hide the warnings of `UPSTREAM_WARNINGS`; the command line calls it, importing the package changes nothing."""
    for category, message in UPSTREAM_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)


def enable_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass; the method was renamed in transformers 5.2x."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def activation_checkpointing(enabled: bool) -> dict[str, bool]:
    """The argument of transformers' TrainingArguments, renamed in 5.2x; none when it is off, which is the default."""
    if not enabled:
        return {}
    import dataclasses

    from transformers import TrainingArguments

    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    return {next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in names): True}


def captures(name: str) -> bool:
    """Whether the forward pass that runs now collects outputs of this name, such as ``attentions``.

    transformers 5.23 keeps that in a variable of its own; some models (GPT-2) tell their layers nothing of it.
    """
    import torch

    if torch.compiler.is_compiling():
        return False
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        return False
    return name in (_active_collector.get() or ())
