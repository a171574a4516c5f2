"""What every engine is asked and what it answers, whichever backend does the work; torch-free.

An `Engine` continues requests and scores continuations. What a backend lacks it refuses by name: nothing that a request
asks for is left out in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tenfold.config.autopasta import Mode
from tenfold.errors import ConfigError

if TYPE_CHECKING:  # what they come from loads torch
    from tenfold.attend.chat_marks import MessageSpan
    from tenfold.attend.text_marks import TextSpan

Finish = Literal["stop", "length", "error"]
"""Why a text ends: a stop string or the end of the model's turn; ``max_new_tokens``; the engine failed."""

REMEDIES = {
    "text": "give messages, or an engine that continues plain text",
    "messages": "give text, or a model with a chat template",
    "prefill": "leave prefill out, or take the engine transformers or llama.cpp",
    "seed": "leave seed out, or temperature at 0",
    "grammar": "leave grammar out, or take the engine llama.cpp",
    "choices": "leave choices out, or take the engine transformers or llama.cpp, or a server that has something for "
    "them (accepts of tenfold.engines.openai.OpenAIEngine)",
    "emphasis": "leave emphasis out, or take the engine transformers (tenfold.engines.session.Session)",
    "evidence": "leave evidence out, or take the engine transformers (tenfold.engines.session.Session)",
    "score": "take the engine transformers or llama.cpp",
}
"""What an engine may be able to do, and what to do where it is not."""


@dataclass(frozen=True)
class Evidence:
    """A question over a context whose key sentence the model finds itself (AutoPASTA).

    Args:
        question: not blank.
        context: what it is answered from.
        mode: ``autopasta`` emphasises the sentence that was found; the others are what it is compared with.
        gold: for the mode ``gold``, the characters ``[start, end)`` of the context to emphasise.
    """

    question: str
    context: str
    mode: Mode = "autopasta"
    gold: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Request:
    r"""One text to be written, or to be scored: exactly one of ``text``, ``messages`` and ``evidence``.

    Args:
        text: a prompt that is continued as it stands.
        messages: a conversation of ``{"role": ..., "content": text}``, which goes through the chat template.
        prefill: how the answer begins; the reply goes on from there and does not repeat it.
        stop: the text ends in front of the first of these.
        grammar: what the text must follow, in llama.cpp's GBNF.
        choices: the text is exactly one of these; where ``max_new_tokens`` do not tell which, what was written of it.
        seed: of the sampling. The same request gives the same text, whatever else is asked beside it.
        max_new_tokens: longest text, 1 or more.
        temperature: 0 takes the most probable token each time, 1 samples from the model's distribution.
        emphasis: parts of the prompt to emphasise (PASTA): a text stands for all its occurrences, a `TextSpan` of
            ``text`` or a `MessageSpan` of ``messages`` (`tenfold.attend.chat_marks`) for one place, with a strength.
        evidence: a question over a context instead of a prompt.

    Raises:
        ConfigError: what cannot be meant.

    >>> sorted(Request("Say yes or no:", stop=("\n",), temperature=1.0).asks)
    ['seed', 'text']
    """

    text: str | None = None
    messages: Sequence[Mapping[str, Any]] = ()
    prefill: str = ""
    stop: tuple[str, ...] = ()
    grammar: str | None = None
    choices: tuple[str, ...] = ()
    seed: int = 0
    max_new_tokens: int = 64
    temperature: float = 0.0
    emphasis: tuple[str | TextSpan | MessageSpan, ...] = ()
    evidence: Evidence | None = None

    def __post_init__(self) -> None:
        there = {"text": self.text is not None, "messages": bool(self.messages), "evidence": self.evidence is not None}
        given = [name for name, is_there in there.items() if is_there]
        if len(given) != 1:
            raise ConfigError(
                f"request: {' and '.join(given) or 'nothing'} to answer", "give text, messages or evidence"
            )
        if isinstance(self.stop, str) or not all(self.stop):
            raise ConfigError(f"stop: {self.stop!r}", remedy="give a tuple of texts, none of them empty")
        if self.choices:
            self._check_choices()
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: {self.max_new_tokens} is below 1", remedy="give 1 or more")
        if not self.temperature >= 0:
            raise ConfigError(f"temperature: {self.temperature} is below 0", "0 is greedy, 1 the model's distribution")
        prompt = [self.text or "", *(str(message.get("content")) for message in self.messages)]
        for part in self.emphasis:
            if not isinstance(part, str):
                if hasattr(part, "message") != bool(self.messages):
                    raise ConfigError(f"emphasis: {part}", "give a TextSpan of a text, a MessageSpan of messages")
            elif not part or not any(part in text for text in prompt):
                raise ConfigError(f"emphasis: {part!r} is not in the prompt", remedy="copy a part of it exactly")
        if self.evidence is not None:
            self._check_evidence(self.evidence)

    def _check_choices(self) -> None:
        if isinstance(self.choices, str) or not all(self.choices) or len(set(self.choices)) < len(self.choices):
            raise ConfigError(
                f"choices: {self.choices!r}", remedy="give a tuple of texts, each once and none of them empty"
            )
        if unfit := [name for name in ("grammar", "stop") if getattr(self, name)]:
            raise ConfigError(f"choices and {unfit[0]}: choices say all of a text", remedy=f"leave {unfit[0]} out")

    def _check_evidence(self, evidence: Evidence) -> None:
        if not evidence.question.strip():
            raise ConfigError("evidence: the question is blank", remedy="ask something")
        unfit = [name for name in ("prefill", "grammar", "choices", "emphasis", "temperature") if getattr(self, name)]
        if unfit:
            raise ConfigError(
                f"evidence and {unfit[0]}: answers from a context are greedy and emphasise what is found",
                remedy=f"leave {unfit[0]} out",
            )

    @property
    def asks(self) -> frozenset[str]:
        """What an engine must be able to do for this, as the keys of `REMEDIES`; any engine has stop strings."""
        names = {name for name in ("prefill", "grammar", "choices", "emphasis") if getattr(self, name)}
        names.add("text" if self.text is not None else "messages" if self.messages else "evidence")
        return frozenset(names | ({"seed"} if self.temperature else set()))


