"""Attention to a local span of keys in linear time: queries in tiles, each against the few tiles of keys it can reach.

Never a mask of all queries and all keys: a tile has one of its own, shared by all tiles where rows are plain, and made
from positions where they are padded or packed. MASFormer specification, section 2 (item 3 and the block-local kernel).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

CHUNK = 2**24
"""Scores of the tiles that are worked on at once: it bounds the copies of keys and values."""

LONG = 128
"""Spans from here on are read in tiles of a quarter: smaller tiles would leave the matrix products too small."""


@dataclass(frozen=True)
class AttentionWindow:
    """Which earlier keys a query sees; causality is always and-ed in. Positions count the real tokens of a document.

    Args:
        pattern: ``sliding``: the last ``size`` keys, itself among them; ``block``: its own block of ``size`` positions
            and the ``previous`` ones before it.
        size: 1 or more.
        previous: blocks to the left; ``block`` only.
        sinks: so many first keys are always seen.
    """

    pattern: Literal["sliding", "block"]
    size: int
    previous: int = 1
    sinks: int = 0

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether queries at some positions see keys at others; the two broadcast.

        >>> AttentionWindow("block", 3, previous=0).sees(torch.arange(4)[:, None], torch.arange(4)).int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]
        """
        near = self.near(query, key)
        return (key <= query) & (near | (key < self.sinks) if self.sinks else near)

    def near(self, query: Tensor, key: Tensor) -> Tensor:
        """The same without causality and sinks."""
        if self.pattern == "sliding":
            return query - key < self.size
        return query.div(self.size, rounding_mode="floor") - key.div(self.size, rounding_mode="floor") <= self.previous

    @property
    def reach(self) -> int:
        """Keys of the past that a query may need, besides itself and the sinks."""
        return self.size - 1 if self.pattern == "sliding" else (self.previous + 1) * self.size - 1

    def pairs(self, n: int) -> int:
        """Visible pairs of query and key among ``n`` tokens, without sinks.

        >>> [AttentionWindow("block", 3, previous).pairs(10) for previous in (0, 1)]
        [19, 40]
        >>> AttentionWindow("sliding", 3).pairs(10)
        27
        """
        if self.pattern == "sliding":
            window = min(self.size, n)
            return n * window - window * (window - 1) // 2
        total = 0
        for start in range(0, n, self.size):
            length = min(self.size, n - start)
            total += length * (length + 1) // 2 + length * min(start, self.previous * self.size)
        return total


FULL = AttentionWindow("sliding", 2**40)
"""Every earlier key."""


def real_positions(seen: Tensor) -> Tensor:
    """Positions of the real tokens of rows, ``[batch, tokens]``; padding has -1.

    >>> real_positions(torch.tensor([[False, True, True]])).tolist()
    [[-1, 0, 1]]
    """
    seen = seen.long()
    return torch.where(seen > 0, seen.cumsum(1) - 1, -1)


def held_positions(places: Tensor, seen: Tensor | None) -> Tensor:
    """Positions of keys at some places of the text, ``[batch, keys]``; -1 for padding and where there is no key.

    >>> held_positions(torch.tensor([[-1, 2, 3]]), torch.tensor([[False, True, True, True]])).tolist()
    [[-1, 1, 2]]
    """
    if seen is None:
        return places
    return torch.where(places >= 0, real_positions(seen).gather(1, places.clamp(min=0)), -1)


@dataclass(frozen=True)
class Softmax:
    """How a model makes weights of products of queries and keys.

    Args:
        scale: factor of the products.
        softcap: scores are bent to lie within plus and minus this, by the tangent, before masks (Gemma 2); None for no
            cap.
        sink: learned scores ``[heads]`` of one more key that is always seen and has a value of zero (gpt-oss); None for
            no such key.
    """

    scale: float
    softcap: float | None = None
    sink: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether torch's own attention computes it."""
        return self.softcap is None and self.sink is None


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    span: AttentionWindow,
    softmax: Softmax | float,
    positions: Tensor | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """Attention of each query to its span.

    Args:
        query: ``[batch, heads, queries, channels]``; the queries are the last tokens of the keys.
        key: ``[batch, kv_heads, keys, channels]``; ``kv_heads`` divides ``heads``.
        value: as ``key``.
        span: what a query sees.
        softmax: how weights are made; a number is the scale.
        positions: of the keys within their documents, ``[batch, keys]``, negative for padding, rising with gaps where
            keys that no query sees are left out; None where all rows are ``0, 1, 2, ...``.
        documents: a number for each key's document, ``[batch, keys]``; None for one document a row.

    Returns:
        ``[batch, heads, queries, channels]``; rows of padding give zeros. A key or value that is not finite reaches
        the queries that see it, and no others.

    >>> x = torch.randn(1, 2, 7, 4)
    >>> torch.equal(local_attention(x, x, x, AttentionWindow("sliding", 1), 1.0), x)
    True
    """
    softmax = softmax if isinstance(softmax, Softmax) else Softmax(softmax)
    if _all_finite(key, value):
        return _on_finite(query, key, value, span, softmax, positions, documents)
    # A tile holds keys that some of its queries do not see, and their weight of 0 times NaN would be NaN. So it is
    # computed without, and equal weights on what was left out tell which queries see it.
    bad = (~value.isfinite() | ~key.isfinite().all(-1, keepdim=True)).to(value.dtype)
    key, value = (torch.where(part.isfinite(), part, 0) for part in (key, value))
    output = _on_finite(query, key, value, span, softmax, positions, documents)
    blank = torch.zeros_like(query), torch.zeros_like(key)
    return output.masked_fill(_on_finite(*blank, bad, span, Softmax(1.0), positions, documents) > 0, torch.nan)


