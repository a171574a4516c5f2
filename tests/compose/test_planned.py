"""A planned model under every other method says what the plain model with the same numbers says."""

import importlib.util
import json

import pytest
import torch

from tenfold import fpx
from tenfold.align.margins import score_pairs, score_policy_pairs
from tenfold.arena.agents import Turn
from tenfold.arena.latency import Measured, Tokens
from tenfold.arena.players import EnginePlayer, Timed
from tenfold.attend import masformer
from tenfold.compress import losparse
from tenfold.compress.losparse.layer import compressed_layers, install
from tenfold.core.weight_formats import weight_format
from tenfold.data.rows import Preference
from tenfold.engines.requests import Request
from tenfold.engines.session import Session
from tenfold.errors import ConfigError, ModelError
from tenfold.kernels.local import AttentionWindow
from tenfold.models import tiny as tiny_models
from tenfold.models.export import merge, save_model
from tenfold.models.gguf_write import write_gguf
from tenfold.models.layer_map import plain_modules
from tenfold.models.open import open_model
from tenfold.models.simulated import simulated
from tenfold.models.tiny import tiny_model

from ..preferences import table_of
from ..runs import execute
from .test_compressed import adapted, factors_of
from .test_pairs import KINDS, PARTS, PROMPTS, TAILS, WINDOW, expected, places, session

pytestmark = pytest.mark.slow  # together they take minutes

IDS = torch.randint(6, 262, (64,), generator=torch.Generator().manual_seed(0))
WEIGHTS_ALONE, INPUTS_TOO = ("int8_row_a16", "nvfp4_a16"), ("int8_row", "fp4_row")
ON = [
    {"pasta"},
    {"gear"},
    {"masformer"},
    {"lora"},
    {"adalora"},
    {"pasta", "gear", "masformer"},
    {"lora", "pasta", "gear", "masformer"},
]


def tiny(kind="llama"):
    return tiny_model(kind, num_hidden_layers=3, **KINDS[kind]).model


def planned(model, palette):
    """Some layers of the model in each of two formats."""
    found = fpx.plan(model, [IDS], gamma=0.5, palette=palette)
    assert set(found.formats.values()) == set(palette)
    return found


def by_hand(model, plan):
    """The same numbers by code that knows formats alone; adapters read what they always did."""
    modules = dict(plain_modules(model))
    done = set()
    for name, form in ((name, weight_format(form)) for name, form in plan.by_module.items()):
        weight = modules[name].weight
        if id(weight) not in done:
            done.add(id(weight))
            weight.data = form.weight(weight.data)
        if not isinstance(modules[name], torch.nn.Embedding):
            modules[name].register_forward_pre_hook(lambda _, args, form=form: (form.inputs(args[0]), *args[1:]))
    return model


def stacked(kind, on, plan):
    """A planned model with what is on it: the plan before or after the rest, which must not matter."""
    model, late = tiny(kind), "lora" in on
    if not late:
        fpx.apply(model, plan)
    if "masformer" in on:
        masformer.convert(model, full_layers=[1], span=AttentionWindow("sliding", WINDOW))
    model = adapted(model, on).eval()
    if late:
        fpx.apply(model, plan)
    return model


def asked(on):
    parts = [(part,) if "pasta" in on else () for part in PARTS]
    return [Request(prompt, emphasis=part) for prompt, part in zip(PROMPTS, parts, strict=True)]


def said(engine, on):
    return [torch.tensor([one.log_probabilities[tail] for tail in TAILS]) for one in engine.score(asked(on), TAILS)]


@pytest.mark.parametrize("on", ON, ids=lambda on: " x ".join(sorted(on)))
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_scores_are_those_of_the_definition_on_rounded_weights(kind, on):
    tokenizer, plan = tiny_model(kind).tokenizer, planned(tiny(kind), WEIGHTS_ALONE)
    rounded, exact = adapted(by_hand(tiny(kind), plan), on).eval(), adapted(tiny(kind), on).eval()
    model = stacked(kind, on, plan)
    engine, close = session(model, tokenizer, on), 2e-2 if "gear" in on else 1e-3
    found = said(engine, on)
    fpx.remove(model)
    for prompt, part, one, back in zip(PROMPTS, PARTS, found, said(engine, on), strict=True):
        right, without = (
            expected(tokenizer, plain, on, prompt, places(prompt, part), TAILS) for plain in (rounded, exact)
        )
        torch.testing.assert_close(one, right, atol=close, rtol=0)
        torch.testing.assert_close(back, without, atol=close, rtol=0)
        assert float((right - without).abs().max()) > 5 * close


