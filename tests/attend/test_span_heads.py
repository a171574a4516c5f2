"""Heads of one layer with spans of their own: against a mask of all pairs for each head, in files, steered, chosen."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from tenfold import pasta
from tenfold.attend import masformer, spans
from tenfold.attend.attention import self_attentions
from tenfold.attend.masformer import native
from tenfold.attend.reach import head_span, reach
from tenfold.errors import ConfigError, ModelError
from tenfold.evaluate.long_context import repeated
from tenfold.kernels.biased import KeyBias
from tenfold.kernels.local import FULL, AttentionWindow
from tenfold.models.export import save_model
from tenfold.models.open import open_model
from tenfold.models.tiny import tiny_model

NEAR, SUNK, BLOCK = (
    AttentionWindow("sliding", 3),
    AttentionWindow("sliding", 5, sinks=2),
    AttentionWindow("block", 4, 1, 1),
)
# Of four KV heads. Equal spans stand apart, so that heads in the order of their groups are not in their own; in the
# first, going there is another way than going back.
MIXES = [
    (NEAR, None, SUNK, NEAR),
    (None, BLOCK, None, BLOCK),
    (None, BLOCK, SUNK, NEAR),
    (NEAR, SUNK, BLOCK, NEAR),
    (SUNK, AttentionWindow("sliding", 60), NEAR, SUNK),
]
SCALE = 0.3


def layer_of(mix, groups=2):
    """What the attention function reads of a layer: its heads, and the table with their spans."""
    heads = {1: {head: span for head, span in enumerate(mix) if span != NEAR}}
    table = masformer.Converted(None, (0,), NEAR, "sdpa", heads).table()
    config = SimpleNamespace(tenfold_span=table, num_attention_heads=4 * groups, num_key_value_heads=4)
    return SimpleNamespace(layer_idx=1, config=config, num_key_value_groups=groups, is_causal=True)


def tensors(queries, keys, batch=2, groups=2):
    generator = torch.Generator().manual_seed(queries * 100 + keys)
    q = torch.randn(batch, 4 * groups, queries, 8, generator=generator, dtype=torch.float64)
    return q, *torch.randn(2, batch, 4, keys, 8, generator=generator, dtype=torch.float64)


def dense(q, k, v, mix, positions=None, documents=None, bias=None):
    """One head after the other, with a mask of all pairs; ``[batch, queries, heads, channels]``."""
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    positions = torch.arange(keys).expand(batch, -1) if positions is None else positions
    documents = torch.zeros_like(positions) if documents is None else documents
    i, j = positions[:, keys - queries :, None], positions[:, None]
    same = documents[:, keys - queries :, None] == documents[:, None]
    outputs = []
    for head in range(heads):
        group = head // (heads // k.shape[1])
        seen = (j >= 0) & (j <= i) & same
        if mix[group] is not None:
            seen = seen & mix[group].sees(i, j)
        scores = q[:, head] @ k[:, group].mT * SCALE
        scores = scores if bias is None else scores + bias[:, head, None]
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)
        outputs.append(weights @ v[:, group])
    return torch.stack(outputs, 2)


def close(found, expected, atol=1e-10):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize(("queries", "keys"), [(41, 41), (1, 41), (7, 41), (1, 1)])
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_every_head_sees_its_own_span(mix, queries, keys, groups):
    q, k, v = tensors(queries, keys, groups=groups)
    found, weights = spans.spanned(layer_of(mix, groups), q, k, v, None, scaling=SCALE)
    assert weights is None
    assert found.is_contiguous()
    close(found, dense(q, k, v, mix))


@pytest.mark.parametrize("queries", [41, 9, 1])
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_left_padding(mix, queries):
    q, k, v = tensors(queries, 41)
    mask = torch.ones(2, 41, dtype=torch.bool)
    mask[1, :11] = False
    positions = torch.stack([torch.arange(41), (torch.arange(41) - 11).clamp(min=-1)])
    found = spans.spanned(layer_of(mix), q, k, v, mask, scaling=SCALE)[0]
    real = mask[:, 41 - queries :]
    close(found[real], dense(q, k, v, mix, positions)[real])


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_packed_documents(mix):
    q, k, v = tensors(41, 41, batch=1)
    lengths = (20, 3, 18)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    documents = torch.cat([torch.full((n,), number) for number, n in enumerate(lengths)])[None]
    found = spans.spanned(layer_of(mix), q, k, v, None, scaling=SCALE, position_ids=positions)[0]
    close(found, dense(q, k, v, mix, positions, documents))


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 2.0, 1.5, 1.0])])
@pytest.mark.parametrize("heads", [[0, 2, 3, 7], [1, 4, 5, 6]])
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_biases_reach_the_heads_they_are_for(mix, heads, weights):
    q, k, v = tensors(12, 12)
    # Multiples of a quarter: single precision, in which biases are given, rounds nothing.
    values = torch.randint(-8, 8, (2, 12), generator=torch.Generator().manual_seed(0)) / 4
    bias = KeyBias(torch.tensor(heads), values, weights=weights)
    wanted = torch.zeros(2, 8, 12, dtype=torch.float64)
    wanted[:, heads] = values[:, None].double() * (torch.ones(4) if weights is None else weights)[:, None]
    other = KeyBias(torch.tensor([7]), values + 1)
    wanted[:, 7] += values + 1
    found = spans.spanned(layer_of(mix), q, k, v, None, key_bias=(bias, other), scaling=SCALE)[0]
    close(found, dense(q, k, v, mix, bias=wanted))


@pytest.mark.parametrize("gate", [torch.tensor(0.25), torch.tensor([0.2, 0.5, 0.9, 0.4])], ids=str)
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_gates_mix_full_and_local_attention(mix, gate):
    q, k, v = tensors(20, 20)
    found = spans.spanned(layer_of(mix), q, k, v, None, gate=gate, scaling=SCALE)[0]
    share = gate.double().expand(4).repeat_interleave(2)[:, None]
    close(found, share * dense(q, k, v, [None] * 4) + (1 - share) * dense(q, k, v, mix))


def test_a_probe_is_given_all_heads():
    q, k, v = tensors(20, 20)
    looked = []
    spans.spanned(layer_of(MIXES[0]), q, k, v, None, probe=lambda *given: looked.append(given), scaling=SCALE)
    ((layer, value, read),) = looked
    assert (layer, value is v) == (1, True)
    close(read(2 * v), 2 * dense(q, k, v, MIXES[0]))


def test_a_mask_of_four_dimensions_is_refused_where_one_head_is_local():
    q, k, v = tensors(5, 5)
    with pytest.raises(ModelError, match="layer 1: a mask of four dimensions"):
        spans.spanned(layer_of((None, None, None, NEAR)), q, k, v, torch.ones(2, 1, 5, 5, dtype=torch.bool))


def converted(kind="llama", heads=None, span=NEAR, full=(1,), **keys):
    opened = tiny_model(kind, num_hidden_layers=3, **keys)
    handle = masformer.convert(opened.model, full_layers=full, span=span, heads=heads)
    return opened, handle


@torch.no_grad()
def logits(model, ids, **inputs):
    return model(input_ids=ids, use_cache=False, **inputs).logits


def some_ids(rows=2, tokens=40):
    return torch.randint(10, 200, (rows, tokens), generator=torch.Generator().manual_seed(0))


HEADS = {0: {1: None}, 2: {0: SUNK, 1: AttentionWindow("block", 8)}}


def test_what_the_model_holds_and_reports():
    opened, handle = converted(heads={2: {1: None, 0: SUNK}, 0: {1: None}})
    table = opened.model.config.tenfold_span
    own = {"pattern": "sliding", "size": 5, "previous": 1, "sinks": 2}
    assert table["heads"] == {"0": {"1": None}, "2": {"0": own, "1": None}}
    assert [spans.head_spans(opened.model.config, layer) for layer in range(3)] == [
        (NEAR, FULL),
        (FULL, FULL),
        (SUNK, FULL),
    ]
    report = handle.report(10)
    assert report["heads"] == table["heads"]
    assert (report["full layers"], report["local layers"]) == ([1], 2)
    assert report["pairs"] == pytest.approx((NEAR.pairs(10) + SUNK.pairs(10) + 4 * 55) / (6 * 55))
    handle.revert()
    assert handle.report(10) == report
    assert "heads" not in converted()[1].table()


def test_heads_that_see_all_are_the_unmodified_model_and_reverting_leaves_it():
    model = tiny_model("llama").model
    before = logits(model, some_ids())
    handle = masformer.convert(model, full_layers=(), span=NEAR, heads={0: {0: None, 1: None}, 1: {0: None, 1: None}})
    assert torch.equal(logits(model, some_ids()), before)
    handle.revert()
    far = AttentionWindow("sliding", 100)
    handle = masformer.convert(model, full_layers=(), span=far, heads={0: {0: None}, 1: {1: None}})
    close(logits(model, some_ids()), before, 1e-5)
    handle.revert()
    handle = masformer.convert(model, full_layers=(), span=far, heads={0: {1: NEAR}})
    assert not torch.allclose(logits(model, some_ids()), before, atol=1e-3)
    handle.revert()
    assert torch.equal(logits(model, some_ids()), before)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_padded_rows_and_packed_documents_of_a_model(kind):
    model = converted(kind, HEADS)[0].model
    ids = some_ids(1, 30)
    alone = logits(model, ids)
    mask = torch.ones(2, 37, dtype=torch.int64)
    mask[0, :7] = 0
    rows = torch.cat([torch.cat([torch.zeros(1, 7, dtype=torch.int64), ids], 1), some_ids(1, 37)])
    found = logits(model, rows, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    close(found[:1, 7:], alone, 1e-5)
    positions = torch.cat([torch.arange(30), torch.arange(30)])[None]
    close(logits(model, torch.cat([ids, ids], 1), position_ids=positions), torch.cat([alone, alone], 1), 1e-5)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({7: {0: None}}, "heads: 7; the model has layers 0 to 2"),
        ({1: {0: None}}, "heads: layer 1 is one of full_layers too"),
        ({0: {2: None}}, "heads: KV head 2 of layer 0; a layer has KV heads 0 to 1"),
        ({0: {-1: None}}, "heads: KV head -1 of layer 0"),
        ({2: {1: AttentionWindow("sliding", 0)}}, r"heads: KV head 1 of layer 2: AttentionWindow.* too small"),
        (
            {2: {1: AttentionWindow("sliding", 4, sinks=-1)}},
            r"heads: KV head 1 of layer 2: AttentionWindow.* too small",
        ),
        ({2: {1: AttentionWindow("spiral", 4)}}, r"heads: KV head 1 of layer 2: AttentionWindow.* unknown pattern"),
    ],
)
def test_heads_that_cannot_be_meant(heads, message):
    model = tiny_model("llama", num_hidden_layers=3).model
    with pytest.raises(ConfigError, match=message) as refusal:
        masformer.convert(model, full_layers=[1], span=NEAR, heads=heads)
    assert refusal.value.remedy
    assert not hasattr(model.config, spans.FIELD)


@pytest.mark.parametrize(
    "span", [AttentionWindow("sliding", 0), AttentionWindow("block", 4, -1), AttentionWindow("spiral", 4)], ids=str
)
def test_spans_that_cannot_be_meant(span):
    with pytest.raises(ConfigError, match=r"span: AttentionWindow\("):
        masformer.convert(tiny_model("llama").model, full_layers=[1], span=span)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_saved_and_opened_again(tmp_path, kind):
    opened, handle = converted(kind, HEADS)
    plain = logits(tiny_model(kind, num_hidden_layers=3).model, some_ids())
    again = open_model(save_model(opened.model, opened.tokenizer, tmp_path / "own"), device="cpu").model
    assert again.config.tenfold_span == opened.model.config.tenfold_span
    assert torch.equal(logits(again, some_ids()), logits(opened.model, some_ids()))
    found = native.restore(again)
    assert (found.heads, found.full_layers, found.span) == (handle.heads, (1,), NEAR)
    assert found.report() == handle.report()
    found.revert()
    assert torch.equal(logits(again, some_ids()), plain)


def test_stock_layers_have_no_spans_of_heads(tmp_path):
    opened, _ = converted(heads={0: {1: None}})
    with pytest.raises(ModelError, match=r"heads: \{'0': \{'1': None\}\}: stock layers know no such thing") as refusal:
        native.save_native(opened.model, opened.tokenizer, tmp_path / "native")
    assert "save_model" in refusal.value.remedy
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "heads",
    [
        {"9": {"0": None}},
        {"0": {"0": None}},
        {"1": {"5": None}},
        {"1": {"0": {"size": 3}}},
        {"1": {"0": {"pattern": "sliding", "size": 0}}},
        {"1": {"0": {"pattern": "sliding", "size": "3"}}},
        {"one": {"0": None}},
        [1],
    ],
    ids=str,
)
def test_heads_that_cannot_be_read(heads):
    table = {"full_layers": [0], "pattern": "sliding", "size": 16, "heads": heads}
    with pytest.raises(ModelError, match=r"tenfold_span in the configuration: .* cannot be read"):
        native.restore(tiny_model("llama", tenfold_span=table).model)


def test_a_query_head_reaches_as_far_as_its_keys():
    modules = self_attentions(converted(heads={0: {1: None}, 2: {0: AttentionWindow("block", 8)}})[0].model)
    assert [head_span(modules[0], head).reach for head in range(4)] == [2, 2, FULL.reach, FULL.reach]
    assert [head_span(modules[2], head).reach for head in range(4)] == [15, 15, 2, 2]
    assert [reach(modules[layer]) for layer in range(3)] == [3, None, 3]
    assert head_span(modules[1], 3) == FULL


TEXT = "It was <mark>red</mark>, she said, and nobody in the town believed a word of it."


def test_marks_are_refused_only_for_heads_that_cannot_see_them():
    opened, _ = converted(heads={0: {1: None}})
    marks = pasta.encode(opened.tokenizer, [pasta.from_tags(TEXT)])
    plain = logits(opened.model, marks.input_ids)
    with pasta.steer(opened.model, marks, heads={0: [2, 3]}):
        assert not torch.allclose(logits(opened.model, marks.input_ids), plain, atol=1e-4)
    with pytest.raises(ConfigError, match="prompt 1: head 1 of layer 0 does not reach"):
        pasta.steer(opened.model, marks, heads={0: [1]}).__enter__()
    named = pytest.warns(UserWarning, match="2 heads are steered; 1 see no mark .* layer 0 heads 0")
    with named, pasta.steer(opened.model, marks, heads={1: [0], 0: [3, 0]}) as found:
        alone = logits(opened.model, marks.input_ids)
    assert found.heads == {0: (3,), 1: (0,)}
    with pasta.steer(opened.model, marks, heads={1: [0], 0: [3]}):
        assert torch.equal(logits(opened.model, marks.input_ids), alone)
    far_and_near = [pasta.from_tags("Red <mark>it is</mark>"), pasta.from_tags(TEXT)]
    marks = pasta.encode(opened.tokenizer, far_and_near)
    with (
        pytest.raises(ConfigError, match="prompt 2: head 1 of layer 0"),
        pasta.steer(opened.model, marks, heads={0: [1]}),
    ):
        pass
    near = pasta.encode(opened.tokenizer, far_and_near[:1])
    with pasta.steer(opened.model, near, heads={0: [1]}):
        steered = logits(opened.model, near.input_ids)
    assert not torch.allclose(steered, logits(opened.model, near.input_ids), atol=1e-4)


@pytest.mark.parametrize(
    ("heads", "keys"),
    [
        ({0: [0, 1, 2, 3], 2: [1, 2]}, {"alpha": 0.05}),
        ({0: [2], 2: [0]}, {"alpha": 0.05, "generated": "scale"}),
    ],
)
def test_steering_is_that_of_the_unconverted_model_where_spans_hold_the_text(heads, keys):
    opened = tiny_model("llama", num_hidden_layers=3)
    marks = pasta.encode(opened.tokenizer, [pasta.from_tags(TEXT)])
    with pasta.steer(opened.model, marks, heads=heads, **keys):
        expected = logits(opened.model, marks.input_ids)
    far = AttentionWindow("sliding", 300)
    masformer.convert(opened.model, full_layers=[1], span=far, heads={0: {1: None}, 2: {0: None}})
    with pasta.steer(opened.model, marks, heads=heads, **keys):
        found = logits(opened.model, marks.input_ids)
    close(found, expected, 1e-5)
    assert not torch.allclose(found, logits(opened.model, marks.input_ids), atol=1e-3)


def loss_at(model, gates, texts):
    """Mean loss with given gates, in float64."""
    handle = masformer.convert(model, full_layers=(), span=SUNK)
    hooks = [
        module.register_forward_pre_hook(
            partial(lambda gate, module, args, keys: (args, {**keys, "gate": gate}), gate), with_kwargs=True
        )
        for gate, module in zip(gates, self_attentions(model).values(), strict=True)
    ]
    losses = [cross_entropy(logits(model, ids[None])[0, :-1][scored[1:]], ids[1:][scored[1:]]) for ids, scored in texts]
    for hook in hooks:
        hook.remove()
    handle.revert()
    return float(sum(losses)) / len(losses)


def test_the_profile_of_heads_is_the_slope_of_the_loss():
    model = tiny_model("llama").model.double()
    texts = repeated(some_ids(1, 80)[0], 20, 20)
    assert len(texts) == 2
    scores = torch.tensor(list(masformer.profile_heads(model, texts, SUNK).values()), dtype=torch.float64)
    assert scores.shape == (2, 2)
    step = 0.02  # the norms of a Llama are computed in single precision
    for layer in range(2):
        for head in range(2):
            change = torch.zeros(2, 2, dtype=torch.float64)
            change[layer, head] = step
            rise = loss_at(model, 0.5 + change, texts) - loss_at(model, 0.5 - change, texts)
            assert float(scores[layer, head]) == pytest.approx(-rise / (2 * step), rel=1e-3, abs=1e-6)
    assert float(scores.abs().min()) > 1e-6
    whole = masformer.profile(model, texts, SUNK)
    assert whole == pytest.approx(dict(enumerate(scores.sum(1).tolist())), rel=1e-4, abs=1e-8)
    assert not hasattr(model.config, spans.FIELD)
    assert not [hook for module in model.modules() for hook in module._forward_pre_hooks]


def test_choosing_heads():
    scores = {0: [0.1, 0.5], 1: [0.9, 0.8], 2: [0.5, -1.0]}
    assert masformer.choose_heads(scores, 0) == ((), {})
    assert masformer.choose_heads(scores, 1) == ((), {1: {0: None}})
    assert masformer.choose_heads(scores, 2) == ((1,), {})
    assert masformer.choose_heads(scores, 3) == ((1,), {0: {1: None}})  # of equal scores the first
    assert masformer.choose_heads(scores, 4) == ((1,), {0: {1: None}, 2: {0: None}})
    assert masformer.choose_heads(scores, 6) == ((0, 1, 2), {})
    for count in (-1, 7):
        with pytest.raises(ConfigError, match=f"full heads: {count} of 6"):
            masformer.choose_heads(scores, count)
    full, heads = masformer.choose_heads(scores, 4)
    report = converted(full=full, heads=heads)[1].report(20)
    assert report["pairs"] == pytest.approx((4 * 210 + 2 * NEAR.pairs(20)) / (6 * 210))
