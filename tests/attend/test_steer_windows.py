"""Steering of heads that do not see everything: who is steered, and what happens when a mark leaves the window."""

import contextlib
import itertools
import math

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from tenfold.attend import masformer
from tenfold.attend.attention import self_attentions
from tenfold.attend.pasta import lifts, steer
from tenfold.attend.pasta.profiles import Profile, describe_model
from tenfold.attend.text_marks import Marks
from tenfold.cache.spans import SpanCache
from tenfold.errors import ConfigError, TenfoldError
from tenfold.kernels.local import AttentionWindow
from tenfold.models.tiny import tiny_model

HEADS = {0: [1, 2], 1: [0, 3]}


def marks_of(length, *rows, pads=()):
    ids = torch.randint(6, 200, (len(rows), length), generator=torch.Generator().manual_seed(0))
    mask, marked = torch.ones_like(ids), torch.zeros(len(rows), length, dtype=torch.bool)
    for row, spans in enumerate(rows):
        for start, end in spans:
            marked[row, start:end] = True
    for row, pad in enumerate(pads):
        ids[row, :pad], mask[row, :pad] = 0, 0
    return Marks(ids, mask, marked, torch.ones(len(rows), length))


def logits(model, ids, mask, **arguments):
    with torch.no_grad():
        return model(ids, attention_mask=mask, **arguments).logits * mask[:, -ids.shape[1] :, None]


def grown(marks, count):
    """The prompts with so many tokens written behind them."""
    rows = len(marks.input_ids)
    new = torch.randint(6, 200, (rows, count), generator=torch.Generator().manual_seed(7))
    return torch.cat([marks.input_ids, new], 1), torch.cat([marks.attention_mask, torch.ones_like(new)], 1)


def by_definition(model, marks, ids, mask, window, generated):
    """Gemma 3 of one sliding and one full layer, with PASTA written into a mask of all rows, heads, queries, keys."""
    batch, length = ids.shape
    index = torch.arange(length)
    causal = (index[:, None] >= index) & mask.bool()[:, None, None]
    sees = {"sliding_attention": causal & (index[:, None] - index < window), "full_attention": causal}
    marked = torch.nn.functional.pad(marks.marked, (0, length - marks.marked.shape[1]))
    weak = torch.full((length,), generated == "scale")
    weak[: marks.marked.shape[1]] = True
    bias = torch.where(weak & ~marked, math.log(0.01), 0.0)[:, None, None]
    given = {}
    for layer, (name, seen) in enumerate(sees.items()):
        aware = (seen & marked[:, None, None]).any(-1, keepdim=True)  # queries that see a mark
        # A head is steered for a row if the end of its prompt sees the mark.
        aware = aware & aware[:, :, marks.marked.shape[1] - 1, None]
        chosen = torch.zeros(4, dtype=torch.bool)
        chosen[HEADS[layer]] = True
        biased = torch.where(aware & chosen[None, :, None, None], bias, 0.0)
        given[name] = torch.where(seen, biased, torch.finfo(torch.float32).min).expand(batch, 4, -1, -1)
    with torch.no_grad():
        return model(ids, attention_mask=given).logits * mask[..., None]


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "made_up_flash"])
@pytest.mark.parametrize("generated", ["keep", "scale"])
def test_a_mark_that_leaves_the_window_is_the_definition_with_every_cache(implementation, generated):
    """Row 0 loses its mark within the text that is written, row 1 at once, row 2 never had one."""
    marks = marks_of(40, [(20, 23)], [(7, 11)], [], pads=(0, 2, 0))
    ids, mask = grown(marks, 24)
    reference, model = tiny_model("gemma3").model, tiny_model("gemma3").model
    reference.config._attn_implementation, model.config._attn_implementation = "eager", implementation
    window = self_attentions(model)[0].config.sliding_window
    expected = by_definition(reference, marks, ids, mask, window, generated)
    assert (expected - logits(reference, ids, mask)).abs().max() > 0.01
    with steer(model, marks, heads=HEADS, generated=generated):
        assert (logits(model, ids, mask) - expected).abs().max() < 2e-5
        for cuts in ([40, *range(41, 64)], [40, 45, 60], [17, 40, 52]):
            for cache in (DynamicCache(config=model.config), DynamicCache()):
                found, edges = [], [0, *cuts, 64]
                for start, end in itertools.pairwise(edges):
                    found.append(logits(model, ids[:, start:end], mask[:, :end], past_key_values=cache))
                assert (torch.cat(found, 1) - expected).abs().max() < 2e-5, cuts


