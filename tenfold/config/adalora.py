"""AdaLoRA: one budget of rank for the whole model, moved to the matrices that use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from tenfold.config.base import Config
from tenfold.config.budget import WeightBudget, adapter_budget, parse_budget
from tenfold.config.shape import Shape
from tenfold.config.stage import ArtefactKind
from tenfold.config.training import TextTrainingFields


def _check_span(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ValueError("give steps (an integer, 0 or more) or a share of all steps (below 1)")
    if isinstance(value, float) and value >= 1:
        raise ValueError(f"a share of the steps is below 1; for steps write the integer {int(value)}")
    return value


StepSpan = Annotated[int | float, BeforeValidator(_check_span)]
"""A number of optimizer steps: an integer counts them, a float below 1 is a share of all."""

Beta = Annotated[float, Field(gt=0, lt=1)]


class AdaLoraPaper(Config):
    """What the paper and its published code do another way than the default; no measurement favours it."""

    init: Literal["lora", "normal", "orthonormal"] = "lora"
    """How P, lambda and Q start; the model is unchanged under each. ``lora``: 0, 1 and as LoRA's A, so that training
    begins as LoRA's does and its learning rates serve (not in the paper). ``normal``: lambda is 0, and P and Q are
    normal with standard deviation 0.02 (the published code); short runs then want ten times the rate. ``orthonormal``:
    lambda is 0, and the penalty starts at zero at every width."""
    orthogonality: Literal["mean_norm", "sum_squared"] = "mean_norm"
    """``mean_norm``: the mean of un-squared norms, which the published code minimises and every published gamma was
    tuned for. ``sum_squared``: the sum of squared norms, which the paper prints (section 3.1); turn it
    to repeat that."""
    sensitivity_at: Literal["after", "before"] = "after"
    """Weights from after the optimizer step (the published code) or from before it (algorithm 1); turn it to repeat
    that."""


class AdaLoraConfig(TextTrainingFields):
    """AdaLoRA (Zhang et al. 2023, arXiv 2303.10512).

    The update of a matrix is ``alpha / initial_rank * P @ diag(lambda) @ Q``. Training starts above the budget and
    takes singular triplets (a column of P, a lambda, a row of Q) away from matrices that do not use them. Sections
    below are the paper's.
    """

    verb = "adapt"
    summary = "AdaLoRA: a parameter budget that goes to the matrices that use it"
    verb_summary = "fine-tune within a parameter budget"
    examples = (
        "tenfold adapt demo --method adalora --data python-reference --budget 0.4% --tokens 24000",
        "tenfold adapt Qwen/Qwen3-0.6B --data my.jsonl --rank 8 --targets attention --out runs/mine",
    )
    makes: ClassVar[Mapping[str, ArtefactKind]] = {"adapter": "adapter"}
    run = "tenfold.adapt.adalora.stage:run_adalora"
    attach = "tenfold.adapt.adalora.stage:attach_adalora"

    budget: WeightBudget | None = None
    """Trainable parameters left at the end: a share of all parameters of the model (``0.4%``), a count (``300k``), or
    bytes of the exported adapter in fp32 (``2MiB``). A triplet costs ``in_features + out_features``. Never exceeded.
    Raise it where the loss stays high."""
    rank: Annotated[float, Field(gt=0)] | None = None
    """Mean rank left at the end, :math:`b^{(T)}/n` (section 3.3); give this or ``budget``. Default: 8. To compare with
    LoRA of that rank."""
    initial_rank: Annotated[int, Field(ge=1)] | None = None
    """Rank of every matrix at the start, :math:`b^{(0)}/n`. Default: 1.5 times the final mean rank, rounded up, as in
    the paper's runs. Raise it to let more triplets compete, at their cost in memory."""
    min_rank: Annotated[int, Field(ge=0)] = 0
    """Rank that no matrix falls below, for adapters that must touch every layer (not in the paper)."""
    max_rank: Annotated[int, Field(ge=1)] | None = None
    """Rank that no matrix exceeds once shrinking begins. Default: ``initial_rank``, as in the paper;
    lower it to spread the budget."""
    allocate_by: Literal["count", "parameters"] | None = None
    """What the budget counts: triplets, ranked by score (the paper), or parameters, ranked by score per parameter.
    Default: ``count`` with ``rank``; with ``budget`` always ``parameters``, or it could be exceeded. Turn it to
    compare the two."""
    tinit: StepSpan = 0.1
    """Steps at the initial budget, :math:`t_i`. The paper's runs: 4 to 18 % of the steps. Lengthen it where the scores
    of short runs have not settled."""
    tfinal: StepSpan = 0.5
    """Steps at the final budget with the mask fixed, :math:`t_f`; 1 or more. The paper's runs: 44 to 63 % of the steps.
    Shorten it where the loss has settled long before the end."""
    interval: StepSpan = 0.005
    r"""Steps between two allocations while shrinking, :math:`\Delta_T`; at least 1. The paper's runs: 1 to 100 steps.
    Raise it where allocations take time that counts."""
    beta1: Beta = 0.85
    r"""Decay of the sensitivity, :math:`\beta_1` (section 3.2; the paper's runs: 0.85). Raise it for small, noisy
    batches."""
    beta2: Beta | None = 0.85
    r"""Decay of the uncertainty, :math:`\beta_2` (section 3.2; the paper's runs: 0.85). ``null``: rank by sensitivity
    alone, which very large batches need, because the uncertainty of a noiseless gradient tends to zero."""
    gamma: Annotated[float, Field(ge=0)] = 0.1
    r"""Weight of the orthogonality penalty, :math:`\gamma` (section 3.1; the paper's runs: 0.1, 0.3 or 0.5). Raise it
    where triplets of one matrix grow alike; 0 is off."""
    importance: Literal["full", "light"] = "full"
    """``full``: score all entries of a triplet (section 3.2). ``light``: score lambda alone, at a fraction of the time
    and memory; it keeps nearly the same triplets. Turn it to ``light`` for large models and small batches, where
    scoring is a part of the step that counts."""
    shrink: bool = True
    """Really remove the dropped triplets, and what the optimizer remembers of them, once the mask is fixed.
    Turn it off to keep shapes fixed, as compiled or sharded training wants."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale of the update before division by ``initial_rank``. Default: twice ``initial_rank``. Turn ``learning_rate``
    first: both move the weights faster."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs that is dropped while it trains; for few rows and many passes."""
    targets: tuple[str, ...] = ("all-linear",)
    """Roles (``q k v o qkv gate up down gate_up fc1 fc2``), groups (``attention mlp mixer all-linear``), suffixes of
    module names, or regular expressions that match whole names; each must match something. The paper: every linear
    layer. Name fewer to keep the budget to parts of the model."""

    paper: AdaLoraPaper = AdaLoraPaper()
    """How factors start, and which of two forms the penalty and the sensitivity have. Turn it to repeat the paper."""

    def applied_to(self, shape: Shape) -> Shape:
        """An adapter more."""
        shape = super().applied_to(shape)
        for rank in (self.rank, self.initial_rank, self.min_rank):
            shape.check_rank(rank or 0)
        return replace(shape, adapted=True)

    def needs_matrices(self, shape: Shape) -> bool:
        """Targets may match nothing, and a budget may buy no triplet or more than the matrices hold."""
        if self.targets != type(self).model_fields["targets"].default or self.min_rank or self.max_rank:
            return True
        width, rows = shape.hidden or 0, shape.vocabulary or 0
        if self.budget is None:
            return (self.rank or 0) > width / 8
        # A triplet of the attention costs at most twice the width, and a model has more parameters than its embedding;
        # a wide one has matrices that hold a fiftieth of it many times over.
        budget = parse_budget(self.budget)
        fits = budget.unit == "share" and 2 / max(rows, 1) <= budget.amount <= 0.02 and width >= 256
        return self.initial_rank is not None or not fits

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.rank is not None and self.budget is not None:
            raise ValueError("rank and budget both set the size of the adapter; give one")
        if self.budget is not None:
            adapter_budget(self.budget)
            if self.allocate_by == "count":
                raise ValueError(
                    "allocate_by: count cannot keep a budget, because triplets of different matrices cost different "
                    "numbers of parameters; leave it out, or give rank"
                )
        if self.rank is not None and self.initial_rank is not None and self.rank > self.initial_rank:
            raise ValueError(f"rank: {self.rank:g} at the end is above initial_rank {self.initial_rank}")
        if self.rank is not None and self.min_rank > self.rank:
            raise ValueError(f"min_rank: {self.min_rank} for every matrix is above the mean rank {self.rank:g}")
        if self.max_rank is not None and self.max_rank < max(self.min_rank, self.rank or 0):
            raise ValueError(
                f"max_rank: {self.max_rank} is below min_rank {self.min_rank} or the mean rank {self.rank}"
            )
        if self.tfinal == 0:
            raise ValueError(
                "tfinal: 0 would end training above the budget; give 1 step or more, or a share such as 0.5"
            )
        if isinstance(self.tinit, float) and isinstance(self.tfinal, float) and self.tinit + self.tfinal >= 1:
            raise ValueError(
                f"tinit {self.tinit:g} and tfinal {self.tfinal:g} leave no steps to shrink in; keep the sum below 1"
            )
        return self
