"""AutoPASTA (Zhang et al. 2024, arXiv 2409.10790): a model names the key sentence itself and then attends to it.

First the model is asked which sentence of the context holds the evidence. What it writes is only used to find that
sentence in the context again. Then the ordinary question is answered while the sentence is emphasised with PASTA
(`tenfold.attend.pasta`): the prompt is the same as without, to the last token.

    ask = AutoPasta(model, tokenizer)
    ask("When did Dr. Smith move to Paris?", context).answer
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tenfold.attend.attention import self_attentions
from tenfold.attend.autopasta.prompts import ANSWER_PROMPT, IDENTIFY_PROMPT, QuestionPrompt
from tenfold.attend.autopasta.quote_matching import (
    MIN_RARE,
    Embed,
    Hit,
    Stage,
    clean_quote,
    is_refusal,
    locate_quote,
    rare_words,
)
from tenfold.attend.autopasta.sentences import sentences
from tenfold.attend.pasta.likelihood import Scores, continuation, likelihood
from tenfold.attend.pasta.profiles import Profile, all_heads, by_layer, load_profile
from tenfold.attend.pasta.steering import steer
from tenfold.attend.reach import sights, split
from tenfold.attend.text_marks import Marked, Marks, encode
from tenfold.config.autopasta import Mode
from tenfold.data.templates import require_chat_template
from tenfold.errors import ConfigError
from tenfold.models.generation import continue_ids
from tenfold.models.inference import input_device, max_positions

Region = tuple[int, int]
"""Characters ``[start, end)`` of a context."""

MODES: tuple[Mode, ...] = ("direct", "iterative", "autopasta", "gold", "whole")
"""The method and what the paper compares it with: nothing steered; the quote put into the prompt; the sentence found
for the quote steered; given spans steered; the whole context steered."""

_WITH_QUOTE = "{question}\nKey sentence of the text: {quote}"


@dataclass(frozen=True)
class Answer:
    """An answer, and where the model was made to look for it.

    Args:
        answer: the generated text without outer white space.
        quote: what the model wrote when asked for the sentence, as it is; None where it was not asked.
        spans: the emphasised parts ``[start, end)`` of the caller's context, in its order; empty where nothing was.
        score: how alike quote and sentence are, -1 to 1 (of several the least alike; see `Hit`); None without a quote.
        stage: how that sentence was found: exact, normalised, ratio or embedding.
        fallback: whether the mode found nothing to use, so that the question was answered as in mode ``direct``.
        reused: prompt tokens that the first pass had computed for the second already.
        prompt_tokens: of the prompt that was answered.
        token_ids: of the answer, the one that ends the turn included.
        timings: seconds of the steps ``identify``, ``locate`` and ``answer``; in a batch, its share of each.
    """

    answer: str
    quote: str | None = None
    spans: tuple[Region, ...] = ()
    score: float | None = None
    stage: Stage | None = None
    fallback: bool = False
    reused: int = 0
    prompt_tokens: int = field(default=0, compare=False)
    token_ids: tuple[int, ...] = field(default=(), compare=False)
    timings: dict[str, float] = field(default_factory=dict, compare=False)


class _Row(NamedTuple):
    """One question, and the spans that were given for it."""

    question: str
    context: str
    gold: Sequence[Region]


@dataclass(frozen=True)
class _Evidence:
    """What a mode makes of a row before it is answered; ``seen`` is what the first pass read and its cache."""

    quote: str | None = None
    pasted: str | None = None
    spans: tuple[Region, ...] = ()
    hits: tuple[Hit, ...] = ()
    fallback: bool = False
    timings: dict[str, float] = field(default_factory=dict)
    seen: tuple[Tensor, DynamicCache] | None = None


class AutoPasta:
    """Answers questions over a context, with the model's own evidence emphasised.

    The model is left as it was after every call, also after one that failed.

    Args:
        model: a causal language model whose attention goes through transformers' interface.
        tokenizer: its tokenizer, a fast one.
        profile: which heads to steer: the name of a profile that comes with the package, a JSON file, or a `Profile`.
        heads: query heads by layer instead of a profile, or ``"all"``, which the paper found harmful.
        alpha: factor of the attention to the rest of the prompt, 0 or more: the paper's ``exp(-delta)``.
        target_mass: instead of ``alpha``, the share of attention to lift the sentence to; see `steer`.
        generated: ``scale`` treats what is written as unmarked; see `steer`.
        keep_sink: keep the first token at full weight; see `steer`.
        identify_prompt: asks for the sentence; ``{context}`` and ``{question}`` stand in it once each, other braces
            are doubled. The longer its beginning is that of ``answer_prompt``, the more of the first pass is reused.
        answer_prompt: asks for the answer, likewise.
        split: from a context to the spans of its sentences.
        embed: from texts to one row of numbers each, for quotes that are not copies; see `locate`.
        min_similarity: least cosine of quote and sentence, -1 to 1; below it nothing is steered. Tune it per embedder.
        max_spans: sentences to emphasise at most; the paper takes one.
        max_quote_tokens: longest quote.
        max_answer_tokens: longest answer.
        chat: whether prompts go through the chat template; by default where the tokenizer has one.
        template: further arguments of the chat template, such as ``{"enable_thinking": False}``.
        reuse: keep the keys and values of the first pass, up to the first mark, for the second. Exact; only for one row
            at a time and full-attention layers, otherwise everything is computed again.
        make_cache: makes an empty cache for each thing that is read, such as a packed one, whose prompt is never used
            twice; by default, and where it gives None, the model's own.

    Raises:
        ConfigError: a field out of its range, a prompt without its two fields, a profile or heads of another model.
        ModelError: a model outside the attention interface; ``chat`` without a chat template.

    Source: section 3 of the paper; prompts, fallback and reuse are ours (docs/methods/autopasta.md).

    >>> from tenfold.models.tiny import tiny_model
    >>> opened = tiny_model("llama")
    >>> ask = AutoPasta(opened.model, opened.tokenizer, heads={0: [1], 1: [0, 2]}, max_answer_tokens=2)
    >>> ask("Where is the cat?", "The dog is out. The cat is in.", mode="gold", gold=[(16, 30)]).spans
    ((16, 30),)
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        profile: Profile | str | Path = "default",
        heads: Mapping[int, Sequence[int]] | Literal["all"] | None = None,
        alpha: float = 0.01,
        target_mass: float | None = None,
        generated: Literal["keep", "scale"] = "keep",
        keep_sink: bool = False,
        identify_prompt: str = IDENTIFY_PROMPT,
        answer_prompt: str = ANSWER_PROMPT,
        split: Callable[[str], Sequence[Region]] = sentences,
        embed: Embed = rare_words,
        min_similarity: float = MIN_RARE,
        max_spans: int = 1,
        max_quote_tokens: int = 128,
        max_answer_tokens: int = 32,
        chat: bool | None = None,
        template: Mapping[str, Any] | None = None,
        reuse: bool = True,
        make_cache: Callable[[], Any] | None = None,
    ) -> None:
        if min(max_quote_tokens, max_answer_tokens) < 1:
            lengths = f"{max_quote_tokens}, {max_answer_tokens}"
            raise ConfigError(f"max_quote_tokens, max_answer_tokens: {lengths}", remedy="give 1 or more")
        locate_quote(
            "", "", embed=embed, min_similarity=min_similarity, max_spans=max_spans
        )  # refuses what it refuses later
        self.model, self.tokenizer, self.make_cache = model, tokenizer, make_cache
        self.reuse = reuse and make_cache is None
        weak: dict[str, Any] = {"alpha": alpha} if target_mass is None else {"target_mass": target_mass}
        self.dose = {**weak, "generated": generated, "keep_sink": keep_sink}
        self.split, self.embed = split, embed
        self.min_similarity, self.max_spans = min_similarity, max_spans
        self.max_quote_tokens, self.max_answer_tokens = max_quote_tokens, max_answer_tokens
        self.notes: dict[str, None] = {}  # about heads that did not see a sentence, each once
        self._ask_sentence = QuestionPrompt("identify_prompt", identify_prompt)
        self._ask_answer = QuestionPrompt("answer_prompt", answer_prompt)
        if chat:
            require_chat_template(tokenizer)
        self.chat = dict(template or {}) if (tokenizer.chat_template if chat is None else chat) else None
        if heads is None:
            found = profile if isinstance(profile, Profile) else load_profile(profile)
            found.check_model(model)
            heads = found.heads
        elif heads == "all":
            heads = by_layer(all_heads(model))
        self.heads = {layer: tuple(indices) for layer, indices in dict(heads).items()}
        with self._steered(encode(tokenizer, ["."], device=input_device(model))):
            pass  # nothing is marked: this only refuses heads and doses that it would refuse later

    def __call__(
        self, question: str, context: str, *, mode: Mode = "autopasta", gold: Sequence[Region] | None = None
    ) -> Answer:
        """Answer one question.

        Args:
            question: not blank.
            context: what it is answered from; without a sentence it is answered unsteered.
            mode: one of `MODES`.
            gold: for mode ``gold``, the parts ``[start, end)`` of the context to emphasise; none is a fallback.

        Raises:
            ConfigError: a blank question, an unknown mode, mode ``gold`` without ``gold`` or with parts outside the
                context, a prompt that leaves the model no room to answer.
        """
        return self.batch([question], [context], mode=mode, gold=None if gold is None else [gold])[0]

    def batch(
        self,
        questions: Sequence[str],
        contexts: Sequence[str],
        *,
        mode: Mode = "autopasta",
        gold: Sequence[Sequence[Region]] | None = None,
        batch_size: int = 8,
    ) -> list[Answer]:
        """Answer many questions, each from its own context; the answers are those of single calls.

        Args:
            questions: none of them blank.
            contexts: one for each question.
            mode: one of `MODES`.
            gold: for mode ``gold``, the parts to emphasise for each question; other modes do not look at it.
            batch_size: questions at once; 1 reuses the first pass, which pays for long contexts.

        Raises:
            ConfigError: as a single call; lists of different lengths.
        """
        rows = _rows(questions, contexts, mode, gold)
        answers: list[Answer] = []
        for part in _parts(rows, batch_size):
            evidence = self._evidence(part, mode)
            answers += self._answer(self._prompts(part, evidence), evidence)
        return answers

    def log_probabilities(
        self,
        questions: Sequence[str],
        contexts: Sequence[str],
        continuations: Sequence[str],
        *,
        mode: Mode = "autopasta",
        gold: Sequence[Sequence[Region]] | None = None,
        given: Sequence[Answer] | None = None,
        batch_size: int = 8,
    ) -> Scores:
        """How likely given answers are, under a mode: the measure for heads, and for how far an answer is faithful.

        Args:
            questions: none of them blank.
            contexts: one for each question.
            continuations: the text after the prompt, for each question, with the space that the model would write.
            mode: one of `MODES`.
            gold: as in `batch`.
            given: what `batch` answered in this mode: its evidence is used, and the model is not asked for it again.
            batch_size: questions at once.

        Raises:
            ConfigError: as `batch`; an empty continuation; other than one of ``given`` for each question.

        >>> from tenfold.models.tiny import tiny_model
        >>> opened = tiny_model("llama")
        >>> ask = AutoPasta(opened.model, opened.tokenizer, heads={1: [0]})
        >>> scores = ask.log_probabilities(["Who?"], ["Ann did."], ["Ann"], mode="gold", gold=[[(0, 3)]])
        >>> bool(scores.total < scores.first)
        True
        """
        rows = _rows(questions, contexts, mode, gold)
        if len(continuations) != len(rows) or (given is not None and len(given) != len(rows)):
            counts = f"{len(continuations)} continuations, {len(rows if given is None else given)} given"
            raise ConfigError(f"{len(rows)} questions, {counts}", "give one for each")
        known = [None] * len(rows) if given is None else [_known(answer, mode) for answer in given]
        found = [torch.zeros(0, 2)]
        parts = (_parts(values, batch_size) for values in (rows, continuations, known))
        for part, texts, evidence in zip(*parts, strict=True):
            prompts = self._prompts(part, self._evidence(part, mode) if given is None else evidence)
            tails = [continuation(self.tokenizer, *pair) for pair in zip(prompts, texts, strict=True)]
            marks, _ = self._marks(prompts, max(map(len, tails)))
            with self._steered(marks):
                scores = likelihood(self.model, marks, tails, make_cache=self.make_cache)
            found.append(torch.stack(scores, 1))
        return Scores(*torch.cat(found).unbind(1))

    def identifying(self, question: str, context: str) -> Marked:
        """The prompt that asks for the sentence, as the model reads it; nothing is marked."""
        return self._ask_sentence.marked(question, context, tokenizer=self.tokenizer, chat=self.chat)

    def answering(
        self, question: str, context: str, spans: Sequence[Region] = (), *, quote: str | None = None
    ) -> Marked:
        """The prompt that asks for the answer, as the model reads it.

        Args:
            question: the question.
            context: its context.
            spans: parts of the context to mark; the text is the same whichever they are.
            quote: for the baseline of iterative prompting, a sentence to put after the question.
        """
        if quote is not None:
            question = _WITH_QUOTE.format(question=question, quote=quote)
        return self._ask_answer.marked(question, context, spans, tokenizer=self.tokenizer, chat=self.chat)

    def _evidence(self, rows: Sequence[_Row], mode: Mode) -> list[_Evidence]:
        if mode == "direct":
            return [_Evidence() for _ in rows]
        if mode in ("gold", "whole"):
            regions = [row.gold if mode == "gold" else _inner(row.context) for row in rows]
            return [_Evidence(spans=tuple(sorted(spans)), fallback=not spans) for spans in regions]
        start = time.perf_counter()
        quotes, seen = self._identify(rows)
        identify, found = (time.perf_counter() - start) / len(rows), []
        for quote, row in zip(quotes, rows, strict=True):
            timings = {"identify": identify}
            if mode == "iterative":
                pasted = None if is_refusal(quote) else clean_quote(quote)
                found.append(_Evidence(quote, pasted, fallback=pasted is None, timings=timings, seen=seen))
                continue
            start = time.perf_counter()
            limits: Any = {"min_similarity": self.min_similarity, "max_spans": self.max_spans}
            hits = locate_quote(quote, row.context, self.split(row.context), embed=self.embed, **limits)
            timings["locate"] = time.perf_counter() - start
            spans = tuple((hit.start, hit.end) for hit in hits)
            found.append(_Evidence(quote, None, spans, hits, not hits, timings, seen))
        return found

    def _identify(self, rows: Sequence[_Row]) -> tuple[list[str], tuple[Tensor, DynamicCache] | None]:
        """What the model says is the sentence, and for a single row what it has read, where that can be cut."""
        prompts = [self.identifying(row.question, row.context) for row in rows]
        marks = encode(self.tokenizer, prompts, device=input_device(self.model))
        self._check_room(marks, self.max_quote_tokens)
        cache = self._empty_cache() if self.reuse and len(rows) == 1 else None
        written = self._write(marks, self.max_quote_tokens, cache)
        return self._read(written), None if cache is None else (marks.input_ids[0], cache)

    def _empty_cache(self) -> DynamicCache | None:
        """A cache that can be cut anywhere; None for models with windows, which forget the beginning."""
        cache = DynamicCache(config=self.model.config)
        usual = getattr(self.model.generation_config, "cache_implementation", None) is None
        return cache if usual and all(type(layer) is DynamicLayer for layer in cache.layers) else None

    def _write(self, marks: Marks, tokens: int, cache: DynamicCache | None) -> list[list[int]]:
        if cache is None and self.make_cache is not None:
            cache = self.make_cache()
        inputs = marks.inputs if cache is None else {**marks.inputs, "past_key_values": cache}
        return continue_ids(self.model, self.tokenizer, inputs, max_new_tokens=tokens)

    def _read(self, written: Sequence[list[int]]) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        return texts

    def _prompts(self, rows: Sequence[_Row], evidence: Sequence[_Evidence]) -> list[Marked]:
        pairs = zip(rows, evidence, strict=True)
        return [self.answering(row.question, row.context, e.spans, quote=e.pasted) for row, e in pairs]

    def _answer(self, prompts: Sequence[Marked], evidence: Sequence[_Evidence]) -> list[Answer]:
        start = time.perf_counter()
        marks, blind = self._marks(prompts, self.max_answer_tokens)
        cache, reused = _shared(marks, evidence[0].seen)
        with self._steered(marks):
            written = self._write(marks, self.max_answer_tokens, cache)
        texts, read = self._read(written), marks.attention_mask.sum(1).tolist()
        seconds = (time.perf_counter() - start) / len(prompts)
        answers = []
        for row, (text, e) in enumerate(zip(texts, evidence, strict=True)):
            least = min(e.hits, key=lambda hit: hit.score, default=None)
            score, stage = (least.score, least.stage) if least else (None, None)
            spans, fallback = ((), True) if row in blind else (e.spans, e.fallback)
            timings = {**e.timings, "answer": seconds}
            tokens: Any = {"prompt_tokens": read[row], "token_ids": tuple(written[row]), "timings": timings}
            answers.append(Answer(text.strip(), e.quote, spans, score, stage, fallback, reused, **tokens))
        return answers

    def _marks(self, prompts: Sequence[Marked], tokens: int) -> tuple[Marks, list[int]]:
        """Prompts as tokens, and the rows whose marks sliding windows have left behind: nothing is marked there."""
        marks = encode(self.tokenizer, prompts, device=input_device(self.model))
        self._check_room(marks, tokens)
        groups = sights(self_attentions(self.model), self.heads, marks)
        blind = split(groups, marks)[2] if groups else []
        marked = marks.marked.clone()
        marked[blind] = False
        return replace(marks, marked=marked), blind

    def _steered(self, marks: Marks) -> AbstractContextManager[Any]:
        return steer(self.model, marks, heads=self.heads, tell=self._note, **self.dose)

    def _note(self, note: str) -> None:
        self.notes[note] = None

    def _check_room(self, marks: Marks, tokens: int) -> None:
        length, most = marks.input_ids.shape[1], max_positions(self.model)
        if most is not None and length + tokens > most:
            raise ConfigError(
                f"a prompt of {length} tokens and {tokens} to write do not fit into the model's {most} positions",
                remedy="shorten the context, leaving out first what does not answer the question",
            )


