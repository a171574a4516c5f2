"""PASTA: which heads to steer, how strongly, and what to try it on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from tenfold.config.base import yes_or_no
from tenfold.config.data import DataFields
from tenfold.config.gear import PackedFields
from tenfold.config.shape import Shape
from tenfold.config.stage import ArtefactKind, Needs, RowsRead, StageConfig, Takes, check_kind
from tenfold.errors import ConfigError, DataError

UseTemplate = Annotated[Literal["auto", "yes", "no"], BeforeValidator(yes_or_no)]
"""Whether prompts are wrapped in the model's chat template."""

SteeringTask = Literal["conflict", "evidence", "instruction"]

SHIPPED = Path(__file__).parents[1] / "attend" / "pasta" / "shipped"
"""Profiles that come with the package: ``default`` is the embedded model's."""


def profile_path(source: str | Path) -> Path:
    """The file of a profile: a name in the package, or a file.

    Raises:
        ConfigError: neither.

    >>> profile_path("default").name
    'default.json'
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.suffix or len(path.parts) > 1:
        raise ConfigError(f"profile: no file {path}", remedy="make one with `tenfold steer profile MODEL`")
    shipped = SHIPPED / f"{source}.json"
    if not shipped.is_file():
        names = ", ".join(sorted(item.stem for item in SHIPPED.glob("*.json")))
        raise ConfigError(f"profile: no {str(source)!r} in the package", remedy=f"give a file, or one of {names}")
    return shipped


PAPER_ALPHA = 0.01
CHAT_MASS, CHAT_ALPHA = 0.15, 0.3
"""Chosen on instructions of eight kinds (benchmarks/chats.py, docs/results/pasta.md); the second where no layer can be
lifted to a target mass."""


def _number_or_name(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        return handler(value)
    except ValidationError:
        raise ValueError("must be a number of 0 or more, auto or paper") from None


Alpha = Annotated[
    Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto", "paper"], WrapValidator(_number_or_name)
]


class SteeringFields(StageConfig):
    """How marked text is emphasised."""

    profile: Annotated[str | None, Takes(("profile",), inherits=True)] = None
    """Which heads: the name of a profile in the package, or a JSON file (also the paper's released ones). Default: what
    an earlier stage ``profile`` found, else ``default``, the embedded model's. Every other model needs its own."""
    alpha: Alpha = "auto"
    """Factor of the attention to unmarked prompt tokens, 0 or more: below 1 emphasises the marks. ``paper`` is 0.01;
    ``auto`` is that for completions, and gentler for chats, in which 0.01 makes small models repeat themselves: a
    target mass of 0.15, or 0.3 where the model's attention knows no target mass. Lower it where marks are ignored,
    raise it where texts fall apart."""
    target_mass: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Instead of ``alpha``: lift the marks to this share of the attention of every steered head (not in the paper).
    Raise it where marks are ignored, lower it where texts fall apart."""
    generated: Literal["keep", "scale"] = "keep"
    """``keep`` gives the tokens that the model writes full weight, as the paper does; ``scale`` treats them as
    unmarked, so that the emphasis does not fade. Turn it to ``scale`` for long texts."""
    keep_sink: bool = False
    """Keep the first token, where idle attention goes, at full weight (not in the paper). Try it where steered texts
    fall apart."""

    steered_by: ClassVar[str] = ""
    """The keys that say what is emphasised, of stages that also work without."""

    def strength(self) -> dict[str, Any]:
        """The keys that say how strongly, as a session takes them.

        >>> SteeringFields(keep_sink=True).strength()
        {'alpha': 'auto', 'target_mass': None, 'generated': 'keep', 'keep_sink': True}
        """
        return {key: getattr(self, key) for key in ("alpha", "target_mass", "generated", "keep_sink")}

    def dose(self, chat: bool, *, lifts: bool = False) -> dict[str, Any]:
        """How strongly to steer, as `tenfold.attend.pasta.steer` takes it.

        Args:
            chat: whether the prompts go through a chat template and are answered at length.
            lifts: whether the model takes a target mass (`tenfold.attend.pasta.lifts`).

        >>> SteeringFields().dose(chat=True, lifts=True), SteeringFields(alpha="paper").dose(chat=True, lifts=True)
        ({'target_mass': 0.15}, {'alpha': 0.01})
        """
        if self.target_mass is not None:
            return {"target_mass": self.target_mass}
        # These two look at each token's own strength, which a target mass does not have.
        more: dict[str, Any] = {"generated": self.generated} if self.generated != "keep" else {}
        more |= {"keep_sink": True} if self.keep_sink else {}
        if self.alpha == "auto" and chat and lifts and not more:
            return {"target_mass": CHAT_MASS}
        named = {"paper": PAPER_ALPHA, "auto": CHAT_ALPHA if chat else PAPER_ALPHA}
        return {"alpha": named[self.alpha] if isinstance(self.alpha, str) else self.alpha, **more}

    def takes(self) -> dict[str, Takes]:
        """A profile only where something is emphasised."""
        return {key: mark for key, mark in super().takes().items() if self.steers or key != "profile"}

    def files(self) -> dict[str, Path]:
        """The profile."""
        path = self.profile_file() if self.steers else None
        return {} if path is None else {"profile": path}

    @property
    def steers(self) -> bool:
        """Whether the stage emphasises anything at all."""
        return True

    @model_validator(mode="after")
    def _one_dose(self) -> Self:
        if self.target_mass is not None and self.alpha != "auto":
            raise ValueError(f"target_mass takes the place of alpha: leave alpha {self.alpha} or target_mass out")
        if self.target_mass is not None and (self.keep_sink or self.generated == "scale"):
            raise ValueError("target_mass replaces alpha, so keep_sink and generated: scale have nothing to weaken")
        return self

    @model_validator(mode="after")
    def _something_to_steer(self) -> Self:
        # A resolved recipe spells defaults out, so what counts is whether a value is another one.
        for key in () if self.steers else SteeringFields.model_fields:
            value = getattr(self, key)
            if value != SteeringFields.model_fields[key].default:
                raise ValueError(
                    f"{key}: {value!r}, but nothing is emphasised: give {self.steered_by}, or leave {key} out"
                )
        return self

    def applied_to(self, shape: Shape) -> Shape:
        """Heads must be there; released files name no model and are looked at when it is open."""
        if self.target_mass is not None and shape.spans is not None:
            raise ConfigError(
                f"target_mass: {shape.name} has local spans, under which attention knows no target mass",
                remedy="give alpha instead, such as 0.3 for chats",
            )
        path = self.profile_file() if self.steers else None
        made_for = _profiled_model(path) if path is not None else {}
        here = {"layers": shape.layers, "heads": shape.heads}
        if any(known is not None and made_for.get(key, known) != known for key, known in here.items()):
            raise ConfigError(
                f"profile: made for a {made_for.get('model_type')} model of {made_for.get('layers')} layers with "
                f"{made_for.get('heads')} heads each, and {shape.name} has {shape.layers} of {shape.heads}",
                remedy="find this model's own heads: tenfold steer profile MODEL, or a stage `use: profile` before",
            )
        return super().applied_to(shape)

    def profile_file(self) -> Path | None:
        """The file that ``profile`` names; None where an earlier stage of the recipe will make it.

        Raises:
            ConfigError: no such profile.
        """
        if self.profile is not None and self.profile.startswith("${"):
            return None
        return profile_path(self.profile or "default")


class PastaConfig(SteeringFields, PackedFields, DataFields):
    """Steer the model towards marked text (Zhang et al. 2023, arXiv 2311.02262) and see what it does.

    ``data`` has rows with a tagged ``prompt``, the continuation to prefer (``chosen``) and one to avoid (``rejected``).
    """

    verb = "steer"
    summary = "PASTA: emphasis of marked text that the model obeys"
    verb_summary = "emphasise marked text, or find the attention heads for it (tenfold steer profile MODEL)"
    examples = (
        'tenfold steer demo --prompts "Name a fruit that is not red. <mark>Answer in one word.</mark>"',
        "tenfold steer demo --profile runs/heads/01-profile/profile/profile.json --tasks conflict evidence",
    )
    reads: ClassVar[tuple[str, ...]] = ("preference",)
    data_pool: ClassVar[str | None] = "tagged prompts"
    run = "tenfold.attend.pasta.stage:run_pasta"

    prompts: tuple[str, ...] = ()
    """Prompts with tags around what to emphasise; each is continued plain and steered."""
    tags: tuple[str, str] = ("<mark>", "</mark>")
    """What begins and ends a marked span; change them where your texts hold these themselves."""
    tasks: tuple[SteeringTask, ...] = ()
    """Built-in tasks to score plain, with marks in the text (``*like this*``), and steered; to see whether a profile
    serves the model."""
    samples: Annotated[int, Field(ge=2)] = 64
    """Items of each built-in task; never those that heads were found on. Raise it for narrower intervals."""
    split: Literal["all", "held-out"] = "all"
    """Which rows of ``data`` are scored; ``held-out`` by default where an earlier stage read the same data. Write
    ``all`` to score the rows that heads were found on as well."""
    kv: str | None = None
    """A packed KV cache (GEAR) such as ``gear:4``: prompts are continued, and tasks scored, on it as well, plain and
    steered. Of an item the last token is read through the cache that holds the others. Give it to see whether emphasis
    survives the cache that you will serve with."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 48
    """Longest text written for a prompt, in tokens; raise it where texts are cut."""
    chat: UseTemplate = "auto"
    """Wrap each prompt in the model's chat template; ``auto`` does so where there is one. Turn it off (``no``) for
    texts that are to be continued."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Prompts of one forward pass; lower it where memory is short."""

    def check(self, rows: RowsRead | None) -> None:
        """Something to steer, tagged in every row."""
        super().check(rows)
        if not self.prompts and not self.tasks and rows is None:
            raise ConfigError(
                "prompts, tasks and data are all empty", remedy="give at least one prompt with a marked part"
            )
        if rows is not None:
            _check_tagged(rows, self.tags)
            if self.split == "held-out":
                rows.split(self.holdout)

    @model_validator(mode="after")
    def _prompts_are_tagged(self) -> Self:
        check_tags(self.tags)
        for number, prompt in enumerate(self.prompts, 1):
            problem = untagged(prompt, self.tags)
            if problem:
                raise ValueError(f"prompts: prompt {number} {problem}")
        return self


class ProfileConfig(DataFields):
    """Find the heads whose steering the model obeys (PASTA, section 3.2).

    ``data`` adds a task of one's own: rows with a tagged ``prompt``, the continuation to prefer (``chosen``) and one to
    avoid (``rejected``); its held-out share chooses the number of heads.
    """

    verb = "steer"
    summary = "find the attention heads whose steering the model obeys"
    examples = ("tenfold steer profile demo --out runs/heads",)
    reads: ClassVar[tuple[str, ...]] = ("preference",)
    data_pool: ClassVar[str | None] = "tagged prompts"
    needs: ClassVar[Needs] = Needs(full_attention=True)  # gradients of weights that only masks give
    learns: ClassVar[bool] = True
    makes: ClassVar[Mapping[str, ArtefactKind]] = {"profile": "profile"}
    run = "tenfold.attend.pasta.stage:run_profile"

    tasks: tuple[SteeringTask, ...] = ("conflict", "evidence", "instruction")
    """Built-in tasks; their best heads are intersected, with those of ``data``. Leave out those that have nothing to do
    with your use."""
    tags: tuple[str, str] = ("<mark>", "</mark>")
    """What begins and ends a marked span in the rows of ``data``; change them where your texts hold these
    themselves."""
    samples: Annotated[int, Field(ge=2)] = 32
    """Items of each built-in task on which heads are ranked; raise it where two seeds find different heads."""
    validation: Annotated[int, Field(ge=2)] = 48
    """Other items of each built-in task on which the number of heads is chosen; raise it where the curve over numbers
    is ragged."""
    alpha: Annotated[float, Field(ge=0)] = 0.01
    """Factor of the attention to unmarked prompt tokens, 0 or more, while heads are compared. Set it to the ``alpha``
    that you will steer with, where that is far from the paper's 0.01."""
    shortlist: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Least share of all heads that are measured exactly: the best of all tasks by gradient. Raise it to miss fewer
    good heads, for as much more time; 1 is the paper's exhaustive search."""
    sizes: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (4, 8, 16, 24, 32, 48, 64)
    """Numbers of heads that are tried; add larger ones where the largest is chosen."""
    min_fluency: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Least n-gram entropy of steered texts, as a share of that of plain ones. Lower it where no number of heads
    passes, raise it where steered texts repeat themselves."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Prompts of one forward pass; lower it where memory is short."""

    def check(self, rows: RowsRead | None) -> None:
        """Rows that are tagged, and some to hold out."""
        if rows is not None:
            _check_tagged(rows, self.tags)
            rows.split(self.holdout)

    @model_validator(mode="after")
    def _some_task(self) -> Self:
        check_tags(self.tags)
        if not self.tasks and self.data is None:
            raise ValueError("tasks and data are both empty: heads are found by what steering them does to a task")
        return self


def _profiled_model(path: Path) -> dict[str, Any]:
    """What a profile says of the model that it was found on."""
    try:
        model = json.loads(path.read_text(encoding="utf-8")).get("model", {})
    except (OSError, ValueError, AttributeError):  # what is wrong with it is said when it is loaded
        return {}
    return model if isinstance(model, dict) else {}


def untagged(prompt: str, tags: tuple[str, str]) -> str | None:
    """What is wrong with the tags of a prompt, or None.

    >>> untagged("a <m>b", ("<m>", "</m>"))
    'has 1 <m> and 0 </m>: a mark is not closed'
    """
    opened, closed = (prompt.count(tag) for tag in tags)
    if not opened:
        return f"has no {tags[0]}: tag what to emphasise"
    return None if opened == closed else f"has {opened} {tags[0]} and {closed} {tags[1]}: a mark is not closed"


def _check_tagged(rows: RowsRead, tags: tuple[str, str]) -> None:
    check_kind(rows, ("preference",), "steering")
    for row in rows:
        problem = untagged(getattr(row, "prompt", ""), tags)
        if problem:
            raise DataError(
                f"the prompt of row {row.id!r} of {rows.source} {problem}",
                remedy="put tags around what to emphasise, or name yours under `tags`",
            )


def check_tags(tags: tuple[str, str]) -> None:
    """Refuse tags that are alike or empty, for a validator.

    Raises:
        ValueError: naming them.
    """
    if not all(tags) or tags[0] == tags[1]:
        raise ValueError(f"tags {tags!r}: give two different ones, such as <mark> and </mark>")
