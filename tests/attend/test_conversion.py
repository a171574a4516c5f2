"""A conversion that something else undoes: said at the next call, never full attention in silence."""

import copy

import pytest
import torch

from tenfold import pasta
from tenfold.attend import masformer, spans
from tenfold.attend.attention import self_attentions
from tenfold.attend.masformer import native
from tenfold.cache.gear.cache import attach
from tenfold.cache.spans import own_cache
from tenfold.errors import ModelError
from tenfold.kernels.local import AttentionWindow
from tenfold.models.tiny import tiny_model

SPAN = AttentionWindow("sliding", 5, sinks=2)
IDS = torch.randint(10, 200, (2, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def hooks(model):
    return [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]


@pytest.mark.parametrize("way", ["method", "configuration"])
@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_another_implementation_is_an_error_until_it_is_settled(name, way):
    model = tiny_model("llama").model
    plain = logits(model)
    handle = masformer.convert(model, full_layers=[1], span=SPAN)
    local = logits(model)
    for settle in ("restore", "convert", "revert"):
        if way == "method":
            model.set_attn_implementation(name)
        else:
            model.config._attn_implementation = name
        assert own_cache(model) is None
        with pytest.raises(ModelError, match=f"attention was set to '{name}', which knows no spans") as error:
            logits(model)
        assert "restore" in error.value.remedy
        with pytest.raises(ModelError, match="knows no spans"):
            model.generate(input_ids=IDS, max_new_tokens=2)
        if settle == "restore":
            handle = native.restore(model)
            assert torch.equal(logits(model), local)
        elif settle == "convert":
            handle = masformer.convert(model, full_layers=[0], span=SPAN)
            assert model.config.tenfold_span["full_layers"] == [0]
            assert not torch.allclose(logits(model), local, atol=1e-4)
        else:
            handle.revert()
            torch.testing.assert_close(logits(model), plain, atol=1e-5, rtol=0)
    assert not hooks(model)


def test_twice_is_refused_while_it_is_converted():
    model = tiny_model("llama").model
    handle = masformer.convert(model, full_layers=[1], span=SPAN)
    local = logits(model)
    with pytest.raises(ModelError, match="converted already"):
        masformer.convert(model, full_layers=[0], span=SPAN)
    assert torch.equal(logits(model), local)
    native.restore(model)
    assert len(hooks(model)) == 2
    handle.revert()
    assert not hooks(model)
    masformer.convert(model, full_layers=[0], span=SPAN).revert()


def test_copies_are_converted_and_guarded_alike():
    model = tiny_model("llama").model
    handle = masformer.convert(model, full_layers=[1], span=SPAN)
    local, other = logits(model), copy.deepcopy(model)
    handle.revert()
    assert torch.equal(logits(other), local)
    other.set_attn_implementation("eager")
    with pytest.raises(ModelError, match="knows no spans"):
        logits(other)


def test_what_stands_in_front_of_it_is_no_other_implementation():
    opened = tiny_model("llama")
    masformer.convert(opened.model, full_layers=[1], span=SPAN)
    local = logits(opened.model)
    marks = pasta.encode(opened.tokenizer, [pasta.from_tags("It was <mark>red</mark>")])
    with pasta.steer(opened.model, marks, heads={1: [0]}):
        assert opened.model.config._attn_implementation == spans.NAME
    with (
        pytest.raises(ModelError, match="SpanCache"),
        attach(opened.model, bits=4),
    ):  # that one packs the full layers alone
        pass
    assert torch.equal(logits(opened.model), local)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_full_attention_for_a_while(kind):
    model = tiny_model(kind).model
    plain = logits(model)
    masformer.convert(model, full_layers=[1], span=SPAN)
    local = logits(model)
    with masformer.full_attention(model):
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), local)
    assert len(hooks(model)) == len(self_attentions(model))
