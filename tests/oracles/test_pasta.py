"""The oracles of section 7 of PASTA's specification, by number."""

import itertools
import math
from contextlib import contextmanager

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tenfold.attend.pasta import steer
from tenfold.attend.pasta.heads import intersect
from tenfold.attend.pasta.profiles import load_profile
from tenfold.attend.pasta.steering import log_strength
from tenfold.attend.text_marks import Marks, encode, from_spans, tokens_of
from tenfold.data.text_checks import json_contains, json_valid, pronouns_changed
from tenfold.kernels.biased import KeyBias, biased_mask, merge_parts, split_heads, with_key_channel
from tenfold.models.tiny import tiny_model

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
HEADS = {0: [1], 1: [0, 3]}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def marks_of(length, *rows, ids=None, pads=0):
    """One row per list of spans ``(start, end)`` or ``(start, end, strength)``."""
    marked = torch.zeros(len(rows), length, dtype=torch.bool)
    strength = torch.ones(len(rows), length)
    for row, spans in enumerate(rows):
        for start, end, *given in spans:
            marked[row, start:end] = True
            strength[row, start:end] = given[0] if given else 1.0
    if ids is None:
        ids = torch.arange(length).expand(len(rows), -1) % 30 + 2
    mask = torch.ones_like(ids)
    mask[:, :pads] = 0
    return Marks(ids.clone(), mask, marked, strength)


def key_bias(marks, alpha, heads):
    """As `steer` builds it, for the prompt alone."""
    u = log_strength(marks, alpha)
    floor = u.amin(1)
    most = int((u > floor[:, None]).sum(1).max())
    order = (u > floor[:, None]).int().argsort(dim=1, descending=True, stable=True)[:, :most]
    raised = torch.where(u.gather(1, order) > floor[:, None], order, -1)
    return KeyBias(torch.tensor(heads), u, raised, floor, first=int((u > floor[:, None]).any(0).int().argmax()))


def fill(shape, w, c):
    return torch.sin(w * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64) + c).view(shape)


def detllama(dtype=torch.float64, implementation="sdpa"):
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        attn_implementation=implementation,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for p, (name, parameter) in enumerate(model.named_parameters()):
            parameter.copy_(torch.ones(()) if "norm" in name else 0.5 * fill(parameter.shape, 0.7, p))
    return model.to(dtype)


def logits(model, marks, **arguments):
    with torch.no_grad():
        return model(**marks.inputs, **arguments).logits


def steered(model, marks, alpha=0.01, heads=HEADS, **arguments):
    with steer(model, marks, heads=heads, alpha=alpha, **arguments):
        return logits(model, marks)


def near(found, expected, tolerance):
    assert (found.double() - torch.as_tensor(expected, dtype=torch.float64)).abs().max() <= tolerance


