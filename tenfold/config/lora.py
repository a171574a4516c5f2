"""LoRA: one rank for every matrix. PEFT's implementation, kept as the baseline of what follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from tenfold.config.budget import WeightBudget, adapter_budget
from tenfold.config.shape import Shape
from tenfold.config.stage import ArtefactKind
from tenfold.config.training import TextTrainingFields


class LoraConfig(TextTrainingFields):
    """LoRA through PEFT (Hu et al. 2021, arXiv 2106.09685).

    The update of a matrix is ``alpha / rank * B @ A``.
    """

    verb = "adapt"
    summary = "LoRA through PEFT: one rank for every matrix, the baseline"
    examples = ("tenfold adapt demo --method lora --data python-reference --rank 8",)
    makes: ClassVar[Mapping[str, ArtefactKind]] = {"adapter": "adapter"}
    run = "tenfold.adapt.lora.stage:run_lora"
    attach = "tenfold.adapt.lora:attach"

    rank: Annotated[int, Field(ge=1)] | None = None
    """Rank of every adapted matrix; give this or ``budget``. Default: 8. Raise it where the training loss stays
    high."""
    budget: WeightBudget | None = None
    """Trainable parameters: a share of all parameters of the model (``0.4%``), a count (``300k``), or bytes of the
    adapter in fp32 (``2MiB``). The largest rank that fits is taken. Give it to compare methods at one size."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale of the update before division by the rank. Default: twice the rank. Turn ``learning_rate`` first: both move
    the weights faster."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs that is dropped while it trains; for few rows and many passes."""
    targets: tuple[str, ...] = ("all-linear",)
    """Roles (``q k v o qkv gate up down gate_up fc1 fc2``), groups (``attention mlp mixer all-linear``), suffixes of
    module names, or regular expressions that match whole names; each must match something. Name fewer for a smaller
    adapter."""

    def applied_to(self, shape: Shape) -> Shape:
        """An adapter more."""
        shape = super().applied_to(shape)
        shape.check_rank(self.rank or 0)
        return replace(shape, adapted=True)

    def needs_matrices(self, shape: Shape) -> bool:
        """Targets may match nothing, and a budget may buy no rank."""
        return self.budget is not None or self.targets != type(self).model_fields["targets"].default

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.rank is not None and self.budget is not None:
            raise ValueError("rank and budget both set the size of the adapter; give one")
        if self.budget is not None:
            adapter_budget(self.budget)
        return self
