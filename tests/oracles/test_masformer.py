"""The oracles of the MASFormer specification, section 7, by number."""

import statistics
import time
from functools import partial

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, LlamaConfig

from tenfold.attend import masformer, spans
from tenfold.attend.masformer import native
from tenfold.cache.span_layers import SpanLayer
from tenfold.cache.spans import SpanCache, formula_bytes
from tenfold.data.python_reference import python_reference
from tenfold.evaluate.long_context import repeated, spread
from tenfold.kernels.local import AttentionWindow, local_attention
from tenfold.models.inference import text_loss
from tenfold.models.open import open_model
from tenfold.models.tiny import tiny_model

PATTERNS = [
    AttentionWindow("block", 8, 0),
    AttentionWindow("block", 8, 1),
    AttentionWindow("sliding", 8),
    AttentionWindow("sliding", 8, sinks=3),
    AttentionWindow("block", 8, 1, 2),
]
KINDS = ["llama", "qwen3", "gpt2"]


def test_01_pair_counts():
    for (n, b), expected in {(10, 3): (19, 40, 27), (12, 4): (30, 62, 42), (37, 8): (159, 391, 268)}.items():
        assert (
            AttentionWindow("block", b, 0).pairs(n),
            AttentionWindow("block", b, 1).pairs(n),
            AttentionWindow("sliding", b).pairs(n),
        ) == expected
    assert AttentionWindow("sliding", 10).pairs(10) == 55


def test_02_closed_values():
    h, i, d = torch.meshgrid(*(torch.arange(1, n + 1, dtype=torch.float64) for n in (2, 10, 4)), indexing="ij")
    q, k, v = (torch.sin(0.10 * h * i * d)[None], torch.cos(0.07 * h * i * d)[None], torch.sin(0.13 * h * i * d)[None])
    full = scaled_dot_product_attention(q, k, v, is_causal=True)
    cases = [
        (full, (0.628563, 0.747848, 0.386585, 0.013801), 37.904055),
        (AttentionWindow("sliding", 3), (0.914560, 0.706093, -0.334931, -0.911461), 32.527339),
        (AttentionWindow("block", 3, 0), (0.963558, 0.515501, -0.687766, -0.883455), 29.392615),
        (AttentionWindow("block", 3, 1), (0.882837, 0.772812, -0.148485, -0.801513), 34.678054),
        (AttentionWindow("block", 3, 1, 1), (0.753299, 0.684115, -0.057562, -0.578212), 34.889916),
    ]
    for span, last, total in cases:
        found = span if isinstance(span, torch.Tensor) else local_attention(q, k, v, span, 0.5)
        assert found[0, 0, -1].tolist() == pytest.approx(last, abs=1e-6)
        assert float(found.sum()) == pytest.approx(total, abs=1e-6)


