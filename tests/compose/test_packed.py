"""Weights that are packed in memory, under every other method, say what the simulated plan says."""

import pytest
import torch

from tenfold import fpx
from tenfold.attend import masformer
from tenfold.compress import losparse
from tenfold.compress.fpx.packed_layers import CodedLinear
from tenfold.errors import ModelError
from tenfold.kernels.local import AttentionWindow
from tenfold.kernels.packed_choice import STEPS
from tenfold.kernels.packed_product import kernels_for
from tenfold.models.gguf_write import gguf_sizes
from tenfold.models.tiny import tiny_model

from .test_pairs import WINDOW, session
from .test_planned import ON, adapted, asked, said, tiny

pytestmark = pytest.mark.slow  # together they take minutes

IDS = torch.randint(6, 262, (64,), generator=torch.Generator().manual_seed(0))
CLOSE = 1e-3
"""Log-probabilities of a continuation, in nats: kernels that expand the weights in float32."""
ROUNDED = 0.1
"""The same of kernels that round inputs to bfloat16: 8 bits of each number, in every layer."""


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    """Which kernel is the fastest for tiny matrices is chance; the one that rounds least is as good."""
    monkeypatch.setattr("tenfold.compress.fpx.packed_layers.fastest", lambda *args: ("float32",) * len(STEPS))


def plan_of(model):
    """Matrices in each of two formats that leave inputs alone."""
    found = fpx.plan(model, [IDS], gamma=0.5, palette=("bf16", "int4_g32"), codec="kernels")
    assert set(found.formats.values()) == {"bf16", "int4_g32"}
    return found


def stacked(kind, on, plan, put):
    """A model with a plan, simulated or packed, before or after an adapter, and what else is on it."""
    model = tiny(kind)
    if "lora" not in on:
        put(model, plan)
    if "masformer" in on:
        masformer.convert(model, full_layers=[1], span=AttentionWindow("sliding", WINDOW))
    model = adapted(model, on).eval()
    if "lora" in on:
        put(model, plan)
    return model


@pytest.mark.parametrize("on", ON, ids=lambda on: " x ".join(sorted(on)))
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_scores_and_texts_are_those_of_the_simulated_plan(kind, on):
    tokenizer, plan = tiny_model(kind).tokenizer, plan_of(tiny(kind))
    scores, texts = [], []
    for put in (fpx.apply, fpx.pack):
        engine = session(stacked(kind, on, plan, put), tokenizer, on)
        scores.append(torch.stack(said(engine, on)))
        texts.append([reply.token_ids[:8] for reply in engine.generate(asked(on))])
    torch.testing.assert_close(scores[0], scores[1], atol=2e-2 if "gear" in on else CLOSE, rtol=0)
    assert texts[0] == texts[1]
    exact = torch.stack(said(session(adapted(tiny(kind), on).eval(), tokenizer, on), on))
    assert float((exact - scores[0]).abs().max()) > 5 * CLOSE


@pytest.mark.parametrize(
    "on", [{"gear"}, {"lora", "pasta", "gear", "masformer"}], ids=lambda on: " x ".join(sorted(on))
)
def test_kernels_that_round_inputs_say_nearly_the_same(on):
    tokenizer, plan = tiny_model("llama").tokenizer, plan_of(tiny())
    right = torch.stack(said(session(stacked("llama", on, plan, fpx.apply), tokenizer, on), on))
    model = stacked("llama", on, plan, fpx.pack)
    for layer in (module for module in model.modules() if isinstance(module, CodedLinear)):
        there = kernels_for(layer.matrix)
        layer.kernels = (("packed" if "packed" in there else "bfloat16"),) * len(STEPS)
    found = torch.stack(said(session(model, tokenizer, on), on))
    assert 0 < float((found - right).abs().max()) < ROUNDED


def test_what_needs_whole_weights_is_refused():
    opened = tiny_model("llama")
    fpx.pack(opened.model, plan_of(opened.model))
    for refused in (
        lambda: losparse.attach(opened.model, {"model.layers.0.mlp.up_proj": 4}, rows=400),
        lambda: gguf_sizes(opened.model, "q8_0", opened.tokenizer),
    ):
        with pytest.raises(ModelError, match="quantised"):
            refused()
