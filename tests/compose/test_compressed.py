"""A compressed model under every other method says what the plain model with the same matrices says."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tenfold.adapt import adalora
from tenfold.attend import masformer
from tenfold.compress.losparse.dense import to_dense
from tenfold.compress.losparse.factors import Factors
from tenfold.compress.losparse.layer import compressed_layers, install, replace_module
from tenfold.compress.losparse.masked import LoSparseLinear
from tenfold.engines.requests import Request
from tenfold.engines.session import Session
from tenfold.kernels.local import AttentionWindow
from tenfold.kernels.low_rank_rows import FORMS
from tenfold.models.layer_map import layer_map
from tenfold.models.tiny import tiny_model

from .test_pairs import KINDS, PARTS, PROMPTS, TAILS, WINDOW, expected, places, session

RANK, KEPT = 20, 6
ON = [
    set(),
    {"pasta"},
    {"gear"},
    {"masformer"},
    {"lora"},
    {"adalora"},
    {"pasta", "gear", "masformer"},
    {"lora", "pasta", "gear", "masformer"},
]


def factors_of(model):
    """All matrices, by their best approximation; each row that is kept is turned, so that it cannot be lost unseen."""
    factors = {}
    for slot in [slot for slot in layer_map(model).slots if slot.part in ("attention", "mlp")]:
        weight = model.get_submodule(slot.name).weight.detach()
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        kept = torch.arange(slot.out_features)[:: slot.out_features // KEPT][:KEPT].flip(0)
        factors[slot.name] = Factors(u[:, :RANK] * s[:RANK], v[:RANK], kept, weight[kept].flip(1))
    return factors


def masked(model, factors):
    for name, one in factors.items():
        layer, low = model.get_submodule(name), one.left @ one.right
        rest = torch.zeros_like(low).index_copy(0, one.kept, one.rows - low[one.kept])
        replace_module(model, name, LoSparseLinear(one.left.clone(), one.right.clone(), rest, layer.bias))
    return model


def adapted(model, on):
    torch.manual_seed(1)
    if "lora" in on:
        config = LoraConfig(target_modules="all-linear", r=4, lora_alpha=16, init_lora_weights=False)
        return get_peft_model(model, config)
    if "adalora" in on:
        handle = adalora.attach(model, adalora.AdaLoraConfig(rank=2, steps=20))
        for matrix in handle.matrices.values():
            torch.nn.init.normal_(matrix.singular, std=2.0)
        return handle.model
    return model


def build(kind, form, on):
    model = tiny_model(kind, num_hidden_layers=3, **KINDS[kind]).model
    factors = factors_of(model)
    model = masked(model, factors) if form == "masked" else install(model, factors)
    if form == "dense":
        to_dense(model)
    if "masformer" in on:
        masformer.convert(model, full_layers=[1], span=AttentionWindow("sliding", WINDOW))
    return adapted(model, on).eval()


@pytest.mark.parametrize("on", ON, ids=lambda on: " x ".join(sorted(on)) or "nothing")
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_forms_of_the_same_weights_say_the_same(kind, on):
    tokenizer = tiny_model(kind).tokenizer
    plain = build(kind, "dense", on - {"masformer", "pasta", "gear"})
    plain = plain.merge_and_unload() if hasattr(plain, "peft_config") else plain
    parts = [(part,) if "pasta" in on else () for part in PARTS]
    pairs = zip(PROMPTS, parts, strict=True)
    requests = [Request(prompt, emphasis=emphasis, max_new_tokens=8) for prompt, emphasis in pairs]
    said, close = {}, 2e-2 if "gear" in on else 1e-3
    for form in ("dense", "compact", *(() if on & {"lora", "adalora"} else ("masked",))):
        engine = session(build(kind, form, on), tokenizer, on)
        for prompt, part, score in zip(PROMPTS, PARTS, engine.score(requests, TAILS), strict=True):
            found = torch.tensor([score.log_probabilities[tail] for tail in TAILS])
            right = expected(tokenizer, plain, on, prompt, places(prompt, part), TAILS)
            torch.testing.assert_close(found, right, atol=close, rtol=0)
        said[form] = [text.token_ids for text in engine.generate(requests)]
    assert all(texts == said["dense"] for texts in said.values()), said
    assert len({tuple(ids) for ids in said["dense"]}) == len(PROMPTS), "each prompt has a text of its own"


@pytest.mark.parametrize("form", FORMS)
def test_in_any_form_of_its_products(form):
    tokenizer, said = tiny_model("llama").tokenizer, []
    requests = [Request(prompt, max_new_tokens=8) for prompt in PROMPTS]
    for few in ("stored", form):
        model = build("llama", "compact", set())
        for layer in compressed_layers(model).values():
            layer.take(few, form)
        said.append([text.token_ids for text in Session(model, tokenizer).generate(requests)])
    assert said[0] == said[1]
