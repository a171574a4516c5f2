"""A small cache whose full layers are packed is as it was before a call that one of its layers refused."""

import pytest
import torch

from tenfold import gear
from tenfold.attend import masformer
from tenfold.attend.attention import installed
from tenfold.cache.gear import CacheConfig
from tenfold.cache.spans import SpanCache
from tenfold.errors import ModelError
from tenfold.kernels.local import AttentionWindow
from tenfold.models.tiny import tiny_model

KV = CacheConfig(bits=4, buffer=8, kernel="torch")
NEAR = AttentionWindow("sliding", 6, sinks=2)
HEADS = {0: {1: None}}


def ids_of(tokens, seed):
    return torch.randint(20, 200, (1, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("before", [0, 11])
@pytest.mark.parametrize("heads", [None, HEADS])
@torch.no_grad()
def test_a_refused_call_leaves_local_layers_as_they_were(heads, before):
    model = tiny_model("llama", num_hidden_layers=3).model
    masformer.convert(model, full_layers=[1], span=NEAR, heads=heads)
    weight = model.model.layers[1].self_attn.k_proj.weight
    kept, prompt, last = weight.clone(), ids_of(before, 1), ids_of(20, 2)
    with installed(model):
        cache, straight = SpanCache(model.config, KV), SpanCache(model.config, KV)
        if before:
            model(prompt, past_key_values=cache), model(prompt, past_key_values=straight)
        weight.fill_(torch.nan)  # the second layer refuses; the first has the keys of this call already
        with pytest.raises(ModelError, match="layer 1: keys are not finite"):
            model(ids_of(16, 3), past_key_values=cache)
        weight.copy_(kept)
        assert [layer.get_seq_length() for layer in cache.layers] == [before] * 3
        found, expected = (model(last, past_key_values=it).logits for it in (cache, straight))
    assert torch.equal(found, expected)


@torch.no_grad()
def test_keys_of_all_tokens_are_cut_off_again_and_not_held_twice():
    """Without packing the full layer is exact, and the last layer refuses another batch."""
    model = tiny_model("llama", num_hidden_layers=3).model
    masformer.convert(model, full_layers=[0], span=NEAR, heads={1: {1: None}})
    cache, straight = SpanCache(model.config), SpanCache(model.config)
    for it in (cache, straight):
        model(ids_of(12, 1), past_key_values=it)
    cache.layers[2].reads = lambda: False
    with pytest.raises(ModelError, match="layer 2"):
        model(ids_of(5, 2), past_key_values=cache)
    cache.layers[2].reads = straight.layers[2].reads
    assert [layer.get_seq_length() for layer in cache.layers] == [12] * 3
    found, expected = (model(ids_of(5, 3), past_key_values=it).logits for it in (cache, straight))
    assert torch.equal(found, expected)
    cache.update(*(torch.zeros(2, 1, 2, 1, 16)), 0)
    assert "keys" not in cache._before[0]["state"]  # else a step would hold all keys of all layers twice


def test_a_packed_cache_of_a_converted_model_names_the_one_to_take():
    model = tiny_model("llama").model
    masformer.convert(model, full_layers=[1], span=NEAR)
    with pytest.raises(ModelError, match=r"layers \[0\] have local spans") as refused:
        gear.GearCache(model.config, bits=4)
    assert "SpanCache" in str(refused.value.remedy)
