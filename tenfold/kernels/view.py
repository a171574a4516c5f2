"""Keys and values of one layer as a compressed cache keeps them, and attention on them.

The keys and values of a layer are exact first tokens, packed blocks and an exact buffer, in this order of tokens. They
are read part by part: the cache is never expanded as a whole. GEAR specification, sections 2.2 and 2.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.kernels.biased import attention_with_lse, biased_mask
from tenfold.kernels.packed_blocks import REFERENCE, Functions, PackedBlocks

DIRECT_ROWS = 32
"""Up to so many queries of a group of heads read the codes; more of them read one expanded chunk after the other."""
CHUNK = 1024
"""Tokens that are expanded at once for them."""
SCORES = 2**22
"""Scores that are held at once where they are written out."""


@dataclass(frozen=True)
class View:
    """One layer's cache during one call.

    Args:
        first: exact keys and values of the first tokens, each ``[batch, kv_heads, tokens, channels]``; may be empty.
        packed: keys and values of packed blocks, in order of tokens.
        buffer: exact keys and values of the last tokens, those of this call among them.
        rotation: orthogonal ``[channels, channels]`` by which packed keys and values were multiplied; None for none.
        functions: the implementation that reads the packed form.
    """

    first: tuple[Tensor, Tensor]
    packed: tuple[tuple[PackedBlocks, PackedBlocks], ...]
    buffer: tuple[Tensor, Tensor]
    rotation: Tensor | None = None
    functions: Functions = REFERENCE

    @property
    def tokens(self) -> int:
        """Number of keys."""
        packed = sum(keys.blocks * keys.length for keys, _ in self.packed)
        return self.first[0].shape[2] + packed + self.buffer[0].shape[2]

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Keys and values as a cache without compression would hand them over: expanded, with the stored error."""
        if not self.packed and not self.first[0].shape[2]:
            return self.buffer
        kind, tokens = self.buffer[0].dtype, self.tokens
        whole = [side.new_empty(*side.shape[:2], tokens, side.shape[3]) for side in self.buffer]
        start = 0
        for key, value, rotated in _chunks(self, torch.promote_types(kind, torch.float32)):
            for side, part in zip(whole, (key, value), strict=True):
                turned = part @ self.rotation.to(part).mT if rotated and self.rotation is not None else part
                side[:, :, start : start + part.shape[2]] = narrowed(turned, kind)
            start += key.shape[2]
        return whole[0], whole[1]


