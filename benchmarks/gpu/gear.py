"""GEAR: attention of one token on a packed cache beside bfloat16 attention, whole models, and what packing costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from benchmarks.gpu.bench import Bench, Measured, Shape
from benchmarks.gpu.models import in_float64, random_ids, random_llama
from tenfold.attend.attention import installed
from tenfold.cache.gear.cache import GearCache
from tenfold.cache.gear.layer import GearLayer
from tenfold.config.gear import parse_kv
from tenfold.kernels.view import View, attend

CACHES = ("gear:4", "gear:2", "gear-full:2")
ROUNDED = 2e-2
"""What bfloat16 and its sums may be away from float64; the kernels' own arithmetic is float32."""


def attention(bench: Bench) -> None:
    """One layer, one new token: 4k to 128k tokens in the cache, 1 and 32 rows; bytes of the layer's cache."""
    for tokens in bench.sizes((4096, 32768, 131072), (300,)):
        for shape in bench.shapes:
            for batch in bench.sizes((1, 32), (2,)):
                case = {"model": shape.name, "head_dim": shape.channels, "batch": batch, "tokens": tokens}
                query = bench.randn(batch, shape.heads, 1, shape.channels)
                for way in (*_exact_ways(bench), *CACHES):
                    work = partial(_exact if way in _exact_ways(bench) else _packed, bench, shape, query, tokens, way)
                    bench.row("gear attention", {**case, "way": way}, work)


def _exact_ways(bench: Bench) -> tuple[str, ...]:
    more = ("flash-attn",) if find_spec("flash_attn") and not bench.rehearse else ()
    return ("sdpa", "sdpa, flash", *more)


