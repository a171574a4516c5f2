"""The engine over transformers: one model with all that is attached to it, for whoever asks it something.

>>> from tenfold.engines.requests import Request
>>> from tenfold.models.tiny import tiny_model
>>> session = Session(tiny_model("llama"), kv="gear:4", heads={0: [1]})
>>> reply = session.generate([Request("It was red, she said.", emphasis=("red",), max_new_tokens=4)])[0]
>>> reply.tokens, reply.finish
(4, 'length')
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from transformers import LogitsProcessorList, StoppingCriteriaList

from tenfold.attend.autopasta.answering import Answer, AutoPasta
from tenfold.attend.chat_marks import MessageSpan, in_chat
from tenfold.attend.pasta.likelihood import alternatives, continuation
from tenfold.attend.pasta.profiles import Profile
from tenfold.attend.pasta.steering import Steered, lifts, steer
from tenfold.attend.text_marks import Marked, Marks, TextSpan, encode, from_substrings
from tenfold.cache.packing import cache_note, packed_caches
from tenfold.cache.spans import own_cache
from tenfold.config.gear import parse_kv
from tenfold.config.pasta import Alpha, SteeringFields
from tenfold.engines.choices import ChoiceTokens
from tenfold.engines.requests import (
    Continuations,
    Finish,
    Found,
    Reply,
    Request,
    Seconds,
    check_capabilities,
    cut_at_stop,
    for_each,
)
from tenfold.engines.writing import Choosing, Ends, Sampling
from tenfold.errors import DataError
from tenfold.models.generation import decoding, left_padded
from tenfold.models.inference import evaluating, input_device, max_positions
from tenfold.models.memory import stored_bytes
from tenfold.models.opened import Opened


class Session:
    """A transformers model as an engine: emphasis, evidence, packed caches, local spans and adapters together.

    Nothing stays attached between two calls. A model that `tenfold.attend.masformer.convert` has converted is read by
    its spans and through its small cache; an adapter of PEFT stays in effect. Requests of a kind are read in batches; a
    text does not depend on what else is in its batch.

    Args:
        model: what `tenfold.models.open.open_model` gives, or a causal language model with its ``tokenizer``.
        tokenizer: of the model; for emphasis, evidence and scores a fast one.
        kv: a packed cache as ``gear:4`` or ``gear:9KiB/token``; of layers of full attention, where there are spans.
        profile: which heads emphasis steers: the name of a profile that comes with the package, a file, or a `Profile`.
        heads: query heads by layer instead of a profile, or ``"all"``.
        alpha: factor of the attention to what is not emphasised, 0 or more, or ``auto`` or ``paper`` as in
            `tenfold.config.pasta.SteeringFields`.
        target_mass: instead of ``alpha``, the share of attention to lift what is emphasised to, within (0, 1).
        generated: ``keep`` gives what is written full weight, ``scale`` treats it as unmarked.
        keep_sink: keep the first token of a prompt at full weight.
        chat: whether questions with evidence go through the chat template; None is where there is one.
        evidence: further arguments of `tenfold.attend.autopasta.answering.AutoPasta`, such as ``max_spans``.
        batch_size: requests at once.

    Raises:
        ConfigError: an unknown cache, a dose out of its range.
    """

    name = "transformers"
    capabilities = frozenset({"text", "messages", "prefill", "seed", "choices", "emphasis", "evidence", "score"})

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        kv: str | None = None,
        profile: Profile | str | Path = "default",
        heads: Mapping[int, Sequence[int]] | Literal["all"] | None = None,
        alpha: Alpha = "auto",
        target_mass: float | None = None,
        generated: Literal["keep", "scale"] = "keep",
        keep_sink: bool = False,
        chat: bool | None = None,
        evidence: Mapping[str, Any] | None = None,
        batch_size: int = 8,
    ) -> None:
        if isinstance(model, Opened):
            model, tokenizer = model.model, tokenizer or model.tokenizer
        if kv is not None:
            parse_kv(kv)  # refuses it now, not at the first request
        self.model, self.tokenizer, self.kv = model, tokenizer, kv
        self.profile, self.heads, self.chat = profile, heads, chat
        fields = {"alpha": alpha, "target_mass": target_mass, "generated": generated, "keep_sink": keep_sink}
        self.fields = SteeringFields.parse(fields, "session")
        self.evidence, self.batch_size = dict(evidence or {}), batch_size
        self._longest, self._cache_note = -1, ""

    @property
    def notes(self) -> tuple[str, ...]:
        """What its packed caches came to, measured on the longest batch so far."""
        return (self._cache_note,) if self._cache_note else ()

    def generate(
        self, requests: Sequence[Request], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> list[Reply]:
        """One text for each request, in their order.

        Args:
            requests: what to write.
            progress: called after each batch with requests done and requests in all.

        Raises:
            ConfigError: a request for what this engine lacks, with an emphasis that no head can see, or with choices
                that are the same to the tokenizer.
            DataError: messages that the chat template refuses; an empty prompt.
            ModelError: messages without a chat template; a cache or emphasis that the model has no layers for.
        """
        check_capabilities(self, requests)
        began, replies = time.perf_counter(), {}  # type: float, dict[int, Reply]
        for indices in _batches(requests, self.batch_size):
            write = self._answer if requests[indices[0]].evidence else self._write
            replies.update(zip(indices, write(requests, indices, time.perf_counter() - began), strict=True))
            progress(len(replies), len(requests))
        return [replies[index] for index in range(len(requests))]

    def score(self, requests: Sequence[Request], continuations: Continuations) -> list[Reply]:
        """The log-probability of each continuation after the prompt and prefill of its request.

        A prompt is read once for all of its continuations, under the emphasis and through the cache that texts are
        written with. Temperature, seed, stop strings and lengths play no part.

        Args:
            requests: prompts, with or without emphasis or evidence.
            continuations: the same texts for all, or some for each; with the space that the model would write.

        Raises:
            ConfigError: as `generate`; an empty continuation.
        """
        check_capabilities(self, requests, also="score")
        named = for_each(requests, continuations)
        began, replies = time.perf_counter(), {}  # type: float, dict[int, Reply]
        for indices in _batches(requests, self.batch_size):
            score = self._score_answers if requests[indices[0]].evidence else self._score
            found = score(requests, indices, [named[index] for index in indices], time.perf_counter() - began)
            replies.update(zip(indices, found, strict=True))
        return [replies[index] for index in range(len(requests))]

    def _write(self, requests: Sequence[Request], indices: Sequence[int], queue: float) -> list[Reply]:
        batch, start = [requests[index] for index in indices], time.perf_counter()
        with self._reading(requests, indices) as (inputs, make_cache, notes), evaluating(self.model):
            prompt = inputs["input_ids"].shape[1]
            _check_length(self.model, prompt + max(request.max_new_tokens for request in batch))
            config = decoding(self.model, self.tokenizer, max(request.max_new_tokens for request in batch))
            config.return_dict_in_generate = True
            choices = [self._choices(requests[index], index, config.eos_token_id) for index in indices]
            sampling, ends = Sampling(batch), Ends(batch, self.tokenizer, prompt, choices)
            processors = [Choosing(choices, prompt), sampling] if any(choices) else [sampling]
            cache = make_cache()
            written = self.model.generate(
                **inputs,
                **({} if cache is None else {"past_key_values": cache}),
                generation_config=config,
                logits_processor=LogitsProcessorList(processors),
                stopping_criteria=StoppingCriteriaList([ends]),
            )
            held = stored_bytes(getattr(written, "past_key_values", None)) // len(batch)
        done, first = time.perf_counter(), sampling.first or start
        replies = []
        for row, request in enumerate(batch):
            ids = ends.tokens(written.sequences[row], row, config.eos_token_id)
            text, finish = self._finished(request, self.tokenizer.decode(ids, skip_special_tokens=True), ids)
            if (of := choices[row]) and (chosen := of.chosen(ids)) is not None:
                text, finish = chosen, "stop"
            replies.append(
                Reply(
                    text,
                    finish,
                    tokens=len(ids),
                    token_ids=ids,
                    prompt_tokens=int(inputs["attention_mask"][row].sum()),
                    seconds=Seconds(queue, first - start, done - first, time.perf_counter() - done),
                    cache_bytes=held,
                    notes=tuple(notes),
                )
            )
        return replies

    def _choices(self, request: Request, index: int, ends: Sequence[int] | None) -> ChoiceTokens | None:
        """The choices of a request as the tokens that stand after its prompt."""
        if not request.choices:
            return None
        prompt = Marked(_since_special(self.tokenizer, self._prompt(request, index).text))
        sequences = [continuation(self.tokenizer, prompt, text) for text in request.choices]
        return ChoiceTokens(request.choices, sequences, ends or ())

    def _finished(self, request: Request, text: str, ids: Sequence[int]) -> tuple[str, Finish]:
        """The text in front of a stop string, and why it ends."""
        text, stopped = cut_at_stop(text, request.stop)
        ends = decoding(self.model, self.tokenizer, 1).eos_token_id or []
        return text, "stop" if stopped or (ids and ids[-1] in ends) else "length"

    def _score(
        self, requests: Sequence[Request], indices: Sequence[int], named: list[list[str]], queue: float
    ) -> list[Reply]:
        start = time.perf_counter()
        prompts = [self._prompt(requests[index], index) for index in indices]
        pairs = zip(prompts, named, strict=True)
        tails = [[continuation(self.tokenizer, prompt, text) for text in texts] for prompt, texts in pairs]
        with self._reading(requests, indices, marked=True) as (_, make_cache, notes):
            marks = encode(self.tokenizer, prompts, device=input_device(self.model), names=_names(indices))
            found = alternatives(self.model, marks, tails, make_cache=make_cache)
        seconds = Seconds(queue, time.perf_counter() - start)
        return [
            Reply(
                prompt_tokens=int(marks.attention_mask[row].sum()),
                log_probabilities=dict(zip(texts, values.total.tolist(), strict=True)),
                seconds=seconds,
                notes=tuple(notes),
            )
            for row, (texts, values) in enumerate(zip(named, found, strict=True))
        ]

    @contextmanager
    def _reading(
        self, requests: Sequence[Request], indices: Sequence[int], marked: bool = False
    ) -> Iterator[tuple[dict[str, Any], Callable[[], Any], dict[str, None]]]:
        """A batch as the model reads it, its caches and notes about it, with all attached while the block runs."""
        batch, notes = [requests[index] for index in indices], {}  # type: list[Request], dict[str, None]
        prompts = [self._prompt(request, index) for request, index in zip(batch, indices, strict=True)]
        device = input_device(self.model)
        with ExitStack() as stack:
            make_cache = stack.enter_context(self.caches())
            if marked or batch[0].emphasis:
                marks = encode(self.tokenizer, prompts, device=device, names=_names(indices))
                inputs = marks.inputs
            else:  # needs no offsets of tokens
                texts = [prompt.text for prompt in prompts]
                inputs = left_padded(self.tokenizer, texts, special=prompts[0].special, device=device)
            if batch[0].emphasis:
                stack.enter_context(self.steering(marks, chat=bool(batch[0].messages), tell=notes.setdefault))
            yield inputs, make_cache, notes

    def steering(
        self, marks: Marks, *, chat: bool = False, tell: Callable[[str], Any] | None = None
    ) -> AbstractContextManager[Steered]:
        """This session's emphasis while a block runs, for measurements that read marked texts themselves.

        Args:
            marks: what is read.
            chat: whether it is a chat, whose default dose is another one.
            tell: called with what is to be noted; by default it is a warning. See `tenfold.attend.pasta.steer`.
        """
        dose: dict[str, Any] = self.fields.dose(chat, lifts=lifts(self.model))
        dose |= {"profile": self.profile} if self.heads is None else {"heads": self.heads}
        dose |= {} if tell is None else {"tell": tell}
        return steer(self.model, marks, **dose)

    @contextmanager
    def caches(self) -> Iterator[Callable[[], Any]]:
        """What makes the cache of a batch, for measurements too; None is the model's own. Packed ones are noted."""
        if self.kv is None:
            yield partial(own_cache, self.model)
            return
        with packed_caches(self.model, self.kv) as (make, made):
            yield make
            read = [cache for cache in made if cache.get_seq_length() > self._longest]
            if read:
                self._longest = max(cache.get_seq_length() for cache in read)
                self._cache_note = cache_note(self.kv, read)

    def _prompt(self, request: Request, index: int) -> Marked:
        """A request as one text, with what is emphasised of it."""
        if request.text is not None:
            places = [part for part in request.emphasis if isinstance(part, TextSpan)]
            found = Marked(request.text, (*_occurring(request.text, request.emphasis), *places))
        else:
            spans = [part for part in request.emphasis if isinstance(part, MessageSpan)]
            spans += [
                MessageSpan(at, span.start, span.end, span.strength)
                for at, message in enumerate(request.messages)
                for span in _occurring(message.get("content"), request.emphasis)
            ]
            found = in_chat(self.tokenizer, request.messages, spans, place=f"prompt {index + 1}")
        return Marked(found.text + request.prefill, found.spans, found.special)

    def _answer(self, requests: Sequence[Request], indices: Sequence[int], queue: float) -> list[Reply]:
        batch = [requests[index] for index in indices]
        with self._asking(batch[0]) as (ask, options):
            answers = self._ask(ask, batch, options)
            notes = tuple(ask.notes)
        replies = []
        for request, answer in zip(batch, answers, strict=True):
            text, finish = self._finished(request, answer.answer, answer.token_ids)
            parts = answer.timings
            seconds = Seconds(queue, parts.get("identify", 0.0), parts["answer"], parts.get("locate", 0.0))
            replies.append(
                Reply(
                    text,
                    finish,
                    tokens=len(answer.token_ids),
                    token_ids=answer.token_ids,
                    prompt_tokens=answer.prompt_tokens,
                    cached_tokens=answer.reused,
                    seconds=seconds,
                    found=_found(answer),
                    notes=notes,
                )
            )
        return replies

    def _score_answers(
        self, requests: Sequence[Request], indices: Sequence[int], named: list[list[str]], queue: float
    ) -> list[Reply]:
        batch, start = [requests[index] for index in indices], time.perf_counter()
        with self._asking(batch[0]) as (ask, options):
            answers = self._ask(ask, batch, options)
            asked = [request.evidence for request in batch if request.evidence]
            scores: list[dict[str, float]] = [{} for _ in batch]
            for column in range(max(map(len, named))):
                texts = [row[min(column, len(row) - 1)] for row in named]
                questions, contexts = [item.question for item in asked], [item.context for item in asked]
                found = ask.log_probabilities(questions, contexts, texts, given=answers, **options)
                for row, text, value in zip(scores, texts, found.total.tolist(), strict=True):
                    row[text] = value
            notes = tuple(ask.notes)
        seconds = Seconds(queue, time.perf_counter() - start)
        return [
            Reply(
                log_probabilities=row,
                seconds=seconds,
                found=_found(answer),
                notes=notes,
            )
            for row, answer in zip(scores, answers, strict=True)
        ]

    @contextmanager
    def _asking(self, request: Request) -> Iterator[tuple[AutoPasta, dict[str, Any]]]:
        """AutoPASTA on this model and its caches, and the mode of a batch."""
        assert request.evidence is not None
        steers = request.evidence.mode not in ("direct", "iterative")
        with self.caches() as make_cache:
            ask = AutoPasta(
                self.model,
                self.tokenizer,
                profile=self.profile,
                heads=self.heads if steers else {},
                **self.fields.dose(chat=False),
                chat=self.chat,
                max_answer_tokens=request.max_new_tokens,
                make_cache=None if self.kv is None else make_cache,
                **self.evidence,
            )
            yield ask, {"mode": request.evidence.mode, "batch_size": self.batch_size}

    def _ask(self, ask: AutoPasta, batch: Sequence[Request], options: dict[str, Any]) -> list[Answer]:
        asked = [request.evidence for request in batch if request.evidence]
        gold = [list(item.gold) for item in asked]
        return ask.batch([item.question for item in asked], [item.context for item in asked], gold=gold, **options)