def test_generation_with_and_without_cache_where_all_layers_slide():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=200, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=12, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model, marks = MistralForCausalLM(config).eval(), marks_of(20, [(10, 13)], [(16, 18)])
    options = {"max_new_tokens": 20, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with steer(model, marks, heads=HEADS):
        cached = model.generate(**marks.inputs, **options)
        alone = model.generate(**marks.inputs, **options, use_cache=False)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(alone.logits), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "span",
    [
        AttentionWindow("sliding", 12),
        AttentionWindow("block", 8),
        AttentionWindow("block", 8, previous=0),
        AttentionWindow("sliding", 8, sinks=2),
    ],
)
def test_converted_models_generate_the_same_with_and_without_cache(span):
    model = tiny_model("llama").model
    masformer.convert(model, full_layers=[1], span=span)
    start = 1 if span.sinks else 18
    marks = marks_of(22, [(start, start + 2)], [(18, 20)], pads=(0, 0))
    options = {"max_new_tokens": 20, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options["eos_token_id"] = None
    with steer(model, marks, heads=HEADS):
        alone = model.generate(**marks.inputs, **options, use_cache=False)
        for cache in (SpanCache(model.config), DynamicCache(config=model.config)):
            found = model.generate(**marks.inputs, **options, past_key_values=cache)
            torch.testing.assert_close(torch.stack(found.logits), torch.stack(alone.logits), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["gemma3", "converted"])
def test_the_heads_that_see_the_mark_are_steered_and_the_others_are_named(kind):
    model = tiny_model("llama" if kind == "converted" else "gemma3").model
    if kind == "converted":
        masformer.convert(model, full_layers=[1], span=AttentionWindow("sliding", 32))
    marks = marks_of(60, [(5, 8)])
    profile = Profile({0: (1, 2), 1: (0, 3)}, describe_model(model))
    notes = []
    with steer(model, marks, profile=profile, tell=notes.append) as found:
        steered = logits(model, marks.input_ids, marks.attention_mask)
    assert (found.heads, found.blind) == ({1: (0, 3)}, {0: (1, 2)})
    assert notes == [
        "2 heads are steered; 2 see no mark from the end of the prompt and are left alone: layer 0 heads 1, 2"
    ]
    with steer(model, marks, heads={1: [0, 3]}):
        expected = logits(model, marks.input_ids, marks.attention_mask)
    assert torch.equal(steered, expected)
    assert (expected - logits(model, marks.input_ids, marks.attention_mask)).abs().max() > 0.01
    with pytest.warns(UserWarning, match="layer 0 heads 1, 2"), steer(model, marks, profile=profile):
        pass


def test_rows_of_a_batch_are_steered_as_each_alone():
    """A head may see the mark of one row and not that of another."""
    model = tiny_model("gemma3").model
    marks = marks_of(60, [(5, 8)], [(50, 55)], [(40, 41), (3, 4)], pads=(0, 4, 0))
    with steer(model, marks, heads=HEADS) as found:
        together = logits(model, marks.input_ids, marks.attention_mask)
    assert not found.blind
    for row in range(3):
        one = Marks(
            *(part[row : row + 1] for part in (marks.input_ids, marks.attention_mask, marks.marked, marks.strength))
        )
        with steer(model, one, heads=HEADS, tell=lambda note: None):
            alone = logits(model, one.input_ids, one.attention_mask)
        assert (together[row] - alone[0]).abs().max() < 1e-5
    with pytest.raises(ConfigError, match="prompt 1: head 1 of layer 0 does not reach"):
        steer(model, marks, heads={0: [1]}).__enter__()


def test_which_models_can_be_lifted_to_a_target_mass():
    """Where it says no, `steer` refuses; where it says yes, the marks get their share."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"vocab_size": 263, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    capped = Gemma2ForCausalLM(Gemma2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    converted = tiny_model("llama").model
    masformer.convert(converted, full_layers=[1], span=AttentionWindow("sliding", 8))
    plain = tiny_model("llama").model
    marks = marks_of(12, [(4, 6)])
    for model, expected in ((capped, False), (converted, False), (plain, True)):
        assert lifts(model) is expected
        with pytest.raises(TenfoldError) if not expected else contextlib.nullcontext():  # noqa: SIM117
            with steer(model, marks, heads={0: [0, 1]}, target_mass=0.15), torch.no_grad():
                model(**marks.inputs)