def _tensors(bench: Bench, shape: Shape, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one row, the same for every way; keys have channels of unequal size, as real ones."""
    bench.seed = tokens
    size = (1, shape.kv_heads, tokens, shape.channels)
    return bench.randn(*size) * (1 + 2 * bench.randn(1, shape.kv_heads, 1, shape.channels).abs()), bench.randn(*size)


def _exact(bench: Bench, shape: Shape, query: Tensor, tokens: int, way: str) -> Measured:
    key, value = (part.repeat(len(query), 1, 1, 1) for part in _tensors(bench, shape, tokens))
    work: Callable[[], Tensor] = partial(scaled_dot_product_attention, query, key, value, enable_gqa=True)
    if way == "sdpa, flash":
        work = partial(_on_flash, work)
    if way == "flash-attn":
        from flash_attn import flash_attn_with_kvcache

        turned = [part.transpose(1, 2).contiguous() for part in (query, key, value)]
        found = flash_attn_with_kvcache(*turned)
        error = bench.check(found.transpose(1, 2)[:1], _dense(query[:1], key[:1], value[:1]), ROUNDED)
        work = partial(flash_attn_with_kvcache, *turned)
    else:
        error = bench.check(work()[:1], _dense(query[:1], key[:1], value[:1]), ROUNDED)
    return {"error": error, **_timed(bench, work), "bytes": key.nbytes + value.nbytes}


def _on_flash(work: Callable[[], Tensor]) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return work()


def _packed(bench: Bench, shape: Shape, query: Tensor, tokens: int, way: str) -> Measured:
    layer = packed_layer(bench, way, *_tensors(bench, shape, tokens))
    exact = _dense(query[:1], *(part.double() for part in _stored(layer)))
    layer.batch_repeat_interleave(len(query))
    view = View(layer.first, layer.packed, layer.buffer, layer.rotation, layer.functions)
    scale = shape.channels**-0.5
    work = partial(attend, query, view, None, scale)
    error = bench.check(work()[:1], exact, ROUNDED)
    # The packed form is read in float32: without the rounding of the output it is much nearer.
    kernel = bench.check(attend(query.float(), view, None, scale)[:1], exact, 1e-4)
    stored = layer.stored_bytes()
    return {"error": error, "kernel_error": kernel, **_timed(bench, work), "bytes": sum(stored.values())}


def _timed(bench: Bench, work: Callable[[], object]) -> Measured:
    return {
        "ms": bench.milliseconds(work),
        "graph_ms": bench.graph_milliseconds(work),
        "peak": bench.peak(work),
    }


def packed_layer(bench: Bench, way: str, key: Tensor, value: Tensor) -> GearLayer:
    """A layer that has read a prompt."""
    settings = parse_kv(way).model_copy(update={"kernel": bench.kernel})
    layer = GearLayer(settings, 0, lambda: True)
    layer.update(key, value)
    layer.commit()
    return layer


def _stored(layer: GearLayer) -> tuple[Tensor, Tensor]:
    """Keys and values of the first row as the packed form stands for them, expanded in float64 and turned back."""
    found = []
    for side in range(2):
        parts = [layer.first[side][:1].double()]
        for pair in layer.packed:
            dense = pair[side].map(lambda part: part[:, :1]).dense(torch.float64)
            parts.append(dense if layer.rotation is None else dense @ layer.rotation.double().mT)
        found.append(torch.cat([*parts, layer.buffer[side][:1].double()], 2))
    return found[0], found[1]


def _dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of the last token in float64, written out: ``[1, heads, 1, channels]``."""
    groups = query.shape[1] // key.shape[1]
    grouped = query.double().unflatten(1, (-1, groups)).squeeze(3)
    weights = torch.softmax(grouped @ key.double().mT * query.shape[3] ** -0.5, -1)
    return (weights @ value.double()).flatten(1, 2).unsqueeze(2)


# ---- whole models ---------------------------------------------------------------------------------------------------


def decoding(bench: Bench) -> None:
    """A step of a model of a few layers on a filled cache, the host's part included; bytes of the whole cache."""
    for shape in bench.shapes:
        model = random_llama(bench, shape)
        for batch, tokens in bench.sizes(((1, 4096), (32, 4096), (1, 32768), (1, 131072)), ((2, 300),)):
            case = {"model": shape.name, "layers": shape.layers, "batch": batch, "tokens": tokens}
            for way in ("DynamicCache", *CACHES[:2]):
                bench.row("gear decode", {**case, "way": way}, partial(_step, bench, shape, model, batch, tokens, way))
        del model


def _step(bench: Bench, shape: Shape, model: Any, batch: int, tokens: int, way: str) -> Measured:
    settings = None if way == "DynamicCache" else parse_kv(way).model_copy(update={"kernel": bench.kernel})
    cache: Any = DynamicCache(config=model.config) if settings is None else GearCache(model.config, settings)
    exact = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        key, value = _tensors(bench, shape, tokens)
        cache.update(key, value, index)
        if isinstance(layer, GearLayer):
            layer.commit()
            key, value = _stored(layer)
        exact.update(key.double(), value.double(), index)
    ids = random_ids(bench, 1, 1)
    with torch.no_grad():
        expected = in_float64(model)(input_ids=ids, past_key_values=exact).logits
    del exact
    cache.batch_repeat_interleave(batch)
    size = _bytes(cache)

    def step() -> Tensor:
        logits: Tensor = model(input_ids=ids.expand(batch, 1), past_key_values=cache, use_cache=True).logits
        return logits

    # Through whole layers every rounding to bfloat16 counts: DynamicCache's row says how much that is by itself.
    with torch.no_grad(), installed(model):
        error = bench.check(step()[:1], expected, 0.1)
        return {"error": error, "ms": bench.milliseconds(step), "peak": bench.peak(step), "bytes": size}


def _bytes(cache: Any) -> int:
    if isinstance(cache, GearCache):
        return int(cache.report()["bytes"])
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


# ---- packing --------------------------------------------------------------------------------------------------------


def packing(bench: Bench) -> None:
    """Packing keys and values of one layer: a long prompt as one block, and blocks of 128 tokens of many rows."""
    for shape in bench.shapes:
        for what, batch, tokens in bench.sizes((("prompt", 1, 32768), ("blocks", 32, 1024)), (("prompt", 2, 300),)):
            for way in CACHES:
                case = {"model": shape.name, "head_dim": shape.channels, "batch": batch, "tokens": tokens, "of": what}
                name = way if what == "prompt" else f"{way},prefill=blocks"
                bench.row("packing", {**case, "way": name}, partial(_pack, bench, shape, batch, tokens, name))


def _pack(bench: Bench, shape: Shape, batch: int, tokens: int, way: str) -> Measured:
    key, value = (part.repeat(batch, 1, 1, 1) for part in _tensors(bench, shape, tokens))
    work = partial(packed_layer, bench, way, key, value)
    layer = work()
    single = packed_layer(bench, way, key[:1].float(), value[:1].float())
    double = packed_layer(bench, way, key[:1].double(), value[:1].double())
    # Where a number lies between two codes, float32 and float64 may choose another: a step of a few numbers.
    errors = [bench.check(*pair, 1e-2) for pair in zip(_stored(single), _stored(double), strict=True)]
    lost = [
        float((stored - part[:1].double()).norm() / part[:1].double().norm())
        for stored, part in zip(_stored(layer), (key, value), strict=True)
    ]
    milliseconds = bench.milliseconds(work)
    speed = None if milliseconds is None else (key.nbytes + value.nbytes) / milliseconds / 1e6
    return {"error": max(errors), "lost_keys": lost[0], "lost_values": lost[1], "ms": milliseconds, "GB/s": speed,
            "peak": bench.peak(work)}  # fmt: skip
