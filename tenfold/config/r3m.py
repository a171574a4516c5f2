"""R3M: how far to trust each preference label."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from tenfold.config.base import Config
from tenfold.config.budget import ShareBudget, parse_budget
from tenfold.config.data import DataFields
from tenfold.config.shape import Shape, Task
from tenfold.config.stage import ArtefactKind, Incidental, Needs, OtherRows, RowsRead, Takes, check_kind
from tenfold.config.training import TrainingFields
from tenfold.errors import ConfigError

_CAPPED = ("r3m", "trimmed")
_SMOOTHED = ("cdpo", "rdpo")
_DEFAULT_LAM = {"r3m": 0.75, "trimmed": 0.9}


class R3MPaper(Config):
    """What the losses that ``r3m`` is compared with take; no measurement favours any of it for ``r3m`` itself."""

    smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """Share of labels that are flipped, as ``cdpo`` and ``rdpo`` take it. Set it to what you think it is: ``rdpo`` with
    too large a share makes rewards grow without end."""
    lam_warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps, the first ones, in which every label is trusted, because margins mean nothing yet. For
    ``trimmed``, which wants a good start, these are steps of ``r3m`` with ``lam`` 0.1: give 0.5 there."""


class RobustFields(Config):
    """What a preference label that may be wrong can do (Bukharin et al. 2024, arXiv 2406.15568)."""

    loss: Literal["r3m", "bt", "cdpo", "rdpo", "trimmed"] = "r3m"
    """``r3m`` caps what one pair can pull; ``trimmed`` lets flagged pairs pull no more; ``bt`` trusts every label;
    ``cdpo`` and ``rdpo`` reckon with a share of flipped labels. Turn it to compare: ``bt`` first, which is right for
    clean labels."""
    lam: Annotated[float, Field(gt=0, le=1)] | None = None
    """Cap on the pull of one pair, which would be 1 at most: smaller is more robust, 1 is off. A pair is flagged where
    the model gives its label less than ``1 - lam``. Default: 0.75 (``trimmed``: 0.9), unless ``budget`` is given.
    Sensible: 0.5 to 0.95, less where many labels are wrong."""
    budget: ShareBudget | None = None
    """Instead of ``lam``: share of labels that may be wrong, such as ``10%``, where you can guess it. The cap then
    follows the margins, so that about this share of the pairs is flagged."""
    paper: R3MPaper = R3MPaper()
    """What the losses that are there for comparison take. Turn it to repeat their papers."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.lam is not None and self.budget is not None:
            raise ValueError("lam and budget both say how far a label is trusted; give one")
        if self.budget is not None:
            budget = parse_budget(self.budget)
            if budget.unit != "share" or not 0 < budget.amount <= 0.5:
                raise ValueError(f"budget: {self.budget} is not a share of wrong labels: write above 0% and up to 50%")
        # A resolved recipe spells defaults out, so what counts is whether a value is another one.
        idle: tuple[str, ...] = () if self.loss in _CAPPED else ("lam", "budget", "paper.lam_warmup")
        idle += () if self.loss in _SMOOTHED else ("paper.smoothing",)
        for key in idle:
            if attrgetter(key)(self) != attrgetter(key)(RobustFields.model_construct()):
                raise ValueError(f"{key}: the loss {self.loss} has no use for it: leave {key} out")
        return self

    @property
    def fixed_lam(self) -> float:
        """The cap after the warm-up where no budget moves it; 1 of a loss that has none.

        >>> RobustFields().fixed_lam, RobustFields(loss="trimmed").fixed_lam, RobustFields(loss="bt").fixed_lam
        (0.75, 0.9, 1.0)
        """
        if self.loss not in _CAPPED:
            return 1.0
        return _DEFAULT_LAM[self.loss] if self.lam is None else self.lam

    @property
    def share(self) -> float | None:
        """The budget as a number in (0, 0.5]; None where there is none.

        >>> RobustFields(budget="10%").share
        0.1
        """
        return None if self.budget is None else parse_budget(self.budget).amount


NOISES = {"uniform": "20%", "stochastic": "2", "myopic": "0.5", "irrational": "1/2"}
"""Noise models, and a strength of each."""


class Noise(NamedTuple):
    """A noise model and its strength: a share, tau, gamma or p."""

    kind: str
    strength: float


def parse_noise(text: str) -> Noise:
    """Read ``KIND:STRENGTH``.

    Raises:
        ValueError: saying which forms exist.

    >>> parse_noise("uniform:20%"), parse_noise("irrational:1/2")
    (Noise(kind='uniform', strength=0.2), Noise(kind='irrational', strength=0.5))
    """
    kind, _, strength = text.partition(":")
    above, slash, below = strength.removesuffix("%").partition("/")
    try:
        number = float(above) / (float(below) if slash else 1) / (100 if strength.endswith("%") else 1)
    except (ValueError, ZeroDivisionError):
        number = math.nan
    if kind not in NOISES or not 0 < number < math.inf:
        forms = ", ".join(f"{name}:{example}" for name, example in NOISES.items())
        raise ValueError(f"unknown noise {text!r}: write {forms}")
    if number > 1 and kind != "stochastic":
        raise ValueError(f"noise: {text!r} is too strong: {kind} goes up to 1, as in {kind}:{NOISES[kind]}")
    return Noise(kind, number)


class R3MConfig(RobustFields, TrainingFields):
    """Learn a reward, or a policy (DPO), from preferences of which some are wrong, and name the suspects.

    Rows are preferences: ``prompt``, ``chosen``, ``rejected``.
    """

    verb = "align"
    summary = "R3M: a reward or a policy from preferences of which some are wrong, and which those are"
    verb_summary = "learn a reward or a policy from preferences of which some are wrong"
    examples = (
        "tenfold align demo --target reward --data prefs.jsonl --budget 10% --out runs/reward",
        "tenfold align demo --target dpo --data prefs.jsonl --lam 0.75",
    )
    reads: ClassVar[tuple[str, ...]] = ("preference",)
    reads_columns: ClassVar[bool] = True  # true rewards and known flips
    needs: ClassVar[Needs] = Needs(task=("causal", "reward"))
    run = "tenfold.align.r3m.stage:run_r3m"

    target: Literal["reward", "dpo"] = "reward"
    """``reward``: a model with one score, to judge answers; ``dpo``: a policy that writes them, whose log-ratios are
    its rewards."""
    rank: Annotated[int, Field(ge=0)] = 8
    """Rank of the LoRA adapter that is trained; 0 trains all weights (``reward`` only). Raise it where the training
    loss stays high."""
    targets: tuple[str, ...] = ("all-linear",)
    """Adapted matrices, as in ``lora``; name fewer for a smaller adapter."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Reward per nat of log-ratio; ``dpo`` only. Lower it to let the policy go further from where it started. A pair is
    flagged where its log-ratio gap lies below kink / beta."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate of AdamW. Lower it where wrong labels are memorised or the loss jumps, raise it where the loss
    hardly falls."""
    noise: str | None = None
    """Flip training labels on purpose, to see whether they are found: ``uniform:20%``, ``stochastic:2``,
    ``myopic:0.5``, ``irrational:1/2``; all but the first need true rewards per step (``step-audit`` has them)."""
    folds: Annotated[int, Field(ge=0)] = 0
    """Judge each training pair by a model that has not seen it: so many further trainings, 2 or more. 0 judges by the
    trained model, which may have memorised wrong labels; turn it on (5, for one) where it has."""
    lams: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()
    """Instead of ``lam``: train with each of these caps, and keep the one whose model explains best the pairs that it
    has not seen, such as ``[1, 0.75, 0.5, 0.25]``. Without ``trusted`` a fifth of the training pairs judges, and their
    labels may be wrong; so many further trainings."""
    trusted: Annotated[str | None, Takes(("rows",))] = None
    """Pairs whose labels are known to be right, in a file or as ``data`` names them: they choose among ``lams``."""
    worst: Annotated[int, Field(ge=1)] = 12
    """Most doubtful pairs that the report shows; raise it to read more of them."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        self._choosable()
        if self.folds == 1:
            raise ValueError("folds: 1 leaves nothing to train on: give 0, or 2 or more")
        if self.target == "dpo" and self.rank == 0:
            raise ValueError(
                "rank: 0 trains all weights, and dpo compares with the weights it started from: give 1 or more"
            )
        if self.target == "reward" and self.beta != type(self).model_fields["beta"].default:
            raise ValueError("beta: a reward has none: leave it out")
        if self.noise is not None:
            parse_noise(self.noise)
        return self

    def artefacts(self) -> Mapping[str, ArtefactKind]:
        """An adapter or a model, the labels ranked by doubt, and what was trained on, noise included."""
        trained: ArtefactKind = "adapter" if self.rank else "model"
        return {trained: trained, "audit": "table", "training": "rows"}

    def other_rows(self) -> dict[str, OtherRows]:
        """The pairs that choose among caps, read like the training data."""
        if self.trusted is None:
            return {}
        return {"trusted": OtherRows(self.trusted, "preference", self.columns, self.on_bad_row)}

    def task_after(self, task: Task) -> Task:
        """A reward model has another head."""
        return "reward" if self.target == "reward" else task

    def applied_to(self, shape: Shape) -> Shape:
        """An adapter or other weights, with the head that the target needs."""
        shape = super().applied_to(shape)
        shape.check_rank(self.rank)
        return replace(shape, adapted=self.rank > 0, task=self.task_after(shape.task))

    def needs_matrices(self, shape: Shape) -> bool:
        """Targets may match nothing."""
        return self.rank > 0 and self.targets != type(self).model_fields["targets"].default

    def _choosable(self) -> None:
        if len(set(self.lams)) != len(self.lams) or len(self.lams) == 1:
            raise ValueError(f"lams: {list(self.lams)} leaves nothing to choose from: give two caps or more, each once")
        if self.trusted is not None and not self.lams:
            raise ValueError("trusted: these pairs choose among lams, and there are none: give lams: [1, 0.75, 0.5]")
        if self.lams and (self.lam is not None or self.budget is not None or self.loss not in _CAPPED):
            raise ValueError(
                "lams: one of these takes the place of lam; give it without lam and budget, to r3m or trimmed"
            )

    @property
    def audit_lam(self) -> float | None:
        """The level at which pairs are flagged afterwards: that of the training, unless it trusted everything.

        None where a budget says it: then about that share of the labels is flagged.

        >>> R3MConfig(lam=0.9).audit_lam, R3MConfig(loss="bt").audit_lam, R3MConfig(budget="10%").audit_lam
        (0.9, 0.85, None)
        """
        if self.budget is not None:
            return None
        return self.fixed_lam if self.fixed_lam < 1 else AUDIT_LAM