def masked(q, k, v, span):
    """Attention under a mask of all pairs."""
    index = torch.arange(q.shape[2])
    k, v = (x.repeat_interleave(3, 1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=span.sees(index[:, None], index))


@pytest.mark.parametrize("b", [8, 16, 33])
@pytest.mark.parametrize("n", [1, 37, 64, 100, 129])
def test_03_the_kernel_is_a_masked_reference(n, b):
    generator = torch.Generator().manual_seed(n * b)
    q = torch.randn(2, 6, n, 16, generator=generator)
    k, v = torch.randn(2, 2, 2, n, 16, generator=generator)
    spans_ = [
        *(AttentionWindow("block", b, p) for p in (0, 1)),
        AttentionWindow("sliding", b),
        AttentionWindow("block", b, 1, 3),
        AttentionWindow("sliding", b, 3),
    ]
    for span in spans_:
        torch.testing.assert_close(local_attention(q, k, v, span, 0.25), masked(q, k, v, span), atol=2e-6, rtol=0)
        half = [x.bfloat16() for x in (q, k, v)]
        found = local_attention(*half, span, 0.25).float()
        torch.testing.assert_close(found, masked(*(x.float() for x in half), span), atol=2e-2, rtol=0)


@pytest.mark.parametrize(
    "span",
    [
        AttentionWindow("block", 4, 0),
        AttentionWindow("block", 4, 1),
        AttentionWindow("sliding", 4),
        AttentionWindow("sliding", 4, 1, 2),
    ],
)
def test_03_gradients(span):
    q = torch.randn(1, 3, 9, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 1, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *x: local_attention(*x, span, 0.5), (q, k, v))


@torch.no_grad()
def logits(model, **inputs):
    return model.eval()(use_cache=False, **inputs).logits


@pytest.mark.parametrize("kind", KINDS)
def test_04_a_span_that_holds_all_is_the_unmodified_model(kind):
    model = tiny_model(kind).model
    ids = torch.randint(10, 200, (2, 40), generator=torch.Generator().manual_seed(0))
    before = logits(model, input_ids=ids)
    for full, span in (
        ([0, 1], AttentionWindow("sliding", 3)),
        ([], AttentionWindow("sliding", 40)),
        ([], AttentionWindow("block", 40, 0)),
    ):
        handle = masformer.convert(model, full_layers=full, span=span)
        torch.testing.assert_close(logits(model, input_ids=ids), before, atol=1e-5, rtol=0)
        handle.revert()
    handle = masformer.convert(model, full_layers=[0], span=AttentionWindow("sliding", 4))
    assert not torch.allclose(logits(model, input_ids=ids), before, atol=1e-3)
    handle.revert()
    assert torch.equal(logits(model, input_ids=ids), before)
    assert not hasattr(model.config, spans.FIELD)


def test_05_a_window_of_one_is_the_value_itself():
    model = tiny_model("llama").model
    masformer.convert(model, full_layers=[1], span=AttentionWindow("sliding", 1))
    seen = {}
    attention = model.model.layers[0].self_attn
    attention.v_proj.register_forward_hook(lambda module, args, output: seen.update(value=output))
    attention.o_proj.register_forward_pre_hook(lambda module, args: seen.update(output=args[0]))
    logits(model, input_ids=torch.arange(5, 25)[None])
    value = seen["value"].unflatten(-1, (2, 16)).repeat_interleave(2, -2).flatten(-2)
    torch.testing.assert_close(seen["output"], value, atol=1e-6, rtol=0)


def test_06_locality():
    ids = torch.randint(10, 200, (1, 64), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, 0] += 1

    def changed(full, span):
        model = tiny_model("llama", num_hidden_layers=3).model
        masformer.convert(model, full_layers=full, span=span)
        difference = (logits(model, input_ids=ids) - logits(model, input_ids=other)).abs().amax((0, 2))
        return difference > 0

    assert not changed([], AttentionWindow("block", 8, 0))[8:].any()
    assert not changed([], AttentionWindow("block", 8, 1))[8 * 4 :].any()
    assert changed([], AttentionWindow("block", 8, 1))[8:16].any()
    assert not changed([], AttentionWindow("sliding", 8))[1 + 3 * 7 :].any()
    assert changed([1], AttentionWindow("block", 8, 0))[32:].any()


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("span", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_07_incremental_is_the_whole(kind, span, small):
    """On the model's own cache of all keys, and on the small one."""
    model = tiny_model(kind).model
    masformer.convert(model, full_layers=[1], span=span)
    ids = torch.randint(10, 200, (2, 26), generator=torch.Generator().manual_seed(0))
    whole = logits(model, input_ids=ids)
    for pieces in ((7, *[1] * 19), (8, *[1] * 18), (9, *[1] * 17), (10, 10, 6), (16, 10)):
        cache, found = SpanCache(model.config) if small else None, []
        for part in ids.split(pieces, 1):
            with torch.no_grad():
                output = model(input_ids=part, past_key_values=cache, use_cache=True)
            cache, found = output.past_key_values, [*found, output.logits]
        torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-5, rtol=0)


def test_08_cache_length():
    def grown(span, steps):
        layer = SpanLayer(span, 0, lambda: True)
        for step in steps:
            handle, _ = layer.update(*torch.randn(2, 1, 2, step, 4))
            handle.commit(None)
            yield layer, handle

    for t, (layer, _) in enumerate(grown(AttentionWindow("sliding", 6), [1] * 12), 1):
        assert layer.keys.shape[2] == min(t, 5)
    block = AttentionWindow("block", 4, 1)
    visible = []
    for t, (_, handle) in enumerate(grown(block, [1] * 12)):
        (part,) = handle.parts
        places = torch.arange(t + 1) if part.places is None else part.places[0]
        visible.append(int(block.sees(torch.tensor(t), places).sum()))
    assert visible == [1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7, 8]
    for span in (AttentionWindow("sliding", 8), AttentionWindow("sliding", 8, sinks=3), block):
        layer, _ = next(grown(span, [500]))
        ideal = 2 * (span.reach + span.sinks) * 4 * 4
        assert layer.keys.untyped_storage().nbytes() == layer.values.untyped_storage().nbytes() == ideal


def test_09_bytes():
    smol = LlamaConfig(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3)
    smol.tenfold_span = {"full_layers": [7, 8, 17, 18, 20, 23], "pattern": "sliding", "size": 1024}
    assert formula_bytes(smol, 8192, spans=False) == pytest.approx(188.7e6, rel=1e-3)
    assert formula_bytes(smol, 8192) == pytest.approx(56.6e6, rel=1e-3)
    model = tiny_model("llama", num_hidden_layers=4).model
    masformer.convert(model, full_layers=[2], span=AttentionWindow("sliding", 16, sinks=2))
    cache = SpanCache(model.config)
    with torch.no_grad():
        model(input_ids=torch.randint(10, 200, (3, 200)), past_key_values=cache)
    report = cache.report()
    assert report["tokens"] == 200
    assert report["formula bytes"] == 2 * 3 * 2 * 16 * 4 * (200 + 3 * 17)
    assert report["dense bytes"] == 2 * 3 * 2 * 16 * 4 * 4 * 200
    assert report["formula bytes"] <= report["bytes"] < 1.01 * report["formula bytes"]
    assert report["bytes"] == report["local bytes"] + report["full bytes"]


@pytest.mark.parametrize("span", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_10_left_padding(kind, span):
    opened = tiny_model(kind)
    masformer.convert(opened.model, full_layers=[1], span=span)
    ids = torch.randint(10, 200, (1, 30), generator=torch.Generator().manual_seed(0))
    alone = logits(opened.model, input_ids=ids)
    keys = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    written = opened.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **keys)[:, 30:]
    for pads in range(0, span.size, 3):
        padded = torch.cat([torch.zeros(1, pads, dtype=torch.int64), ids], 1)
        rows = torch.cat([padded, torch.randint(10, 200, padded.shape)])
        mask = torch.ones_like(rows)
        mask[0, :pads] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        found = logits(opened.model, input_ids=rows, attention_mask=mask, position_ids=positions)[:1, pads:]
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)
        found = opened.model.generate(input_ids=rows, attention_mask=mask, **keys)[:1, rows.shape[1] :]
        assert torch.equal(found, written)


