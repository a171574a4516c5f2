"""What to measure, and on what."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from tenfold.config.data import DataFields
from tenfold.config.gear import PackedFields
from tenfold.config.pasta import SteeringFields, check_tags, untagged
from tenfold.config.shape import Shape
from tenfold.config.stage import RowsRead, check_kind
from tenfold.errors import ConfigError, DataError

TASKS = ("perplexity", "copying", "needle", "speed", "memory", "multiple_choice", "question_answering")


ON_CACHE = ("perplexity", "copying", "needle", "question_answering", "lm_eval:NAME")
"""Tasks that are measured on a packed cache."""

Emphasised = Literal["marks", "question", "gold", "whole"]

EMPHASISED: dict[str, tuple[Emphasised, ...]] = {
    "perplexity": ("marks",),
    "question_answering": ("marks", "question", "gold", "whole"),
    "needle": ("question", "gold", "whole"),
}
"""Tasks that are measured with emphasis, and what of their texts can be emphasised."""

MEASURED_ROWS: dict[str, tuple[str, ...]] = {
    "perplexity": ("text", "completion", "chat"),
    "copying": ("text",),
    "needle": ("text",),
    "question_answering": ("question",),
    "multiple_choice": ("choice",),
}
"""Tasks that need rows, and of which kinds."""

ANSWERED = ("completion", "chat")
"""Kinds of rows of which only the answers are scored."""


class EvaluateConfig(SteeringFields, PackedFields, DataFields):
    """Measure the model that the stages so far have made, beside the one that the recipe started from.

    ``data`` is by default that of the stage before, of which the held-out share is used.
    """

    verb = "evaluate"
    summary = "perplexity, speed, memory, questions, standard tasks; before and after"
    verb_summary = "measure the model: perplexity, speed, memory, questions, standard tasks"
    examples = (
        "tenfold evaluate demo --data python-reference --tasks perplexity speed memory",
        "tenfold evaluate runs/quickstart/01-adalora/adapter --tasks lm_eval:hellaswag --limit 100",
        "tenfold evaluate demo --data chats.jsonl --tasks perplexity",
        "tenfold evaluate demo --data questions.jsonl --tasks question_answering --kv gear:4 --emphasise question",
    )
    reads: ClassVar[tuple[str, ...]] = ("text", "completion", "chat", "question", "choice")
    run = "tenfold.evaluate.stage:run_evaluate"
    prefills: ClassVar[bool] = True
    steered_by: ClassVar[str] = "emphasise"

    tasks: Annotated[tuple[str, ...], Field(min_length=1)] = ("perplexity", "speed", "memory")
    """``perplexity`` (of texts; of conversations and completions that of the answers, which are what training would
    learn), ``copying`` (passages that come twice, far apart), ``needle`` (a number somewhere in a long
    text), ``speed``, ``memory``, ``multiple_choice``, ``question_answering``, or ``lm_eval:NAME`` for a task of
    lm-evaluation-harness."""
    split: Literal["all", "held-out"] = "all"
    """Which rows of ``data`` are measured; ``held-out`` by default where an earlier stage read the same data. Write
    ``all`` to measure rows that were trained on as well."""
    baseline: bool = True
    """Also measure the model that the recipe started from, and compare token by token. Turn it off to save its time."""
    max_length: Annotated[int, Field(ge=8)] | None = None
    """Tokens in one window of the perplexity. Default: 1024, or what the model can read if that is less. Raise it to
    see what long contexts bring."""
    stride: Annotated[int, Field(ge=1)] | None = None
    """Tokens by which the window moves, so that each but the first tokens has at least ``max_length - stride`` before
    it. Default: half of ``max_length``. Lower it for a truer figure at more time."""
    batch_size: Annotated[int, Field(ge=1)] = 4
    """Sequences per forward pass; lower it where memory is short."""
    kv: str | None = None
    """A packed KV cache (GEAR) such as ``gear:4``: perplexity, copying, needle, question_answering and lm_eval are
    measured on it as well, and its perplexity is compared with the exact one token by token. Give it to see what
    packing costs."""
    emphasise: Emphasised | None = None
    """What is emphasised (PASTA); each model is measured plain and emphasised, on the exact and on the packed cache.
    ``marks``: what stands between ``tags`` in texts, contexts and questions (perplexity, question_answering; the tags
    are taken out, for the plain model too). ``question``: what is asked; ``gold``: the sentences that hold an answer,
    or the number; ``whole``: all of the context (question_answering, needle). Give it to see what emphasis brings, and
    what it costs."""
    tags: tuple[str, str] = ("<mark>", "</mark>")
    """What begins and ends a mark, for ``emphasise: marks``; change them where your texts hold these themselves."""
    passages: Annotated[int, Field(ge=1)] = 4
    """Texts of ``copying`` and ``needle``, spread evenly over the data; raise it for narrower intervals."""
    passage: Annotated[int, Field(ge=8)] = 256
    """Tokens of a passage that comes twice; shorten it for models that read few tokens."""
    between: Annotated[int, Field(ge=1)] = 1024
    """Tokens between its copies; the two together are the length of the text that a needle is hidden in. Raise it to
    look further back."""
    prompt_tokens: Annotated[int, Field(ge=1)] = 512
    """Length of the prompt whose prefill is timed; set it to that of your prompts."""
    new_tokens: Annotated[int, Field(ge=2)] = 32
    """Tokens whose decoding is timed; raise it where timings scatter."""
    repeats: Annotated[int, Field(ge=1)] = 5
    """Timed repeats, after one warm-up; the models alternate. Raise it on a busy machine."""

    def check(self, rows: RowsRead | None) -> None:
        """Rows of the kind that each task measures, and some that are held out where these are asked for."""
        for task in self.tasks:
            if task in MEASURED_ROWS:
                check_kind(rows, MEASURED_ROWS[task], f"tasks: {task}")
        if rows is not None and self.split == "held-out":
            rows.split(self.holdout)
        if rows is not None and self.emphasise == "marks":
            if rows.kind in ANSWERED:
                raise ConfigError(
                    f"emphasise: marks are looked for in texts, contexts and questions, and {rows.source} holds "
                    f"{rows.kind} rows",
                    remedy="leave emphasise out, or give rows of text or questions; `tenfold generate` emphasises "
                    "within conversations",
                )
            self._check_marks(rows)

    def _check_marks(self, rows: RowsRead) -> None:
        """Tags that close, in one row at least."""
        tagged = 0
        for row in rows:
            context = getattr(row, "context", "")
            parts = (getattr(row, "text", ""), getattr(row, "question", ""))
            for text in (*parts, *((context,) if isinstance(context, str) else context)):
                if any(tag in text for tag in self.tags):
                    tagged += 1
                    if problem := untagged(text, self.tags):
                        raise DataError(
                            f"row {row.id!r} of {rows.source} {problem}", remedy="mend its tags, or name yours"
                        )
        if not tagged:
            raise DataError(
                f"emphasise: marks, and no row of {rows.source} has {self.tags[0]}",
                remedy="put tags around what to emphasise, or name yours under `tags`",
            )

    @property
    def steers(self) -> bool:
        """Only where something is emphasised."""
        return self.emphasise is not None

    def emphasises(self, task: str) -> bool:
        """Whether a task is measured with emphasis too."""
        return self.emphasise is not None and self.emphasise in EMPHASISED.get(task, ())

    def applied_to(self, shape: Shape) -> Shape:
        """Windows and passages must be within what the model can read, and layers there to be packed."""
        if "perplexity" in self.tasks and self.max_length is not None:
            shape.check_positions("max_length", self.max_length)
        for task, room in (("copying", self.passage), ("needle", 64)):
            if task in self.tasks:
                tokens = self.passage + self.between + room
                shape.check_positions("between", tokens, f" tokens of {task}, passages of {self.passage} included,")
        return super().applied_to(shape)

    @model_validator(mode="after")
    def _known_tasks(self) -> Self:
        for task in self.tasks:
            if task not in TASKS and not re.fullmatch(r"lm_eval:\S+", task):
                raise ValueError(f"tasks: unknown task {task!r}: choose from {', '.join(TASKS)} or lm_eval:NAME")
        if self.kv is not None and not any(map(on_cache, self.tasks)):
            raise ValueError(
                f"kv: of a packed cache {', '.join(ON_CACHE)} are measured, and tasks names none of them: add one, "
                "leave kv out, or take the stage gear for speed and memory"
            )
        if self.emphasise is not None and not any(map(self.emphasises, self.tasks)):
            able = [task for task, parts in EMPHASISED.items() if self.emphasise in parts]
            raise ValueError(
                f"emphasise: {self.emphasise} is something of {' and '.join(able)}, and tasks names none of them: add "
                "one, or leave emphasise out"
            )
        if self.tags != EvaluateConfig.model_fields["tags"].default:
            check_tags(self.tags)
            if self.emphasise != "marks":
                raise ValueError(f"tags: {self.tags}, but no marks are emphasised: give emphasise: marks")
        if self.stride is not None and self.max_length is not None and self.stride >= self.max_length:
            raise ValueError(f"stride {self.stride} is not below max_length {self.max_length}")
        return self


def on_cache(task: str) -> bool:
    """Whether a task is measured on a packed cache.

    >>> on_cache("perplexity"), on_cache("lm_eval:hellaswag"), on_cache("speed")
    (True, True, False)
    """
    return task in ON_CACHE or task.startswith("lm_eval:")
