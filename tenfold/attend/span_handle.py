"""The handle of keys by spans: each KV head's keys apart by what it sees, and attention on them.

A small cache hands one over; attention of a local layer without a cache makes one of its whole keys. MASFormer
specification, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tenfold.attend.attention import attention
from tenfold.attend.handle import CacheHandle
from tenfold.errors import ModelError
from tenfold.kernels.biased import KeyBias, in_parts, with_key_channel
from tenfold.kernels.local import (
    FULL,
    AttentionWindow,
    Softmax,
    dense_attention,
    held_positions,
    local_attention,
    real_positions,
    visible,
)


@dataclass(frozen=True)
class Part:
    """Keys and values of the KV heads of a layer that see the same.

    Args:
        heads: which KV heads, ascending.
        keys: ``[batch, heads, keys, channels]``, in order of the text; the last are those of this call.
        values: as ``keys``.
        span: what they see; for it the keys were chosen.
        tokens: of the whole text so far.
        places: of the keys in the text, ``[batch, keys]``, -1 where a row has no key; None where they are all of it.
    """

    heads: list[int]
    keys: Tensor
    values: Tensor
    span: AttentionWindow
    tokens: int
    places: Tensor | None = None


@dataclass(frozen=True)
class SpanHandle(CacheHandle):
    """Keys and values of a layer by what its KV heads see.

    Args:
        commit: as in `CacheHandle`; it is given what is no padding, ``[batch, tokens]``, bool, None for all.
        parts: every head of the layer is in one.
    """

    parts: tuple[Part, ...]

    remedy: ClassVar[str] = "call it with its own cache, not with a SpanCache"

    @property
    def tokens(self) -> int:
        """Tokens of the text so far."""
        return self.parts[0].tokens

    @property
    def exact(self) -> bool:
        """Whether all keys are there."""
        return all(part.places is None for part in self.parts)

    def attend(
        self, module: nn.Module, query: Tensor, mask: Tensor | None, bias: tuple[KeyBias, ...] = (), **arguments: Any
    ) -> Tensor:
        """Attention of each part with its own queries and biases; as `CacheHandle.attend`.

        Args:
            module: the attention module.
            query: ``[batch, heads, queries, head_dim]``.
            mask: ``[batch, tokens]``, what is no padding; None for all.
            bias: of keys; here also with ``until``.
            **arguments: what else transformers passes.
        """
        seen = self._seen(mask)
        plain = places_of(query, self.tokens, seen, arguments.get("position_ids"))
        grouped = query.unflatten(1, (self._count, -1))
        outputs = []
        for part in self.parts:
            its, biases, places = query, bias, plain
            if len(self.parts) > 1:
                its, biases = grouped[:, part.heads].flatten(1, 2), _biases_of(bias, part.heads, grouped.shape[2])
            if part.places is not None:
                index = part.places.clamp(min=0)
                biases = tuple(replace(each, values=each.values.take_along_dim(index, 1)) for each in biases)
                places = held_positions(part.places, seen), None
            softmax = _softmax(query, arguments, part.heads, grouped.shape[2])
            if _sees_all(query, part, seen) and softmax.plain:
                given = {"base": "sdpa", "key_bias": biases, **arguments}
                output = attention(module, its, part.keys, part.values, None, **given)[0]
            else:
                output = _of_span(module, its, part, places, biases, softmax, arguments)
            outputs.append(output.unflatten(2, (len(part.heads), -1)))
        self.commit(seen)
        return self._joined(outputs, 2).flatten(2, 3)

    def with_weights(
        self, module: nn.Module, query: Tensor, mask: Tensor | None, bias: tuple[KeyBias, ...] = (), **arguments: Any
    ) -> tuple[Tensor, Tensor]:
        """As `attend`, of all keys, with the weights ``[batch, heads, queries, keys]`` that eager attention shows."""
        places = places_of(query, self.tokens, self._seen(mask), arguments.get("position_ids"))
        grouped = query.unflatten(1, (self._count, -1))
        outputs, weights = [], []
        for part in self.parts:
            softmax = _softmax(query, arguments, part.heads, grouped.shape[2])
            biases = _biases_of(bias, part.heads, grouped.shape[2])
            its = _biased(module, grouped[:, part.heads].flatten(1, 2), part, softmax, biases)
            visible_to_it = visible(part.span, query, part.keys.shape[2], *places)
            output, its_weights = dense_attention(*its, visible_to_it, softmax)
            outputs.append(output[..., : part.values.shape[-1]].unflatten(1, (len(part.heads), -1)))
            weights.append(its_weights.unflatten(1, (len(part.heads), -1)))
        output, whole = (self._joined(tensors, 1).flatten(1, 2) for tensors in (outputs, weights))
        return output.transpose(1, 2).contiguous(), whole

    def dense(self, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `CacheHandle.dense`."""
        if not self.exact:
            raise ModelError(
                f"all {self.tokens} keys are asked for, and their cache holds fewer",
                remedy="call the model with use_cache=False",
            )
        self.commit(self._seen(mask))
        keys, values = ([getattr(part, side) for part in self.parts] for side in ("keys", "values"))
        return self._joined(keys, 1), self._joined(values, 1)

    @property
    def _count(self) -> int:
        """KV heads of the layer."""
        return sum(len(part.heads) for part in self.parts)

    def _seen(self, mask: Tensor | None) -> Tensor | None:
        return None if mask is None else mask[:, -self.tokens :].bool()

    def _joined(self, tensors: Sequence[Tensor], dim: int) -> Tensor:
        """Tensors of the parts in one, in the order of the KV heads, which are dimension ``dim``."""
        if len(tensors) == 1:
            return tensors[0]
        order = torch.tensor([head for part in self.parts for head in part.heads], device=tensors[0].device).argsort()
        return torch.cat(list(tensors), dim).index_select(dim, order)


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
    part: Part,
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
        mask = full_mask(query, part.keys.shape[2], *places)
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
    module: nn.Module, query: Tensor, part: Part, softmax: Softmax, key_bias: tuple[KeyBias, ...]
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


def _sees_all(query: Tensor, part: Part, seen: Tensor | None) -> bool:
    """Whether one query, without padding, sees all that a small cache holds: then there is nothing to mask."""
    span, keys = part.span, part.keys.shape[2]
    alone = seen is None and query.shape[2] == 1
    return alone and span.pattern == "sliding" and keys <= span.sinks + span.size


def places_of(
    query: Tensor, keys: int, mask: Tensor | None, position_ids: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Positions of the keys within their documents, and their documents, each ``[batch, keys]``; None where plain.

    Padding has position -1. Documents are packed where positions begin again and no padding mask is given.
    """
    if mask is not None:
        return real_positions(mask[:, -keys:]), None
    if position_ids is None or query.shape[2] != keys or keys == 1:
        return None, None
    places = position_ids.expand(len(query), -1)
    begins = places[:, 1:] <= places[:, :-1]
    if not bool(begins.any()):
        return None, None
    documents = torch.nn.functional.pad(begins.long().cumsum(1), (1, 0))
    first = torch.nn.functional.pad(begins, (1, 0), value=True)
    index = torch.arange(keys, device=places.device)
    return index - torch.where(first, index, 0).cummax(1).values, documents


def full_mask(query: Tensor, keys: int, positions: Tensor | None, documents: Tensor | None) -> Tensor | None:
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
