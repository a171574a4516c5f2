"""What to measure, and on what."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from tenfold.config.data import DataFields
from tenfold.config.gear import check_packing, checked_kv
from tenfold.config.shape import Shape
from tenfold.config.stage import RowsRead, check_kind

TASKS = ("perplexity", "copying", "needle", "speed", "memory", "multiple_choice", "question_answering")


ON_CACHE = ("perplexity", "copying", "needle", "question_answering")
"""Tasks that are measured on a packed cache."""

MEASURED_ROWS = {
    "perplexity": "text",
    "copying": "text",
    "needle": "text",
    "question_answering": "question",
    "multiple_choice": "choice",
}
"""Tasks that need rows, and of which kind."""


class EvaluateConfig(DataFields):
    """Measure the model that the stages so far have made, beside the one that the recipe started from.

    ``data`` is by default that of the stage before, of which the held-out share is used.
    """

    verb = "evaluate"
    summary = "perplexity, speed, memory, questions, standard tasks; before and after"
    verb_summary = "measure the model: perplexity, speed, memory, questions, standard tasks"
    examples = (
        "tenfold evaluate demo --data python-reference --tasks perplexity speed memory",
        "tenfold evaluate runs/quickstart/01-adalora/adapter --tasks lm_eval:hellaswag --limit 100",
    )
    reads: ClassVar[tuple[str, ...]] = ("text", "question", "choice")
    run = "tenfold.evaluate.stage:run_evaluate"
    prefills: ClassVar[bool] = True

    tasks: Annotated[tuple[str, ...], Field(min_length=1)] = ("perplexity", "speed", "memory")
    """``perplexity``, ``copying`` (passages that come twice, far apart), ``needle`` (a number somewhere in a long
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
    """A packed KV cache (GEAR) such as ``gear:4``: perplexity, copying, needle and question_answering are measured on
    it as well, and its perplexity is compared with the exact one token by token. Give it to see what packing costs."""
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
                check_kind(rows, (MEASURED_ROWS[task],), f"tasks: {task}")
        if rows is not None and self.split == "held-out":
            rows.split(self.holdout)

    def applied_to(self, shape: Shape) -> Shape:
        """Windows and passages must be within what the model can read, and layers there to be packed."""
        if self.kv is not None:
            check_packing(shape, "kv", [self.kv])
        if "perplexity" in self.tasks and self.max_length is not None:
            shape.check_positions("max_length", self.max_length)
        for task, room in (("copying", self.passage), ("needle", 64)):
            if task in self.tasks:
                tokens = self.passage + self.between + room
                shape.check_positions("between", tokens, f" tokens of {task}, passages of {self.passage} included,")
        return shape

    @model_validator(mode="after")
    def _known_tasks(self) -> Self:
        for task in self.tasks:
            if task not in TASKS and not re.fullmatch(r"lm_eval:\S+", task):
                raise ValueError(f"tasks: unknown task {task!r}: choose from {', '.join(TASKS)} or lm_eval:NAME")
        if self.kv is not None:
            checked_kv("kv", self.kv)
            if not set(self.tasks) & set(ON_CACHE):
                raise ValueError(
                    f"kv: of a packed cache {', '.join(ON_CACHE)} are measured, and tasks names none of them: add one, "
                    "leave kv out, or take the stage gear for speed and memory"
                )
        if self.stride is not None and self.max_length is not None and self.stride >= self.max_length:
            raise ValueError(f"stride {self.stride} is not below max_length {self.max_length}")
        return self
