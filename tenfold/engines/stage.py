"""The stage ``generate``: let the model write, before and after."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tenfold.attend.autopasta.answering import Answer, AutoPasta
from tenfold.attend.pasta.prompts import chat_prompt, loops, profile_of, uses_template
from tenfold.attend.pasta.steering import lifts, steer
from tenfold.attend.text_marks import encode, from_substrings
from tenfold.cache.packing import cache_note, packed_caches
from tenfold.cache.spans import own_cache
from tenfold.config.generate import GenerateConfig
from tenfold.errors import DataError
from tenfold.evaluate.subjects import Subjects, open_subjects
from tenfold.models.generation import continue_inputs, generate
from tenfold.models.inference import input_device
from tenfold.stage.context import Context, StageOutput
from tenfold.stage.record import Sample


def run_generate(config: GenerateConfig, context: Context) -> StageOutput:
    """The stage ``generate``: one sample for each prompt."""
    if config.context is not None:
        read_context(config.context)  # before the weights
        return StageOutput(samples=answer_file(config, context, open_subjects(context, config.baseline)))
    subjects = open_subjects(context, config.baseline)
    written: dict[str, list[str]] = {}
    notes: list[str] = []
    for index, name in enumerate(subjects.models):
        context.progress("generate", index, len(subjects.models), name)
        with subjects.use(name) as model:
            write = partial(
                generate,
                model,
                subjects.tokenizer,
                config.prompts,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                chat={"auto": None, "yes": True, "no": False}[config.chat],
                seed=context.seed,
                make_cache=partial(own_cache, model),
            )
            written[name] = write()
            if config.emphasise:
                emphasise = partial(emphasised, model, subjects.tokenizer, config, context)
                written[f"{name}, emphasised"], more = emphasise()
                notes += [f"{name}, {note}" for note in more]
            if config.kv is not None:
                with packed_caches(model, config.kv) as (make, made):
                    written[f"{name}, {config.kv}"] = write(make_cache=make)
                    if config.emphasise:
                        written[f"{name}, emphasised, {config.kv}"], more = emphasise(make)
                        notes += [f"{name}, {config.kv}, {note}" for note in more]
                notes.append(f"{name}, {cache_note(config.kv, made)}")
    samples = [
        Sample(prompt=prompt, outputs={name: texts[index] for name, texts in written.items()})
        for index, prompt in enumerate(config.prompts)
    ]
    return StageOutput(samples=samples, notes=notes)


BATCH = 8
"""Prompts that ``generate`` continues at once."""


def emphasised(
    model: Any,
    tokenizer: Any,
    config: GenerateConfig,
    context: Context,
    make_cache: Callable[[], Any] = lambda: None,
) -> tuple[list[str], list[str]]:
    """``tenfold generate --emphasise ...``: the prompts continued with these parts emphasised, and what to note.

    Args:
        model: that writes.
        tokenizer: its tokenizer.
        config: of the stage.
        context: of the run.
        make_cache: the cache of a batch, asked for each; None is the model's own.
    """
    texts: list[str] = []
    notes: dict[str, None] = {}
    profile = profile_of(config, context)
    dose = config.dose(uses_template(tokenizer, config.chat), lifts=lifts(model))
    for start in range(0, len(config.prompts), BATCH):
        prompts = []
        for prompt in config.prompts[start : start + BATCH]:
            parts = [part for part in config.emphasise if part in prompt]
            prompts.append(chat_prompt(tokenizer, from_substrings(prompt, parts, "all"), config.chat))
        marks, cache = encode(tokenizer, prompts, device=input_device(model)), make_cache()
        with steer(model, marks, profile=profile, tell=lambda note: notes.update({note: None}), **dose):
            texts += continue_inputs(
                model,
                tokenizer,
                {**marks.inputs, **({} if cache is None else {"past_key_values": cache})},
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                seed=context.seed,
            )
    return texts, [*notes, *loops({f"prompt {number}": text for number, text in enumerate(texts, 1)})]


def answer_file(config: GenerateConfig, context: Context, subjects: Subjects) -> list[Sample]:
    """``tenfold generate --context FILE --question ...``: the answer, and with ``find_evidence`` where it comes from.

    Raises:
        DataError: a context that is no text file.
    """
    assert config.context is not None
    assert config.question is not None
    text = read_context(config.context)
    outputs: dict[str, str] = {}
    for number, name in enumerate(subjects.models):
        with subjects.use(name) as model:
            heads: dict[int, tuple[int, ...]] | None = None if config.find_evidence else {}
            ask = AutoPasta(
                model,
                subjects.tokenizer,
                profile=profile_of(config, context) if config.find_evidence else "default",
                heads=heads,
                **config.dose(chat=False),
                max_answer_tokens=config.max_new_tokens,
                chat={"auto": None, "yes": True, "no": False}[config.chat],
            )
            context.progress("generate", number, len(subjects.models), name)
            outputs[name] = ask(config.question, text, mode="direct").answer
            if config.find_evidence:
                found = ask(config.question, text)
                outputs[f"{name}, with evidence"] = found.answer
                outputs[f"{name}, evidence"] = "; ".join([_evidence(found, text), *ask.notes])
    return [Sample(prompt=config.question, outputs=outputs)]


def read_context(path: Path) -> str:
    """The text of a file to answer from.

    Raises:
        DataError: not there, not UTF-8, or empty.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:  # offsets are those of the file
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 at byte {error.start}"
        raise DataError(f"context: {path}: {reason}", remedy="give a text file") from None
    if not text.strip():
        raise DataError(f"context: {path} is empty", remedy="give a text file with something to answer from")
    return text


def _evidence(found: Answer, text: str) -> str:
    if not found.spans:
        return f"none: no sentence supports what the model quoted, so nothing was emphasised (quote: {found.quote!r})"
    return " ... ".join(
        f"{text[lo:hi]} [characters {lo} to {hi}, {found.stage}, {found.score:.2f}]" for lo, hi in found.spans
    )