@contextmanager
def seen_bias(model, layer=0):
    """The bias of each call of a layer, collected; to be opened within the steer block."""
    found = []

    def look(module, args, kwargs):
        found.append(kwargs["key_bias"])

    handle = model.model.layers[layer].self_attn.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def literal(query, key, value, bias):
    """Post-softmax, as the paper's formula has it, head by head."""
    groups = query.shape[1] // key.shape[1]
    weights = torch.zeros(*query.shape[:3], key.shape[2], dtype=query.dtype)
    future = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
    for head in range(query.shape[1]):
        scores = query[:, head] @ key[:, head // groups].transpose(1, 2) * query.shape[3] ** -0.5
        probabilities = scores.masked_fill(future, -torch.inf).softmax(-1)
        if head in bias.heads:
            probabilities = probabilities * bias.values.to(query.dtype).exp()[:, None]
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        weights[:, head] = probabilities
    return weights, weights @ value.repeat_interleave(groups, 1)


class Module(torch.nn.Module):
    num_key_value_groups, is_causal = 2, True


def by_mask(query, key, value, bias):
    mask = biased_mask(None, bias.dense(query.shape[1], query.dtype), query.shape[2], key.shape[2])
    return sdpa_attention_forward(Module(), query, key, value, mask)[0].transpose(1, 2)


def by_position_bias(query, key, value, bias):
    dense = bias.dense(query.shape[1], query.dtype)
    return sdpa_attention_forward(Module(), query, key, value, None, position_bias=dense)[0].transpose(1, 2)


def by_channel(query, key, value, bias):
    scale = query.shape[3] ** -0.5
    wide = with_key_channel(query, key, value, scale, bias)
    return sdpa_attention_forward(Module(), *wide, None, scaling=scale)[0].transpose(1, 2)[..., : value.shape[3]]


def by_merge(query, key, value, bias):
    return merge_parts(query, key, value, None, query.shape[3] ** -0.5, bias)


def by_split(query, key, value, bias):
    plain = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return split_heads(plain, query, key, value, None, query.shape[3] ** -0.5, bias)


WAYS = [by_mask, by_position_bias, by_channel, by_merge, by_split]


def op_level(dtype=torch.float64):
    query, key = fill((2, 4, 6, 4), 0.7, 0.1), fill((2, 2, 6, 4), 1.3, 0.2)
    value = fill((2, 2, 6, 4), 0.9, 0.3)
    bias = key_bias(marks_of(6, [(2, 4)], [(4, 5)]), 0.01, [1, 2])
    return query.to(dtype), key.to(dtype), value.to(dtype), bias


@pytest.mark.parametrize("way", WAYS)
def test_01_uniform_scores(way):
    for keys, marked, alpha in ((12, 2, 0.01), (12, 5, 0.3), (40, 1, 0.001)):
        marks = marks_of(keys, [(3, 3 + marked)])
        value = marks.marked[:, None, :, None].double().expand(1, 2, -1, 4).contiguous()
        zero = torch.zeros(1, 4, keys, 4, dtype=torch.float64)
        share = way(zero, zero[:, :2], value, key_bias(marks, alpha, [0, 3]))[0, :, -1, 0]
        expected = marked / (marked + alpha * (keys - marked))
        near(share[[0, 3]], [expected] * 2, 1e-6)
        near(share[[1, 2]], [marked / keys] * 2, 1e-6)
    near(torch.tensor(2 / (2 + 0.01 * 10)), 0.952381, 5e-7)


@pytest.mark.parametrize("way", WAYS)
def test_02_mass_map(way):
    expected = {
        0.01: {0.1: 0.091743, 0.01: 0.502513, 0.001: 0.909918},
        0.1: {0.1: 0.526316, 0.01: 0.917431, 0.001: 0.991080},
        0.5: {0.1: 0.909091, 0.01: 0.990099, 0.001: 0.999001},
    }
    marks = marks_of(2, [(0, 1)])
    value = torch.tensor([1.0, 0.0])[None, None, :, None].expand(1, 2, -1, 4).contiguous()
    for mass, row in expected.items():
        query = torch.zeros(1, 4, 2, 4)
        query[..., 0] = 2.0  # times the scale 1/2: the score is the key
        key = torch.zeros(1, 2, 2, 4)
        key[:, :, 0, 0] = math.log(mass / (1 - mass))
        for alpha, share in row.items():
            found = way(query, key, value, key_bias(marks, alpha, [1]))[0, :, 1, 0]
            near(found[[0, 2, 3]], [mass] * 3, 1e-6)
            near(found[1], share, 1e-6)


def test_03_op_level():
    query, key, value, bias = op_level()
    plain_bias = KeyBias(bias.heads, torch.zeros_like(bias.values))
    plain, plain_output = literal(query, key, value, plain_bias)
    weights, output = literal(query, key, value, bias)
    near(plain[0, 1, 5], [0.095248, 0.175892, 0.282019, 0.237690, 0.126295, 0.082856], 1e-6)
    near(weights[0, 1, 5], [0.001816, 0.003353, 0.537679, 0.453164, 0.002408, 0.001580], 1e-6)
    near(plain[0, 1, 5, 2:4].sum(), 0.519710, 1e-6)
    near(weights[0, 1, 5, 2:4].sum(), 0.990843, 1e-6)
    near(weights[1, 2, 5], [0.017516, 0.007218, 0.003258, 0.003751, 0.948606, 0.019650], 1e-6)
    near(plain_output.sum(), -3.973813, 1e-6)
    for found in (output, *(way(query, key, value, bias) for way in WAYS)):
        near(found[0, 1, 5], [0.215498, 0.214823, 0.051574, -0.150705], 1e-6)
        near(found[1, 2, 5], [-0.890794, -0.361866, 0.440916, 0.910021], 1e-6)
        near(found.sum(), -5.261659, 2e-6)
    merged, zeros = by_merge(query, key, value, bias), torch.zeros(2, 6)
    unsteered = by_merge(query, key, value, KeyBias(bias.heads, zeros, bias.raised, zeros[:, 0], first=6))
    assert torch.equal(merged[:, [0, 3]], unsteered[:, [0, 3]])
    assert torch.equal(merged[:, :, :2], unsteered[:, :, :2])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("way", WAYS)
def test_04_every_way_agrees(way, dtype, tolerance):
    query, key, value, bias = op_level()
    expected = literal(query, key, value, bias)[1]
    query, key, value, bias = op_level(dtype)
    near(way(query, key, value, bias), expected, tolerance)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_05_model_level(implementation):
    model = detllama(implementation=implementation)
    marks = marks_of(10, [(2, 5)], ids=torch.tensor([IDS]))
    base = logits(model, marks)
    near(base[0, -1, :4], [0.095580, -0.991183, -0.498010, 0.788986], 2e-6)
    expected = {
        0.01: [0.011927, -0.931753, -0.390227, 0.773316],
        0.1: [0.042644, -0.953624, -0.429825, 0.779111],
        10: [0.117841, -1.005351, -0.526024, 0.791781],
    }
    for alpha, values in expected.items():
        near(steered(model, marks, alpha)[0, -1, :4], values, 2e-6)
    assert torch.equal(steered(model, marks, 1), base)
    greedy = {"max_new_tokens": 6, "do_sample": False}
    assert model.generate(**marks.inputs, **greedy)[0, 10:].tolist() == [22, 16, 18, 14, 23, 25]
    with steer(model, marks, heads=HEADS):
        assert model.generate(**marks.inputs, **greedy)[0, 10:].tolist() == [31, 8, 31, 22, 15, 13]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_06_several_spans(implementation):
    model, ids = detllama(implementation=implementation), torch.tensor([IDS])
    union = steered(model, marks_of(10, [(2, 5), (7, 8)], ids=ids))
    near(union[0, -1, :4], [0.056918, -0.968768, -0.450247, 0.785963], 2e-6)
    two = marks_of(10, [(2, 5, 5.0), (6, 8, 0.2)], ids=ids)
    found = steered(model, two, 1)
    near(found[0, -1, :4], [0.033573, -0.948874, -0.418825, 0.778827], 2e-6)
    for factor in (0.01, 0.5, 30.0):  # a constant in all log-strengths
        shifted = Marks(two.input_ids, two.attention_mask, two.marked, two.strength * factor)
        near(steered(model, shifted, factor), found, 1e-6)
    # One byte is one token of this tokenizer, so spans of characters are spans of tokens.
    tokenizer = tiny_model("llama").tokenizer
    first = encode(tokenizer, [from_spans("0123456789", [(2, 5), (7, 8)])])
    assert first.tokens(0) == [(2, 5), (7, 8)]
    for spans in ([(7, 8), (2, 5)], [(2, 5), (7, 8), (2, 5)], [(2, 4), (3, 5), (7, 8)], [(7, 8), (4, 5), (2, 4)]):
        other = encode(tokenizer, [from_spans("0123456789", spans)])
        assert torch.equal(log_strength(other, 0.01), log_strength(first, 0.01))


@pytest.mark.parametrize("heads", [HEADS, "all", {1: [2]}])
def test_07_prefix_invariance(heads):
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        model = detllama(dtype)
        marks = marks_of(10, [(4, 6)], ids=torch.tensor([IDS]))
        base = logits(model, marks)
        for alpha in (0, 0.01, 0.5, 30):
            found = steered(model, marks, alpha, heads)
            near(found[:, :4], base[:, :4], tolerance)
            assert (found[:, 4:] - base[:, 4:]).abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_08_left_padding(implementation):
    model = detllama(torch.float32, implementation)
    row = torch.tensor([IDS])
    alone = steered(model, marks_of(10, [(2, 5)], ids=row))
    padded = marks_of(13, [(5, 8)], ids=torch.cat([torch.zeros(1, 3, dtype=torch.int64), row], 1), pads=3)
    near(steered(model, padded)[:, 3:], alone, 1e-5)
    # The same row twice, under different marks.
    both = marks_of(10, [(2, 5)], [(6, 7)], ids=row.repeat(2, 1))
    found = steered(model, both)
    near(found[:1], alone, 1e-5)
    near(found[1:], steered(model, marks_of(10, [(6, 7)], ids=row)), 1e-5)
    assert (found[0, 6:] - found[1, 6:]).abs().max() > 1e-2


def test_09_caches():
    model = detllama(torch.float32)
    marks = marks_of(10, [(2, 6)], ids=torch.tensor([IDS]))
    written = torch.tensor([[7, 21, 30]])
    ids = torch.cat([marks.input_ids, written], 1)

    def run(cache, *cuts):
        found, edges = [], [0, *cuts, 13]
        for start, end in itertools.pairwise(edges):
            mask = torch.ones(1, end, dtype=torch.int64)
            output = model(ids[:, start:end], attention_mask=mask, past_key_values=cache, use_cache=cache is not None)
            found.append(output.logits)
        return torch.cat(found, 1)

    def static():
        return StaticCache(config=model.config, max_cache_len=20)

    for generated in ("keep", "scale"):
        with torch.no_grad(), steer(model, marks, heads=HEADS, generated=generated):
            expected = run(None)
            for cache in (DynamicCache(config=model.config), static()):
                near(run(cache, 10, 11, 12), expected, 1e-5)
            for cache in (DynamicCache(config=model.config), static()):
                near(run(cache, 4, 10, 11, 12), expected, 1e-5)
            near(run(DynamicCache(config=model.config), 4, 5, 6, 12), expected, 1e-5)
    with torch.no_grad():
        assert (run(None) - expected).abs().max() > 1e-2


def test_10_beams():
    model = detllama(torch.float32)
    marks = marks_of(10, [(2, 5)], [(6, 8)], ids=torch.tensor([IDS, IDS[::-1]]))
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}

    def run(given, beams):
        with steer(model, given, heads=HEADS):
            return model.generate(**given.inputs, num_beams=beams, num_return_sequences=beams, **settings)

    together = run(marks, 3)
    for row in range(2):
        alone = Marks(
            *(part[row : row + 1] for part in (marks.input_ids, marks.attention_mask, marks.marked, marks.strength))
        )
        found = run(alone, 3)
        assert torch.equal(found.sequences, together.sequences[3 * row : 3 * row + 3])
        near(found.sequences_scores, together.sequences_scores[3 * row : 3 * row + 3], 1e-5)
    # The score of each beam is that of its text, read again without a cache under the marks of its row.
    tripled = together.sequences
    with torch.no_grad(), steer(model, marks, heads=HEADS):
        again = model(tripled, use_cache=False).logits[:, 9:-1].log_softmax(-1)
    near(again.gather(2, tripled[:, 10:, None]).sum((1, 2)) / 6, together.sequences_scores, 1e-5)
    # One beam is the greedy search of such readings.
    text = run(marks, 1).sequences
    with torch.no_grad(), steer(model, marks, heads=HEADS):
        again = model(text, use_cache=False).logits[:, 9:-1]
    assert torch.equal(again.argmax(-1), text[:, 10:])


