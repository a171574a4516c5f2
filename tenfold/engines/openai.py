"""The engine over any server that speaks OpenAI's protocol: vLLM, SGLang, llama.cpp, Ollama, hosted ones.

engine = OpenAIEngine("http://localhost:8000/v1", "my-model")
engine.generate([Request("The sky is", max_new_tokens=8)])
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from tenfold.engines.choices import choices_grammar, choices_pattern
from tenfold.engines.requests import (
    Continuations,
    Finish,
    Reply,
    Request,
    Seconds,
    check_capabilities,
    cut_at_stop,
    for_each,
)
from tenfold.engines.transport import Rate, Sender, TransportError
from tenfold.errors import ConfigError

MOST_STOPS = 4
"""Stop strings that the protocol takes; further ones are cut off here, after the server has written beyond them."""
TOP = 20
"""Most probable tokens that a chat server names."""
CHOOSING: dict[str, Callable[[Sequence[str]], Any]] = {
    "structured_outputs": lambda choices: {"choice": list(choices)},
    "regex": choices_pattern,
    "grammar": choices_grammar,
}
"""Fields by which servers take choices, and what they hold."""


class OpenAIEngine:
    """A client of an OpenAI-compatible server.

    Text goes to ``/completions`` and messages to ``/chat/completions``. Whatever the server or the way to it does is
    said in the reply (``finish`` is ``error``), so that one failure of many requests spoils no other.

    Args:
        url: up to and with ``/v1``.
        model: as the server calls it.
        key: sent as a bearer token.
        accepts: what the server takes beyond the protocol: ``prefill`` of messages (vLLM, SGLang and llama.cpp go on
            with a last message of the assistant), ``grammar`` (llama.cpp). Choices need one of the fields
            ``structured_outputs`` (vLLM), ``regex`` (SGLang) and ``grammar``.
        timeout: seconds that the server may stay silent.
        retries: how often a request is tried again after 429, 5xx, silence or no connection, with growing pauses.
        pause: seconds before the first retry.
        concurrency: requests at once, 1 or more, also where several threads ask.
        requests_per_minute: limit, each try counted; None for none.
        tokens_per_minute: limit on tokens read and written, estimated before and counted after; None for none.
        options: further fields of every request, such as ``{"top_k": 20}``.

    Raises:
        ConfigError: a value out of its range.
    """

    name = "openai"

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        accepts: Collection[str] = (),
        timeout: float = 120.0,
        retries: int = 4,
        pause: float = 1.0,
        concurrency: int = 8,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if unknown := set(accepts) - {"prefill", *CHOOSING}:
            raise ConfigError(f"accepts: {sorted(unknown)}", remedy=f"choose from prefill, {', '.join(CHOOSING)}")
        for what, value, least in (
            ("concurrency", concurrency, 1),
            ("retries", retries, 0),
            ("timeout", timeout, 1e-3),
        ):
            if value < least:
                raise ConfigError(f"{what}: must be at least {least:g}, got {value}", remedy=f"give {least:g} or more")
        self.model, self.accepts, self.concurrency = model, frozenset(accepts), concurrency
        self.options = dict(options or {})
        self.capabilities = frozenset({"text", "messages", "seed", "score"}) | (self.accepts & {"prefill", "grammar"})
        self.capabilities |= {"choices"} if self.accepts & set(CHOOSING) else set()
        rates = {"requests": Rate(requests_per_minute), "tokens": Rate(tokens_per_minute)}
        self.sender = Sender(url.rstrip("/"), key, timeout, retries, pause, **rates, at_once=concurrency)

    def generate(self, requests: Sequence[Request]) -> list[Reply]:
        """One text for each request, in their order.

        Raises:
            ConfigError: a request for what the server lacks.
        """
        found = [_joined(request) for request in requests]
        check_capabilities(self, found)
        return self._each(partial(self._write, time.perf_counter()), found)

    def score(self, requests: Sequence[Request], continuations: Continuations) -> list[Reply]:
        """Log-probabilities of continuations, as far as the server tells any.

        After text it is asked to repeat prompt and continuation with the log-probability of each token (``echo``).
        After messages a chat server names the `TOP` most probable first tokens; a continuation must be one of them.

        Raises:
            ConfigError: the server gives no log-probabilities; a request for what it lacks.
        """
        found, named = [_joined(request) for request in requests], for_each(requests, continuations)
        check_capabilities(self, found, also="score")
        return self._each(partial(self._score, time.perf_counter()), found, named)

    def _each(self, work: Callable[..., Reply], *given: Sequence[Any]) -> list[Reply]:
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(work, *given))

    def _write(self, asked: float, request: Request) -> Reply:
        try:
            answer, began = self._send(request, self._payload(request))
            choice = answer["choices"][0]
            written = choice["message"]["content"] if request.messages else choice["text"]
        except TransportError as error:
            return _failed(error.problem, asked)
        except (KeyError, IndexError, TypeError):
            return _failed(f"an answer without a text: {str(answer)[:200]}", asked)
        done, usage, timings = time.perf_counter(), answer.get("usage") or {}, answer.get("timings") or {}
        text, stopped = cut_at_stop(written or "", request.stop)
        why = str(choice.get("finish_reason"))
        finish: Finish = "length" if why == "length" and not stopped else "stop"
        prefill = min(float(timings.get("prompt_ms", 0)) / 1e3, done - began)
        if request.choices and finish == "stop" and text not in request.choices:
            return _failed(f"the server did not keep to the choices, but wrote {text[:80]!r}", asked)
        return Reply(
            text,
            finish,
            tokens=int(usage.get("completion_tokens") or 0),
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            cached_tokens=int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0),
            seconds=Seconds(began - asked, prefill, done - began - prefill),
            notes=() if why in ("stop", "length") else (f"the server ended the text with {why!r}",),
        )

    def _payload(self, request: Request) -> dict[str, Any]:
        prompt: dict[str, Any] = {"prompt": request.text}
        if request.messages:
            messages = [dict(message) for message in request.messages]
            prompt = {"messages": messages}
            if request.prefill:
                messages.append({"role": "assistant", "content": request.prefill})
                prompt |= {"continue_final_message": True, "add_generation_prompt": False}
        field = next((field for field in CHOOSING if field in self.accepts), "")
        return {
            **self.options,
            "model": self.model,
            **prompt,
            "max_tokens": request.max_new_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
            **({"stop": list(request.stop[:MOST_STOPS])} if request.stop else {}),
            **({"grammar": request.grammar} if request.grammar else {}),
            **({field: CHOOSING[field](request.choices)} if request.choices else {}),
        }

    def _send(self, request: Request, payload: Mapping[str, Any]) -> tuple[Any, float]:
        prompt = request.text or "".join(str(message.get("content")) for message in request.messages)
        expected = len(prompt.encode()) / 4 + payload["max_tokens"]  # about four bytes make a token
        path = "/chat/completions" if request.messages else "/completions"
        return self.sender.send(path, payload, expected=expected, used=lambda answer: _used(answer, expected))

    def _score(self, asked: float, request: Request, named: Sequence[str]) -> Reply:
        score = self._score_chat if request.messages else self._score_text
        try:
            found, began = score(request, named)
        except TransportError as error:
            return _failed(error.problem, asked)
        seconds = Seconds(began - asked, time.perf_counter() - began)
        reply = Reply(log_probabilities=found, seconds=seconds)
        if missing := [text for text in named if text not in found]:
            problem = f"{missing[0]!r} is not among the {TOP} most probable first tokens that the server names"
            return replace(reply, finish="error", error=problem)
        return reply

    def _score_text(self, request: Request, named: Sequence[str]) -> tuple[dict[str, float], float]:
        found, prompt, first = {}, request.text or "", None
        for text in named:
            # Some servers refuse to write nothing: one more token is written, and not counted.
            payload = {
                **self._payload(replace(request, text=prompt + text, stop=(), choices=(), temperature=0.0)),
                "max_tokens": 1,
            }
            answer, began = self._send(request, {**payload, "echo": True, "logprobs": 1})
            first = began if first is None else first
            try:
                told = answer["choices"][0]["logprobs"]
                offsets, values = told["text_offset"], told["token_logprobs"]
                ends = [*offsets[1:], len(prompt) + len(text) + 1]
            except (KeyError, IndexError, TypeError):
                raise _no_scores("/completions with echo") from None
            inside = [
                value
                for start, end, value in zip(offsets, ends, values, strict=True)
                if end > len(prompt) and start < len(prompt) + len(text)
            ]
            if not inside or None in inside:
                raise _no_scores("/completions with echo")
            found[text] = float(sum(inside))
        return found, first or time.perf_counter()

    def _score_chat(self, request: Request, named: Sequence[str]) -> tuple[dict[str, float], float]:
        payload = {**self._payload(replace(request, stop=(), choices=(), temperature=0.0)), "max_tokens": 1}
        answer, began = self._send(request, {**payload, "logprobs": True, "top_logprobs": TOP})
        try:
            top = {
                item["token"]: item["logprob"]
                for item in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            }
        except (KeyError, IndexError, TypeError):
            raise _no_scores("/chat/completions with logprobs") from None
        return {text: float(top[text]) for text in named if text in top}, began


def _joined(request: Request) -> Request:
    """Text with its prefill behind it, for which no server needs to do anything."""
    if request.text is None or not request.prefill:
        return request
    return replace(request, text=request.text + request.prefill, prefill="")


def _used(answer: Any, expected: float) -> float:
    usage = answer.get("usage") if isinstance(answer, dict) else None
    return float((usage or {}).get("total_tokens") or expected)


def _failed(problem: str, asked: float) -> Reply:
    return Reply(finish="error", error=problem, seconds=Seconds(queue=time.perf_counter() - asked))


def _no_scores(where: str) -> ConfigError:
    return ConfigError(
        f"openai: the server gives no log-probabilities on {where}",
        remedy="take the engine transformers or llama.cpp, or a server that does, such as vLLM",
    )
