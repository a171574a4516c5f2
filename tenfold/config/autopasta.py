"""AutoPASTA: questions over a context whose key sentence the model names itself."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tenfold.config.data import DataFields
from tenfold.config.gear import PackedFields
from tenfold.config.pasta import SteeringFields
from tenfold.config.stage import RowsRead, check_kind

Mode = Literal["direct", "iterative", "autopasta", "gold", "whole"]


class AutoPastaConfig(SteeringFields, PackedFields, DataFields):
    """Answer questions over a context, several ways side by side (Zhang et al. 2024, arXiv 2409.10790).

    ``data`` has rows with ``question``, ``context``, ``answers`` and, for the mode ``gold``, ``gold``. Without ``data``
    questions are made by code: who owns the thing of which colour.
    """

    verb = "steer"
    summary = "AutoPASTA: answers from a context whose key sentence the model finds itself"
    examples = ("tenfold steer autopasta demo --data questions.jsonl --modes direct autopasta",)
    reads: ClassVar[tuple[str, ...]] = ("question",)
    data_pool: ClassVar[str | None] = None
    run = "tenfold.attend.autopasta.stage:run_autopasta"

    modes: Annotated[tuple[Mode, ...], Field(min_length=1)] = ("direct", "iterative", "autopasta")
    """``direct`` prompts as usual; ``iterative`` lets the model quote first and puts the quote into the prompt;
    ``autopasta`` emphasises the sentence that the quote means; ``gold`` emphasises the sentences that hold an answer;
    ``whole`` emphasises all of the context. Add ``gold`` to see what the best quotes would bring."""
    samples: Annotated[int, Field(ge=2)] = 32
    """Questions that are made where no ``data`` is given; raise it for narrower intervals."""
    min_similarity: Annotated[float, Field(ge=-1, le=1)] | None = None
    """Least cosine between quote and sentence; below it the answer is not steered. Default: 0.25 for ``words``, 0.87
    for ``model``. Raise it where wrong sentences are emphasised, lower it where few answers are steered."""
    max_spans: Annotated[int, Field(ge=1)] = 1
    """Most sentences that are emphasised; the paper marks one. Raise it for answers that two sentences hold
    together."""
    embedder: Literal["words", "model"] = "words"
    """What finds the sentence when the quote is not verbatim: shared words, rare ones above all, or the model's own
    last hidden states. Turn it to ``model`` for quotes in other words."""
    max_quote_tokens: Annotated[int, Field(ge=1)] = 64
    """Longest quote, in tokens; raise it for long sentences."""
    max_answer_tokens: Annotated[int, Field(ge=1)] = 16
    """Longest answer, in tokens; raise it for answers that are sentences."""
    max_prompt_tokens: Annotated[int, Field(ge=64)] | None = None
    """Passages are left out, those without an answer first, until the prompt fits. Default: what the model can read.
    Lower it where memory is short."""
    batch_size: Annotated[int, Field(ge=1)] = 4
    """Questions of one forward pass; lower it where memory is short."""
    kv: str | None = None
    """A packed KV cache (GEAR) such as ``gear:4`` that all modes read through. Default: the exact one. Give it to see
    what packing costs the answers."""

    def check(self, rows: RowsRead | None) -> None:
        """A profile, and questions where there is data."""
        super().check(rows)
        if rows is not None:
            check_kind(rows, self.reads, "questions over a context:")