@pytest.mark.parametrize(
    "on", [{"adalora"}, {"lora", "pasta", "gear", "masformer"}], ids=lambda on: " x ".join(sorted(on))
)
def test_rounded_inputs_are_those_of_base_layers_alone(on):
    """The same arithmetic by hooks written here, bit for bit: rounding tells apart what differs in a last bit."""
    tokenizer, plan = tiny_model("llama").tokenizer, planned(tiny(), INPUTS_TOO)
    right = adapted(tiny(), on).eval()
    if "masformer" in on:
        masformer.convert(right, full_layers=[1], span=AttentionWindow("sliding", WINDOW))
    right = by_hand(right, plan)
    model = stacked("llama", on, plan)
    for one, other in zip(
        said(session(model, tokenizer, on), on), said(session(right, tokenizer, on), on), strict=True
    ):
        assert torch.equal(one, other)


def compressed(form="stored"):
    model = install(tiny(), factors_of(tiny()))
    for layer in compressed_layers(model).values():
        layer.take(form, form)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS[None]).logits


@pytest.mark.parametrize("palette", [WEIGHTS_ALONE, INPUTS_TOO], ids=" ".join)
@pytest.mark.parametrize("form", ["stored", "joined", "whole"])
def test_rows_and_combinations_of_a_compressed_layer_are_one_unit(form, palette):
    """Whatever it multiplies with: what is made of its numbers must not outlive them."""
    model, right = compressed(form), compressed()
    before = logits(model)
    plan = planned(model, palette)
    name = "model.layers.1.mlp.up_proj"
    unit, layer = next(unit for unit in plan.units if unit.name == name), model.get_submodule(name)
    shapes = [tuple(layer.rows.shape), tuple(layer.mix.shape)]
    assert [(weight.out, weight.inner) for weight in unit.weights] == shapes
    for each in unit.candidates:
        assert each.bytes == sum(weight_format(each.format).bytes(*shape) for shape in shapes)
    assert sum(unit.unit.numbers for unit in plan.units) == sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert {each.name for each in plan.kept} >= {f"{name}.place"}
    for where, form_name in plan.by_module.items():
        module, rounding = right.get_submodule(where), weight_format(form_name)
        for parameter in (module.rows, module.mix) if hasattr(module, "mix") else (module.weight,):
            parameter.data = rounding.weight(parameter.data)
        if not isinstance(module, torch.nn.Embedding):
            module.register_forward_pre_hook(lambda _, args, rounding=rounding: (rounding.inputs(args[0]),))
    fpx.apply(model, plan)
    assert torch.equal(logits(model), logits(right))
    fpx.remove(model)
    assert torch.equal(logits(model), before)
    if form != "stored":
        assert layer.few == form
        assert model.get_submodule(name)._made(form) is not None


def test_what_a_compressed_layer_loses_is_what_changes_of_its_outputs():
    model, losses = compressed("whole"), {}
    for metric in ("relative_l2", "kl"):
        found = fpx.plan(model, [IDS], gamma=0, palette=["bf16", "nvfp4_a16"], metric=metric)
        losses[metric] = {unit.name: unit.candidates[1].loss for unit in found.units}
    name, seen = "model.layers.0.mlp.down_proj", []
    layer = model.get_submodule(name)
    hook = layer.register_forward_hook(lambda module, args, output: seen.append((args[0].detach(), output.detach())))
    exact = logits(model)
    hook.remove()
    x, own = seen[0]
    for parameter in (layer.rows, layer.mix):
        with torch.no_grad():
            parameter.copy_(weight_format("nvfp4_a16").weight(parameter))
    with torch.no_grad():
        wanted = float((layer(x) - own).norm() / own.norm())
    assert losses["relative_l2"][name] == pytest.approx(wanted, rel=1e-4)
    p, q = (one.double().log_softmax(-1)[0] for one in (exact, logits(model)))
    assert losses["kl"][name] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


