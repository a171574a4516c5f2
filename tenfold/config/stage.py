"""The contract of a stage: what it is, reads, needs, makes and depends on, said by its configuration class.

A package adds a stage by an entry point of the group ``tenfold.stages`` that names such a class:

    [project.entry-points."tenfold.stages"]
    mymethod = "mypackage.config:MyConfig"

It gets a verb and flags on the command line, a place in recipes, validation, hashed inputs and resumable runs, exactly
as the stages of this package do, which are registered by naming their classes, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from tenfold.config.base import Config
from tenfold.config.shape import Shape, Task
from tenfold.errors import ConfigError

Kind = Literal["text", "completion", "chat", "preference", "question", "choice", "classification"]
"""Of rows."""

OnBadRow = Literal["stop", "skip"]
"""What becomes of the reading where a row cannot be read."""

ArtefactKind = Literal[
    "model", "adapter", "rows", "profile", "plan", "cache-format", "judge", "policy", "traces", "table"
]
"""What an artefact is, and so where it may stand in a recipe."""


@dataclass(frozen=True)
class Needs:
    """What a stage asks of the model it is given.

    Args:
        model: whether it works on one at all.
        task: what the model's head may be for.
        full_attention: whether every layer must see all tokens; a model with local spans is refused.
    """

    model: bool = True
    task: tuple[Task, ...] = ("causal",)
    full_attention: bool = False


@dataclass(frozen=True)
class Takes:
    """Marks a field that names an artefact: a path or a name, or ``${id.name}`` of an earlier stage.

    Args:
        kinds: of artefact that may stand there.
        inherits: left out, it is the last one that an earlier stage made.
    """

    kinds: tuple[ArtefactKind, ...]
    inherits: bool = False


class OtherRows(NamedTuple):
    """Rows beside a stage's data.

    Args:
        source: as ``data`` names one.
        kind: that they must be.
        columns: the user's column name for each of ours.
        on_bad_row: as under ``on_bad_row``.
    """

    source: str
    kind: Kind
    columns: Mapping[str, str]
    on_bad_row: OnBadRow = "stop"


class RowsRead(Protocol):
    """What a configuration asks of its data, as `tenfold.data.read.Rows` answers it."""

    @property
    def kind(self) -> Kind:
        """What each row is."""

    @property
    def source(self) -> str:
        """What was read, as the user named it."""

    @property
    def others(self) -> Sequence[Mapping[str, Any]]:
        """Of each row, the columns that its kind has no use for."""

    @property
    def unpaired(self) -> bool:
        """Whether the source holds unpaired preferences: an answer, and whether it is wanted."""

    def __iter__(self) -> Iterator[Any]: ...

    def split(self, holdout: float) -> tuple[RowsRead, RowsRead]:
        """Training and held-out rows; refused where one side would be empty."""


class Incidental:
    """Marks a field that changes what is written on the way, or where, and no figure: no stage runs again for it."""


class StageConfig(Config):
    """What a step of a recipe is told, and on its class what the step is.

    >>> class CountConfig(StageConfig):
    ...     verb = "evaluate"
    ...     summary = "count words"
    ...     reads = ("text",)
    ...     run = "mypackage.counting:run"
    ...     words: int = 10
    >>> CountConfig.parse({"words": 3}, where="example").words
    3
    """

    verb: ClassVar[str]
    """On the command line; the first stage registered with it is the verb's default method."""
    summary: ClassVar[str]
    """What the stage does, in one line."""
    verb_summary: ClassVar[str] = ""
    """What the verb does, said by its default method. Default: ``summary``."""
    examples: ClassVar[tuple[str, ...]] = ()
    """Command lines that work."""
    reads: ClassVar[tuple[str, ...]] = ()
    """Kinds of rows it can read; () for none."""
    data_pool: ClassVar[str | None] = None
    """Stages of one pool read the same rows: a stage without ``data`` reads what the last one of its pool read."""
    learns: ClassVar[bool] = False
    """Whether its result is fitted to its rows: those it holds out are what later stages measure on."""
    reads_columns: ClassVar[bool] = False
    """Whether its result depends on columns beside those of its kind of rows."""
    needs: ClassVar[Needs] = Needs()
    makes: ClassVar[Mapping[str, ArtefactKind]] = {}
    """Artefacts by name, and what each is."""
    keeps_columns: ClassVar[tuple[str, ...]] = ()
    """Artefacts of rows under the column names of its data: what reads them reads them with the same ``columns``."""
    run: ClassVar[str]
    """``module:function``, ``(config, context) -> StageOutput``; imported on first use."""
    refuse: ClassVar[str | None] = None
    """``module:function``, ``(config) -> None``: raises what the method's own code knows cannot be; imported to check a
    recipe, and so without torch. `check` is for what configurations know by themselves."""
    attach: ClassVar[str | None] = None
    """``module:function``, ``(model, config, task) -> adapted model``, of stages that train: `estimate` predicts their
    needs by it, and `validate` sees whether the model has what they adapt."""
    fits: ClassVar[str | None] = None
    """``module:function``, ``(model, config, tokenizer)``, which refuses a model whose matrices do not have what is
    asked of them; ``tokenizer()`` gives the model's. Of a stage without ``attach``, for `validate`. Default:
    ``targets`` must match something."""
    prefills: ClassVar[bool] = False
    """Whether it reads prompts of ``prompt_tokens``, whose memory `estimate` predicts."""
    out_files: ClassVar[Mapping[str, str]] = {}
    """Suffix of ``--out`` -> the key that it then is: ``{".csv": "csv"}``."""

    def artefacts(self) -> Mapping[str, ArtefactKind]:
        """What this configuration makes; by default what its class says."""
        return self.makes

    def leaves_model(self) -> bool:
        """Whether later stages start from what this one makes."""
        return bool({"model", "adapter"} & {*self.artefacts().values()})

    def writes_weights(self) -> bool:
        """Whether it writes the weights themselves, which packed ones (``load: 4bit``) do not allow.

        By default where it makes a model.
        """
        return "model" in self.artefacts().values()

    def files(self) -> dict[str, Path]:
        """What else the result depends on, by key: each must be there, and is hashed before anything runs."""
        return {}

    def models(self) -> dict[str, str]:
        """Other models that the result depends on, by key: a source as under ``model``."""
        return {}

    def other_rows(self) -> dict[str, OtherRows]:
        """Other rows that the result depends on, by key."""
        return {}

    def delivers(self) -> dict[str, Path]:
        """What is written outside of the run folder as well: its name in the stage's folder -> where to."""
        return {}

    def task_after(self, task: Task) -> Task:
        """What the head of the model is for once the stage is done."""
        return task

    def check(self, rows: RowsRead | None) -> None:
        """Refuse what can be known to fail before any weight is loaded.

        Args:
            rows: its data, or None.

        Raises:
            ConfigError: data that is missing or does not fit, or a key that cannot be.
            DataError: rows of which none could be used.
        """

    def applied_to(self, shape: Shape) -> Shape:
        """The model as the stage leaves it, from configurations alone; by default as it was.

        Args:
            shape: of the model that the stage starts from.

        Raises:
            ConfigError: what no model of this shape can do.
        """
        return shape

    def needs_matrices(self, shape: Shape) -> bool:
        """Whether only the model's matrices, by name and size, tell if the stage is possible."""
        return False

    def takes(self) -> dict[str, Takes]:
        """The keys that name artefacts, as far as this configuration has a use for them."""
        fields = type(self).model_fields.items()
        return {key: mark for key, field in fields for mark in field.metadata if isinstance(mark, Takes)}

    def decisive(self) -> dict[str, Any]:
        """The keys that decide figures, as plain values."""
        aside = {key for key, field in type(self).model_fields.items() if Incidental in field.metadata}
        return self.model_dump(mode="json", exclude=aside)


