"""Memory: bytes of weights and cache by what is really stored, and peak growth while something runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tenfold.models.inference import (
    evaluating,
    input_device,
    prompt_ids,
    takes_cache,
    takes_logits_to_keep,
)
from tenfold.models.memory import measure_growth, stored_bytes, weight_bytes
from tenfold.models.quantised import number_format
from tenfold.stage.results import Metric, Result


def memory(
    model: Any,
    tokenizer: Any,
    *,
    tokens: int = 512,
    batch_size: int = 1,
    subject: str = "model",
    make_cache: Callable[[Any], Any] = lambda model: None,
) -> Result:
    """What a model holds and needs: weights, cache per token, and the peak growth of a prefill.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        tokens: tokens of the prompt.
        batch_size: prompts at once.
        subject: which model this is, for the report.
        make_cache: a fresh cache for the model; None is its own.

    Returns:
        ``weights`` (bytes), ``cache`` (bytes per token, the average over the prompt), ``prefill_growth`` (bytes above
        the loaded model while the prompt is read, the cache included). No ``cache`` for a model that returns none,
        such as Mamba or RecurrentGemma: its state is of one size.

    Example:
        >>> memory(model, tokenizer, tokens=512).metric("cache").value  # doctest: +SKIP
        23040.0
    """
    device = input_device(model)
    ids = prompt_ids(tokenizer, tokens, batch_size, device)
    keep = {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}
    if takes_cache(model):
        keep["use_cache"] = True
    with evaluating(model):
        # What libraries allocate once, at first use, is not a cost of a prefill.
        model(input_ids=ids[:, :8], **keep)
        with measure_growth(device) as growth:
            given = {"past_key_values": make_cache(model)} if takes_cache(model) else {}
            cache = getattr(model(input_ids=ids, **given, **keep), "past_key_values", None)
    metrics = [
        Metric(name="weights", value=weight_bytes(model), unit="bytes", count=1, better="lower"),
        Metric(name="prefill_growth", value=growth.growth, unit="bytes", count=1, better="lower", kind="memory"),
    ]
    if cache is not None:
        size = stored_bytes(cache) / (tokens * batch_size)
        count = tokens * batch_size
        metrics.insert(1, Metric(name="cache", value=size, unit="bytes/token", count=count, better="lower"))
    settings = {
        "prompt_tokens": tokens,
        "batch_size": batch_size,
        "dtype": number_format(model),
        "device": str(device),
        "measured_by": growth.method,
    }
    return Result(task="memory", subject=subject, metrics=tuple(metrics), settings=settings)