def _shared(marks: Marks, seen: tuple[Tensor, DynamicCache] | None) -> tuple[DynamicCache | None, int]:
    """The first pass's cache, cut where the prompts part, at the first mark, or before the last token; its length."""
    if seen is None:
        return None, 0
    ids, cache = seen
    here = marks.input_ids[0]
    most = min(len(ids), len(here) - 1, *(start for start, _ in marks.tokens(0)))
    same = int((ids[:most] == here[:most]).long().cumprod(0).sum())
    if same == 0:
        return None, 0
    if same < cache.get_seq_length():
        cache.crop(same - cache.get_seq_length())
    return cache, same


def _known(answer: Answer, mode: Mode) -> _Evidence:
    """The evidence behind an answer."""
    pasted = clean_quote(answer.quote) if mode == "iterative" and answer.quote and not answer.fallback else None
    return _Evidence(pasted=pasted, spans=answer.spans)


def _inner(context: str) -> list[Region]:
    """The context without outer white space, which a chat template may take away."""
    start = len(context) - len(context.lstrip())
    return [(start, len(context.rstrip()))] if context.strip() else []


def _rows(
    questions: Sequence[str], contexts: Sequence[str], mode: Mode, gold: Sequence[Sequence[Region]] | None
) -> list[_Row]:
    """Checked questions with their contexts, and with the given spans where the mode wants them."""
    if mode not in MODES:
        raise ConfigError(f"mode: {mode!r} is unknown", remedy=f"choose from {', '.join(MODES)}")
    if mode == "gold" and gold is None:
        raise ConfigError("gold: missing in mode gold", remedy="give the spans to emphasise, or take another mode")
    given = gold if mode == "gold" and gold is not None else [()] * len(questions)
    if not len(questions) == len(contexts) == len(given):
        lengths = f"{len(questions)} questions, {len(contexts)} contexts, {len(given)} lists of spans"
        raise ConfigError(lengths, remedy="give one of each for every question")
    for number, (question, context, spans) in enumerate(zip(questions, contexts, given, strict=True), 1):
        if not question.strip():
            raise ConfigError(f"question {number} is blank", remedy="ask something")
        wrong = [span for span in spans if not 0 <= span[0] < span[1] <= len(context)]
        if wrong:
            raise ConfigError(
                f"gold: {wrong[0]} of question {number} does not lie within its context of {len(context)} characters",
                remedy="give [start, end) offsets of this context",
            )
    return [_Row(*row) for row in zip(questions, contexts, given, strict=True)]


def _parts(rows: Sequence[Any], size: int) -> list[Sequence[Any]]:
    if size < 1:
        raise ConfigError(f"batch_size: {size} is below 1", remedy="give 1 or more")
    return [rows[start : start + size] for start in range(0, len(rows), size)]
