"""Spans in the attention function: full attention in some layers or heads, a local span in the others.

A model carries its spans in its configuration, ``tenfold_span``, so that they are saved with it. Its attention runs as
``tenfold_span``: one function, and a mask function that hands the two-dimensional padding mask through, because no mask
of all pairs shall exist. MASFormer specification, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.attend.attention import PREFIX, Probe, attention, check_mask, register
from tenfold.attend.handle import CacheHandle
from tenfold.attend.span_handle import Part, SpanHandle, full_mask, places_of
from tenfold.compat import captures
from tenfold.errors import ModelError
from tenfold.kernels.biased import KeyBias, in_parts
from tenfold.kernels.local import FULL, AttentionWindow
from tenfold.models.head_sizes import kv_heads

NAME = f"{PREFIX}span"
FIELD = "tenfold_span"
"""Of the model's configuration: ``full_layers``, the fields of `AttentionWindow`, perhaps ``heads``: by layer and KV
head, both as text, the fields of another span, or null for full attention."""
SAVED = "attn_implementation"
"""Of the configuration too, always `NAME`: transformers reads it where it opens a file, and refuses a name that nothing
has registered, where it would otherwise open the model with full attention everywhere."""


def head_spans(config: Any, layer: int) -> tuple[AttentionWindow, ...]:
    """What each KV head of a layer sees; `FULL` where that is everything.

    >>> from types import SimpleNamespace
    >>> table = {"full_layers": [0], "pattern": "sliding", "size": 8, "heads": {"1": {"0": None}}}
    >>> config = SimpleNamespace(tenfold_span=table, num_attention_heads=4, num_key_value_heads=2)
    >>> head_spans(config, 0) == (FULL, FULL), head_spans(config, 1) == (FULL, AttentionWindow("sliding", 8))
    (True, True)
    """
    return spans_in(getattr(config, FIELD, None), layer, kv_heads(config))


def spans_in(table: Any, layer: int, count: int) -> tuple[AttentionWindow, ...]:
    """The same by the entry of a configuration, None where there is none, and the KV heads of a layer."""
    if table is None or layer in table["full_layers"]:
        return (FULL,) * count
    spans = [common_span(table)] * count
    for head, span in own_spans(table, layer).items():
        spans[head] = span or FULL
    return tuple(spans)


def common_span(table: Any) -> AttentionWindow:
    """The span of all heads of local layers that have none of their own."""
    return AttentionWindow(**{key: value for key, value in table.items() if key not in ("full_layers", "heads")})


def own_spans(table: Any, layer: int) -> dict[int, AttentionWindow | None]:
    """The KV heads of a layer with a span of their own; None is full attention."""
    own = table.get("heads", {}).get(str(layer), {})
    return {int(head): None if fields is None else AttentionWindow(**fields) for head, fields in own.items()}


def by_span(spans: Sequence[AttentionWindow]) -> dict[AttentionWindow, list[int]]:
    """KV heads of a layer by what they see.

    >>> list(by_span((FULL, AttentionWindow("sliding", 8), FULL)).values())
    [[0, 2], [1]]
    """
    groups: dict[AttentionWindow, list[int]] = {}
    for head, span in enumerate(spans):
        groups.setdefault(span, []).append(head)
    return groups


def spanned(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    key_bias: tuple[KeyBias, ...] = (),
    probe: Probe | None = None,
    gate: Tensor | None = None,
    **arguments: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer by the spans of its heads, as transformers calls it.

    Args:
        module: the attention module.
        query: ``[batch, heads, queries, head_dim]``.
        key: ``[batch, kv_heads, keys, head_dim]``, or the handle of a packed cache (full layers only) or of a small
            one (local layers only).
        value: as ``key``.
        attention_mask: ``[batch, keys]``, bool, what is no padding; None for all. One of four dimensions, given by the
            caller, is honoured by full layers alone.
        key_bias: as in `tenfold.attend.attention.attention`.
        probe: likewise.
        gate: share of full attention in a layer with a span, between 0 and 1: a number ``[]``, or one for each KV head
            ``[kv_heads]``, which may ask for a gradient; the rest is what the spans say. None is 0; see
            `tenfold.attend.masformer.profile`.
        **arguments: what else transformers passes, ``position_ids`` among them.

    Returns:
        Output ``[batch, queries, heads, head_dim]``, and the weights ``[batch, heads, queries, keys]`` where
        ``output_attentions`` asks for them, else None.

    Raises:
        ModelError: a mask of four dimensions or a dose of attention for a local layer; a cache made for other spans;
            weights of keys that the cache does not hold; an argument that asks for something else than spans.
    """
    check_mask(NAME)
    layer: Any = module.layer_idx
    spans = head_spans(module.config, layer)
    full = set(spans) == {FULL}
    _check_arguments(layer, full, arguments)
    note(module.config)
    if attention_mask is not None and attention_mask.ndim == 4 and not full:
        raise _four_dimensions(layer)
    asked = _asks_weights(module, arguments)
    if asked and isinstance(key, CacheHandle):
        raise _needs_all_keys(layer, "the weights of its attention are asked for")
    if isinstance(key, SpanHandle):
        _check_made_for(layer, spans, key)
        if probe is None and gate is None:
            return key.attend(module, query, attention_mask, key_bias, **arguments), None
        if not key.exact:
            raise _needs_all_keys(layer, f"a picture of attention needs all {key.tokens} keys")
        key, value = key.dense(attention_mask)
    if full:
        base = "eager" if asked or any(arguments.get(name) is not None for name in _EAGER) else "sdpa"
        keys = key.tokens if isinstance(key, CacheHandle) else key.shape[2]
        mask = _mask_for(base, query, keys, attention_mask, arguments.get("position_ids"))
        return attention(module, query, key, value, mask, base=base, key_bias=key_bias, probe=probe, **arguments)

    def seeing(spans: Sequence[AttentionWindow], value: Tensor) -> Tensor:
        return _whole(key, value, spans).attend(module, query, attention_mask, key_bias, **arguments)

    if asked:
        every = _whole(key, value, spans)
        return in_parts(key_bias, lambda some: every.with_weights(module, query, attention_mask, some, **arguments))
    if gate is not None:
        whole, local = seeing([FULL] * len(spans), value), seeing(spans, value)
        share = gate.to(local).expand(len(spans)).repeat_interleave(query.shape[1] // len(spans))
        return torch.lerp(local, whole, share[:, None]), None
    if probe is not None:
        probe(layer, value, partial(seeing, spans))
    return seeing(spans, value), None


def _whole(key: Tensor, value: Tensor, spans: Sequence[AttentionWindow]) -> SpanHandle:
    """All keys and values of a layer, ``[batch, kv_heads, keys, channels]``, apart by span."""
    groups = by_span(spans)
    cut = [(key, value)] if len(groups) == 1 else [(key[:, heads], value[:, heads]) for heads in groups.values()]
    parts = [
        Part(heads, *tensors, span, key.shape[2]) for (span, heads), tensors in zip(groups.items(), cut, strict=True)
    ]
    return SpanHandle(lambda seen: None, tuple(parts))


def _check_made_for(layer: int, spans: Sequence[AttentionWindow], handle: SpanHandle) -> None:
    """Refuse what a cache kept for other spans than the layer has now."""
    for part in handle.parts:
        if other := [head for head in part.heads if spans[head] != part.span]:
            made, has = ("full attention" if span == FULL else span for span in (part.span, spans[other[0]]))
            raise ModelError(
                f"layer {layer}: its cache was made for {made}, and the layer has {has} in KV head {other[0]}",
                remedy="make another SpanCache after each conversion",
            )


def note(config: Any) -> None:
    """Let a configuration say in files which function its spans need, also one that was opened without tenfold."""
    if SAVED not in vars(config):
        setattr(config, SAVED, NAME)


_EAGER = ("softcap", "s_aux", "position_bias", "sinks")
"""Arguments that only a model's own function knows, or it alone knows best."""
_NEVER = ("sliding_window", "indices", "block_indices")
_LOCAL_NEVER = ("position_bias", "sinks")


def _check_arguments(layer: int, full: bool, arguments: dict[str, Any]) -> None:
    """Refuse what a model asks of its attention and spans would drop."""
    for name in _NEVER if full else _NEVER + _LOCAL_NEVER:
        if arguments.get(name) is not None:
            raise ModelError(
                f"layer {layer}: the model gives its attention {name}, which {NAME} does not know",
                remedy="take a model of plain full attention, such as Llama, Qwen, Mistral, Gemma 2 or GPT-2"
                if full or name in _NEVER
                else "keep full attention in this layer",
            )


def _asks_weights(module: nn.Module, arguments: dict[str, Any]) -> bool:
    """Whether the caller of the model wants its attentions; GPT-2 and others tell their attention nothing of it."""
    told = arguments.get("output_attentions") or getattr(module.config, "output_attentions", False)
    return bool(told) or captures("attentions")


def _needs_all_keys(layer: int, what: str) -> ModelError:
    return ModelError(
        f"layer {layer}: {what}, and its cache may hold fewer keys", remedy="call the model with use_cache=False"
    )


def _four_dimensions(layer: int) -> ModelError:
    return ModelError(
        f"layer {layer}: a mask of four dimensions says itself what is seen, and this layer has a span",
        remedy="give a mask [batch, tokens], or position_ids that begin again at each document",
    )


def _mask_for(base: str, query: Tensor, keys: int, mask: Tensor | None, position_ids: Tensor | None) -> Tensor | None:
    """The mask of a layer of full attention, as ``sdpa`` or ``eager`` takes it."""
    if mask is None or mask.ndim == 2:
        mask = full_mask(query, keys, *places_of(query, keys, mask, position_ids))
    if base == "sdpa":
        return mask
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], keys, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is None or mask.dtype != torch.bool:
        return mask
    # Eager attention adds its mask, and a row of nothing but -inf would become NaN.
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)


def _padding_mask(*args: Any, attention_mask: Tensor | None = None, **sizes: Any) -> Tensor | None:
    """The mask function of ``tenfold_span``: the padding mask as it is, or None where nothing is padded.

    Raises:
        ModelError: keys that are not there yet, as in a static cache; padding between the tokens of a row.
    """
    tokens, keys = int(sizes.get("q_offset", 0)) + sizes.get("q_length", 0), sizes.get("kv_length", 0)
    if tokens != keys:
        raise ModelError(
            f"a cache of {keys} keys after {tokens} tokens: a span has to know which keys are there",
            remedy="take SpanCache(model.config), or the model's own cache; not a static one",
        )
    if attention_mask is None or bool(attention_mask.all()):
        return None
    seen = attention_mask.bool()
    begins = seen[:, 0].long() + (seen[:, 1:] & ~seen[:, :-1]).sum(1)
    if bool((begins > 1).any()):
        raise ModelError(
            f"attention_mask: row {int(begins.argmax())} has padding between its tokens, and spans count real tokens",
            remedy="pad on one side only",
        )
    return attention_mask


register(NAME, spanned, _padding_mask)
