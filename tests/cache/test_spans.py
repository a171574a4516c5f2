"""A small cache in use: whatever a model does on it, it does as on a cache of all keys."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from tenfold import pasta
from tenfold.attend import masformer
from tenfold.attend.attention import self_attentions
from tenfold.attend.pasta.attention_share import attention_mass
from tenfold.cache.gear.layer import GearLayer
from tenfold.cache.span_layers import HeadSpanLayer, SpanLayer
from tenfold.cache.spans import SpanCache, formula_bytes
from tenfold.config.gear import CacheConfig
from tenfold.errors import ModelError
from tenfold.kernels.local import FULL, AttentionWindow
from tenfold.models.memory import stored_bytes
from tenfold.models.tiny import tiny_model

SPANS = [
    AttentionWindow("sliding", 8),
    AttentionWindow("sliding", 8, sinks=3),
    AttentionWindow("sliding", 1, sinks=2),
    AttentionWindow("block", 4, 0, 2),
    AttentionWindow("block", 4, 1, 3),
]
SINKS = SPANS[1]
# By layer and KV head, beside SINKS. Equal spans stand apart: heads in the order of their groups are not in their own.
HEADS = {0: {1: None}, 2: {0: AttentionWindow("block", 4, 1, 3), 1: AttentionWindow("sliding", 1, sinks=2)}}
MANY_HEADS = {
    0: {1: None, 2: AttentionWindow("sliding", 1)},
    2: {0: AttentionWindow("block", 4, 1, 3), 2: AttentionWindow("sliding", 1), 3: None},
}
CASES = [*SPANS, HEADS]


def converted(span=SINKS, kind="llama", full=(1,), **keys):
    """With one span in all local layers, or with spans of heads beside `SINKS`."""
    opened = tiny_model(kind, num_hidden_layers=3, **keys) if kind != "gpt2" else tiny_model(kind, n_layer=3)
    spans = {"span": SINKS, "heads": span} if isinstance(span, dict) else {"span": span}
    masformer.convert(opened.model, full_layers=list(full), **spans)
    return opened


def padded(lengths=(30, 19, 3)):
    """Rows of several lengths, padded on the left; the last is almost nothing but padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 200, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def written(opened, cache, inputs, tokens=20, **keys):
    config = GenerationConfig(
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **keys,
    )
    found = opened.model.generate(**inputs, past_key_values=cache, generation_config=config)
    return found.sequences, torch.stack(found.logits)


def check_same(opened, inputs, **keys):
    """Generates on both caches, compares, and returns the small one."""
    cache = SpanCache(opened.model.config)
    expected = written(opened, DynamicCache(config=opened.model.config), inputs, **keys)
    found = written(opened, cache, inputs, **keys)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=0)
    return cache


def stores(layer):
    return [part for _, part in layer.parts] if isinstance(layer, HeadSpanLayer) else [layer]


def held(cache):
    """Keys that are held where something is local."""
    found = [store for layer in cache.layers for store in stores(layer) if isinstance(store, SpanLayer)]
    return [store.keys.shape[2] for store in found if store.span != FULL]


def most(span):
    """Keys that a span needs between two calls."""
    spans = [SINKS, span[2][0]] if isinstance(span, dict) else [span]
    return max(each.reach + each.sinks for each in spans)


@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_padded_rows(kind, span):
    cache = check_same(converted(span, kind), padded())
    assert held(cache) == [span.reach + span.sinks] * 2
    assert cache.get_seq_length() == 49


@pytest.mark.parametrize(("kind", "heads"), [("llama", HEADS), ("qwen3", HEADS), ("gpt2", MANY_HEADS)])
def test_padded_rows_on_spans_of_heads(kind, heads):
    cache = check_same(converted(heads, kind), padded())
    own = [[10, 49], [10, 2]] if kind != "gpt2" else [[10, 49, 0], [10, 10, 0, 49]]
    assert [[part.keys.shape[2] for part in stores(cache.layers[layer])] for layer in (0, 2)] == own
    assert cache.get_seq_length() == 49
    assert isinstance(check_same(converted(heads, kind), padded((20, 13)), num_beams=3).layers[0], HeadSpanLayer)


