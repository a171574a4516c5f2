"""Attention on packed caches, and generating on them, against what is stored, expanded in float64."""

import copy

import pytest
import torch

from tenfold import gear
from tenfold.cache.gear.layer import GearLayer
from tenfold.config.gear import parse_kv
from tenfold.kernels.view import View, attend
from tenfold.models.tiny import tiny_model

CACHES = [
    "gear:4",
    "gear:2",
    "gear-full:2",
    "gear:K4V3,prefill=blocks",
    "gear-full:4,backbone=kcvt",
    "plain:8,buffer=16",
]
ROUNDED = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def layer_on(device, name, dtype, tokens=300, channels=64):
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 2, 2, tokens, channels, generator=generator).to(device, dtype)
    # On the CPU its own kernel takes seconds to compile, and is tested elsewhere.
    kernel = "auto" if device == "cuda" else "torch"
    layer = GearLayer(parse_kv(name).model_copy(update={"kernel": kernel}), 0, lambda: True)
    layer.update(key, value)
    layer.commit()
    return layer


def stored(layer):
    """Keys and values that the packed form stands for, in float64."""
    sides = []
    for side in range(2):
        parts = [pair[side].dense(torch.float64) for pair in layer.packed]
        if layer.rotation is not None:
            parts = [part @ layer.rotation.double().mT for part in parts]
        sides.append(torch.cat([layer.first[side].double(), *parts, layer.buffer[side].double()], 2))
    return sides


def dense(query, key, value, seen, scale, softcap=None, sinks=None, bias=None):
    groups = query.shape[1] // key.shape[1]
    scores = query.double() @ key.repeat_interleave(groups, 1).mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    return scores.softmax(-1)[..., : key.shape[2]] @ value.repeat_interleave(groups, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 5, 40])
@pytest.mark.parametrize("name", CACHES)
def test_attention_reads_what_is_stored(device, away, name, queries, dtype):
    layer = layer_on(device, name, dtype)
    assert layer.functions.name == ("triton" if device == "cuda" else "torch")
    view = View(layer.first, layer.packed, layer.buffer, layer.rotation, layer.functions)
    assert layer.packed
    query = torch.randn(2, 8, queries, 64, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    key, value = stored(layer)
    causal = torch.ones(queries, 300, dtype=torch.bool, device=device).tril(300 - queries)
    found = attend(query, view, None, 0.125)
    assert found.dtype == dtype
    assert away(found, dense(query, key, value, causal, 0.125)) < ROUNDED[dtype]
    padded = causal.expand(2, 1, -1, -1).clone()
    padded[1, :, :, :70] = False
    bias = torch.randn(2, 8, 1, 300, generator=torch.Generator().manual_seed(2)).to(device)
    found = attend(query, view, padded, 0.125, bias=bias)
    assert away(found, dense(query, key, value, padded, 0.125, bias=bias.double())) < ROUNDED[dtype]


def test_caps_and_sinks(device, away):
    layer = layer_on(device, "gear:4", torch.float32)
    view = View(layer.first, layer.packed, layer.buffer, layer.rotation, layer.functions)
    query = torch.randn(2, 8, 3, 64, generator=torch.Generator().manual_seed(1)).to(device)
    sinks = torch.linspace(-1, 3, 8, device=device)
    causal = torch.ones(3, 300, dtype=torch.bool, device=device).tril(297)
    found = attend(query, view, None, 0.125, softcap=2.0, sinks=sinks)
    assert away(found, dense(query, *stored(layer), causal, 0.125, softcap=2.0, sinks=sinks)) < 1e-5


@pytest.mark.parametrize("name", CACHES[:4])
def test_packing_is_that_of_float64(device, away, name):
    single, double = (stored(layer_on(device, name, dtype)) for dtype in (torch.float32, torch.float64))
    for found, exact in zip(single, double, strict=True):
        # A number between two codes may be given either: a few of them, a step each.
        assert away(found, exact) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_generating_on_the_packed_form(device, away, kind, dtype):
    opened = tiny_model(kind)
    model, tokenizer = opened.model.to(device, dtype), opened.tokenizer
    tokenizer.padding_side = "left"
    inputs = tokenizer(["a text of some length that is to be continued", "another"], return_tensors="pt", padding=True)
    inputs = inputs.to(device)
    kernel = "auto" if device == "cuda" else "torch"
    with gear.attach(model, bits=4, buffer=16, kernel=kernel) as cache:
        found = model.generate(
            **inputs, past_key_values=cache, max_new_tokens=20, min_new_tokens=20, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        assert cache.report()["packed tokens"] >= 32
        assert cache.report()["reads"] == "views"
        assert all(logits.isfinite().all() for logits in found.logits)
        # One more step on the same state, read packed and read as whole tensors.
        mask = torch.cat([inputs["attention_mask"], inputs["attention_mask"].new_ones(2, 20)], 1)
        whole = copy.deepcopy(cache)
        for layer in whole.packed_layers:
            layer.reads = lambda: False
        logits = [
            model(
                input_ids=found.sequences[:, -1:], attention_mask=mask, past_key_values=one,
                position_ids=mask.sum(1, keepdim=True) - 1,
            ).logits.detach()
            for one in (cache, whole)
        ]  # fmt: skip
    assert away(logits[0], logits[1].double()) < (1e-4 if dtype == torch.float32 else 3e-2)
