"""Recording on a small cache: it ends when nobody takes tokens back any more."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from tenfold.attend import masformer
from tenfold.cache.span_layers import DRAFTED, HeadSpanLayer, SpanLayer
from tenfold.cache.spans import SpanCache
from tenfold.kernels.local import AttentionWindow
from tenfold.models.tiny import tiny_model

NEAR = AttentionWindow("sliding", 8, sinks=3)
CASES = {
    "layers": (NEAR, None, 10),
    "block": (AttentionWindow("block", 4, 1, 3), None, 10),
    "heads": (NEAR, {0: {1: None}, 2: {0: AttentionWindow("sliding", 8)}}, 10),
}


def converted(span, heads):
    model = tiny_model("llama", num_hidden_layers=3).model
    masformer.convert(model, full_layers=[1], span=span, heads=heads)
    return model


def written(model, cache, ids, tokens, **keys):
    config = GenerationConfig(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, **keys)
    return model.generate(input_ids=ids, past_key_values=cache, generation_config=config)


def local_layers(cache):
    parts = [part for layer in cache.layers if isinstance(layer, HeadSpanLayer) for _, part in layer.parts]
    parts += [layer for layer in cache.layers if isinstance(layer, SpanLayer)]
    return [part for part in parts if part.span.reach < 1000]


@pytest.mark.parametrize("case", CASES)
def test_plain_decoding_after_assisted_decoding_holds_few_keys_again(case):
    span, heads, most = CASES[case]
    model = converted(span, heads)
    ids = torch.tensor([[5, 6, 7, 8] * 6])
    small, whole = SpanCache(model.config), DynamicCache(config=model.config)
    for cache in (small, whole):
        first = written(model, cache, ids, 20, prompt_lookup_num_tokens=5)
        second = written(model, cache, torch.cat([first, ids], 1), 80)
        if cache is small:
            found = second
    assert torch.equal(found, second)
    assert small.get_seq_length() == second.shape[1] - 1
    for layer in local_layers(small):
        assert not layer.record_past
        assert layer.seen is None
        assert layer.keys.shape[2] <= most
    # And once more assisted: recording begins again.
    third = written(model, small, torch.cat([second, ids], 1), 8, prompt_lookup_num_tokens=5)
    assert torch.equal(third, written(model, whole, torch.cat([second, ids], 1), 8, prompt_lookup_num_tokens=5))


def test_recording_ends_with_the_tokens_that_no_draft_is_as_long_as():
    layer = SpanLayer(NEAR, 0, lambda: True)

    def call(tokens):
        layer.update(*torch.randn(2, 1, 2, tokens, 4))[0].commit(None)
        return layer.keys.shape[2]

    layer.activate_past_recording()
    assert [call(100), call(100)] == [100, 200]  # until the first crop everything is kept
    layer.crop(-150)
    assert (layer.tokens, layer.keys.shape[2]) == (50, 10)
    assert call(DRAFTED + 36) == 10 + DRAFTED + 36  # a call as such may be as long as it likes
    layer.crop(-36)
    assert call(DRAFTED) == 10 + DRAFTED
    layer.crop(0)
    held = [call(1) for _ in range(DRAFTED + 2)]
    assert held == [*range(11, 10 + DRAFTED + 1), 10, 10]
    assert not layer.record_past
    with pytest.raises(RuntimeError, match="dropped"):
        layer.crop(-2)
    layer.activate_past_recording()
    assert [call(1), call(1)] == [11, 12]
    layer.crop(-2)
    assert layer.keys.shape[2] == 10


def test_padding_is_remembered_when_recording_ends():
    model = converted(NEAR, None)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 200, (2, 140), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    small, whole = SpanCache(model.config), DynamicCache(config=model.config)
    found = {}
    for cache in (small, whole):
        logits = []
        for number, part in enumerate(torch.arange(140).split([12, 4, *[1] * 124])):
            if number == 1:
                cache.activate_past_recording()
            given = {"input_ids": ids[:, part], "position_ids": positions[:, part]}
            with torch.no_grad():
                output = model(**given, attention_mask=mask[:, : int(part[-1]) + 1], past_key_values=cache)
            logits.append(output.logits)
            if number == 1:
                cache.crop(0)
        found[cache] = torch.cat(logits, 1)
    seen = mask.bool()
    torch.testing.assert_close(found[small][seen], found[whole][seen], atol=1e-5, rtol=0)
    assert all(layer.keys.shape[2] == 10 for layer in local_layers(small))


def test_transformers_can_read_and_end_a_recording():
    model = converted(*CASES["heads"][:2])
    cache = SpanCache(model.config)
    cache.activate_past_recording()
    assert [cache.is_recording_past(layer) for layer in range(3)] == [True, False, True]
    for layer in cache.layers:  # as its `finish` does
        if hasattr(layer, "record_past"):
            layer.record_past = False
    assert not any(layer.record_past for layer in local_layers(cache))


def test_copies_of_a_cache_go_on_by_themselves():
    """A prompt that is read once and continued several times: the usual pattern of ``copy.deepcopy``."""
    model = converted(*CASES["heads"][:2])
    ids = torch.randint(10, 200, (1, 30), generator=torch.Generator().manual_seed(0))
    read = SpanCache(model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=read)
    for cache in (copy.deepcopy(read), pickle.loads(pickle.dumps(read)), read):
        more = torch.cat([ids, torch.tensor([[50, 51]])], 1)
        expected = written(model, DynamicCache(config=model.config), more, 12)
        assert torch.equal(written(model, cache, more, 12), expected)
