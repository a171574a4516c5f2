"""Speed of several models in one process, taking turns, so that a busy machine is unfair to none of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from tenfold.core.statistics import t_quantile
from tenfold.errors import ConfigError
from tenfold.models.inference import (
    evaluating,
    input_device,
    prompt_ids,
    synchronize,
    takes_cache,
    takes_logits_to_keep,
)
from tenfold.models.memory import stored_bytes
from tenfold.models.quantised import number_format
from tenfold.models.simulated import refuse_simulated
from tenfold.stage.results import Metric, Result

Subject = Any | tuple[Any, Callable[[], AbstractContextManager[Any]]]
"""A model, or a model and what to enter around each of its runs: ``(model, model.disable_adapter)``."""


@dataclass
class _Times:
    """Seconds of each repeat."""

    prefill: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    decode: list[list[float]] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    cache: int = 0


def speed(
    models: Mapping[str, Subject],
    tokenizer: Any,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    repeats: int = 5,
    batch_size: int = 1,
    warmup: int = 1,
    make_cache: Callable[[Any], Any] = lambda model: None,
) -> list[Result]:
    """Time prefill and greedy decoding of each model.

    The models take turns, in reversed order every second time. A model and the same model without its adapter share one
    copy of the weights: ``{"before": (model, model.disable_adapter), "after": model}``. All repeats decode the same
    number of tokens, whatever they are: an end-of-text token does not stop them.

    Args:
        models: subject -> model, or (model, factory of a context manager to enter around each run).
        tokenizer: makes the prompt, English text of exactly ``prompt_tokens`` tokens.
        prompt_tokens: tokens to prefill.
        new_tokens: tokens to decode, 2 or more; the first comes out of the prefill.
        repeats: timed runs of each model.
        batch_size: prompts at once.
        warmup: runs of each model that are not timed.
        make_cache: a fresh cache for a model, asked for each run; None is the model's own.

    Returns:
        One result per subject: ``prefill`` (tokens/s, median), ``time_to_first_token`` (ms, median), ``decode`` and
        ``decode_p95`` (ms per step of the batch, over all steps), ``generation`` (new tokens/s with the prefill
        included, median), ``cache`` (bytes at the end). Standard errors are those between repeats, the intervals
        Student's t. A model that returns no cache has the first two alone.

    Example:
        >>> before, after = speed({"before": base, "after": tuned}, tokenizer)  # doctest: +SKIP
    """
    for name, value, least in (
        ("prompt_tokens", prompt_tokens, 1),
        ("new_tokens", new_tokens, 2),
        ("repeats", repeats, 1),
        ("batch_size", batch_size, 1),
        ("warmup", warmup, 0),
    ):
        if value < least:
            raise ConfigError(f"{name}: {value} is below {least}", remedy=f"give {least} or more")
    runs = {subject: entry if isinstance(entry, tuple) else (entry, nullcontext) for subject, entry in models.items()}
    for subject, (model, _) in runs.items():
        refuse_simulated(model, f"speed: {subject}", "time what runs in these formats, such as the exported file")
    times = {subject: _Times() for subject in runs}
    for turn in range(warmup + repeats):
        for subject in reversed(runs) if turn % 2 else runs:
            model, context = runs[subject]
            ids = prompt_ids(tokenizer, prompt_tokens, batch_size, input_device(model))
            with context(), evaluating(model):
                _run(model, ids, new_tokens, times[subject] if turn >= warmup else _Times(), make_cache(model))
    return [
        _result(subject, runs[subject][0], times[subject], prompt_tokens, new_tokens, batch_size) for subject in runs
    ]


def _run(model: Any, ids: torch.Tensor, new_tokens: int, times: _Times, cache: Any) -> None:
    """One prefill and the decoding of the rest of ``new_tokens``, timed step by step."""
    keep = {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}
    device = ids.device
    synchronize(device)
    cached = {"past_key_values": cache, "use_cache": True} if takes_cache(model) else {}
    start = time.perf_counter()
    output = model(input_ids=ids, **cached, **keep)
    synchronize(device)
    times.prefill.append(time.perf_counter() - start)
    token = output.logits[:, -1:].argmax(-1).to(device)
    synchronize(device)
    times.first.append(time.perf_counter() - start)
    if getattr(output, "past_key_values", None) is None:
        return
    steps = []
    for _ in range(new_tokens - 1):
        begin = time.perf_counter()
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True, **keep)
        token = output.logits[:, -1:].argmax(-1).to(device)
        synchronize(device)
        steps.append(time.perf_counter() - begin)
    times.decode.append(steps)
    times.whole.append(time.perf_counter() - start)
    times.cache = stored_bytes(output.past_key_values)


def _result(subject: str, model: Any, times: _Times, prompt_tokens: int, new_tokens: int, batch_size: int) -> Result:
    prefill = [prompt_tokens * batch_size / seconds for seconds in times.prefill]
    first = [1000 * seconds for seconds in times.first]
    metrics = (
        _timing("prefill", statistics.median(prefill), prefill, "tokens/s", "higher"),
        _timing("time_to_first_token", statistics.median(first), first, "ms", "lower"),
        *(_decoding(times, new_tokens * batch_size) if times.decode else ()),
    )
    device = input_device(model)
    settings = {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeats": len(times.prefill),
        "batch_size": batch_size,
        "dtype": number_format(model),
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    return Result(task="speed", subject=subject, metrics=metrics, settings=settings)


def _decoding(times: _Times, tokens: int) -> tuple[Metric, ...]:
    steps = sorted(step for repeat in times.decode for step in repeat)
    generation = [tokens / seconds for seconds in times.whole]
    medians = [1000 * statistics.median(repeat) for repeat in times.decode]
    tails = [1000 * quantile(sorted(repeat), 0.95) for repeat in times.decode]
    return (
        _timing("decode", 1000 * statistics.median(steps), medians, "ms/token", "lower", count=len(steps)),
        _timing("decode_p95", 1000 * quantile(steps, 0.95), tails, "ms/token", "lower", count=len(steps)),
        _timing("generation", statistics.median(generation), generation, "tokens/s", "higher"),
        Metric(name="cache", value=times.cache, unit="bytes", count=1, better="lower"),
    )


def _timing(name: str, value: float, repeats: list[float], unit: str, better: Any, count: int | None = None) -> Metric:
    stderr = interval = None
    if len(repeats) > 1:
        stderr = statistics.stdev(repeats) / len(repeats) ** 0.5
        # a handful of repeats: 1.96 standard errors would promise far too much
        half = t_quantile(len(repeats) - 1) * stderr
        interval = (value - half, value + half)
    return Metric(
        name=name,
        value=value,
        unit=unit,
        count=count or len(repeats),
        stderr=stderr,
        interval=interval,
        better=better,
        kind="timing",
    )


def quantile(ordered: list[float], share: float) -> float:
    """The value below which ``share`` of the sorted values lie, interpolated.

    >>> quantile([1.0, 2.0, 3.0], 0.75)
    2.5
    """
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
