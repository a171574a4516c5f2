"""lm-evaluation-harness on a session: scores and texts are those of the engine. Imported where the harness is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from tenfold.attend.pasta.likelihood import alternatives
from tenfold.attend.text_marks import left_filled
from tenfold.data.encode import pad_id
from tenfold.engines.requests import Request
from tenfold.engines.session import Session
from tenfold.errors import ConfigError
from tenfold.models.inference import input_device
from tenfold.models.scoring import Window, score

PLAIN = {"top_p": 1.0, "top_k": 0, "num_beams": 1, "repetition_penalty": 1.0, "typical_p": 1.0}
"""Ways of decoding that a task may name, at the value that changes nothing."""


class SessionLM(HFLM):
    """The harness's own model for tokens and windows, whose passes are those of a session.

    Args:
        session: what is measured.
    """

    def __init__(self, session: Session) -> None:
        super().__init__(pretrained=session.model, tokenizer=session.tokenizer, batch_size=session.batch_size)
        self.session = session

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, override_bs: Any = None
    ) -> list[tuple[float, bool]]:
        """Log-probability of continuations given as tokens, and whether greedy decoding would write them.

        A context is read once for all its continuations, as `Session.score` does. The windows of a rolling likelihood
        come without a text, and are read as `tenfold.evaluate.perplexity` reads its own.
        """
        if requests and requests[0][0] is None:
            return self._windows(requests)
        tails: dict[tuple[int, ...], dict[tuple[int, ...], tuple[float, bool]]] = {}
        keys = []
        for _, context, tail in requests:
            kept = tuple(context[-(self.max_length + 1 - len(tail)) :])  # what is too long loses its beginning
            tails.setdefault(kept, {})[tuple(tail)] = (0.0, False)
            keys.append((kept, tuple(tail)))
        contexts, size = sorted(tails, key=lambda ids: -len(ids)), self.session.batch_size
        device = input_device(self.session.model)
        with self.session.caches() as make_cache:
            for start in range(0, len(contexts), size):
                batch = contexts[start : start + size]
                marks = left_filled([(ids, [None] * len(ids)) for ids in batch], self.session.tokenizer, device)
                named = [list(tails[ids]) for ids in batch]
                found = alternatives(self.session.model, marks, named, make_cache=make_cache)
                for ids, row, scores in zip(batch, named, found, strict=True):
                    values = zip(scores.total.tolist(), scores.greedy.tolist(), strict=True)
                    tails[ids].update(zip(row, values, strict=True))
        return [tails[context][tail] for context, tail in keys]

    def _windows(self, requests: Sequence[tuple[Any, list[int], list[int]]]) -> list[tuple[float, bool]]:
        windows = [Window([*context, *tail], len(context)) for _, context, tail in requests]
        with self.session.caches() as make_cache:
            found = score(
                self.session.model,
                windows,
                pad_id=pad_id(self.session.tokenizer),
                batch_size=self.session.batch_size,
                make_cache=None if self.session.kv is None else make_cache,
            )
        return [(-float(nll.sum()), False) for nll in found]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first of their stop strings.

        Raises:
            ConfigError: a task that asks for a way of decoding that sessions lack.
        """
        asked = [self._asked(request.args[0], request.args[1], seed) for seed, request in enumerate(requests)]
        return [reply.text for reply in self.session.generate(asked)]

    def _asked(self, context: str, how: dict[str, Any], seed: int) -> Request:
        kwargs = normalize_gen_kwargs(how, self.max_gen_toks)
        stop, length = kwargs.pop("until"), kwargs.pop("max_gen_toks")
        temperature, sampled = kwargs.pop("temperature", None), kwargs.pop("do_sample", False)
        unknown = {key: value for key, value in kwargs.items() if value is not None and PLAIN.get(key) != value}
        if unknown:
            key, value = next(iter(unknown.items()))
            raise ConfigError(
                f"lm_eval: the task asks for {key}: {value}; texts are greedy or drawn from the model's distribution",
                remedy=f"take {key} out of the task's generation_kwargs",
            )
        text = self._within(context, self.max_length - length)
        drawn = float(1.0 if temperature is None else temperature) if sampled else 0.0
        return Request(text, stop=tuple(filter(None, stop)), max_new_tokens=length, temperature=drawn, seed=seed)

    def _within(self, context: str, room: int) -> str:
        """The end of a context that leaves room to write."""
        if room < 1:
            raise ConfigError(
                f"lm_eval: the task has {self.max_length - room} tokens written, and the model reads {self.max_length}",
                remedy="give the task a smaller max_gen_toks",
            )
        ids = self.tok_encode(context)
        while len(ids) > room:
            context = self.tokenizer.decode(ids[-room:], skip_special_tokens=True)
            ids = self.tok_encode(context)
            room -= 1 if len(ids) > room else 0  # a special token comes in front again
        return context
