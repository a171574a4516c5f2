"""Questions over a context: the stage ``autopasta`` for many, and the answer of ``tenfold generate`` to one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from tenfold.attend.autopasta.answering import Answer, AutoPasta
from tenfold.attend.autopasta.embed import hidden_states
from tenfold.attend.autopasta.quote_matching import MIN_RARE, rare_words
from tenfold.attend.pasta.profiles import Profile
from tenfold.attend.pasta.prompts import profile_of
from tenfold.attend.pasta.tasks import colour_questions
from tenfold.cache.packing import cache_note, packed_caches
from tenfold.config.autopasta import AutoPastaConfig
from tenfold.data.rows import Question
from tenfold.errors import DataError
from tenfold.evaluate.choice import share
from tenfold.evaluate.compare import paired_metric
from tenfold.evaluate.qa import answering_sentences, exact_match, gold_passages, holds, passages_of, token_f1
from tenfold.models.inference import max_positions
from tenfold.models.opened import Opened
from tenfold.stage.context import Context, StageOutput
from tenfold.stage.record import Table
from tenfold.stage.results import Metric, Result

SUBJECTS = {"direct": "before", "autopasta": "after"}
"""The mode that the report compares with, and the one that it compares."""
MIN_SIMILARITY = {"words": MIN_RARE, "model": 0.87}
"""Least cosine by embedder: a model's hidden states lie close together."""
SPARE = 64
"""Tokens that a quote in the prompt, or a right answer that is scored, may take beside."""
NAMED = ("probability", "exact_match", "f1", "evidence")


def run_autopasta(config: AutoPastaConfig, context: Context) -> StageOutput:
    """The stage ``autopasta``: each mode once, remembered when the run is killed between two."""
    profile = profile_of(config, context)
    opened = context.model.open()
    rows = _questions(config, context)
    room = (max_positions(opened.model) or 2**20) - max(config.max_quote_tokens, config.max_answer_tokens) - SPARE
    room = min(room, config.max_prompt_tokens or room)
    found: dict[str, dict[str, list[float]]] = {}
    results, packed = [], {}  # type: list[Result], dict[int, str]
    exact: AbstractContextManager[Any] = nullcontext((None, []))
    with packed_caches(opened.model, config.kv) if config.kv else exact as (make_cache, made):
        ask = _asking(config, opened, profile, make_cache)
        asked = [Asked.of(row, ask, room) for row in rows]
        for number, mode in enumerate(config.modes):
            context.progress("autopasta", number, len(config.modes), mode)
            found[mode], caches = _mode(ask, asked, mode, config, context, made)
            packed |= caches
            results.append(_result(found[mode], SUBJECTS.get(mode, mode), config))
    if {"direct", "autopasta"} <= set(found):
        results.append(_difference(found["direct"], found["autopasta"]))
    dropped = sum(item.dropped for item in asked)
    return StageOutput(
        results=results,
        tables=[_table(found)],
        attached={"heads": profile.size, "layers": len(profile.heads)},
        notes=[
            "before: mode direct; after: mode autopasta. Nothing of the model is changed.",
            *ask.notes,
            *([packed[max(packed)]] if packed else []),  # of the longest cache
            *([f"{dropped} passages were left out so that prompts fit into {room} tokens"] if dropped else []),
        ],
    )


def _asking(config: AutoPastaConfig, opened: Opened, profile: Profile, make_cache: Any) -> AutoPasta:
    return AutoPasta(
        opened.model,
        opened.tokenizer,
        profile=profile,
        **config.dose(chat=False),
        embed=hidden_states(opened.model, opened.tokenizer) if config.embedder == "model" else rare_words,
        min_similarity=MIN_SIMILARITY[config.embedder] if config.min_similarity is None else config.min_similarity,
        max_spans=config.max_spans,
        max_quote_tokens=config.max_quote_tokens,
        max_answer_tokens=config.max_answer_tokens,
        make_cache=make_cache,
    )


class Asked:
    """A question with its context as one text, and where in it an answer stands.

    Args:
        question: the question.
        context: one text.
        answers: all that count as right.
        gold: ``[start, end)`` of the sentences that hold an answer, within the gold passages where they are known.
        dropped: passages that were left out.
    """

    def __init__(
        self, question: str, context: str, answers: Sequence[str], gold: Sequence[tuple[int, int]], dropped: int
    ) -> None:
        self.question, self.context, self.answers, self.gold, self.dropped = question, context, answers, gold, dropped

    @classmethod
    def of(cls, row: Question, ask: AutoPasta, room: int) -> Asked:
        """A row, with as many passages as fit; those without an answer go first, the last ones before others.

        Raises:
            DataError: the passages with an answer alone do not fit.
        """
        passages, gold = passages_of(row), gold_passages(row)
        kept = list(range(len(passages)))
        while len(ask.tokenizer(ask.identifying(row.question, _join(passages, kept)).text)["input_ids"]) > room:
            spare = [index for index in kept if index not in gold]
            if not spare:
                raise DataError(
                    f"row {row.id!r}: its context is longer than {room} tokens",
                    remedy="shorten it, raise max_prompt_tokens if you set it, or take a model that reads more",
                )
            kept.remove(spare[-1])
        context = _join(passages, kept)
        spans, begin = [], 0
        for index in kept:
            if index in gold:
                inside = answering_sentences(passages[index], row.answers)
                spans += [(begin + lo, begin + hi) for lo, hi in inside]
            begin += len(passages[index]) + len(_GAP)
        return cls(row.question, context, row.answers, spans, len(passages) - len(kept))