@dataclass(frozen=True)
class Seconds:
    """Where the time of a reply went. Requests that are read together share the times of their batch.

    Args:
        queue: until the engine began with it.
        prefill: reading the prompt; for a score, all of it; with evidence, letting the model name the sentence.
        decode: writing; with evidence, reading and writing the answer.
        parse: from tokens to text; with evidence, finding the sentence.
    """

    queue: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    parse: float = 0.0


@dataclass(frozen=True)
class Found:
    """What an answer with evidence rests on.

    Args:
        spans: characters ``[start, end)`` of the context that were emphasised; none where nothing was found.
        quote: what the model wrote when asked for the sentence; None where it was not asked.
        score: how alike quote and sentence are, -1 to 1.
        stage: how the sentence was found: exact, normalised, ratio or embedding.
    """

    spans: tuple[tuple[int, int], ...] = ()
    quote: str | None = None
    score: float | None = None
    stage: str | None = None


@dataclass(frozen=True)
class Reply:
    """What an engine says to a request.

    Args:
        text: the new text, without prompt, prefill, stop string and special tokens.
        finish: why it ends there.
        tokens: how many were written, the end of the turn included.
        token_ids: these tokens, where the engine tells; what a stop string cut off is among them.
        prompt_tokens: how many were read.
        cached_tokens: of these, how many lay in a cache already.
        log_probabilities: of `Engine.score`: continuation -> natural logarithm of its probability after the prompt.
        seconds: where the time went.
        cache_bytes: what keys and values of this request came to, where the engine tells.
        found: what an answer with evidence rests on.
        notes: sentences that the reader of the text must know.
        error: why there is no text, where ``finish`` is ``error``: transport failed, also when tried again.
    """

    text: str = ""
    finish: Finish = "stop"
    tokens: int = 0
    token_ids: tuple[int, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    log_probabilities: Mapping[str, float] = field(default_factory=dict)
    seconds: Seconds = Seconds()
    cache_bytes: int | None = None
    found: Found | None = None
    notes: tuple[str, ...] = ()
    error: str | None = None


class Engine(Protocol):
    """Something that continues and scores; replies come in the order of the requests."""

    name: str
    """What error messages call it."""
    capabilities: frozenset[str]
    """What it can do, as the keys of `REMEDIES`."""

    def generate(self, requests: Sequence[Request]) -> list[Reply]:
        """One text for each request."""
        ...

    def score(self, requests: Sequence[Request], continuations: Continuations) -> list[Reply]:
        """How probable each continuation is after the prompt and prefill of its request; how to write plays no part."""
        ...


Continuations = Sequence[str] | Sequence[Sequence[str]]
"""The same for all requests, or some for each request."""


def check_capabilities(engine: Engine, requests: Sequence[Request], also: str | None = None) -> None:
    """Refuse what an engine lacks.

    Args:
        engine: that is asked.
        requests: what is asked of it.
        also: what is asked besides, as ``score``.

    Raises:
        ConfigError: naming request, capability and remedy.
    """
    for number, request in enumerate(requests, 1):
        asked = request.asks - ({"seed"} if also == "score" else set()) | ({also} if also else set())
        for name in sorted(asked - engine.capabilities):
            raise ConfigError(f"request {number}: {engine.name} has no {name}", remedy=REMEDIES[name])


def for_each(requests: Sequence[Request], continuations: Continuations) -> list[list[str]]:
    """The continuations of each request.

    Raises:
        ConfigError: none, an empty one, or not some for each request.

    >>> for_each([Request("a"), Request("b")], ["yes", "no"])
    [['yes', 'no'], ['yes', 'no']]
    """
    if all(isinstance(item, str) for item in continuations):
        found = [[str(item) for item in continuations] for _ in requests]
    else:
        found = [list(item) for item in continuations]
    if len(found) != len(requests) or not all(texts and all(texts) for texts in found):
        raise ConfigError(
            f"continuations: {len(found)} lists for {len(requests)} requests, or an empty one",
            remedy="give one list of texts for all requests, or one for each",
        )
    return found


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    r"""A text in front of the first of its stop strings, and whether there was one.

    >>> cut_at_stop("one\ntwo. three", (".", "\n"))
    ('one', True)
    """
    places = [at for at in (text.find(string) for string in stop) if at >= 0]
    return (text[: min(places)], True) if places else (text, False)