def test_11_exact_no_ops():
    model, ids = detllama(torch.float32), torch.tensor([IDS])
    marks = marks_of(10, [(2, 5)], ids=ids)
    base = logits(model, marks)
    text = model.generate(**marks.inputs, max_new_tokens=5, do_sample=False)
    for given, settings in (
        (marks, {"alpha": 1}),
        (marks, {"alpha": 1, "generated": "scale"}),
        (marks_of(10, [], ids=ids), {}),
        (marks_of(10, [], ids=ids), {"generated": "scale"}),
        (marks, {"heads": {}}),
        (marks, {"heads": {0: []}}),
        (marks_of(10, [(0, 10)], ids=ids), {}),
        (marks_of(10, [], ids=ids), {"target_mass": 0.5}),
    ):
        with steer(model, given, **{"heads": HEADS, **settings}) as found:
            assert not found.heads
            assert torch.equal(logits(model, given), base)
            assert torch.equal(model.generate(**given.inputs, max_new_tokens=5, do_sample=False), text)
    # A whole prompt is no no-op when what is written counts as unmarked.
    with steer(model, marks_of(10, [(0, 10)], ids=ids), heads=HEADS, generated="scale") as found:
        assert found.heads
    # Leaving restores, also after an error and when another model was steered in between.
    other = detllama(torch.float32, "eager")
    other_base = logits(other, marks)
    try:
        with steer(model, marks, heads=HEADS):
            inside = logits(model, marks)
            assert not torch.equal(inside, base)
            with steer(other, marks, heads=HEADS, alpha=0.1):
                assert not torch.equal(logits(other, marks), other_base)
                assert torch.equal(logits(model, marks), inside)
            assert torch.equal(logits(other, marks), other_base)
            with steer(model, marks, heads={1: [2]}):
                assert not torch.equal(logits(model, marks), inside)
            assert torch.equal(logits(model, marks), inside)
            raise KeyError("an error of the user")
    except KeyError:
        pass
    assert torch.equal(logits(model, marks), base)
    assert (model.config._attn_implementation, other.config._attn_implementation) == ("sdpa", "eager")


