"""Spans of layers in the attention function: full attention in some layers, a local span in the others.

A model carries its spans in its configuration, ``tenfold_span``, so that they are saved with it. Its attention runs as
``tenfold_span``: one function, and a mask function that hands the two-dimensional padding mask through, because no mask
of all pairs shall exist. MASFormer specification, section 2.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from tenfold.attend.attention import PREFIX, Probe, attention
from tenfold.errors import ModelError
from tenfold.kernels.biased import KeyBias, with_key_channel
from tenfold.kernels.local import Held, Span, held_positions, local_attention, real_positions
from tenfold.kernels.view import View

NAME = f"{PREFIX}span"
FIELD = "tenfold_span"
"""Of the model's configuration: ``full_layers``, and the fields of `Span`."""


def span_of(config: Any, layer: int) -> Span | None:
    """The span of a layer; None for full attention.

    >>> from types import SimpleNamespace
    >>> span_of(SimpleNamespace(tenfold_span={"full_layers": [0], "pattern": "sliding", "size": 8}), 1)
    Span(pattern='sliding', size=8, previous=1, sinks=0)
    """
    table = getattr(config, FIELD, None)
    if table is None or layer in table["full_layers"]:
        return None
    return Span(**{key: value for key, value in table.items() if key != "full_layers"})


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
    """Attention of one layer by its span, as transformers calls it.

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
        gate: share of full attention in a layer with a span, a number between 0 and 1 that may ask for a gradient;
            the rest is local. None is 0; see `tenfold.attend.masformer.profile`.
        **arguments: what else transformers passes, ``position_ids`` among them.

    Returns:
        Output ``[batch, queries, heads, head_dim]``, and None.

    Raises:
        ModelError: a mask of four dimensions or a dose of attention for a local layer; a cache made for another span.
    """
    layer: Any = module.layer_idx
    span = span_of(module.config, layer)
    if isinstance(key, Held):
        given = {"key_bias": key_bias, "probe": probe, "gate": gate, **arguments}
        return _on_held(module, query, key, attention_mask, span, given)
    keys = key.tokens if isinstance(key, View) else key.shape[2]
    if attention_mask is not None and attention_mask.ndim == 4:
        if span is not None:
            raise _four_dimensions(layer)
        mask: Tensor | None = attention_mask
        positions = documents = None
    else:
        mask = attention_mask
        positions, documents = _places(query.shape[0], query.shape[2], keys, mask, arguments.get("position_ids"))
    if span is None:
        if mask is None or mask.ndim == 2:
            mask = _full_mask(query, keys, positions, documents)
        return attention(module, query, key, value, mask, base="sdpa", key_bias=key_bias, probe=probe, **arguments)
    if gate is not None:
        full = _full_mask(query, keys, positions, documents)
        whole = attention(module, query, key, value, full, base="sdpa", key_bias=key_bias, **arguments)[0]
        local = spanned(module, query, key, value, attention_mask, key_bias, **arguments)[0]
        return torch.lerp(local, whole, gate.to(local.dtype)), None
    if probe is not None:
        again = partial(spanned, module, query, key, attention_mask=attention_mask, key_bias=key_bias, **arguments)
        probe(layer, value, lambda values: again(value=values)[0])
    return _local(module, query, key, value, span, positions, documents, key_bias, arguments.get("scaling"))


def _four_dimensions(layer: int) -> ModelError:
    return ModelError(
        f"layer {layer}: a mask of four dimensions says itself what is seen, and this layer has a span",
        remedy="give a mask [batch, tokens], or position_ids that begin again at each document",
    )


def _on_held(
    module: nn.Module, query: Tensor, held: Held, mask: Tensor | None, span: Span | None, given: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Attention on a small cache; as long as it holds the whole text, it is that on its tensors."""
    layer: Any = module.layer_idx
    if span != held.span:
        raise ModelError(
            f"layer {layer}: its cache was made for {held.span}, and the layer has {span or 'full attention'}",
            remedy="make another SpanCache after each conversion",
        )
    if mask is not None and mask.ndim == 4:
        raise _four_dimensions(layer)
    seen = None if mask is None else mask[:, -held.tokens :].bool()
    if held.places is None:
        output = spanned(module, query, held.keys, held.values, seen, **given)
    else:
        if given["probe"] is not None or given["gate"] is not None:
            raise ModelError(
                f"layer {layer}: a picture of attention needs all {held.tokens} keys, and the cache holds fewer",
                remedy="call the model with use_cache=False",
            )
        index = held.places.clamp(min=0)
        biases = tuple(replace(bias, values=bias.values.take_along_dim(index, 1)) for bias in given["key_bias"])
        positions = held_positions(held.places, seen)
        output = _local(module, query, held.keys, held.values, held.span, positions, None, biases, given.get("scaling"))
    held.finish(seen)
    return output


def _local(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    span: Span,
    positions: Tensor | None,
    documents: Tensor | None,
    key_bias: tuple[KeyBias, ...],
    scaling: float | None,
) -> tuple[Tensor, None]:
    """Local attention with biases of keys; as `spanned` returns it."""
    layer: Any = module.layer_idx
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    size = value.shape[-1]
    for bias in key_bias:
        if bias.target is not None:
            raise ModelError(f"layer {layer}: target_mass, and this layer has a span", remedy="use alpha")
        query, key, value = with_key_channel(query, key, value, scale, bias)
    output = local_attention(query, key, value, span, scale, positions, documents)
    return output[..., :size].transpose(1, 2).contiguous(), None


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


def _padding_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The mask function of ``tenfold_span``: the padding mask as it is, or None where nothing is padded."""
    return None if attention_mask is None or bool(attention_mask.all()) else attention_mask


AttentionInterface.register(NAME, spanned)
AttentionMaskInterface.register(NAME, _padding_mask)
