"""Which form a layer takes: what was measured, once on a machine, and the same again when it is opened."""

import copy
import json

import pytest
import torch

import tenfold
from tenfold.compress.losparse import layout
from tenfold.compress.losparse.layer import compressed_layers, install
from tenfold.compress.losparse.layout import settle
from tenfold.kernels.low_rank_rows import FORMS, MANY, seconds
from tenfold.models.export import save_model
from tenfold.models.tiny import tiny_model

from .test_layer import factors_of

IDS = torch.arange(5, 45).reshape(2, 20)


@pytest.fixture
def opened():
    made = tiny_model("llama")
    names = ["mlp.gate_proj", "mlp.down_proj", "self_attn.k_proj"]
    factors = {}
    for name in (f"model.layers.{at}.{name}" for at in range(2) for name in names):
        shape = made.model.get_submodule(name).weight.shape
        factors[name] = factors_of(*shape, 5, 4, dtype=torch.float32)
    install(made.model, factors)
    return made


@pytest.fixture
def timed(monkeypatch):
    """Times by shape: those of up and down are best joined for one token, and whole for many."""
    asked = []

    def fake(shape, rank, kept, tokens, dtype, device):
        asked.append((shape, tokens))
        if shape == (32, 64):  # k: too little to take memory for
            return {"stored": 1.0, "joined": 0.9, "whole": 1.0}
        return {"stored": 1.0, "joined": 0.8 if tokens == 1 else 0.98, "whole": 0.85 if tokens == 1 else 0.7}

    monkeypatch.setattr(layout, "seconds", fake)
    return asked


def test_what_is_measured_is_taken(opened, timed):
    forms = settle(opened.model)
    assert forms == {
        name: ("stored", "stored") if "k_proj" in name else ("joined", "whole")
        for name in compressed_layers(opened.model)
    }
    assert sorted(timed) == sorted([(shape, n) for shape in [(128, 64), (64, 128), (32, 64)] for n in (1, MANY)])
    wide = (9 + 64) * 128 + (9 + 128) * 64
    assert sum(layer.form_bytes() for layer in compressed_layers(opened.model).values()) == 4 * 2 * wide
    settle(opened.model)
    assert len(timed) == 6, "measured once"


def test_it_is_stored_and_not_measured_again_on_such_a_machine(opened, timed, tmp_path, monkeypatch):
    settle(opened.model)
    save_model(opened.model, opened.tokenizer, tmp_path / "model")
    asked = len(timed)
    again = tenfold.open_model(tmp_path / "model", device="cpu").model
    assert len(timed) == asked
    assert {name: (one.few, one.many) for name, one in compressed_layers(again).items()} == settle(opened.model)
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, opened.model(input_ids=IDS).logits)
    monkeypatch.setattr(layout, "machine", lambda device: "another")
    elsewhere = tenfold.open_model(tmp_path / "model", device="cpu").model
    assert len(timed) == 2 * asked
    assert set(elsewhere.config.quantization_config.layouts) == {
        *again.config.quantization_config.layouts,
        "another, float32",
    }
    save_model(elsewhere, opened.tokenizer, tmp_path / "both")
    stored = json.loads((tmp_path / "both/config.json").read_text())["quantization_config"]["layouts"]
    assert len(stored) == 2


def test_nothing_is_measured_unasked(opened, timed, tmp_path):
    """On opening a model for which nobody has measured yet, or without leave."""
    save_model(opened.model, opened.tokenizer, tmp_path / "model")
    model = tenfold.open_model(tmp_path / "model", device="cpu").model
    assert settle(model, measure=False) == {}
    assert not timed
    assert settle(tiny_model("llama").model) == {}


def test_patience_ends(opened, timed, monkeypatch):
    monkeypatch.setattr(layout, "PATIENCE", 0.0)
    forms = settle(opened.model)
    assert len(timed) == 2
    assert len(set(forms.values())) == 1, "those that were not measured do as the nearest"


def test_forms_do_not_change_what_a_model_says(opened):
    with torch.no_grad():
        right = opened.model(input_ids=IDS).logits
        for few in FORMS:
            for many in FORMS:
                for layer in compressed_layers(opened.model).values():
                    layer.take(few, many)
                torch.testing.assert_close(opened.model(input_ids=IDS).logits, right, rtol=1e-4, atol=1e-4)
                copied = copy.deepcopy(opened.model)
                torch.testing.assert_close(copied(input_ids=IDS).logits, right, rtol=1e-4, atol=1e-4)


def test_seconds_are_those_of_the_forms():
    taken = seconds((64, 48), 4, 3, 1, torch.float32, torch.device("cpu"))
    assert set(taken) == set(FORMS)
    assert all(0 < value < 1 for value in taken.values())