def test_12_spans_to_tokens():
    offsets = [(0, 0), (0, 4), (4, 7), (7, 9), (9, 16), (16, 17)]
    expected = {(0, 17): [1, 2, 3, 4, 5], (9, 16): [4], (10, 16): [4], (16, 17): [5], (3, 5): [1, 2]}
    for span, tokens in expected.items():
        assert tokens_of(offsets, *span) == tokens
    assert tokens_of([(12, 14), (13, 14), (13, 14)], 13, 14) == [0, 1, 2]
    # An empty or outlying span is refused where the text is known.
    for start, end in ((3, 3), (5, 3), (-1, 2), (12, 99)):
        with pytest.raises(ValueError, match="span"):
            encode(tiny_model("llama").tokenizer, [from_spans("Mary is a doctor.", [(start, end)])])


@contextmanager
def pastalib(model, length, start, end, alpha, position):
    """The official code's edit of the additive mask, for one section of every row (eager attention only)."""
    heads = {layer: torch.tensor(indices) for layer, indices in HEADS.items()}

    def edit(module, args, kwargs):
        mask = kwargs["attention_mask"].expand(-1, model.config.num_attention_heads, -1, -1).clone()
        chosen = heads[module.layer_idx]
        if position == "exclude":
            mask[:, chosen, :, :start] += math.log(alpha)
            mask[:, chosen, :, end:length] += math.log(alpha)
        else:
            mask[:, chosen, :, start:end] += math.log(alpha)
            mask[:, chosen, :, :length] -= math.log(alpha)
        return args, {**kwargs, "attention_mask": mask}

    handles = [model.model.layers[layer].self_attn.register_forward_pre_hook(edit, with_kwargs=True) for layer in heads]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_13_pastalib_parity():
    model = detllama(torch.float32, "eager")
    ids = torch.tensor([IDS, IDS[::-1]])
    marks = marks_of(10, [(3, 6)], [(3, 6)], ids=ids)
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with steer(model, marks, heads=HEADS, alpha=0.01):
        ours, text = logits(model, marks), model.generate(**marks.inputs, **settings)
    for alpha, position in ((0.01, "exclude"), (100, "include")):
        with pastalib(model, 10, 3, 6, alpha, position):
            near(logits(model, marks), ours, 1e-5)
            theirs = model.generate(**marks.inputs, **settings)
        assert torch.equal(theirs.sequences, text.sequences)
        near(torch.stack(theirs.logits), torch.stack(text.logits), 1e-5)
    prompt = marks_of(12, [(1, 2)])
    with steer(model, prompt, heads={0: [2]}), seen_bias(model) as found:
        model.generate(**prompt.inputs, max_new_tokens=4, do_sample=False)
    row = found[-1][0].dense(4, torch.float32)[0, :, 0]
    expected = torch.zeros(4, 15)
    expected[2, :12] = math.log(0.01)
    expected[2, 1] = 0
    assert torch.equal(row, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_14_half_precision(kind, implementation, dtype):
    model = tiny_model(kind).model.to(dtype)
    model.set_attn_implementation(implementation)
    ids = torch.arange(6, 20).repeat(3, 1)
    marks = marks_of(14, [(6, 8)], [(4, 14)], [], ids=ids)
    marks.attention_mask[0, :4] = 0
    real = marks.attention_mask.bool()
    for alpha in (1e-9, 0, 0.01, 1e9):
        with steer(model, marks, heads={0: [1], 1: [0, 3]}, alpha=alpha), torch.no_grad():
            output = model(**marks.inputs, output_hidden_states=True)
            for state in (output.logits, *output.hidden_states):
                assert state[real].isfinite().all()
            text = model.generate(
                **marks.inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
        assert all(step.isfinite().all() for step in text.logits)
    # Fully masked rows: of the attention itself, padding included.
    with steer(model, marks, heads="all", alpha=1e-9), torch.no_grad():
        for state in model(**marks.inputs, output_hidden_states=True).hidden_states:
            assert state.isfinite().all()


def test_15_erosion():
    table = {"keep": [0.9174, 0.4785, 0.0902, 0.0243], "scale": [0.9174, 0.9091, 0.8403, 0.6711]}
    model = tiny_model("llama").model

    def share(marks, written, generated):
        ids = torch.cat([marks.input_ids, torch.full((1, written), 9)], 1)
        with torch.no_grad(), steer(model, marks, heads={0: [2]}, generated=generated), seen_bias(model) as found:
            model(ids)
        weights = found[0][0].dense(4, torch.float64)[0, 2, 0].softmax(-1)  # scores are all alike
        return float(weights[:100][marks.marked[0]].sum())

    for generated, row in table.items():
        for written, printed in zip((0, 10, 100, 400), row, strict=True):
            expected = 10 / (10 + 0.01 * 90 + (0.01 if generated == "scale" else 1) * written)
            assert expected == pytest.approx(printed, abs=5e-5)
            assert share(marks_of(100, [(40, 50)]), written, generated) == pytest.approx(expected, abs=1e-6)
    assert share(marks_of(100, [(10, 15), (70, 75)]), 20, "keep") == pytest.approx(0.323625, abs=1e-6)
    log_alpha = math.log(0.01)  # the official loop over sections: each subtracts outside of itself
    official = torch.cat([torch.full((10,), log_alpha), torch.full((90,), 2 * log_alpha), torch.zeros(20)]).double()
    assert float(official.softmax(0)[:10].sum()) == pytest.approx(0.004973, abs=1e-6)


def test_16_profiles(shared_data):
    folder = shared_data / "pasta_heads"
    expected = {
        "llama-7b_top300": (25, 15),
        "llama-7b_top400": (53, 19),
        "llama-7b_top500": (86, 26),
        "gptj_top250": (52, None),
        "gptj_top275": (72, None),
        "gptj_top300": (111, None),
    }
    for name, (heads, layers) in expected.items():
        profile = load_profile(folder / f"{name}.json")
        assert profile.size == heads
        assert layers is None or len(profile.heads) == layers
        assert all(type(layer) is int for layer in profile.heads)
    smaller, larger = (load_profile(folder / f"llama-7b_top{k}.json").heads for k in (300, 500))
    assert all(set(indices) <= set(larger[layer]) for layer, indices in smaller.items())

    every = [(layer, head) for layer in range(6) for head in range(8)]
    generator = torch.Generator().manual_seed(0)
    rankings = {task: [every[i] for i in torch.randperm(48, generator=generator)] for task in "abc"}
    before = set()
    for k in range(49):
        found = intersect(rankings, k)
        assert list(found) == sorted(found)
        assert before <= set(found)
        assert set(found) == {head for head in every if all(head in ranking[:k] for ranking in rankings.values())}
        before = set(found)
    assert intersect(rankings, 48) == tuple(every)


def test_17_task_metrics():
    assert json_valid('Sure: {"a":1} ok')
    assert not json_valid("{a:1}")
    assert not json_valid("{'a':'b'}")
    assert json_contains('{"x":{"occupation":"Doctor"}}', "doctor")
    assert pronouns_changed("They said her book") == (True, False)
