"""Calls of a model, timed for a latency model: prompts and answers of several sizes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from tenfold.core.latency import TimedCall
from tenfold.errors import ModelError
from tenfold.models.inference import evaluating, input_device, synchronize, takes_cache, takes_logits_to_keep
from tenfold.models.simulated import refuse_simulated

PROMPTS = (1, 32, 128, 512)
ANSWERS = (0, 1, 8, 32)


def time_calls(
    model: Any, prompts: Sequence[int] = PROMPTS, answers: Sequence[int] = ANSWERS, *, rounds: int = 3
) -> list[TimedCall]:
    """Time a model for `tenfold.core.latency.LatencyModel.fit`: every prompt with every answer.

    One call decodes the longest answer, and the shorter ones are how far it was by then. A round that is not counted
    comes first.

    Args:
        model: a causal model; what it computes with is what is timed.
        prompts: sizes in tokens, a short one among them.
        answers: tokens to decode after each, 0 among them.
        rounds: of all calls.

    Raises:
        ConfigError: a model that simulates formats.
        ModelError: one that does not decode with a cache.

    >>> from tenfold.core.latency import LatencyModel
    >>> from tenfold.models.tiny import tiny_model
    >>> found = LatencyModel.fit(time_calls(tiny_model("llama").model, (1, 16, 64), (0, 1, 4), rounds=2))
    >>> found.seconds(32, 4) > 0
    True
    """
    refuse_simulated(model, "latency", "time what runs in these formats, such as the packed model")
    if not takes_cache(model) or model.config.is_encoder_decoder:
        raise ModelError("latency: the model does not decode with a cache", remedy="take a causal language model")
    device, wanted, calls = input_device(model), sorted(set(answers)), []
    with evaluating(model):
        for turn in range(rounds + 1):
            for n_in in prompts:
                ends = _ends(model, torch.zeros(1, n_in, dtype=torch.int64, device=device), wanted[-1])
                if turn:
                    calls += [TimedCall(n_in, n_out, ends[n_out]) for n_out in wanted]
    return calls


def _ends(model: Any, ids: torch.Tensor, tokens: int) -> list[float]:
    """Seconds until the prompt was read, and until each of so many tokens was decoded."""
    keep = {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}
    start, ends, cache = time.perf_counter(), [], None
    for _ in range(tokens + 1):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, **keep)
        cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1).to(ids.device)
        synchronize(ids.device)
        ends.append(time.perf_counter() - start)
    return ends