def _all_finite(key: Tensor, value: Tensor) -> bool:
    """Read off one number, for which a GPU is waited for; a sum that overflows takes the longer way, no more."""
    with torch.no_grad():
        total = key.sum(dtype=torch.promote_types(key.dtype, torch.float32))
        return bool((total + value.sum(dtype=total.dtype)).isfinite())


def _on_finite(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    span: AttentionWindow,
    softmax: Softmax,
    positions: Tensor | None,
    documents: Tensor | None,
) -> Tensor:
    """The shortest way for finite keys and values."""
    queries, keys = query.shape[2], key.shape[2]
    if positions is None and queries == keys and keys <= span.size:
        return _causal(query, key, value, softmax)
    if positions is None and queries == keys and not span.sinks:
        return _plain(query, key, value, span, softmax)
    if positions is None:
        positions = torch.arange(keys, device=query.device).expand(query.shape[0], -1)
    if queries <= _tile(span.size) and keys <= span.sinks + span.reach + queries:
        return _dense(query, key, value, span, softmax, positions, documents)
    return _positioned(query, key, value, span, softmax, positions, documents)


def _tile(size: int) -> int:
    """Queries of a tile: a quarter of a long span, so that a tile reads 1.25 spans of keys and not 2."""
    return size if size < LONG else -(-size // 4)


def _causal(query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
    if softmax.plain:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=softmax.scale, enable_gqa=True)
    return dense_attention(query, key, value, _lower(query.shape[2], query.device), softmax)[0]


def _lower(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).tril()


def _plain(query: Tensor, key: Tensor, value: Tensor, span: AttentionWindow, softmax: Softmax) -> Tensor:
    """Rows that start at position 0 and hold one document: every tile but the first few has the same mask."""
    if span.pattern == "block" and span.previous == 0 and softmax.plain:
        return _folded(query, key, value, span.size, softmax)
    # A stride is a block, or a tile of a window; a tile of a block reads no keys beyond its own end.
    tile = _tile(span.size)
    stride = span.size if span.pattern == "block" else tile
    back = span.previous if span.pattern == "block" else -(-span.reach // stride)
    count = query.shape[2]
    strides = -(-count // stride)
    index = torch.arange(stride, device=query.device)
    column = torch.arange(-back * stride, stride, device=query.device)
    mask = span.sees(index[:, None], column)
    key, value = (pad(part, (0, 0, back * stride, strides * stride - count)) for part in (key, value))
    query = pad(query, (0, 0, 0, strides * stride - count)).unflatten(2, (strides, stride))
    outputs = []
    steps = _steps(query, tile * (back + 1) * stride, strides)
    asked = query.split([stop - start for start, stop in steps], 2)
    held = zip(*(_pieces(part, steps, stride, back * stride) for part in (key, value)), strict=True)
    for (start, stop), queries, near in zip(steps, asked, held, strict=True):
        first = torch.arange(start, stop, device=query.device)[:, None, None] * stride
        rows = []
        for top in range(0, stride, tile):
            bottom = min(top + tile, stride)
            width = back * stride + bottom
            seen = mask[top:bottom, :width].expand(stop - start, -1, -1)
            if start < back:  # before the first token there is nothing
                seen = seen & (column[:width] + first >= 0)
            keys, values = (part.unfold(2, (back + 1) * stride, stride).mT[..., :width, :] for part in near)
            rows.append(_attend(queries[:, :, :, top:bottom], keys, values, seen, softmax))
        outputs.append(torch.cat(rows, 3))
    return torch.cat(outputs, 2).flatten(2, 3)[:, :, :count]


def _folded(query: Tensor, key: Tensor, value: Tensor, size: int, softmax: Softmax) -> Tensor:
    """Blocks that see nothing but themselves are a larger batch of causal attention, without any mask."""
    count = query.shape[2]
    whole = count // size * size
    parts = [part[:, :, :whole].unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1) for part in (query, key, value)]
    output = _causal(parts[0], parts[1], parts[2], softmax)
    output = output.unflatten(0, (query.shape[0], -1)).transpose(1, 2).flatten(2, 3)
    if whole == count:
        return output
    rest = [part[:, :, whole:] for part in (query, key, value)]
    last = _causal(rest[0], rest[1], rest[2], softmax)
    return torch.cat([output, last], 2)


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    span: AttentionWindow,
    softmax: Softmax,
    positions: Tensor,
    documents: Tensor | None,
) -> Tensor:
    """So few rows and keys, as in decoding, that one tile is all of them."""
    seen = visible(span, query, key.shape[2], positions, documents)
    return _attend(query[:, :, None], key[:, :, None], value[:, :, None], seen, softmax)[:, :, 0]


def visible(
    span: AttentionWindow, query: Tensor, keys: int, positions: Tensor | None = None, documents: Tensor | None = None
) -> Tensor:
    """A mask of all pairs: bool, ``[batch, 1, queries, keys]``; arguments as `local_attention` takes them.

    >>> visible(AttentionWindow("sliding", 2), torch.zeros(1, 1, 3, 4), 3).int().tolist()
    [[[[1, 0, 0], [1, 1, 0], [0, 1, 1]]]]
    """
    if positions is None:
        positions = torch.arange(keys, device=query.device).expand(query.shape[0], -1)
    seen = span.sees(positions[:, -query.shape[2] :, None], positions[:, None]) & (positions >= 0)[:, None]
    if documents is not None:
        seen = seen & (documents[:, -query.shape[2] :, None] == documents[:, None])
    return seen[:, None]


def _positioned(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    span: AttentionWindow,
    softmax: Softmax,
    positions: Tensor,
    documents: Tensor | None,
) -> Tensor:
    """Any rows: tiles by array place, masks from positions. Blocks of a row may begin anywhere within a tile.

    Keys that are left out bring others closer: what is near by position is near by place.
    """
    queries, keys = query.shape[2], key.shape[2]
    documents = torch.zeros_like(positions) if documents is None else documents
    size = min(_tile(span.size), queries)
    back = -(-span.reach // size)  # tiles of keys before a tile of queries
    tiles, offset = -(-queries // size), keys - queries
    skip, left, right = max(0, offset - back * size), max(0, back * size - offset), tiles * size - queries
    far = first_keys(positions, span.sinks)
    asked = [pad(x[:, offset:], (0, right), value=-1) for x in (positions, documents)]
    held = [pad(x[:, skip:], (left, right), value=-1) for x in (positions, documents)]
    query = pad(query, (0, 0, 0, right))
    near = [pad(x[:, :, skip:], (0, 0, left, right)) for x in (key, value)]
    width = (back + 1) * size
    outputs = []
    steps = _steps(query, size * (width + far.shape[1]), tiles)
    rows = query.split([(stop - start) * size for start, stop in steps], 2)
    keys_of = zip(*(_pieces(x, steps, size, back * size) for x in near), strict=True)
    for (start, stop), row, pieces in zip(steps, rows, keys_of, strict=True):
        count, columns = stop - start, slice(start * size, (stop + back) * size)
        tile = row.unflatten(2, (count, size))
        parts = [x.unfold(2, width, size).mT for x in pieces]
        place, document = (x[:, start * size : stop * size].view(-1, count, size, 1) for x in asked)
        its_place, its_document = (x[:, columns].unfold(1, width, size).unsqueeze(2) for x in held)
        seen = span.sees(place, its_place) & (its_place >= 0) & (document == its_document)
        if far.shape[1]:
            index = far.clamp(min=0)
            beyond = [x.take_along_dim(index[:, None, :, None], 2) for x in (key, value)]
            parts = [
                torch.cat([x[:, :, None].expand(-1, -1, count, -1, -1), y], 3)
                for x, y in zip(beyond, parts, strict=True)
            ]
            # A sink among the near keys is seen there.
            first = skip - left + size * torch.arange(start, stop, device=far.device)[None, :, None, None]
            outside = (far[:, None, None] >= 0) & (far[:, None, None] < first)
            same = documents.gather(1, index)[:, None, None] == document
            earlier = positions.gather(1, index)[:, None, None] <= place
            seen = torch.cat([outside & same & earlier, seen], -1)
        outputs.append(_attend(tile, parts[0], parts[1], seen, softmax))
    return torch.cat(outputs, 2).flatten(2, 3)[:, :, :queries]


def first_keys(positions: Tensor, sinks: int) -> Tensor:
    """Array places of the first keys of every document, ``[batch, most]``, filled up with -1."""
    chosen = (positions >= 0) & (positions < sinks)
    most = int(chosen.sum(1).max()) if sinks else 0
    order = chosen.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    return torch.where(chosen.gather(1, order), order, -1)


def _steps(query: Tensor, scores: int, tiles: int) -> list[tuple[int, int]]:
    """Intervals of tiles that are worked on at once."""
    step = max(1, CHUNK // (query.shape[0] * query.shape[1] * scores))
    return [(start, min(start + step, tiles)) for start in range(0, tiles, step)]


def _pieces(part: Tensor, steps: list[tuple[int, int]], size: int, before: int) -> list[Tensor]:
    """The keys of each step, with those before them; ``part`` begins with those before the first.

    Slices of the whole would each have a gradient as large as the whole, and all of them time in the square of it.
    """
    near, *others = part.split([before, *((stop - start) * size for start, stop in steps)], 2)
    found = []
    for other in others:
        near = torch.cat([near[:, :, near.shape[2] - before :], other], 2)
        found.append(near)
    return found


def _attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, softmax: Softmax) -> Tensor:
    """Attention of tiles.

    Args:
        query: ``[batch, heads, tiles, size, channels]``.
        key: ``[batch, kv_heads, tiles, width, channels]``.
        value: as ``key``.
        seen: ``[tiles, size, width]`` or ``[batch, tiles, size, width]``, bool.
        softmax: how weights are made.

    Returns:
        As ``query``; queries that see nothing give zeros.
    """
    batch, tiles = query.shape[0], query.shape[2]
    parts = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    seen = seen.expand(batch, *seen.shape[-3:]).flatten(0, 1)[:, None]
    folded_query, folded_key, folded_value = parts
    if softmax.plain:
        # A query that sees nothing must not divide by nothing: it looks at all, and its result is dropped.
        some = seen.any(-1, keepdim=True)
        output = scaled_dot_product_attention(
            folded_query, folded_key, folded_value, attn_mask=seen | ~some, scale=softmax.scale, enable_gqa=True
        )
        output = output.masked_fill(~some, 0)
    else:
        output = dense_attention(folded_query, folded_key, folded_value, seen, softmax)[0]
    return output.unflatten(0, (batch, tiles)).transpose(1, 2)


def dense_attention(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, softmax: Softmax) -> tuple[Tensor, Tensor]:
    """Attention with all of its weights at hand, for what torch's own cannot compute or does not tell.

    Args:
        query: ``[batch, heads, queries, channels]``.
        key: ``[batch, kv_heads, keys, channels]``; ``kv_heads`` divides ``heads``.
        value: as ``key``.
        seen: which keys a query sees, bool, ``[batch or 1, 1, queries, keys]`` or ``[queries, keys]``.
        softmax: how weights are made.

    Returns:
        Output as ``query``, and weights ``[batch, heads, queries, keys]`` in its dtype, which add up to less than 1
        where a sink takes the rest. Queries that see nothing give zeros.

    >>> x = torch.ones(1, 1, 2, 4)
    >>> dense_attention(x, x, x, torch.ones(2, 2).bool().tril(), Softmax(1.0))[1]
    tensor([[[[1.0000, 0.0000],
              [0.5000, 0.5000]]]])
    """
    heads, queries, kv_heads = query.shape[1], query.shape[2], key.shape[1]
    # Queries that share keys stand below each other: keys and values are read as they are.
    scores = (query.reshape(len(query), kv_heads, -1, query.shape[3]) @ key.mT) * softmax.scale
    scores = scores.view(len(query), heads, queries, -1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if softmax.softcap is not None:
        scores = softmax.softcap * torch.tanh(scores / softmax.softcap)
    # Not -inf: a query that sees nothing must not divide by nothing.
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if softmax.sink is not None:
        sink = softmax.sink.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]].masked_fill(~seen, 0).to(value.dtype)
    output = weights.view(len(query), kv_heads, -1, weights.shape[3]) @ value
    return output.view(len(query), heads, queries, -1), weights
