"""The engine over llama.cpp, for GGUF files: its own server in this process (the wheel ``xllamacpp``).

engine = LlamaCpp("model.gguf")
engine.generate([Request("Yes or no?", grammar='root ::= "yes" | "no"')])
"""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from tenfold.engines.choices import choices_grammar, decisive
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
from tenfold.engines.transport import Sender, TransportError
from tenfold.errors import ConfigError, DataError, MissingDependencyError, ModelError

PLAIN: dict[str, Any] = {"samplers": ["temperature"], "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}
"""Decoding as in `tenfold.models.generation`: greedy, or the model's own distribution."""
FORCED = 1e4
"""Added to a token's logit, so that it is chosen; the probabilities that are told are those without."""


class LlamaCpp:
    """A GGUF file as an engine: grammars natively, prompts that begin alike are read once.

    Decoding is plain, as that of the other engines. A prompt that begins as an earlier one may be read in other batches
    than alone, by which logits differ in their last bits; ``reuse=False`` gives the same text in any order.

    Args:
        path: the GGUF file.
        context: most tokens of one request, read and written, 1 or more.
        parallel: requests at once.
        threads: of the processor; by default llama.cpp's own choice.
        gpu_layers: layers on a GPU; by default as many as fit, where llama.cpp sees one.
        reuse: keep what was read for prompts that begin alike.
        timeout: seconds of one request.

    Raises:
        MissingDependencyError: without the wheel.
        ModelError: no such file, or none that llama.cpp opens.
    """

    name = "llama.cpp"
    capabilities = frozenset({"text", "messages", "prefill", "seed", "grammar", "choices", "score"})

    def __init__(
        self,
        path: str | Path,
        *,
        context: int = 4096,
        parallel: int = 4,
        threads: int | None = None,
        gpu_layers: int | None = None,
        reuse: bool = True,
        timeout: float = 600.0,
    ) -> None:
        if min(context, parallel) < 1:
            raise ConfigError(f"context, parallel: {context}, {parallel}", remedy="give 1 or more")
        self.parallel, self.reuse = parallel, reuse
        self._server = _start(Path(path), context * parallel, parallel, threads, gpu_layers)
        self._sender = Sender(self._server.listening_address, timeout=timeout, retries=0)

    def generate(self, requests: Sequence[Request]) -> list[Reply]:
        """One text for each request, in their order.

        Raises:
            ConfigError: a request for what this engine lacks; a grammar that llama.cpp cannot read.
            DataError: messages that the chat template refuses.
        """
        check_capabilities(self, requests)
        return self._each(partial(self._write, time.perf_counter()), requests)

    def score(self, requests: Sequence[Request], continuations: Continuations) -> list[Reply]:
        """The log-probability of each continuation after the prompt and prefill of its request, exactly.

        Raises:
            ConfigError: a request for what this engine lacks; an empty continuation.
        """
        check_capabilities(self, requests, also="score")
        return self._each(partial(self._score, time.perf_counter()), requests, for_each(requests, continuations))

    def _each(self, work: Any, *given: Sequence[Any]) -> list[Reply]:
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(work, *given))

    def _send(self, path: str, **payload: Any) -> Any:
        return self._sender.send(path, payload)[0]

    def _tokens(self, text: str) -> list[int]:
        found: list[int] = self._send("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        return found

    def _prompt(self, request: Request) -> str:
        if request.text is not None:
            return request.text + request.prefill
        try:
            rendered: str = self._send("/apply-template", messages=[dict(message) for message in request.messages])[
                "prompt"
            ]
        except TransportError as error:
            raise DataError(
                f"the chat template refuses these messages: {error.problem}",
                remedy="mend them (some templates take no system message, or want user and assistant to alternate)",
            ) from None
        return rendered + request.prefill

    def _write(self, asked: float, request: Request) -> Reply:
        prompt, began = self._tokens(self._prompt(request)), time.perf_counter()
        grammar = choices_grammar(request.choices) if request.choices else request.grammar
        try:
            answer = self._send(
                "/completion",
                **PLAIN,
                prompt=prompt,
                n_predict=request.max_new_tokens,
                temperature=request.temperature,
                seed=request.seed % 2**32,
                stop=list(decisive(request.choices) if request.choices else request.stop),
                **({"grammar": grammar} if grammar else {}),
                cache_prompt=self.reuse,
                return_tokens=True,
            )
        except TransportError as error:
            if request.grammar and "grammar" in error.problem:
                raise ConfigError(f"grammar: {error.problem}", remedy="write it in GBNF, from root ::= on") from None
            seconds = Seconds(queue=began - asked, decode=time.perf_counter() - began)
            return Reply(finish="error", error=error.problem, prompt_tokens=len(prompt), seconds=seconds)
        done, timings = time.perf_counter(), answer.get("timings", {})
        text, stopped = cut_at_stop(answer["content"], request.stop)
        if request.choices:  # the beginning that decides is cut off as a stop string
            text = decisive(request.choices).get(answer["stopping_word"], text)
        finish: Finish = "length" if answer["stop_type"] == "limit" and not stopped else "stop"
        prefill, decode = (float(timings.get(name, 0)) / 1e3 for name in ("prompt_ms", "predicted_ms"))
        return Reply(
            text,
            finish,
            tokens=int(answer["tokens_predicted"]),
            token_ids=tuple(answer["tokens"]),
            prompt_tokens=len(prompt),
            cached_tokens=int(timings.get("cache_n", 0)),
            # What the server does not spend on reading and writing is waiting for a slot.
            seconds=Seconds(max(0.0, done - asked - prefill - decode), prefill, decode),
        )

    def _score(self, asked: float, request: Request, named: Sequence[str]) -> Reply:
        prompt, began = self._prompt(request), time.perf_counter()
        alone, found = self._tokens(prompt), {}
        try:
            for text in named:
                whole = self._tokens(prompt + text)
                same = next((at for at, pair in enumerate(zip(alone, whole, strict=False)) if pair[0] != pair[1]), None)
                start = len(alone) if same is None else same  # where prompt and text merge into one token
                if start >= len(whole) or start == 0:
                    raise ConfigError(f"continuation {text!r} has no token", remedy="give the text of an answer")
                found[text] = sum(self._probability(whole[:at], whole[at]) for at in range(start, len(whole)))
        except TransportError as error:
            return Reply(finish="error", error=error.problem, prompt_tokens=len(alone))
        seconds = Seconds(began - asked, time.perf_counter() - began)
        return Reply(prompt_tokens=len(alone), log_probabilities=found, seconds=seconds)

    def _probability(self, ids: Sequence[int], token: int) -> float:
        """The logarithm of the probability of a token; the server tells that of the one it is made to choose."""
        answer = self._send(
            "/completion",
            **PLAIN,
            prompt=list(ids),
            n_predict=1,
            n_probs=1,
            temperature=0.0,
            logit_bias=[[token, FORCED]],
            cache_prompt=self.reuse,
        )
        told = answer["completion_probabilities"][0]
        assert told["id"] == token
        return float(told["logprob"])


def _start(path: Path, context: int, parallel: int, threads: int | None, gpu_layers: int | None) -> Any:
    """llama.cpp's server on a port of its own choice; it ends with the object."""
    try:
        import xllamacpp
    except ImportError:
        raise MissingDependencyError(
            "the engine llama.cpp needs xllamacpp", remedy='pip install "tenfold[gguf]"'
        ) from None
    if not path.is_file():
        raise ModelError(f"{path}: no such file", remedy="give a GGUF file; `tenfold export` writes one")
    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx, settings.n_parallel = context, parallel
    settings.verbosity, settings.warmup = -1, False
    if threads is not None:
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    if gpu_layers is not None:
        settings.n_gpu_layers = gpu_layers
    try:
        server = xllamacpp.Server(settings)
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{path}: llama.cpp does not open it: {error}", remedy="check the file") from None
    # A server that is let go before its queue runs would wait for it without end. The queue answers this.
    with suppress(OSError), urllib.request.urlopen(f"{server.listening_address}/slots", timeout=60) as answer:
        answer.read()
    return server