@pytest.mark.parametrize("span", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_11_packed_documents(kind, span):
    model = tiny_model(kind).model
    masformer.convert(model, full_layers=[1], span=span)
    first, second = torch.randint(10, 200, (1, 40), generator=torch.Generator().manual_seed(0)).split((22, 18), 1)
    positions = torch.cat([torch.arange(22), torch.arange(18)])[None]
    packed = logits(model, input_ids=torch.cat([first, second], 1), position_ids=positions)
    apart = torch.cat([logits(model, input_ids=part) for part in (first, second)], 1)
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("full", "exact"), [((0, 1), True), ((1,), False), ((), False)])
def test_12_a_llama_saved_as_a_ministral(tmp_path, full, exact):
    opened = tiny_model("llama")
    ids = torch.randint(10, 200, (2, 40), generator=torch.Generator().manual_seed(0))
    before = logits(opened.model, input_ids=ids)
    masformer.convert(opened.model, full_layers=full, span=AttentionWindow("sliding", 8))
    folder = native.save_native(opened.model, opened.tokenizer, tmp_path / "native")
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert stock.config.model_type == "ministral"
    assert stock.config.sliding_window == 8
    found = logits(stock, input_ids=ids)
    torch.testing.assert_close(found, logits(opened.model, input_ids=ids), atol=1e-5, rtol=0)
    assert bool(torch.equal(found, before)) is exact


