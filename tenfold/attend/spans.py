"""Spans in the attention function: full attention in some layers or heads, a local span in the others.

A model carries its spans in its configuration, ``tenfold_span``, so that they are saved with it. Its attention runs as
``tenfold_span``: one function, and a mask function that hands the two-dimensional padding mask through, because no mask
of all pairs shall exist. MASFormer specification, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.attend.attention import PREFIX, Probe, attention, check_mask, register
from tenfold.compat import captures
from tenfold.errors import ModelError
from tenfold.kernels.biased import KeyBias, in_parts, with_key_channel
from tenfold.kernels.local import (
    FULL,
    Held,
    HeldHeads,
    Softmax,
    Span,
    dense_attention,
    held_positions,
    local_attention,
    real_positions,
    visible,
)
from tenfold.kernels.view import View

NAME = f"{PREFIX}span"
FIELD = "tenfold_span"
"""Of the model's configuration: ``full_layers``, the fields of `Span`, perhaps ``heads``: by layer and KV head, both
as text, the fields of another span, or null for full attention."""
SAVED = "attn_implementation"
"""Of the configuration too, always `NAME`: transformers reads it where it opens a file, and refuses a name that nothing
has registered, where it would otherwise open the model with full attention everywhere."""


def head_spans(config: Any, layer: int) -> tuple[Span, ...]:
    """What each KV head of a layer sees; `FULL` where that is everything.

    >>> from types import SimpleNamespace
    >>> table = {"full_layers": [0], "pattern": "sliding", "size": 8, "heads": {"1": {"0": None}}}
    >>> config = SimpleNamespace(tenfold_span=table, num_attention_heads=4, num_key_value_heads=2)
    >>> head_spans(config, 0) == (FULL, FULL), head_spans(config, 1) == (FULL, Span("sliding", 8))
    (True, True)
    """
    return spans_in(getattr(config, FIELD, None), layer, kv_heads(config))


def spans_in(table: Any, layer: int, count: int) -> tuple[Span, ...]:
    """The same by the entry of a configuration, None where there is none, and the KV heads of a layer."""
    if table is None or layer in table["full_layers"]:
        return (FULL,) * count
    spans = [common_span(table)] * count
    for head, span in own_spans(table, layer).items():
        spans[head] = span or FULL
    return tuple(spans)


def common_span(table: Any) -> Span:
    """The span of all heads of local layers that have none of their own."""
    return Span(**{key: value for key, value in table.items() if key not in ("full_layers", "heads")})


def own_spans(table: Any, layer: int) -> dict[int, Span | None]:
    """The KV heads of a layer with a span of their own; None is full attention."""
    own = table.get("heads", {}).get(str(layer), {})
    return {int(head): None if fields is None else Span(**fields) for head, fields in own.items()}


def kv_heads(config: Any) -> int:
    """KV heads of a layer, by a decoder's configuration."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def by_span(spans: Sequence[Span]) -> dict[Span, list[int]]:
    """KV heads of a layer by what they see.

    >>> list(by_span((FULL, Span("sliding", 8), FULL)).values())
    [[0, 2], [1]]
    """
    groups: dict[Span, list[int]] = {}
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
        key: ``[batch, kv_heads, keys, head_dim]``, or the view of a compressed cache (full layers only), or what a
            small cache holds (local layers only).
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
    if asked and isinstance(key, Held | HeldHeads | View):
        raise _needs_all_keys(layer, "the weights of its attention are asked for")
    if isinstance(key, Held | HeldHeads):
        given = {"key_bias": key_bias, "probe": probe, "gate": gate, **arguments}
        return _on_held(module, query, key, attention_mask, spans, given), None
    if full:
        base = "eager" if asked or any(arguments.get(name) is not None for name in _EAGER) else "sdpa"
        keys = key.tokens if isinstance(key, View) else key.shape[2]
        mask = _mask_for(base, query, keys, attention_mask, arguments.get("position_ids"))
        return attention(module, query, key, value, mask, base=base, key_bias=key_bias, probe=probe, **arguments)

    def seeing(spans: Sequence[Span], value: Tensor) -> Tensor:
        return _on_parts(module, query, _parts(key, value, spans), attention_mask, key_bias, arguments)

    if asked:
        places = _places(len(query), query.shape[2], key.shape[2], attention_mask, arguments.get("position_ids"))
        every = _parts(key, value, spans)
        return in_parts(key_bias, lambda some: _with_weights(module, query, every, places, some, arguments))
    if gate is not None:
        whole, local = seeing([FULL] * len(spans), value), seeing(spans, value)
        share = gate.to(local).expand(len(spans)).repeat_interleave(query.shape[1] // len(spans))
        return torch.lerp(local, whole, share[:, None]), None
    if probe is not None:
        probe(layer, value, partial(seeing, spans))
    return seeing(spans, value), None


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


def _on_held(
    module: nn.Module,
    query: Tensor,
    held: Held | HeldHeads,
    mask: Tensor | None,
    spans: Sequence[Span],
    given: dict[str, Any],
) -> Tensor:
    """Attention on a small cache."""
    layer: Any = module.layer_idx
    parts = held.parts if isinstance(held, HeldHeads) else ((list(range(len(spans))), held),)
    for heads, part in parts:
        if other := [head for head in heads if spans[head] != part.span]:
            made, has = ("full attention" if span == FULL else span for span in (part.span, spans[other[0]]))
            raise ModelError(
                f"layer {layer}: its cache was made for {made}, and the layer has {has} in KV head {other[0]}",
                remedy="make another SpanCache after each conversion",
            )
    tokens = parts[0][1].tokens
    seen = None if mask is None else mask[:, -tokens:].bool()
    if given["probe"] is None and given["gate"] is None:
        arguments = {key: value for key, value in given.items() if key not in ("key_bias", "probe", "gate")}
        output = _on_parts(module, query, parts, seen, given["key_bias"], arguments)
    elif all(part.places is None for _, part in parts):
        key, value = (_joined(parts, [getattr(part, x) for _, part in parts], 1) for x in ("keys", "values"))
        output = spanned(module, query, key, value, seen, **given)[0]
    else:
        raise ModelError(
            f"layer {layer}: a picture of attention needs all {tokens} keys, and the cache holds fewer",
            remedy="call the model with use_cache=False",
        )
    for _, part in parts:
        part.finish(seen)
    return output


Parts = Sequence[tuple[list[int], Held]]
"""KV heads, and their keys and values; every head of a layer is in one part."""


def _parts(key: Tensor, value: Tensor, spans: Sequence[Span]) -> Parts:
    """Keys and values of a layer, ``[batch, kv_heads, keys, channels]``, apart by span."""
    groups = by_span(spans)
    cut = [(key, value)] if len(groups) == 1 else [(key[:, heads], value[:, heads]) for heads in groups.values()]
    return [
        (heads, Held(*tensors, span, key.shape[2], None, lambda seen: None))
        for (span, heads), tensors in zip(groups.items(), cut, strict=True)
    ]


def _joined(parts: Parts, tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Tensors of the parts in one, in the order of the KV heads, which are dimension ``dim``."""
    if len(tensors) == 1:
        return tensors[0]
    order = torch.tensor([head for heads, _ in parts for head in heads], device=tensors[0].device).argsort()
    return torch.cat(list(tensors), dim).index_select(dim, order)


def _on_parts(
    module: nn.Module,
    query: Tensor,
    parts: Parts,
    seen: Tensor | None,
    key_bias: tuple[KeyBias, ...],
    arguments: dict[str, Any],
) -> Tensor:
    """Attention of each part with its own queries and biases; ``[batch, queries, heads, head_dim]``."""
    tokens, count = parts[0][1].tokens, sum(len(heads) for heads, _ in parts)
    plain = _places(len(query), query.shape[2], tokens, seen, arguments.get("position_ids"))
    grouped = query.unflatten(1, (count, -1))
    outputs = []
    for heads, part in parts:
        its, biases, places = query, key_bias, plain
        if len(parts) > 1:
            its, biases = grouped[:, heads].flatten(1, 2), _biases_of(key_bias, heads, grouped.shape[2])
        if part.places is not None:
            index = part.places.clamp(min=0)
            biases = tuple(replace(bias, values=bias.values.take_along_dim(index, 1)) for bias in biases)
            places = held_positions(part.places, seen), None
        softmax = _softmax(query, arguments, heads, grouped.shape[2])
        if _sees_all(query, part, seen) and softmax.plain:
            output = attention(module, its, part.keys, part.values, None, base="sdpa", key_bias=biases, **arguments)[0]
        else:
            output = _of_span(module, its, part, places, biases, softmax, arguments)
        outputs.append(output.unflatten(2, (len(heads), -1)))
    return _joined(parts, outputs, 2).flatten(2, 3)


def _biases_of(key_bias: tuple[KeyBias, ...], heads: list[int], each: int) -> tuple[KeyBias, ...]:
    """Biases for the queries of some KV heads, ``each`` of which has so many; without those that concern none."""
    found = []
    for bias in key_bias:
        own = torch.tensor(heads)[:, None] * each + torch.arange(each)
        same = bias.heads[:, None] == own.flatten().to(bias.heads.device)
        kept = same.any(1)
        if bool(kept.any()):
            weights = None if bias.weights is None else bias.weights[..., kept]
            found.append(replace(bias, heads=same[kept].int().argmax(1), weights=weights))
    return tuple(found)


def _of_span(
    module: nn.Module,
    query: Tensor,
    part: Held,
    places: tuple[Tensor | None, Tensor | None],
    key_bias: tuple[KeyBias, ...],
    softmax: Softmax,
    arguments: dict[str, Any],
) -> Tensor:
    """Attention of heads of one span, with biases of keys; ``[batch, queries, heads, head_dim]``."""
    if any(bias.until is not None for bias in key_bias):

        def of_some(some: tuple[KeyBias, ...]) -> tuple[Tensor, None]:
            return _of_span(module, query, part, places, some, softmax, arguments), None

        return in_parts(key_bias, of_some)[0]
    if part.span == FULL and softmax.plain:
        mask = _full_mask(query, part.keys.shape[2], *places)
        given = {**arguments, "s_aux": None}
        return attention(module, query, part.keys, part.values, mask, base="sdpa", key_bias=key_bias, **given)[0]
    its = _biased(module, query, part, softmax, key_bias)
    if part.span == FULL:
        seen = visible(FULL, query, its[1].shape[2], *places)
        output = dense_attention(*its, seen, softmax)[0]
    else:
        output = local_attention(*its, part.span, softmax, *places)
    return output[..., : part.values.shape[-1]].transpose(1, 2).contiguous()


def _softmax(query: Tensor, arguments: dict[str, Any], heads: list[int], each: int) -> Softmax:
    """How the query heads of some KV heads make weights, ``each`` of which has so many."""
    scale, sink = arguments.get("scaling"), arguments.get("s_aux")
    if sink is not None:
        sink = sink.view(-1, each)[heads].flatten()
    return Softmax(query.shape[-1] ** -0.5 if scale is None else scale, arguments.get("softcap"), sink)


def _biased(
    module: nn.Module, query: Tensor, part: Held, softmax: Softmax, key_bias: tuple[KeyBias, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values with biases of keys in channels of their own."""
    layer: Any = module.layer_idx
    its = query, part.keys, part.values
    for bias in key_bias:
        if bias.target is not None:
            raise ModelError(f"layer {layer}: target_mass, and this layer has a span", remedy="use alpha")
        if softmax.softcap is not None:  # the channel would be capped as well
            raise ModelError(
                f"layer {layer}: it caps its scores and has a span, and cannot be biased",
                remedy="steer layers of full attention",
            )
        its = with_key_channel(*its, softmax.scale, bias)
    return its


def _with_weights(
    module: nn.Module,
    query: Tensor,
    parts: Parts,
    places: tuple[Tensor | None, Tensor | None],
    key_bias: tuple[KeyBias, ...],
    arguments: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Attention on whole keys, and all of its weights, as they are asked for in eager attention."""
    grouped = query.unflatten(1, (sum(len(heads) for heads, _ in parts), -1))
    outputs, weights = [], []
    for heads, part in parts:
        softmax = _softmax(query, arguments, heads, grouped.shape[2])
        biases = _biases_of(key_bias, heads, grouped.shape[2])
        its = _biased(module, grouped[:, heads].flatten(1, 2), part, softmax, biases)
        seen = visible(part.span, query, part.keys.shape[2], *places)
        output, its_weights = dense_attention(*its, seen, softmax)
        outputs.append(output[..., : part.values.shape[-1]].unflatten(1, (len(heads), -1)))
        weights.append(its_weights.unflatten(1, (len(heads), -1)))
    output, whole = (_joined(parts, tensors, 1).flatten(1, 2) for tensors in (outputs, weights))
    return output.transpose(1, 2).contiguous(), whole


def _sees_all(query: Tensor, part: Held, seen: Tensor | None) -> bool:
    """Whether one query, without padding, sees all that a small cache holds: then there is nothing to mask."""
    span, keys = part.span, part.keys.shape[2]
    alone = seen is None and query.shape[2] == 1
    return alone and span.pattern == "sliding" and keys <= span.sinks + span.size


def _places(
    batch: int, queries: int, keys: int, mask: Tensor | None, position_ids: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Positions of the keys within their documents, and their documents, each ``[batch, keys]``; None where plain.

    Padding has position -1. Documents are packed where positions begin again and no padding mask is given.
    """
    if mask is not None:
        return real_positions(mask[:, -keys:]), None
    if position_ids is None or queries != keys or keys == 1:
        return None, None
    places = position_ids.expand(batch, -1)
    begins = places[:, 1:] <= places[:, :-1]
    if not bool(begins.any()):
        return None, None
    documents = torch.nn.functional.pad(begins.long().cumsum(1), (1, 0))
    first = torch.nn.functional.pad(begins, (1, 0), value=True)
    index = torch.arange(keys, device=places.device)
    return index - torch.where(first, index, 0).cummax(1).values, documents


def _mask_for(base: str, query: Tensor, keys: int, mask: Tensor | None, position_ids: Tensor | None) -> Tensor | None:
    """The mask of a layer of full attention, as ``sdpa`` or ``eager`` takes it."""
    if mask is None or mask.ndim == 2:
        mask = _full_mask(query, keys, *_places(len(query), query.shape[2], keys, mask, position_ids))
    if base == "sdpa":
        return mask
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], keys, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is None or mask.dtype != torch.bool:
        return mask
    # Eager attention adds its mask, and a row of nothing but -inf would become NaN.
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)


def _full_mask(query: Tensor, keys: int, positions: Tensor | None, documents: Tensor | None) -> Tensor | None:
    """What sdpa is to be given for causal attention; None where its own causal flag says it."""
    queries = query.shape[2]
    if positions is None and queries in (1, keys):
        return None
    if positions is None:
        return torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)[None, None]
    index = torch.arange(keys, device=positions.device)
    seen = (index <= index[keys - queries :, None]) & (positions >= 0)[:, None, None]
    if documents is not None:
        seen = seen & (documents[:, keys - queries :, None] == documents[:, None])[:, None]
    return seen


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
