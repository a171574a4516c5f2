"""MASFormer's local attention beside full flash attention and the ways that torch has for a window."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.bench import Bench, Measured, Shape
from tenfold.kernels.local import AttentionWindow, local_attention

Way = Callable[[Tensor, Tensor, Tensor], Tensor]
ROWS = 64
"""Queries whose attention is written out in float64, at the beginning, in the middle and at the end of the text."""
DENSE = 16_384
"""Tokens up to which a mask of all pairs is made."""


def local(bench: Bench) -> None:
    """One layer reads a text, forward and with its backward pass."""
    sizes = bench.sizes(((4096, 1024), (32768, 1024), (32768, 4096)), ((150, 32),))
    for (tokens, window), shape in itertools.product(sizes, bench.shapes):
        for way, backward in itertools.product(_ways(bench, tokens), (False, True)):
            _row(bench, shape, tokens, window, way, backward)
    # Last, and one size alone: each shape is compiled for some ten seconds.
    for shape in bench.shapes:
        for backward in bench.sizes((False, True), (False,)):  # there is no backward pass on a CPU
            _row(bench, shape, *bench.sizes((32768, 1024), (150, 32)), "flex attention window", backward)


def _row(bench: Bench, shape: Shape, tokens: int, window: int, way: str, backward: bool) -> None:
    case = {"model": shape.name, "head_dim": shape.channels, "tokens": tokens, "window": window}
    case |= {"pass": "both" if backward else "forward", "way": way}
    bench.row("local attention", case, partial(_one, bench, shape, tokens, window, way, backward))


def _ways(bench: Bench, tokens: int) -> tuple[str, ...]:
    ours = ("sliding", "sliding, keys repeated", "sliding, 4 sinks", "blocks, one before")
    masked = ("sdpa, mask of the window",) if tokens <= DENSE else ()
    flash = ("flash-attn window",) if find_spec("flash_attn") and not bench.rehearse else ()
    return (*(f"tenfold {way}" for way in ours), "sdpa, full", *masked, *flash)


def _span(way: str, window: int, tokens: int) -> AttentionWindow:
    """What a query sees; the window of flash and flex is the same number of keys."""
    if "full" in way:
        return AttentionWindow("sliding", tokens)
    if "blocks" in way:
        return AttentionWindow("block", window, 1)
    return AttentionWindow("sliding", window, sinks=4 if "sinks" in way else 0)


def _one(bench: Bench, shape: Shape, tokens: int, window: int, way: str, backward: bool) -> Measured:
    bench.seed = tokens
    query = bench.randn(1, shape.heads, tokens, shape.channels).requires_grad_(backward)
    key, value = (bench.randn(1, shape.kv_heads, tokens, shape.channels).requires_grad_(backward) for _ in range(2))
    span = _span(way, window, tokens)
    function = _function(bench, way, span, window, tokens)
    # Only the last tokens' queries have a gradient here, so that their keys' can be written out as well.
    slope = bench.randn(1, shape.heads, tokens, shape.channels)
    marked = torch.zeros_like(slope)
    marked[:, :, -ROWS:] = slope[:, :, -ROWS:]
    found = function(query, key, value)
    starts = sorted({0, (tokens - ROWS) // 2, tokens - ROWS})
    places = torch.cat([torch.arange(start, start + ROWS, device=bench.device) for start in starts])
    exact = _rows(query, key, value, span, places)
    errors = {"error": bench.check(found[:, :, places], exact, 2e-2)}
    if backward:
        leaves = (query, key, value)
        gradients = torch.autograd.grad(found, leaves, marked)
        expected = _gradients(query, key, value, span, slope[:, :, -ROWS:])
        pairs = zip((gradients[0][:, :, -ROWS:], *gradients[1:]), expected, strict=True)
        errors["gradient_error"] = max(bench.check(*pair, 3e-2) for pair in pairs)

    def work() -> object:
        output = function(query, key, value)
        return torch.autograd.grad(output, (query, key, value), slope) if backward else output

    return {**errors, "ms": bench.milliseconds(work), "peak": bench.peak(work)}


def _rows(query: Tensor, key: Tensor, value: Tensor, span: AttentionWindow, places: Tensor) -> Tensor:
    """Attention of some queries in float64, written out: ``[1, heads, places, channels]``."""
    wide_key, wide_value = (_for_each_head(query, part.double()) for part in (key, value))
    scores = query[:, :, places].double() @ wide_key.mT * query.shape[3] ** -0.5
    seen = span.sees(places[:, None], torch.arange(key.shape[2], device=key.device))
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ wide_value


def _gradients(query: Tensor, key: Tensor, value: Tensor, span: AttentionWindow, slope: Tensor) -> tuple[Tensor, ...]:
    """Those of the last queries and of all keys and values, in float64."""
    leaves = [part.detach().double().requires_grad_() for part in (query[:, :, -ROWS:], key, value)]
    places = torch.arange(ROWS, device=query.device)
    wide = [_for_each_head(query, part) for part in leaves[1:]]
    scores = leaves[0] @ wide[0].mT * query.shape[3] ** -0.5
    seen = span.sees((places + key.shape[2] - ROWS)[:, None], torch.arange(key.shape[2], device=key.device))
    output = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ wide[1]
    return torch.autograd.grad(output, leaves, slope.double())


def _function(bench: Bench, way: str, span: AttentionWindow, window: int, tokens: int) -> Way:
    if way.startswith("tenfold"):
        # Some of torch's kernels take no mask where heads share keys; then it is worth a copy of the keys.
        copied = "repeated" in way
        return lambda q, k, v: local_attention(
            q, *(_for_each_head(q, part) if copied else part for part in (k, v)), span, q.shape[3] ** -0.5
        )
    if way == "sdpa, full":
        return partial(scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    if way == "flash-attn window":
        from flash_attn import flash_attn_func

        return lambda q, k, v: flash_attn_func(
            *(part.transpose(1, 2) for part in (q, k, v)), causal=True, window_size=(window - 1, 0)
        ).transpose(1, 2)
    if way == "sdpa, mask of the window":
        index = torch.arange(tokens, device=bench.device)
        mask = span.sees(index[:, None], index)
        return lambda q, k, v: scaled_dot_product_attention(  # as transformers calls it
            q, _for_each_head(q, k), _for_each_head(q, v), attn_mask=mask
        )
    return _flex(bench, window, tokens)


def _for_each_head(query: Tensor, part: Tensor) -> Tensor:
    return part.repeat_interleave(query.shape[1] // part.shape[1], 1)


def _flex(bench: Bench, window: int, tokens: int) -> Way:
    """Compiled on a GPU, which takes seconds once for each shape; a rehearsal runs it as it is."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query - key < window)

    torch.compiler.reset()  # else the ninth shape is not compiled any more
    mask = create_block_mask(sees, None, None, tokens, tokens, device=bench.device.type)
    function = flex_attention if bench.rehearse else torch.compile(flex_attention, dynamic=False)
    return partial(function, block_mask=mask, enable_gqa=True)