def check_kind(rows: RowsRead | None, kinds: tuple[str, ...], what: str) -> None:
    """Refuse rows that are missing, or of another kind.

    Args:
        rows: the data of a stage, or None.
        kinds: that it can use.
        what: needs them: ``training``, ``tasks: perplexity``.

    Raises:
        ConfigError: naming what is needed and what is there.
    """
    listed = " or ".join(filter(None, (", ".join(kinds[:-1]), kinds[-1])))
    if rows is None:
        first = "step-audit" if kinds == ("preference",) else "python-reference"
        raise ConfigError(
            f"data: missing, and {what} needs {listed} rows",
            remedy=f"name a file, a folder or a hub id under `data` (--data), or {first} for a first try",
        )
    if rows.kind not in kinds and rows.unpaired and kinds == ("preference",):
        raise ConfigError(
            f"{what} needs pairs, and {rows.source} holds unpaired preferences: one answer, and whether it is wanted",
            remedy="give rows with prompt, chosen and rejected; TRL's KTOTrainer learns from unpaired ones, and "
            "`tenfold adapt` from the wanted answers",
        )
    if rows.kind not in kinds:
        remedy = "choose other tasks or data, or say what the rows are with `rows` and `columns`"
        if rows.kind == "preference" and "completion" in kinds:
            remedy = (
                "`tenfold align` learns from pairs; for the better answers alone say `rows: completion` and "
                "`columns: {completion: chosen}` (--rows completion --columns completion chosen)"
            )
        raise ConfigError(f"{what} needs {listed} rows, but {rows.source} holds {rows.kind} rows", remedy=remedy)
