"""Budgets in milliseconds: chosen by measured times, never above them, from a plan's file as from a model."""

import itertools
import math
import sys
import time

import pytest
import torch

from tenfold.compress.fpx import decode_time
from tenfold.compress.fpx.decode_time import rest_seconds, unit_seconds
from tenfold.compress.fpx.plan import Plan, plan
from tenfold.compress.fpx.units import units_of
from tenfold.errors import ConfigError
from tenfold.models.tiny import tiny_model

IDS = torch.randint(6, 262, (2, 24), generator=torch.Generator().manual_seed(0))
NANO = {"bf16": 16.0, "int8_row": 8.5, "int4_g32": 5.3}
"""Nanoseconds for each of the numbers of a matrix; and a microsecond for each call."""


@pytest.fixture
def times(monkeypatch):
    asked = []

    def decode_seconds(form, shape, dtype, device):
        asked.append((form, shape))
        return 1e-6 + math.prod(shape) * NANO[form] * 1e-9

    monkeypatch.setattr(decode_time, "decode_seconds", decode_seconds)
    monkeypatch.setattr(sys.modules["tenfold.compress.fpx.plan"], "rest_seconds", lambda model, units: 0.5e-3)
    return asked


def made(budget, model=None, **settings):
    model = model or tiny_model("llama", num_hidden_layers=1, tie_word_embeddings=True).model
    return plan(model, list(IDS), budget=budget, codec="kernels", metric="token_mean", **settings)


def test_it_is_the_best_of_all_plans_within_the_time(times):
    found = made("999ms")
    assert set(found.formats.values()) == {"bf16"}
    assert found.seconds == pytest.approx(0.5e-3 + 1e-6 * 8 + 16e-9 * sum(unit.unit.numbers for unit in found.units))
    # A tied table is multiplied with once a token, however many modules read it.
    assert len(found.units) == 8
    every = [
        (sum(one.loss for one in chosen), 0.5e-3 + sum(one.seconds for one in chosen))
        for chosen in itertools.product(*(unit.candidates for unit in found.units))
    ]
    fastest, slowest = min(every, key=lambda one: one[1])[1], found.seconds
    for share in (0.0, 0.1, 0.3, 0.5, 0.8, 1.0):
        budget = 1e3 * (fastest + share * (slowest - fastest)) + 1e-5
        chosen = found.replan(f"{budget}ms")
        assert chosen.seconds <= budget / 1e3
        best = min(loss for loss, seconds in every if seconds <= budget / 1e3)
        assert chosen.loss == pytest.approx(best, rel=1e-9)
    middle = f"{5e2 * (fastest + slowest)}ms"
    assert Plan.from_json(found.to_json()).replan(middle) == found.replan(middle)


def test_budgets_that_cannot_be_are_refused_by_name(times):
    found = made("999ms")
    with pytest.raises(ConfigError, match=r"takes 0\.\d+ ms a token, 0\.5 of them beside its matrices") as error:
        found.replan("0.1ms")
    least = error.value.remedy.split()[1]
    assert found.replan(least).seconds <= float(least.removesuffix("ms")) / 1e3
    for codec in ("reference", "gguf"):
        with pytest.raises(ConfigError, match="codec='kernels'"):
            plan(object(), [], budget="20ms", codec=codec, palette=("f16",) if codec == "gguf" else None)
    assert made("9bits").replan("999ms").seconds == found.seconds


def test_bits_and_times_are_budgets_of_one_plan(times):
    found = made("9bits")
    assert found.bits <= 9
    assert found.seconds > found.replan("6bits").seconds
    assert found.timed_on
    other = plan(tiny_model("llama").model, list(IDS), budget="9bits", metric="token_mean")
    assert other.seconds is None


def test_a_unit_takes_the_time_of_its_products(times):
    model = tiny_model("qwen2").model  # untied
    units = {unit.name: unit for unit in units_of(model)}
    assert unit_seconds(model, units["model.embed_tokens"], "bf16") == 0
    q = units["model.layers.0.self_attn.q_proj"]
    assert unit_seconds(model, q, "int8_row") == pytest.approx(1e-6 + 64 * 64 * 8.5e-9)
    fused = units_of(model, fused=True)
    three = next(unit for unit in fused if unit.name.endswith("q_proj+k_proj+v_proj"))
    alone = [units[f"model.layers.0.self_attn.{one}_proj"] for one in "qkv"]
    assert unit_seconds(model, three, "bf16") == pytest.approx(sum(unit_seconds(model, one, "bf16") for one in alone))
    gpt2 = tiny_model("gpt2").model
    transposed = next(unit for unit in units_of(gpt2) if unit.weights[0].transposed)
    times.clear()
    unit_seconds(gpt2, transposed, "bf16")
    assert times[0][1] == (transposed.weights[0].out, transposed.weights[0].inner)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "deberta-v2"])
def test_the_rest_is_less_than_the_whole_and_leaves_nothing_behind(kind):
    model = tiny_model(kind).model
    inputs = {"input_ids": IDS[:1], **({"decoder_input_ids": IDS[:1]} if kind == "t5" else {})}
    before = model(**inputs).logits
    calls = []
    hook = model.get_submodule(units_of(model)[-1].modules[-1]).register_forward_hook(lambda *_: calls.append(1))
    start = time.perf_counter()
    rest = rest_seconds(model, units_of(model))
    assert 0 < rest < time.perf_counter() - start
    hook.remove()
    assert calls  # modules are called, and what they give is not computed
    assert torch.equal(model(**inputs).logits, before)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_an_error_leaves_nothing_behind(monkeypatch):
    model = tiny_model("llama").model

    def fail(*_, **__):
        raise RuntimeError

    monkeypatch.setattr(decode_time, "in_turns", fail)
    with pytest.raises(RuntimeError):
        rest_seconds(model, units_of(model))
    assert not any("forward" in module.__dict__ for module in model.modules())
