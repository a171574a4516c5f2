"""Finding heads: shortcuts against the long way."""

from itertools import pairwise

import pytest
import torch

from tenfold.attend.pasta import heads as module
from tenfold.attend.pasta.heads import batches_of, candidates, effects, gradients, intersect, margins, rank, steerable
from tenfold.attend.pasta.profiles import by_layer
from tenfold.attend.pasta.tasks import Item, conflict_items, evidence_items, instruction_items
from tenfold.attend.text_marks import from_spans
from tenfold.errors import ConfigError, DataError
from tenfold.models.tiny import tiny_model

KINDS = ("llama", "qwen3", "gemma3", "gpt2")


def prepared(kind="llama", items=None, batch_size=3, **fields):
    opened = tiny_model(kind, **fields)
    return opened.model, batches_of(opened.model, opened.tokenizer, items or conflict_items(5), batch_size)


def hooks(model):
    return [hook for part in model.modules() for hook in (*part._forward_hooks, *part._forward_pre_hooks)]


@pytest.mark.parametrize("kind", KINDS)
def test_effects_are_those_of_whole_passes_with_one_head(kind):
    fields = {"sliding_window": 512} if kind == "gemma3" else {}
    model, batches = (
        prepared(kind, num_hidden_layers=4, **fields) if kind not in ("gpt2", "gemma3") else prepared(kind, **fields)
    )
    wanted = [(0, 1), (1, 0), (1, 3)]
    found = effects(model, batches, wanted, rows=4)
    plain = margins(model, batches)
    for layer, head in wanted:
        alone = margins(model, batches, {layer: [head]})
        assert found[layer, head] == pytest.approx(float((alone - plain).mean()), abs=2e-5)
        assert abs(found[layer, head]) > 1e-5
    assert not hooks(model)
    assert "forward" not in vars(module._layers(model)[0])


def test_effects_without_the_short_cut_are_the_same(monkeypatch):
    model, batches = prepared(num_hidden_layers=3)
    short = effects(model, batches, [(2, 0), (1, 2)])
    monkeypatch.setattr(module, "_layers", lambda model: [])
    assert effects(model, batches, [(2, 0), (1, 2)]) == pytest.approx(short, abs=2e-5)


def test_a_model_that_hands_more_than_hidden_states_is_run_as_a_whole(monkeypatch):
    """A layer that remembers: replaying it alone gives other logits, which must be noticed."""
    model, batches = prepared(num_hidden_layers=3)
    inner, seen = model.model.layers[0], []
    inner.register_forward_hook(lambda *_: seen.append(1))
    last = model.model.layers[2]
    last.register_forward_pre_hook(lambda part, args: ((args[0] + len(seen) % 2, *args[1:])) if args else None)
    layers = module._layers(model)
    assert module._remembered(model, layers, batches[0], 0.01)[2] == []


def test_gradients_are_the_slope_of_the_strength():
    """The derivative at weight 0 against a finite difference, in float64."""
    model, batches = prepared()
    model.double()
    slopes = gradients(model, batches, alpha=0.01)
    step = 1e-5
    for head in ((0, 0), (1, 2)):
        # alpha ** step is the strength at weight `step`
        change = margins(model, batches, by_layer([head]), alpha=0.01**step).double() - margins(model, batches).double()
        assert slopes[head] == pytest.approx(float(change.mean()) / step, rel=0.05, abs=2e-3)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_margin_is_the_log_odds_against_the_strongest_foil():
    _, batches = prepared(items=evidence_items(3))
    batch = batches[0]
    logits = torch.randn(3, 262)
    logits[0, 0] = 9.0  # a token that is no continuation of any item
    for row, margin in enumerate(batch.margin(logits)):
        foils = [float(logits[row, foil]) for foil in batch.foils[row] if foil >= 0]
        pair = torch.tensor([float(logits[row, batch.target[row]]), max(foils)]).softmax(0)
        assert float(margin.sigmoid()) == pytest.approx(float(pair[0]), rel=1e-5)


def test_sliding_layers_that_cannot_see_the_prompt_are_left_out():
    model, batches = prepared("gemma3")  # window 32, prompts are longer
    assert list(steerable(model, batches)) == [1]
    assert {layer for layer, _ in gradients(model, batches)} == {1}
    with pytest.raises(ConfigError, match="looks back"):
        steerable(*prepared("gemma3", layer_types=["sliding_attention"] * 2))


def test_continuations_part_where_they_differ():
    """Byte-level tokens: " red" and " rose" share " r", which is read as part of the prompt."""
    opened = tiny_model("llama")
    item = Item(from_spans("It is", [(0, 2)]), " red", (" rose", " row"))
    (batch,) = batches_of(opened.model, opened.tokenizer, [item])
    assert opened.tokenizer.decode(batch.marks.input_ids[0]) == "It is r"
    assert opened.tokenizer.decode([batch.target[0], batch.foils[0, 0]]) == "eo"
    assert batch.marks.tokens(0) == [(0, 2)]


def test_continuations_that_cannot_be_told_apart_are_refused():
    opened = tiny_model("llama")
    prompt = from_spans("It is so.", [(0, 2)])
    for target, foil in (("same", "same"), ("", "x"), ("re", "red")):
        with pytest.raises((ConfigError, DataError), match=r"same token|no token"):
            batches_of(opened.model, opened.tokenizer, [Item(prompt, target, (foil,))])
    with pytest.raises(DataError, match="no items"):
        batches_of(opened.model, opened.tokenizer, [])


def test_heads_need_an_implementation_with_masks():
    model, batches = prepared()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="sdpa"):
        effects(model, batches, [(0, 0)])


def test_intersections_grow_with_k_and_end_with_all():
    generator = torch.Generator().manual_seed(0)
    everything = [(layer, head) for layer in range(4) for head in range(3)]
    rankings = {
        name: [everything[index] for index in torch.randperm(12, generator=generator)] for name in ("a", "b", "c")
    }
    sets = [set(intersect(rankings, k)) for k in range(13)]
    assert all(small <= large for small, large in pairwise(sets))
    assert sets[0] == set()
    assert sets[12] == set(everything)
    found = candidates(rankings, [2, 5, 12, 40])
    assert [len(heads) >= size for heads, size in zip(found.values(), (2, 5, 12), strict=True)] == [True] * 3
    for k, heads in found.items():
        assert len(intersect(rankings, k - 1)) < len(heads)


def test_rank_breaks_ties_by_layer_and_head():
    assert rank({(1, 1): 0.0, (0, 2): 0.0, (1, 0): 0.0, (3, 0): 1.0}) == [(3, 0), (0, 2), (1, 0), (1, 1)]


@pytest.mark.parametrize("make", [conflict_items, evidence_items, instruction_items])
def test_generated_items_mark_what_holds_the_answer(make):
    for item in make(24, seed=3):
        ((start, end),) = [(span.start, span.end) for span in item.prompt.spans]
        marked = item.prompt.text[start:end]
        if make is instruction_items:
            assert marked.startswith("Give the")
            assert item.target in item.prompt.text
        else:
            assert item.target.strip() in marked
            assert not any(foil.strip() in marked for foil in item.foils)
        assert all(foil in item.prompt.text for foil in item.foils)
    assert make(24, seed=3) != make(24, seed=4)