def test_a_compressed_model_is_not_planned_for_files_nor_a_planned_one_compressed(tmp_path):
    model, heard = compressed(), []
    with pytest.raises(ModelError, match="GGUF has no form for layers compressed by losparse"):
        fpx.plan(model, [IDS], budget="6bits", palette=["q8_0"], codec="gguf", tell=lambda *one: heard.append(one))
    assert heard == []
    with pytest.raises(ModelError, match="LoSparseLinear does not store its matrix"):
        fpx.plan(losparse.attach(tiny(), {"model.layers.0.mlp.up_proj": 4}, rows=400).model, [IDS], gamma=0)
    opened = tiny_model("llama")
    fpx.apply(opened.model, planned(opened.model, WEIGHTS_ALONE))
    said = "the model simulates int8_row_a16 and nvfp4_a16"
    with pytest.raises(ConfigError, match=said):
        losparse.attach(opened.model, {"model.layers.0.mlp.up_proj": 4}, rows=400)
    with pytest.raises(ConfigError, match=said):
        save_model(opened.model, opened.tokenizer, tmp_path / "model")
    with pytest.raises(ConfigError, match=said):
        write_gguf(opened.model, opened.tokenizer, tmp_path / "model.gguf", "q8_0")
    with pytest.raises(ConfigError, match=said):
        merge(adapted(opened.model, {"lora"}))
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_is_merged_into_rounded_weights_is_not_lost():
    model = adapted(tiny(), {"lora"}).eval()
    before = logits(model)
    fpx.apply(model, planned(tiny(), WEIGHTS_ALONE))
    model.merge_adapter()
    with pytest.raises(ModelError, match=r"q_proj: its adapter is merged"):
        fpx.remove(model)
    assert simulated(model)
    model.unmerge_adapter()
    fpx.remove(model)
    assert torch.equal(logits(model), before)


def pairs():
    return [Preference(str(n), f"{n} and {n}?", f"{2 * n}", f"{n}{n}") for n in range(4)]


def test_as_a_judge_it_scores_by_rounded_numbers_and_remembers_by_what_it_rounds(tmp_path):
    opened = tiny_model("llama", task="reward")
    weights_alone = fpx.plan(opened.model, [IDS], gamma=1, palette=["int8_row_a16", "fp4_row_a16"])
    inputs_too = fpx.plan(opened.model, [IDS], gamma=1, palette=["int8_row", "fp4_row"])
    found = []
    for plan in (weights_alone, inputs_too):  # of the same weights
        right = by_hand(tiny_model("llama", task="reward").model, plan)
        fpx.apply(opened.model, plan)
        scored = score_pairs(opened.model, opened.tokenizer, pairs(), cache=tmp_path / "margins.jsonl").margins
        assert torch.equal(scored, score_pairs(right, opened.tokenizer, pairs()).margins)
        found.append(scored)
    assert not torch.equal(*found)


def question(number):
    moves = ("jab", "low guard", "wait")
    return Turn("You fight.", f"They are {number} px away.\nYour move:", moves, seed=number)


def test_nobody_measures_the_time_of_a_simulated_agent():
    opened = tiny_model("llama")
    fpx.apply(opened.model, planned(opened.model, WEIGHTS_ALONE))
    player = EnginePlayer(Session(opened), "planned")
    assert Timed(player, Tokens()).answer([question(1)])[0].seconds > 0
    with pytest.raises(ConfigError, match=r"latency: measured: planned: the model simulates int8_row_a16"):
        Timed(player, Measured()).answer([question(2)])
    fpx.remove(opened.model)
    assert Timed(player, Measured()).answer([question(2)])[0].seconds > 0


def test_a_planned_file_plays_and_judges_in_a_recipe(number_rows, tmp_path, monkeypatch):
    """In llama.cpp, and through transformers from the folder: as agents, and as a policy that labels are judged by."""
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(tiny_models._DECODER, "max_position_embeddings", 2048)  # a token is a byte of the rules
    stage = {"use": "fpx", "data": str(number_rows), "holdout": 0.3, "max_length": 48, "calibration": 256}
    data = tmp_path / "pairs.jsonl"
    lines = [{"id": one.id, "prompt": one.prompt, "chosen": one.chosen, "rejected": one.rejected} for one in pairs()]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    audit = {"use": "audit", "data": str(data), "reference": "tiny:llama", "max_length": 64}
    execute({"model": "tiny:llama", "stages": [{**stage, "budget": "6bits"}, audit]}, tmp_path / "run")
    folder = tmp_path / "run/01-fpx/model"
    margins = [float(row["margin"]) for row in table_of(tmp_path / "run/02-audit/audit.csv").values()]
    opened, reference = open_model(str(folder)), tiny_model("llama").model
    scored = score_policy_pairs(opened.model, opened.tokenizer, pairs(), beta=0.1, reference=reference, max_length=64)
    assert sorted(margins) == pytest.approx(sorted(scored.margins.tolist()), abs=1e-4)
    assert max(map(abs, margins)) > 0
    agents = [f"{folder}@measured"]
    if importlib.util.find_spec("xllamacpp") is not None:
        agents.append(f"llama.cpp:{folder / 'model.gguf'}@measured")
    stage = {"use": "trading", "agents": agents, "days": 1, "synthetic": {"events": 3}}
    (summary,) = execute({"stages": [stage]}, tmp_path / "arena")
    assert {result.subject for result in summary.results} >= set(agents)