def test_padding_changes_nothing_on_spans_of_heads():
    opened, inputs = converted(HEADS), padded((30, 19))
    together = written(opened, SpanCache(opened.model.config), inputs)
    for row, tokens in enumerate((30, 19)):
        alone = {key: value[row : row + 1, 30 - tokens :] for key, value in inputs.items()}
        sequences, logits = written(opened, SpanCache(opened.model.config), alone)
        assert torch.equal(together[0][row, 30:], sequences[0, tokens:])
        torch.testing.assert_close(together[1][:, row], logits[:, 0], atol=1e-5, rtol=0)


def test_sinks_of_a_row_are_its_first_real_tokens():
    opened = converted()
    cache = SpanCache(opened.model.config)
    with torch.no_grad():
        opened.model(**padded(), past_key_values=cache)
    # Of the third row everything is still within reach.
    assert cache.layers[0].sinks.tolist() == [[0, 1, 2], [11, 12, 13], [-1, -1, -1]]
    assert cache.layers[0].places()[:, 3:].tolist() == [list(range(23, 30))] * 3


@pytest.mark.parametrize("span", CASES, ids=str)
def test_beams(span):
    check_same(converted(span), padded((20, 13)), num_beams=3, num_return_sequences=2)


@pytest.mark.parametrize("span", CASES, ids=str)
@pytest.mark.parametrize("step", [1, 7, 25])
def test_a_prompt_in_pieces(span, step):
    opened, inputs = converted(span), padded((60, 41, 2))
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    found = []
    cache = SpanCache(opened.model.config)
    with torch.no_grad():
        whole = opened.model(**inputs, position_ids=positions, use_cache=False).logits
        for start in range(0, 60, step):
            part = slice(start, start + step)
            found.append(
                opened.model(
                    input_ids=inputs["input_ids"][:, part],
                    attention_mask=inputs["attention_mask"][:, : part.stop],
                    position_ids=positions[:, part],
                    past_key_values=cache,
                ).logits
            )
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(found, 1)[seen], whole[seen], atol=1e-5, rtol=0)


def test_prefill_chunks_of_generate():
    check_same(converted(), padded((40, 22)), prefill_chunk_size=9)


@pytest.mark.parametrize("span", CASES, ids=str)
def test_assisted_decoding(span):
    opened = converted(span)
    ids = torch.tensor([[5, 6, 7, 8] * 6])
    plain = written(opened, DynamicCache(config=opened.model.config), {"input_ids": ids}, 30)
    cache = SpanCache(opened.model.config)
    assisted = written(opened, cache, {"input_ids": ids}, 30, prompt_lookup_num_tokens=4)
    assert torch.equal(assisted[0], plain[0])
    torch.testing.assert_close(assisted[1], plain[1], atol=1e-5, rtol=0)
    assert max(held(cache)) <= most(span)


def run(opened, cache, ids, mask):
    """One call on top of a cache."""
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return opened.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


@pytest.mark.parametrize("span", CASES, ids=str)
def test_crop_while_recording(span):
    opened, inputs = converted(span), padded((40, 25, 12))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache, other = SpanCache(opened.model.config), DynamicCache(config=opened.model.config)
    for each in (cache, other):
        run(opened, each, ids[:, :14], mask[:, :14])
        each.activate_past_recording()
        run(opened, each, ids[:, 14:30], mask[:, :30])
        run(opened, each, ids[:, 30:36], mask[:, :36])
        each.crop(-9)
    assert max(held(cache)) <= most(span)
    for each in (cache, other):
        assert each.get_seq_length() == 27
    for stop in (32, 33, 40):
        start = cache.get_seq_length()
        found, expected = (run(opened, each, ids[:, start:stop], mask[:, :stop]) for each in (cache, other))
        seen = mask[:, start:stop].bool()
        torch.testing.assert_close(found[seen], expected[seen], atol=1e-5, rtol=0)


