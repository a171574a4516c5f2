"""Caches side by side: what they do to a model's predictions, and how long a token takes on them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tenfold.attend.attention import installed
from tenfold.cache.gear.cache import packed_report
from tenfold.cache.gear.layer import GearLayer
from tenfold.cache.layer import CacheLayer
from tenfold.errors import DataError
from tenfold.models.head_sizes import head_dim, kv_heads
from tenfold.models.inference import evaluating, input_device, synchronize, takes_logits_to_keep
from tenfold.models.memory import stored_bytes

MakeCache = Callable[[], Any]
"""Makes an empty cache for the model."""


@dataclass
class Quality:
    """What a cache does to the next tokens of some texts: one number for each scored token.

    Args:
        nll: nats of the true token.
        kl: divergence from the predictions on the exact cache, nats.
        agrees: whether the most probable token is the same, 0 or 1.
        text: which text it is of.
        report: of the cache after the last prompt; of caches of others only their bytes.
    """

    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agrees: list[float] = field(default_factory=list)
    text: list[int] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)


def measure_quality(
    model: Any,
    texts: Sequence[Tensor],
    caches: Mapping[str, MakeCache],
    *,
    context: int | Sequence[int],
    scored: int | None = None,
    step: int = 64,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Quality]:
    """Read a context exactly, hand its keys and values to each cache, and score what follows, true token by true token.

    Args:
        model: a causal language model.
        texts: token ids, each ``[tokens]``, of more than ``context + scored`` tokens.
        caches: name -> factory.
        context: tokens of the prompt, of all or of each text; its own attention is exact, as in GEAR's prefill.
        scored: tokens whose predictions are compared; None is the rest of each text.
        step: tokens of one forward pass; after each of them a cache may pack.
        tell: called with texts done and texts in all.

    Returns:
        Name -> what was found; ``exact`` is the model's own cache.

    Raises:
        DataError: a text that is too short.
    """
    found = {name: Quality() for name in ("exact", *caches)}
    device = input_device(model)
    contexts = [context] * len(texts) if isinstance(context, int) else context
    for number, (text, prefix) in enumerate(zip(texts, contexts, strict=True)):
        tell(number, len(texts))
        stop = len(text) if scored is None else prefix + scored + 1
        if len(text) < max(stop, prefix + 2):
            raise DataError(
                f"text {number}: {len(text)} tokens, and {max(stop, prefix + 2)} are needed",
                remedy="give longer texts, or a shorter context",
            )
        ids = text[None, :stop].to(device)
        with evaluating(model), installed(model):
            keep = {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}
            prompt = DynamicCache(config=model.config)
            model(input_ids=ids[:, :prefix], past_key_values=prompt, use_cache=True, **keep)
            exact = None
            for name in found:
                cache = caches[name]() if name != "exact" else DynamicCache(config=model.config)
                hand_over(prompt, cache)
                report = _report(cache)
                logs = _predictions(model, ids, cache, prefix, step)
                exact = logs if exact is None else exact
                _score(found[name], logs, exact, ids[0, prefix + 1 :], number)
                found[name].report = report
    return found


def hand_over(prompt: DynamicCache, cache: Any) -> None:
    """Give an empty cache the keys and values of a prompt; layers of another kind than full attention are copied."""
    for index, layer in enumerate(prompt.layers):
        if type(layer) is DynamicLayer:
            cache.update(layer.keys, layer.values, index)
            _settle(cache.layers[index])
        else:
            cache.layers[index] = copy.deepcopy(layer)


def _settle(layer: Any) -> None:
    """End the step of a layer that no attention follows in, by which its handle would end it."""
    if isinstance(layer, CacheLayer):
        layer.commit()


def _report(cache: Any) -> dict[str, Any]:
    packed = [layer for layer in cache.layers if isinstance(layer, GearLayer)]
    return packed_report(packed) if packed else {"bytes": stored_bytes(cache.layers)}


def _predictions(model: Any, ids: Tensor, cache: Any, context: int, step: int) -> Tensor:
    """Logarithms of the probabilities of the tokens after the context: ``[scored, vocabulary]``."""
    last = ids.shape[1] - 1
    parts = [
        model(input_ids=ids[:, start : min(start + step, last)], past_key_values=cache, use_cache=True).logits[0]
        for start in range(context, last, step)
    ]
    return torch.cat(parts).float().log_softmax(-1)


def _score(found: Quality, logs: Tensor, exact: Tensor, true: Tensor, text: int) -> None:
    found.nll += (-logs.gather(1, true[:, None])[:, 0]).tolist()
    found.kl += (exact.exp() * (exact - logs)).sum(-1).tolist()
    found.agrees += (logs.argmax(-1) == exact.argmax(-1)).float().tolist()
    found.text += [text] * len(true)


def measure_decoding(
    model: Any, caches: Mapping[str, MakeCache], *, context: int, steps: int = 8, repeats: int = 3
) -> dict[str, list[float]]:
    """Seconds of each decoding step on a cache of so many tokens, the caches taking turns.

    Keys and values are random: how long a step takes does not depend on them, and no prompt need be read.

    Args:
        model: a causal language model.
        caches: name -> factory.
        context: tokens in the cache at the first step.
        steps: that are timed in a turn, after one that is not.
        repeats: turns of each cache.

    Returns:
        Name -> seconds of ``repeats * steps`` steps.
    """
    device = input_device(model)
    generator = torch.Generator(device).manual_seed(0)
    filled = {}
    for name, make in caches.items():
        filled[name] = make()
        _fill(model, filled[name], context, generator)
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    token = torch.full((1, 1), 10, device=device)
    with evaluating(model), installed(model):
        for turn in range(repeats):
            for name in reversed(list(caches)) if turn % 2 else caches:
                for number in range(steps + 1):
                    synchronize(device)
                    began = time.perf_counter()
                    model(input_ids=token, past_key_values=filled[name], use_cache=True)
                    synchronize(device)
                    if number:
                        seconds[name].append(time.perf_counter() - began)
    return seconds


def _fill(model: Any, cache: Any, tokens: int, generator: torch.Generator) -> None:
    config = model.config.get_text_config(decoder=True)
    shape = (2, 1, kv_heads(config), tokens, head_dim(config))
    for index in range(config.num_hidden_layers):
        keys, values = torch.randn(shape, generator=generator, device=generator.device).to(model.dtype)
        cache.update(keys, values, index)
        _settle(cache.layers[index])
