"""Every way to bias attention against its definition in float64, and steered models."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tenfold.attend.pasta import steer
from tenfold.attend.text_marks import encode, from_tags
from tenfold.kernels.biased import KeyBias, biased_mask, merge_parts, split_heads, with_key_channel
from tenfold.models.tiny import tiny_model

SCALE = 0.125
ROUNDED = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
BIASED = [0, 2, 7]


def strengths(device):
    values = torch.full((2, 80), math.log(0.01))
    values[0, 3:9], values[1, 30:34] = 0.0, math.log(3.0)
    raised = torch.full((2, 6), -1)
    raised[0], raised[1, :4] = torch.arange(3, 9), torch.arange(30, 34)
    parts = (torch.tensor(BIASED), values, raised, torch.full((2,), math.log(0.01)))
    return KeyBias(*(part.to(device) for part in parts), first=3)


def definition(query, key, value, seen, values):
    wide = [part.double().repeat_interleave(4, 1) for part in (key, value)]
    scores = query.double() @ wide[0].mT * SCALE
    scores[:, BIASED] += values.double()[:, None, None, :]
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ wide[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 80])
@pytest.mark.parametrize("way", ["mask", "split heads", "merge", "key channel"])
def test_every_way_is_the_definition(device, away, way, queries, dtype):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 8, queries, 64, generator=generator).to(device, dtype)
    key, value = torch.randn(2, 2, 2, 80, 64, generator=generator).to(device, dtype)
    bias = strengths(device)
    seen = torch.ones(queries, 80, dtype=torch.bool, device=device).tril(80 - queries).expand(2, 1, -1, -1)
    wide = [part.repeat_interleave(4, 1) for part in (key, value)]
    if way == "mask":
        dense = biased_mask(seen, bias.dense(8, dtype), queries, 80).contiguous()
        found = scaled_dot_product_attention(query, *wide, attn_mask=dense, scale=SCALE)
    elif way == "split heads":
        plain = scaled_dot_product_attention(query, *wide, attn_mask=seen, scale=SCALE)
        found = split_heads(plain, query, key, value, seen, SCALE, bias)
    elif way == "merge":
        found = merge_parts(query, key, value, seen, SCALE, bias if queries > 1 else strengths_of_a_step(bias))
    else:
        parts = with_key_channel(query, key, value, SCALE, bias)
        parts = [parts[0], *(part.repeat_interleave(4, 1) for part in parts[1:])]
        found = scaled_dot_product_attention(*parts, attn_mask=seen, scale=SCALE)[..., :64]
    assert away(found, definition(query, key, value, seen, bias.values)) < ROUNDED[dtype]


def strengths_of_a_step(bias):
    return KeyBias(bias.heads, bias.values, bias.raised, bias.floor)


@pytest.mark.parametrize(
    "settings", [{"alpha": 0.01}, {"alpha": 0.2, "generated": "scale"}, {"target_mass": 0.3}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steered_reading_and_writing_is_that_of_float64(device, away, settings, dtype):
    opened = tiny_model("llama")
    # Without padding: rows of it see nothing, of which eager attention makes NaN in float64 (transformers 5.23).
    texts = ["It was <mark>red</mark>, she said.", "That was <mark>two</mark> and more"]
    marks = encode(opened.tokenizer, [from_tags(text) for text in texts])
    assert marks.attention_mask.all()
    heads = {0: [1], 1: [0, 2]}
    token = torch.tensor([[70], [71]])

    def logits(model, its):
        with torch.no_grad():
            prompt = model(its.input_ids, use_cache=True)
            step = model(token.to(its.input_ids.device), past_key_values=prompt.past_key_values)
        return torch.cat([prompt.logits[:, -3:], step.logits], 1)

    exact_model = tiny_model("llama").model.double()
    exact_model.set_attn_implementation("eager")
    plain = logits(exact_model, marks)
    with steer(exact_model, marks, heads=heads, **settings):
        exact = logits(exact_model, marks)
    model, there = opened.model.to(device, dtype), marks.to(device)
    with steer(model, there, heads=heads, **settings):
        found = logits(model, there)
    error = away(found, exact)
    assert error < (1e-3 if dtype == torch.float32 else 3e-2)
    assert error < away(plain, exact) / 2
