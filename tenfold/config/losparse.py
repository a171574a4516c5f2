"""LoSparse: weights as low rank plus whole rows, within a budget of what is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from tenfold.config.adalora import Beta, StepSpan
from tenfold.config.base import Config
from tenfold.config.budget import Budget, WeightBudget, parse_budget
from tenfold.config.shape import Shape
from tenfold.config.stage import ArtefactKind, RowsRead, check_kind
from tenfold.config.training import TextTrainingFields
from tenfold.errors import ConfigError


class LoSparsePaper(Config):
    """How rows are pruned on a schedule, for ``pruning: schedule`` and ``gates``."""

    low_rank: Annotated[float, Field(ge=0, lt=1)] | None = None
    r"""Share of each matrix that goes to its low-rank part, :math:`\rho`, the same for all; the rest of the
    budget is for rows. Default: ranks where they save most of the loss. The paper's runs: 0.05, and 0.35 for
    summaries."""
    tinit: StepSpan = 0.05
    """Steps before the first row is pruned, :math:`t_i`. The paper's runs: 3 to 10 % of the steps."""
    tfinal: StepSpan = 0.3
    """Steps at the end with the rows fixed, :math:`t_f`; 1 or more. The paper's runs: 25 to 50 % of the steps. Lengthen
    it where the loss still falls at the end."""
    interval: StepSpan = 0.005
    r"""Steps between two prunings, and in a window of the scores, :math:`\Delta_T`; at least 1."""
    beta: Beta = 0.85
    r"""Decay of the scores from window to window, :math:`\beta`."""


class LoSparseConfig(TextTrainingFields):
    """LoSparse (Li et al. 2023, arXiv 2306.11222): low rank for what neurons share, whole rows for what they do not.

    Without training, in minutes: a backward pass over texts of yours says how much each output of each matrix matters,
    and one budget buys ranks and rows wherever they save most of the loss. With ``steps``, ``epochs`` or ``tokens`` the
    compressed model is trained as well, which at less than about 80 % it needs.
    """

    verb = "compress"
    summary = "LoSparse: low rank plus whole rows; fewer weights and less arithmetic"
    verb_summary = "fewer weights and less arithmetic: low rank plus whole rows"
    examples = (
        "tenfold compress demo --data python-reference --budget 80% --out runs/small",
        "tenfold compress demo --data python-reference --budget 50% --tokens 20000 --distil 0.5 --out runs/smaller",
    )
    makes: ClassVar[Mapping[str, ArtefactKind]] = {"model": "model"}
    run = "tenfold.compress.losparse.stage:run_losparse"
    fits = "tenfold.compress.losparse.checks:check_asked"

    budget: WeightBudget = "80%"
    """What the replaced matrices may hold when all is done: a share of their numbers (``50%``), a count (``60M``), or
    bytes (``120MiB``, biases and indices included). Never exceeded. The report says what that is of the whole model.
    Lower it for a smaller and faster model, raise it where the perplexity suffers."""
    targets: tuple[str, ...] = ("all-linear",)
    """Matrices that are replaced: roles (``q k v o qkv gate up down gate_up fc1 fc2``), groups (``attention mlp
    all-linear``), suffixes of module names, or regular expressions that match whole names. Name fewer to spare parts
    of the model, such as ``mlp``, where small matrices gain no speed."""
    calibration: Annotated[int, Field(ge=128)] = 16384
    """Tokens of the data that say which directions and rows matter. Raise it for wide models, which have more
    directions than so many tokens show; time grows in proportion."""
    own_text: Annotated[float, Field(ge=0, le=0.9)] = 0.5
    """Share of these tokens that the model writes itself, by its own distribution from random beginnings, so that it
    does not forget what your texts do not show (not in the paper). Lower it where only texts like yours matter, raise
    it where your texts are few and the model is for much else."""
    refit: bool = True
    """Fit each matrix to what the compressed layers before it really give it, where held-out tokens show that this
    helps (not in the paper). Turn it off to save half of the time."""
    elastic: bool = False
    """Also keep what rows are made of without them, so that the folder opens with fewer rows as well (not in the
    paper). It costs ``rank`` numbers a row, of the same budget."""
    layout: Literal["fast", "small"] = "fast"
    """Whether speed or memory counts where the model runs; the files are as small either way. ``fast``: each matrix
    computes in the form that was measured to be best, and none is more than 5 % slower than before; one that saves too
    little for that is in memory as a whole as well. ``small``: nothing but what the files hold."""
    pruning: Literal["oneshot", "schedule", "gates"] = "oneshot"
    """How the rows that stay are chosen. ``oneshot``: by the backward pass, before any training. ``schedule``: while
    training, which starts with all rows and prunes them by sensitivity (the paper); it needs four times the memory of
    the weights. ``gates``: while training, with the rows themselves frozen, for models that do not fit full
    fine-tuning (not in the paper)."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps of the training; give this, ``epochs`` or ``tokens``. Default: no training."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training rows; for data that is small."""
    tokens: Annotated[int, Field(ge=1)] | None = None
    """Training tokens, rounded up to whole steps; to compare at the same amount of text."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate of AdamW. The paper's runs: 5e-5 to 9e-5. Lower it where the loss jumps, raise it where the
    loss hardly falls."""
    distil: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the loss, from 0 to 1, that is the distance to what the model was before; the rest is the loss on the
    text. It needs a copy of the weights. Turn it up where the compressed model is to stay like the old one on texts
    beyond yours."""
    paper: LoSparsePaper = LoSparsePaper()
    """When and how rows are pruned while training. Turn it to repeat the paper."""

    @property
    def trains(self) -> bool:
        """Whether a training follows, or chooses the rows."""
        return self.steps is not None or self.epochs is not None or self.tokens is not None

    @property
    def allowed(self) -> Budget:
        """``budget``, read."""
        return parse_budget(self.budget)

    def needs_matrices(self, shape: Shape) -> bool:
        """Targets may match nothing, low-rank parts of a given share be too large, and a budget buy nothing."""
        allowed, usual = self.allowed, type(self).model_fields["targets"].default
        small = allowed.unit != "share" or allowed.amount < 0.05
        return small or self.targets != usual or self.paper.low_rank is not None

    def check(self, rows: RowsRead | None) -> None:
        """Rows to look at and, if asked for, to learn from."""
        check_kind(rows, self.reads, "compressing")
        super().check(rows)

    def applied_to(self, shape: Shape) -> Shape:
        """Whole weights, which later stages cannot have compressed again."""
        if shape.compressed:
            raise ConfigError(
                f"{shape.name} is compressed already",
                remedy="start from the model before that, with a smaller budget; or export it as dense",
            )
        shape.check_mergeable()
        shape.check_positions("max_length", self.max_length)
        return replace(shape, adapted=False, compressed=True)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.allowed.amount <= 0:
            raise ValueError(f"budget: {self.budget} buys nothing: write 50%, 60M or 120MiB")
        if self.pruning != "oneshot" and not self.trains:
            raise ValueError(f"pruning: {self.pruning} chooses rows while training: give steps, epochs or tokens")
        if self.paper.low_rank is not None and self.pruning == "oneshot":
            raise ValueError("paper.low_rank: without training the budget itself chooses ranks; say pruning: schedule")
        if self.distil and not self.trains:
            raise ValueError("distil: needs a training: give steps, epochs or tokens")
        return self