def test_crop_of_what_is_gone():
    layer = SpanLayer(AttentionWindow("sliding", 8), 0, lambda: True)
    layer.crop(0)
    layer.update(*torch.randn(2, 1, 2, 5, 4))[0].commit(None)
    layer.crop(-2)  # nothing was dropped yet
    assert layer.get_seq_length() == layer.keys.shape[2] == 3
    layer.update(*torch.randn(2, 1, 2, 20, 4))[0].commit(None)
    layer.crop(0)
    with pytest.raises(RuntimeError, match=r"crop\(-1\): layer 0 has dropped keys .* activate_past_recording"):
        layer.crop(-1)
    with pytest.raises(ValueError, match="negative"):
        layer.crop(1)
    with pytest.raises(ValueError, match="has 23 tokens"):
        layer.crop(-24)
    layer.activate_past_recording()
    layer.update(*torch.randn(2, 1, 2, 4, 4))[0].commit(None)
    with pytest.raises(RuntimeError, match="dropped"):
        layer.crop(-5)
    layer.crop(-4)
    assert layer.get_seq_length() == 23
    assert layer.keys.shape[2] == 7


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_storage_after_a_long_prompt_is_what_is_held(span):
    opened = converted(span, "gpt2")  # its keys and values are views of one product
    cache = SpanCache(opened.model.config)
    ids = torch.randint(10, 200, (2, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for part in (ids[:, :298], ids[:, 298:299], ids[:, 299:]):
            opened.model(input_ids=part, past_key_values=cache)
            kept = span.reach + span.sinks
            ideal = 2 * 2 * 4 * 16 * 4 * kept
            for layer in (cache.layers[0], cache.layers[2]):
                assert stored_bytes([layer.keys, layer.values]) == ideal
                assert stored_bytes(layer) <= ideal + 8 * 2 * span.sinks
    report = cache.report()
    assert report["bytes"] == stored_bytes(cache.layers)
    assert report["full bytes"] == 2 * 2 * 4 * 16 * 4 * 300


def test_stored_bytes_of_heads_are_those_of_the_formula():
    opened = converted({0: {1: None}, 2: {0: AttentionWindow("block", 8)}}, full=())
    opened.model.config.tenfold_span["sinks"] = 0  # places of sinks are stored beside them, and the formula has none
    cache = SpanCache(opened.model.config)
    ids = torch.randint(10, 200, (3, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        opened.model(input_ids=ids, past_key_values=cache)
    report, each = cache.report(), 2 * 3 * 16 * 4
    assert report["full bytes"] == each * 200
    assert report["local bytes"] == each * (4 * 7 + 15)
    assert report["bytes"] == stored_bytes(cache.layers) == report["formula bytes"]
    assert report["dense bytes"] == each * 6 * 200
    assert formula_bytes(opened.model.config, 5, itemsize=4) == 2 * 16 * 4 * 6 * 5


@pytest.mark.parametrize("span", [SINKS, HEADS], ids=str)
def test_rows_reset_and_offload(span):
    opened, inputs = converted(span), padded()
    cache = SpanCache(opened.model.config)
    expected = written(opened, DynamicCache(config=opened.model.config), inputs, 5)[1]
    for _ in range(2):
        found = written(opened, cache, inputs, 5)[1]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        for layer in cache.layers:
            layer.offload()
            layer.prefetch()
        cache.reset()
        assert cache.get_seq_length() == cache.report()["bytes"] == 0
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    caches = SpanCache(opened.model.config), DynamicCache(config=opened.model.config)
    results = []
    for each in caches:
        run(opened, each, ids[:, :25], mask[:, :25])
        each.batch_select_indices(torch.tensor([2, 0]))
        each.batch_repeat_interleave(2)
        rows = torch.tensor([2, 2, 0, 0])
        results.append(run(opened, each, ids[rows, 25:], mask[rows]))
    seen = mask[rows, 25:].bool()
    torch.testing.assert_close(results[0][seen], results[1][seen], atol=1e-5, rtol=0)


@pytest.mark.parametrize("span", [SINKS, {0: {1: None}}], ids=str)
def test_packed_full_layers(span):
    opened, inputs = converted(span), padded((60, 41))
    expected = written(opened, DynamicCache(config=opened.model.config), inputs)
    for bits, close in ((16, 2e-3), (4, 0.5)):
        kv = CacheConfig(bits=bits, kernel="torch", buffer=16, variant="plain")
        cache = SpanCache(opened.model.config, kv)
        found = written(opened, cache, inputs)
        torch.testing.assert_close(found[1][:8], expected[1][:8], atol=close, rtol=0)
        layer = cache.layers[1]
        assert isinstance(layer, GearLayer)
        assert layer.packed_tokens >= 48
        assert held(cache) == [10, 10]
    exact = 2 * 2 * 16 * 4 * 79 if isinstance(span, dict) else 0  # heads of full attention are not packed
    assert exact < cache.report()["full bytes"] < exact + 0.5 * 2 * 2 * 2 * 16 * 4 * 79


@pytest.mark.parametrize("heads", [{1: [0, 2]}, {0: [1], 1: [0], 2: [3]}])
@pytest.mark.parametrize("own", [None, {0: {0: None}, 2: {0: AttentionWindow("block", 3)}}], ids=str)
def test_steering_while_decoding(heads, own):
    opened = tiny_model("llama", num_hidden_layers=3)
    masformer.convert(opened.model, full_layers=[1], span=AttentionWindow("sliding", 40, sinks=3), heads=own)
    texts = ["It was <mark>red</mark>, she said, and nobody believed it.", "A <mark>blue</mark> one."]
    opened.tokenizer.padding_side = "left"
    marks = pasta.encode(opened.tokenizer, [pasta.from_tags(text) for text in texts])
    plain = written(opened, DynamicCache(config=opened.model.config), marks.inputs)[1]
    # While decoding the marks leave the span of local layers; whatever is still seen is biased alike.
    with pasta.steer(opened.model, marks, heads=heads):
        cache = check_same(opened, marks.inputs)
        steered = written(opened, SpanCache(opened.model.config), marks.inputs)[1]
    assert float((steered - plain).abs().max()) > 1e-2
    assert held(cache) == ([42, 42] if own is None else [42, 5, 42])


def test_half_precision():
    opened = converted()
    opened.model.to(torch.bfloat16)
    cache = SpanCache(opened.model.config)
    found = written(opened, cache, padded(), 5)[1]
    expected = written(opened, DynamicCache(config=opened.model.config), padded(), 5)[1]
    torch.testing.assert_close(found, expected, atol=3e-2, rtol=0)
    assert cache.layers[0].keys.dtype == torch.bfloat16


def test_what_cannot_be_meant_is_refused():
    opened = tiny_model("llama")
    with pytest.raises(ModelError, match=r"(?s)no spans.*convert"):
        SpanCache(opened.model.config)
    handle = masformer.convert(opened.model, full_layers=[], span=SINKS)
    with pytest.raises(ModelError, match="nothing to pack"):
        SpanCache(opened.model.config, CacheConfig(bits=4))
    cache = SpanCache(opened.model.config)
    ids = torch.arange(5, 35)[None]
    with torch.no_grad():
        opened.model(input_ids=ids, past_key_values=cache)
        with pytest.raises(ModelError, match="2 rows after 1"):
            opened.model(input_ids=ids.expand(2, -1), past_key_values=cache)
        with pytest.raises(ModelError, match="four dimensions"):
            opened.model(input_ids=ids, attention_mask=torch.ones(1, 1, 30, 60).bool(), past_key_values=cache)
        handle.revert()
        with pytest.raises(ModelError, match="is not 'tenfold_span'"):
            opened.model(input_ids=ids, past_key_values=cache)
        masformer.convert(opened.model, full_layers=[0], span=AttentionWindow("block", 8))
        with pytest.raises(ModelError, match=r"layer 0: its cache was made for .* and the layer has full attention"):
            opened.model(input_ids=ids, past_key_values=cache)
        with pytest.raises(ModelError, match=r"layer_bits: layers \[1\] do not have full attention"):
            SpanCache(opened.model.config, CacheConfig(bits=4, layer_bits={1: (2, 2)}))


def test_a_cache_for_other_spans_of_heads_is_refused():
    opened, ids = converted({0: {1: None}}), torch.arange(5, 35)[None]
    cache = SpanCache(opened.model.config)
    table = opened.model.config.tenfold_span
    for heads, message in (
        ({"0": {"0": None}}, r"made for AttentionWindow\(.* and the layer has full attention in KV head 0"),
        ({}, r"made for full attention, and the layer has AttentionWindow\(.* in KV head 1"),
        ({"0": {"1": None}, "2": {"1": None}}, "layer 2: its cache was made for .* full attention in KV head 1"),
    ):
        opened.model.config.tenfold_span = {**table, "heads": heads}
        with pytest.raises(ModelError, match=message), torch.no_grad():
            opened.model(input_ids=ids, past_key_values=cache)
        cache.reset()


@pytest.mark.parametrize(("kind", "span"), [("llama", SINKS), ("llama", HEADS), ("gpt2", MANY_HEADS)], ids=str)
def test_pictures_need_all_keys(kind, span):
    opened = converted(span, kind)
    text = "It was <mark>red</mark>, she said, and nobody believed it."
    marks = pasta.encode(opened.tokenizer, [pasta.from_tags(text)])
    assert attention_mass(opened.model, marks).shape == (3, 4)  # without a cache
    cache = SpanCache(opened.model.config)
    looked = []

    def hook(module, args, kwargs):
        return args, {**kwargs, "probe": lambda *given: looked.append(given)}

    self_attentions(opened.model)[0].register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        opened.model(**marks.inputs, past_key_values=cache)
        opened.model(**marks.inputs, use_cache=False)
        (layer, value, read), (_, expected, _) = looked
        assert layer == 0
        assert torch.equal(value, expected)
        assert torch.equal(read(value), looked[1][2](expected))
        with pytest.raises(ModelError, match=r"layer 0: a picture of attention needs all .* keys"):
            opened.model(input_ids=torch.tensor([[5]]), past_key_values=cache)


@pytest.mark.parametrize("pads", range(1, 7))
@pytest.mark.parametrize(
    "span", [AttentionWindow("sliding", 8, sinks=4), AttentionWindow("block", 4, 1, sinks=5)], ids=str
)
def test_fewer_pads_than_sinks_in_a_short_prompt(span, pads):
    """Sinks are sorted out when something is dropped, not before: until then places are those of the text."""
    model = tiny_model("llama").model.eval()
    masformer.convert(model, full_layers=[1], span=span)
    ids = torch.randint(10, 200, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :pads] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        cache, found = SpanCache(model.config), []
        for part in torch.arange(30).split([7, *[1] * 23]):
            inputs = {"input_ids": ids[:, part], "position_ids": positions[:, part]}
            mask_so_far = mask[:, : int(part[-1]) + 1]
            found.append(model(**inputs, attention_mask=mask_so_far, past_key_values=cache).logits)
    found = torch.cat(found, 1)
    torch.testing.assert_close(found[0, pads:], whole[0, pads:], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], whole[1], atol=1e-5, rtol=0)