_GAP = "\n\n"


def _join(passages: Sequence[str], kept: Sequence[int]) -> str:
    return _GAP.join(passages[index] for index in kept)


def _questions(config: AutoPastaConfig, context: Context) -> list[Question]:
    if context.rows is None:
        return colour_questions(config.samples, context.seed)
    return [row for row in context.rows if isinstance(row, Question)]


def _mode(
    ask: AutoPasta, asked: Sequence[Asked], mode: Any, config: AutoPastaConfig, context: Context, made: Sequence[Any]
) -> tuple[dict[str, list[float]], dict[int, str]]:
    """One value for each question and figure, and what packed caches came to, by tokens.

    Finished batches are kept with both, so that a killed run goes on and tells the same.
    """
    size = config.batch_size

    def work(some: Sequence[Asked]) -> dict[str, Any]:
        values, longest = measure(ask, some, mode), max((cache.get_seq_length() for cache in made), default=0)
        return {"values": values, "cache": [longest, cache_note(config.kv, made)] if config.kv and made else None}

    batches = {f"{mode} {start}": asked[start : start + size] for start in range(0, len(asked), size)}
    parts = context.store.map(
        batches,
        work,
        tell=lambda done, _: context.progress(f"autopasta, {mode}", min(done * size, len(asked)), len(asked)),
    )
    found: dict[str, list[float]] = {}
    for part in parts.values():
        for name, values in part["values"].items():
            found.setdefault(name, []).extend(values)
    return found, dict(part["cache"] for part in parts.values() if part["cache"])


def measure(ask: AutoPasta, asked: Sequence[Asked], mode: Any) -> dict[str, list[float]]:
    """What a mode does on some questions: one value for each question and figure."""
    questions, contexts = [item.question for item in asked], [item.context for item in asked]
    options: dict[str, Any] = {"mode": mode, "gold": [item.gold for item in asked], "batch_size": len(asked)}
    answers = ask.batch(questions, contexts, **options)
    space = "" if ask.chat is not None else " "
    right = [space + item.answers[0] for item in asked]
    scores = ask.log_probabilities(questions, contexts, right, given=answers, **options)
    texts = [answer.answer.split("\n")[0] for answer in answers]
    return {
        "probability": scores.first.exp().tolist(),
        "log_probability": scores.total.tolist(),
        "exact_match": _best(exact_match, texts, asked),
        "f1": _best(token_f1, texts, asked),
        **({} if mode == "direct" else {"evidence": _evidence_found(answers, asked, mode)}),
        "fallback": [float(answer.fallback) for answer in answers],
        "seconds": [sum(answer.timings.values()) for answer in answers],
    }


def _best(metric: Any, texts: Sequence[str], asked: Sequence[Asked]) -> list[float]:
    return [max(metric(text, right) for right in item.answers) for text, item in zip(texts, asked, strict=True)]


def _evidence_found(answers: Sequence[Answer], asked: Sequence[Asked], mode: str) -> list[float]:
    """Whether what was emphasised, or in iterative prompting quoted, holds an answer."""
    found = []
    for answer, item in zip(answers, asked, strict=True):
        quoted = [answer.quote or ""] if mode == "iterative" else []
        parts = [*(item.context[lo:hi] for lo, hi in answer.spans), *quoted]
        found.append(float(any(holds(part, item.answers) for part in parts)))
    return found


def _result(values: Mapping[str, Sequence[float]], subject: str, config: AutoPastaConfig) -> Result:
    metrics = [share(name, values[name]) for name in (*NAMED, "fallback") if name in values]
    metrics[-1] = metrics[-1].model_copy(update={"better": "neither"})
    seconds = torch.tensor(values["seconds"])
    metrics.append(
        Metric(
            name="time",
            value=float(seconds.mean()),
            unit="s",
            count=len(seconds),
            better="lower",
            kind="timing",
        )
    )
    settings = {"questions": len(seconds), **config.dose(chat=False), "probability": "of the first token of an answer"}
    settings |= {} if config.kv is None else {"kv": config.kv}
    return Result(task="question answering", subject=subject, metrics=tuple(metrics), settings=settings)


def _difference(first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]]) -> Result:
    changes = {
        name: torch.tensor(second[name]) - torch.tensor(first[name]) for name in ("probability", "exact_match", "f1")
    }
    metrics = tuple(paired_metric(f"{name}_difference", change.double()) for name, change in changes.items())
    return Result(task="question answering", subject="after - before", metrics=metrics)


def _mean(values: Sequence[float] | None) -> float | None:
    return sum(values) / len(values) if values else None


def _table(found: Mapping[str, Mapping[str, Sequence[float]]]) -> Table:
    names = (*NAMED, "fallback", "seconds")
    rows = tuple((mode, *(_mean(values.get(name)) for name in names)) for mode, values in found.items())
    return Table(title="Ways to answer", columns=("mode", *(name.replace("_", " ") for name in names)), rows=rows)