def test_13_layer_types_alone_would_change_nothing():
    """Why the converter does not write them into a Llama: its forward pass ignores them."""
    ids = torch.arange(5, 45)[None]
    plain = tiny_model("llama").model
    typed = tiny_model("llama", layer_types=["sliding_attention", "full_attention"], sliding_window=8).model
    assert isinstance(typed.config, LlamaConfig)
    assert torch.equal(logits(plain, input_ids=ids), logits(typed, input_ids=ids))
    masformer.convert(plain, full_layers=[1], span=AttentionWindow("sliding", 8))
    assert getattr(plain.config, "layer_types", None) is None


def test_14_the_mask_arrives(monkeypatch):
    model = tiny_model("llama").model
    masformer.convert(model, full_layers=[1], span=AttentionWindow("sliding", 4))
    seen = []
    original = spans.spanned

    def spy(module, query, key, value, attention_mask, **arguments):
        seen.append(attention_mask)
        return original(module, query, key, value, attention_mask, **arguments)

    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(spans.NAME, spy)
    try:
        mask = torch.ones(2, 12, dtype=torch.int64)
        logits(model, input_ids=torch.arange(5, 29).view(2, 12), attention_mask=mask)
        mask[0, :3] = 0
        logits(model, input_ids=torch.arange(5, 29).view(2, 12), attention_mask=mask)
    finally:
        AttentionInterface.register(spans.NAME, original)
    assert [None if m is None else tuple(m.shape) for m in seen] == [None, None, (2, 12), (2, 12)]


def test_marks_beyond_a_span_are_refused_and_full_layers_are_steered():
    from tenfold import pasta
    from tenfold.errors import TenfoldError

    opened = tiny_model("llama")
    masformer.convert(opened.model, full_layers=[1], span=AttentionWindow("sliding", 8))
    text = "It was <mark>red</mark>, she said, and nobody in the town believed a word of it."
    marks = pasta.encode(opened.tokenizer, [pasta.from_tags(text)])
    plain = logits(opened.model, **marks.inputs)
    with pasta.steer(opened.model, marks, heads={1: [0]}):
        assert not torch.allclose(logits(opened.model, **marks.inputs), plain, atol=1e-4)
    with pytest.raises(TenfoldError, match="of layer 0"), pasta.steer(opened.model, marks, heads={0: [1]}):
        pass
    near = pasta.encode(opened.tokenizer, [pasta.from_tags("It was <mark>red</mark>.")])
    with pasta.steer(opened.model, near, heads={0: [1]}):
        steered = logits(opened.model, **near.inputs)
    assert not torch.allclose(steered, logits(opened.model, **near.inputs), atol=1e-4)


