"""Local attention, its gradients, and converted models, against masks of all pairs in float64."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tenfold.attend import masformer
from tenfold.kernels.local import AttentionWindow, local_attention, visible
from tenfold.models.tiny import tiny_model

SPANS = [
    AttentionWindow("sliding", 32),
    AttentionWindow("sliding", 160, sinks=4),
    AttentionWindow("block", 32, 1),
    AttentionWindow("block", 64, 0),
]
ROUNDED = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


def inputs(device, dtype, queries=300, keys=300):
    generator = torch.Generator().manual_seed(queries)
    query = torch.randn(2, 8, queries, 64, generator=generator)
    key, value = torch.randn(2, 2, 2, keys, 64, generator=generator)
    return [part.to(device, dtype).requires_grad_() for part in (query, key, value)]


def dense(parts, span, positions=None):
    query, key, value = (part.detach().double().requires_grad_() for part in parts)
    seen = visible(span, query, key.shape[2], positions)
    some = seen.any(-1, keepdim=True)
    wide = [part.repeat_interleave(4, 1) for part in (key, value)]
    output = scaled_dot_product_attention(query, *wide, attn_mask=seen | ~some, scale=0.125).masked_fill(~some, 0)
    return output, (query, key, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("span", SPANS, ids=str)
def test_attention_and_gradients(device, away, span, dtype):
    parts = inputs(device, dtype)
    found = local_attention(*parts, span, 0.125)
    exact, leaves = dense(parts, span)
    assert away(found, exact) < ROUNDED[dtype]
    slope = torch.randn(found.shape, generator=torch.Generator().manual_seed(3)).to(device)
    gradients = torch.autograd.grad(found, parts, slope.to(dtype))
    for one, its in zip(gradients, torch.autograd.grad(exact, leaves, slope.double()), strict=True):
        assert away(one, its) < ROUNDED[dtype]


@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("queries", [1, 7, 300])
def test_padding_and_the_last_queries_of_a_longer_row(device, away, span, queries):
    parts = inputs(device, torch.float32, queries)
    positions = torch.stack([torch.arange(300), torch.arange(300) - 21]).clamp(min=-1).to(device)
    found = local_attention(*parts, span, 0.125, positions)
    assert away(found, dense(parts, span, positions)[0]) < ROUNDED[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_converted_model_writes_as_one_with_a_mask_of_all_pairs(device, away, dtype):
    opened = tiny_model("llama")
    ids = torch.randint(6, 200, (2, 90), generator=torch.Generator().manual_seed(0))
    masformer.convert(opened.model, full_layers=[0], span=AttentionWindow("sliding", 16, sinks=4))
    exact = opened.model.double()(input_ids=ids).logits[:, -20:]
    model = opened.model.to(device, dtype)
    with torch.no_grad():
        # Piece by piece on its own cache: the last tokens one by one.
        output = model(input_ids=ids[:, :70].to(device), use_cache=True)
        found = []
        for place in range(70, 90):
            output = model(
                input_ids=ids[:, place, None].to(device), past_key_values=output.past_key_values, use_cache=True
            )
            found.append(output.logits)
    assert away(torch.cat(found, 1), exact) < (1e-3 if dtype == torch.float32 else 3e-2)
