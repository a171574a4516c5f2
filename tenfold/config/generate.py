"""What to write, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from tenfold.config.gear import PackedFields
from tenfold.config.pasta import SteeringFields, UseTemplate


class GenerateConfig(SteeringFields, PackedFields):
    """Let the model write, beside the one that the recipe started from; or answer a question from a text."""

    verb = "generate"
    summary = "let the model write, before and after"
    verb_summary = "let the model write"
    examples = (
        'tenfold generate demo --prompts "What is a list comprehension?"',
        'tenfold generate demo --prompts "Name a fruit. Answer in one word." --emphasise "Answer in one word."',
        'tenfold generate demo --prompts "Tell a long story." --max-new-tokens 400 --kv gear:4',
        'tenfold generate demo --context notes.txt --question "When does the library open?" --find-evidence',
        'tenfold generate runs/quickstart/01-adalora/adapter --prompts "The with statement" --chat no',
    )
    run = "tenfold.engines.stage:run_generate"
    steered_by: ClassVar[str] = "emphasise, or context, question and find_evidence"

    prompts: Annotated[tuple[str, ...], Field(min_length=1)] = ("Explain in two sentences what a language model is.",)
    """One text is written for each; on the command line in quotes, one after the other."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    """Longest text, in tokens; raise it where texts are cut."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the most probable token each time; raise it to 0.7 or 1 for texts that vary with ``seed``."""
    chat: UseTemplate = "auto"
    """Wrap each prompt in the model's chat template; ``auto`` does so where there is one. Turn it off (``no``) for
    texts that are to be continued."""
    kv: str | None = None
    """A packed KV cache (GEAR): ``gear:4``, ``gear:3.5bits``, ``gear:9KiB/token``, ``gear-full:2``, ``gear-l:2``. Each
    prompt is continued on the exact cache and on this one, also where parts are emphasised; so is a question answered,
    also with evidence. Give it to see what packing changes."""
    baseline: bool = True
    """Also let the model write that the recipe started from. Turn it off to save its time."""
    emphasise: tuple[str, ...] = ()
    """Parts of the prompts that are emphasised (PASTA), for instructions that the model ignores; each prompt is
    continued plain and emphasised. A part is marked in every prompt that has it, wherever it occurs."""
    context: Path | None = None
    """A text file to answer ``question`` from, instead of continuing ``prompts``."""
    question: str | None = None
    """What to answer from ``context``; the two belong together."""
    find_evidence: bool = False
    """Let the model name the sentence of ``context`` that answers, and emphasise it (AutoPASTA); the answer without is
    shown beside."""

    def files(self) -> dict[str, Path]:
        """The profile, where something is emphasised, and the text to answer from."""
        found = super().files()
        return found if self.context is None else {**found, "context": self.context}

    @property
    def steers(self) -> bool:
        """Only where there is something to emphasise."""
        return bool(self.emphasise) or self.find_evidence

    @model_validator(mode="after")
    def _one_job(self) -> Self:
        if (self.context is None) != (self.question is None):
            raise ValueError("context and question belong together: give a text file and what to answer from it")
        if self.find_evidence and self.context is None:
            raise ValueError("find_evidence looks for the key sentence of a context: give context and question")
        if self.context is not None and self.emphasise:
            raise ValueError("emphasise marks parts of prompts; with context and question use find_evidence")
        if self.question is not None and not self.question.strip():
            raise ValueError("question is blank: ask something")
        if self.context is not None and self.temperature:
            raise ValueError("temperature: answers from a context are greedy")
        for part in self.emphasise:
            if not part:
                raise ValueError("emphasise holds an empty text: copy a part of a prompt")
            if not any(part in prompt for prompt in self.prompts):
                raise ValueError(f"emphasise: {part!r} is in none of the prompts")
        return self