@pytest.mark.slow
@pytest.mark.timing
def test_15_time():
    q = torch.randn(1, 9, 8192, 64)
    k, v = torch.randn(2, 1, 3, 8192, 64)
    index = torch.arange(8192)
    mask = ((index[:, None] >= index) & (index[:, None] - index < 1024))[None, None]
    dense = partial(scaled_dot_product_attention, q, k, v, scale=0.125, enable_gqa=True)
    spans_ = {
        "p=0": AttentionWindow("block", 1024, 0),
        "p=1": AttentionWindow("block", 1024, 1),
        "sliding": AttentionWindow("sliding", 1024),
    }
    ways = {name: partial(local_attention, q, k, v, span, 0.125) for name, span in spans_.items()}
    ways |= {"full": partial(dense, is_causal=True), "stock": partial(dense, attn_mask=mask)}
    seconds = {name: [] for name in ways}
    for _ in range(6):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    median = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    for name in ("p=1", "sliding"):
        assert median[name] < 0.6 * median["full"]
        assert median[name] < 0.3 * median["stock"]
    assert median["p=0"] < 0.25 * median["full"]


@pytest.mark.slow
def test_16_selection():
    """The specification's six are {7, 8, 17, 18, 20, 23} on one passage of its own; which come fifth and sixth depends
    on the passage, four of them always come first here. So does the loss of the bottom six: 3.7 on its passage, 2.5 to
    3.0 on ours, where the profiled six have 0.8 to 1.0 and its own six 0.9 to 1.1."""
    opened = open_model("demo", device="cpu")
    model, span = opened.model.eval(), AttentionWindow("block", 64, 1, sinks=4)
    ids = torch.tensor(opened.tokenizer("\n\n".join(python_reference()[0].values()), verbose=False)["input_ids"])
    texts = [repeated(piece, 430, 420)[0] for piece in spread(ids, 850, 4, "python-reference")]
    scores = masformer.profile(model, texts[:2], span)
    best = sorted(range(30), key=lambda layer: -scores[layer])[:6]
    assert len({7, 8, 17, 18, 20, 23} & set(best)) >= 4

    def loss(full):
        handle = masformer.convert(model, full_layers=full, span=span)
        with torch.no_grad():
            found = [float(text_loss(model, ids, scored)) for ids, scored in texts[2:]]
        handle.revert()
        return sum(found) / len(found)

    assert loss(best) < 1.2
    assert loss(range(6)) > 2.2


def test_block_marks_are_refused_by_what_the_last_token_sees_and_sinks_are_seen():
    from tenfold import pasta
    from tenfold.errors import TenfoldError

    text = "It was <mark>red</mark>, she said, and nobody in the town believed a word of it."
    for span, seen in ((AttentionWindow("block", 32, 0), False), (AttentionWindow("block", 8, 0, sinks=12), True)):
        opened = tiny_model("llama")
        masformer.convert(opened.model, full_layers=[1], span=span)
        marks = pasta.encode(opened.tokenizer, [pasta.from_tags(text)])
        plain = logits(opened.model, **marks.inputs)
        if not seen:
            with pytest.raises(TenfoldError, match="of layer 0"), pasta.steer(opened.model, marks, heads={0: [1]}):
                pass
            continue
        with pasta.steer(opened.model, marks, heads={0: [1]}):
            assert not torch.allclose(logits(opened.model, **marks.inputs)[:, -1], plain[:, -1], atol=1e-5)


def test_static_caches_and_padding_within_a_row_are_refused():
    from transformers import StaticCache

    from tenfold.errors import ModelError

    model = tiny_model("llama").model
    masformer.convert(model, full_layers=[1], span=AttentionWindow("sliding", 8))
    ids = torch.arange(5, 25)[None]
    with pytest.raises(ModelError, match="a cache of 64 keys after 20 tokens"), torch.no_grad():
        model(input_ids=ids, past_key_values=StaticCache(config=model.config, max_cache_len=64))
    mask = torch.ones_like(ids)
    mask[0, 8:12] = 0
    with pytest.raises(ModelError, match="row 0 has padding between"):
        logits(model, input_ids=ids, attention_mask=mask)