TRIMMED_START = 0.1
"""The cap of ``r3m`` that ``trimmed`` warms up with (R3M specification, section 8.1)."""
AUDIT_LAM = 0.85
"""A pair is flagged where the model gives its label less than 15 %."""


class AuditConfig(DataFields):
    """Which preference labels to doubt, by the margins of a reward model or of a DPO policy."""

    verb = "audit"
    summary = "which preference labels to doubt, by a reward model or a DPO policy"
    verb_summary = "say which preference labels to doubt"
    examples = ("tenfold audit runs/reward/01-r3m/adapter --data prefs.jsonl --out audit.csv --clean cleaned.jsonl",)
    reads: ClassVar[tuple[str, ...]] = ("preference",)
    reads_columns: ClassVar[bool] = True  # cleaned rows keep them
    needs: ClassVar[Needs] = Needs(task=("causal", "reward"))
    makes: ClassVar[Mapping[str, ArtefactKind]] = {"audit": "table", "cleaned": "rows"}
    keeps_columns: ClassVar[tuple[str, ...]] = ("cleaned",)
    run = "tenfold.align.audit.stage:run_audit"
    out_files: ClassVar[Mapping[str, str]] = {".csv": "csv"}

    lam: Annotated[float, Field(gt=0, lt=1)] = AUDIT_LAM
    """A pair is flagged where the model gives its label less than ``1 - lam``; raise it to flag fewer and surer
    ones."""
    beta: Annotated[float, Field(gt=0)] | None = None
    """For policies: the beta that they were trained with. Default: what the adapter says that this library trained,
    else 0.1."""
    reference: Annotated[str | None, Takes(("model",))] = None
    """For policies without an adapter: the model that they started from, a folder, a hub id or ``demo``."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Pairs of a forward pass, which has twice as many sequences; lower it where memory is short."""
    max_length: Annotated[int, Field(ge=8)] | None = None
    """Tokens of prompt and answer; longer pairs are left out and counted. Default: that of the training where the model
    says so, else 1024. Raise it where many were left out."""
    worst: Annotated[int, Field(ge=1)] = 12
    """Most doubtful pairs that the report shows; raise it to read more of them."""
    by: str | None = None
    """Column that says who gave the label, or where the row comes from: these are ranked, too. Give it to find careless
    annotators or sources."""
    csv: Annotated[Path | None, Incidental] = None
    """Also write the ranked table to this file, to go through it by hand; on the command line ``--out NAME.csv`` says
    the same."""
    action: Literal["drop", "flip", "weights"] = "drop"
    """What the cleaned data does with suspects: leaves them out, flips those that are almost surely wrong, or
    keeps all with a column ``weight``, for trainers that weigh rows (those here do not)."""
    clean: Annotated[Path | None, Incidental] = None
    """Also write the cleaned rows to this file: ``.jsonl``, or the format of the data. To train on them
    elsewhere."""

    def models(self) -> dict[str, str]:
        """What a policy is compared with."""
        return {} if self.reference is None else {"reference": self.reference}

    @property
    def cleaned_files(self) -> tuple[str, ...]:
        """Files of cleaned rows in the stage's folder: in the format of the data, and as JSON lines.

        >>> AuditConfig(data="prefs.csv").cleaned_files
        ('cleaned.csv', 'cleaned.jsonl')
        """
        return tuple(f"cleaned{suffix}" for suffix in dict.fromkeys((self.data_format, ".jsonl")))

    def delivers(self) -> dict[str, Path]:
        """The ranked table and the cleaned rows."""
        cleaned = f"cleaned{self.clean.suffix}" if self.clean is not None else ""
        asked = {"audit.csv": self.csv, cleaned: self.clean}
        return {name: target for name, target in asked.items() if target is not None}

    def check(self, rows: RowsRead | None) -> None:
        """Preferences, places for what is written, and the column by which labels are grouped."""
        check_kind(rows, self.reads, "auditing labels")
        assert rows is not None
        formats = tuple(Path(name).suffix for name in self.cleaned_files)
        for key, path, suffixes in (("csv", self.csv, (".csv",)), ("clean", self.clean, formats)):
            if path is not None:
                _check_output(key, path, suffixes, Path(str(self.data)).resolve())
        if self.by is not None and not any(self.by in other for other in rows.others):
            there = ", ".join(dict.fromkeys(name for other in rows.others for name in other)) or "none"
            raise ConfigError(f"by: {rows.source} has no column {self.by!r}", remedy=f"further columns are: {there}")

    def applied_to(self, shape: Shape) -> Shape:
        """A policy is judged against what it started from."""
        if shape.task == "causal" and not shape.adapted and self.reference is None:
            raise ConfigError(
                f"reference: missing, and {shape.name} has no adapter that could be switched off",
                remedy="give the model that the policy started from as reference, or a reward model as the model",
            )
        return shape


def _check_output(key: str, path: Path, suffixes: tuple[str, ...], data: Path) -> None:
    if path.suffix not in suffixes or path.is_dir():
        listed = " or ".join(suffixes)
        raise ConfigError(f"{key}: {path} is not a {listed} file", remedy=f"give a name that ends in {listed}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{key}: there is no folder {path.parent}", remedy="make it, or give another one")
    if path.resolve() == data or data in path.resolve().parents:
        raise ConfigError(f"{key}: {path} belongs to the data, which would be lost", remedy="give another file")