def attend(
    query: Tensor,
    view: View,
    mask: Tensor | None,
    scale: float,
    *,
    bias: Tensor | None = None,
    lift: Callable[[Tensor], Tensor] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of a few or many queries on a compressed cache: one softmax over all of its parts.

    Args:
        query: ``[batch, heads, queries, channels]``; the queries are the last tokens of the cache.
        view: the cache.
        mask: boolean (True where a query may look) or additive, ``[batch or 1, heads or 1, queries, keys]``; None is
            causal.
        scale: factor of the scores.
        bias: added to the scores, ``[batch, heads, 1, keys]``.
        lift: from masked scores to a further bias that depends on them; see `tenfold.kernels.biased.KeyBias.target`.
        softcap: the model's cap of scores.
        sinks: the model's logits of an empty key, ``[heads]``.

    Returns:
        ``[batch, heads, queries, channels]`` in the dtype of ``query``.
    """
    queries, kind = query.shape[2], query.dtype
    query = query.to(torch.promote_types(kind, torch.float32))
    rows = query.shape[1] // view.buffer[0].shape[1] * queries
    plain = lift is None and softcap is None and sinks is None
    if rows > DIRECT_ROWS and plain:
        return narrowed(_by_chunks(query, view, mask, scale, bias), kind)
    step = max(1, SCORES // (query.shape[0] * query.shape[1] * view.tokens))
    outputs = []
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        part = query[:, :, start:stop]
        seen = _rows_of(mask, start, stop, queries, view.tokens, query.device)
        weights = _scores(part * scale, view)
        if softcap is not None:
            weights = torch.tanh(weights / softcap) * softcap
        if bias is not None or seen is not None:
            added = bias if bias is not None else weights.new_zeros(1, 1, 1, 1)
            weights = weights + biased_mask(seen, added.to(weights.dtype), 1, view.tokens)
        if lift is not None:
            weights = weights + lift(weights)
        if sinks is not None:
            weights = torch.cat([weights, sinks.to(weights)[None, :, None, None].expand(*weights.shape[:3], 1)], -1)
        weights = torch.softmax(weights, -1)
        outputs.append(_outputs(weights[..., : view.tokens] if sinks is not None else weights, view))
    return narrowed(outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2), kind)


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As `Tensor.to`, but what rounding has put beyond the largest number of a dtype is that number.

    Codes of rotated heads are off by a part of the *group's* range, so a head near the end of float16 overshoots.

    >>> narrowed(torch.tensor([7e4, -1.0]), torch.float16).tolist()
    [65504.0, -1.0]
    """
    if dtype != torch.float16:  # the others have the range of float32
        return x.to(dtype)
    most = torch.finfo(dtype).max
    return x.clamp(-most, most).to(dtype)


def _rows_of(
    mask: Tensor | None, start: int, stop: int, queries: int, keys: int, device: torch.device
) -> Tensor | None:
    """Some rows of the mask; a causal one is made where it is not given and hides something."""
    if mask is not None:
        return mask if mask.shape[2] == 1 else mask[:, :, start:stop]
    if queries == 1:
        return None
    last = torch.arange(start, stop, device=device) + keys - queries
    return (torch.arange(keys, device=device) <= last[:, None])[None, None]


def _scores(query: Tensor, view: View) -> Tensor:
    """``[batch, heads, queries, keys]`` of scaled queries."""
    heads, queries = query.shape[1:3]
    grouped = query.unflatten(1, (view.buffer[0].shape[1], -1)).flatten(2, 3)
    found = [grouped @ view.first[0].to(grouped).mT] if view.first[0].shape[2] else []
    turned = grouped if view.rotation is None else grouped @ view.rotation.to(grouped)
    found += [view.functions.scores(keys, turned.contiguous()) for keys, _ in view.packed]
    found.append(grouped @ view.buffer[0].to(grouped).mT)
    return torch.cat(found, -1).unflatten(2, (-1, queries)).reshape(query.shape[0], heads, queries, -1)


def _outputs(weights: Tensor, view: View) -> Tensor:
    """Values summed by weights ``[batch, heads, queries, keys]``."""
    heads, queries = weights.shape[1:3]
    kv_heads = view.buffer[0].shape[1]
    grouped = weights.unflatten(1, (kv_heads, -1)).flatten(2, 3)
    sizes = [view.first[1].shape[2], *(values.blocks * values.length for _, values in view.packed)]
    parts = grouped.split([*sizes, view.tokens - sum(sizes)], -1)
    total = parts[-1] @ view.buffer[1].to(grouped)
    if sizes[0]:
        total = total + parts[0] @ view.first[1].to(grouped)
    packed = [
        view.functions.combine(values, part.contiguous())
        for (_, values), part in zip(view.packed, parts[1:-1], strict=True)
    ]
    if packed:
        turned = packed[0] if len(packed) == 1 else torch.stack(packed).sum(0)
        total = total + (turned if view.rotation is None else turned @ view.rotation.to(turned).mT)
    return total.unflatten(2, (-1, queries)).reshape(weights.shape[0], heads, queries, -1)


def _by_chunks(query: Tensor, view: View, mask: Tensor | None, scale: float, bias: Tensor | None) -> Tensor:
    """Many queries: chunk after chunk is expanded and attended to, and the results are merged by their normalisers."""
    queries = query.shape[2]
    turned = query if view.rotation is None else query @ view.rotation.to(query)
    seen = _rows_of(mask, 0, queries, queries, view.tokens, query.device)
    total = normaliser = None
    start = 0
    for key, value, rotated in _chunks(view, query.dtype):
        columns = slice(start, start + key.shape[2])
        start = columns.stop
        part = seen[..., columns] if seen is not None else key.new_ones(1, 1, 1, key.shape[2], dtype=torch.bool)
        visible = part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2
        allowed = part.expand(-1, -1, queries, -1)
        if bias is not None:
            allowed = biased_mask(allowed, bias[..., columns].to(query.dtype), queries, key.shape[2])
        elif allowed.dtype != torch.bool:
            allowed = allowed.to(query.dtype)
        output, lse = attention_with_lse(turned if rotated else query, key, value, allowed, scale)
        if rotated and view.rotation is not None:
            output = output @ view.rotation.to(output).mT
        # Of a row that sees nothing here, the normaliser is open and the output may be anything.
        some = visible.any(-1)
        lse, output = lse.masked_fill(~some, -torch.inf), output.masked_fill(~some[..., None], 0)
        if total is None or normaliser is None:
            total, normaliser = output, lse
            continue
        # Two finished softmaxes become one: sigmoid of the difference of their normalisers is the share of the new one.
        share = torch.sigmoid(lse - normaliser).nan_to_num(0.0)[..., None].to(output.dtype)
        total, normaliser = torch.lerp(total, output, share), torch.logaddexp(normaliser, lse)
    assert total is not None
    return total


def _chunks(view: View, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Keys, values, and whether they are rotated; of packed blocks some `CHUNK` tokens at once."""
    if view.first[0].shape[2]:
        yield view.first[0].to(dtype), view.first[1].to(dtype), False
    for keys, values in view.packed:
        step = max(1, CHUNK // keys.length)
        for start in range(0, keys.blocks, step):
            stop = start + step
            yield keys.some_blocks(start, stop).dense(dtype), values.some_blocks(start, stop).dense(dtype), True
    yield view.buffer[0].to(dtype), view.buffer[1].to(dtype), False