def _found(answer: Answer) -> Found:
    return Found(answer.spans, answer.quote, answer.score, answer.stage)


def _occurring(text: Any, parts: Sequence[Any]) -> tuple[TextSpan, ...]:
    """Where the parts of a text occur that are given as texts."""
    return from_substrings(text, [part for part in parts if isinstance(part, str) and part in text], "all").spans


def _since_special(tokenizer: Any, text: str) -> str:
    """A text from its last special token on, in front of which nothing matters to the tokens behind it."""
    return text[max([0, *(text.rfind(token) for token in tokenizer.all_special_tokens)]) :]


def _names(indices: Sequence[int]) -> list[str]:
    return [f"prompt {index + 1}" for index in indices]


def _check_length(model: Any, tokens: int) -> None:
    """Refuse what a table of positions has no rows for; rotary ones go on, at a loss that transformers warns of."""
    most = max_positions(model)
    rotary = getattr(model.config.get_text_config(), "rope_parameters", None)
    if most is not None and tokens > most and not rotary:
        raise DataError(
            f"{tokens} tokens to read and write, and the model was built for {most}",
            remedy="shorten the prompt or max_new_tokens, or take a model for longer texts",
        )


def _batches(requests: Sequence[Request], size: int) -> Iterator[list[int]]:
    """Indices of requests that can be read together."""
    kinds: dict[Hashable, list[int]] = {}
    for index, request in enumerate(requests):
        evidence = request.evidence and (request.evidence.mode, request.max_new_tokens)
        kinds.setdefault((evidence, bool(request.messages), bool(request.emphasis)), []).append(index)
    for indices in kinds.values():
        yield from (indices[start : start + size] for start in range(0, len(indices), size))
