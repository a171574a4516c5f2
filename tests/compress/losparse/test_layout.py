"""Which form a layer takes: what was measured, once on a machine, and the same again when it is opened."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tenfold
from tenfold import cli, losparse
from tenfold.compress.losparse import layout
from tenfold.compress.losparse.layer import compressed_layers, install
from tenfold.compress.losparse.layout import settle
from tenfold.kernels.low_rank_rows import FORMS, MANY, seconds
from tenfold.models.export import save_adapter, save_model
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


def layouts(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]["layouts"]


def forms(folder):
    model = tenfold.open_model(folder, device="cpu").model
    return {name: (one.few, one.many) for name, one in compressed_layers(model).items()}


@pytest.fixture
def elastic(timed, tmp_path):
    """The folder of an elastic model whose forms were measured."""
    made = tiny_model("llama")
    shapes = {f"model.layers.{at}.mlp.{role}": role for at in range(2) for role in ("gate_proj", "down_proj")}
    factors = {}
    for name in shapes:
        factors[name] = factors_of(*made.model.get_submodule(name).weight.shape, 5, 4, dtype=torch.float32)
    losparse.settle(losparse.install(made.model, factors, elastic=True))
    return made, save_model(made.model, made.tokenizer, tmp_path / "model")


def exported(folder, out, *more):
    assert cli.main(["export", str(folder), "--device", "cpu", "--out", str(out), *more]) == 0
    return out / "01-export/model"


def test_what_changes_sizes_is_measured_anew_before_it_is_written(elastic, timed, tmp_path):
    _, folder = elastic
    before, asked = forms(folder), len(timed)
    assert set(before.values()) == {("joined", "whole")}
    smaller = exported(folder, tmp_path / "rows", "--rows", "0.5")
    assert len(timed) == asked + 4
    assert layouts(smaller)
    assert forms(smaller) == before
    asked = len(timed)
    again = exported(smaller, tmp_path / "again")
    assert len(timed) == asked, "of these sizes it is known"
    assert forms(again) == before
    halved = exported(folder, tmp_path / "half", "--save-dtype", "bfloat16")
    assert {key.rsplit(", ", 1)[1] for key in layouts(halved)} == {"float32", "bfloat16"}


def test_a_merged_adapter_leaves_measured_layers(elastic, timed, tmp_path):
    made, folder = elastic
    base = tenfold.open_model(folder, device="cpu")
    config = LoraConfig(r=2, target_modules=["gate_proj"], init_lora_weights=False)
    save_adapter(get_peft_model(base.model, config), made.tokenizer, tmp_path / "adapter")
    asked = len(timed)
    merged = exported(tmp_path / "adapter", tmp_path / "merged")
    assert len(timed) > asked
    assert set(forms(merged).values()) == {("joined", "whole")}
    # In memory, where nobody has measured, its layers do as those that they come from.
    within = tenfold.models.export.merge(tenfold.open_model(tmp_path / "adapter", device="cpu").model)
    assert {(one.few, one.many) for one in compressed_layers(within).values()} == {("joined", "whole")}


def test_small_stays_small(elastic, timed, tmp_path):
    made, _ = elastic
    assert set(settle(made.model, layout="small").values()) == {("stored", "stored")}
    assert not any(layer.form_bytes() for layer in compressed_layers(made.model).values())
    asked = len(timed)
    save_model(made.model, made.tokenizer, tmp_path / "small")
    folder = exported(tmp_path / "small", tmp_path / "rows", "--rows", "0.5")
    assert (len(timed), layouts(folder)) == (asked, {})
    assert set(forms(folder).values()) == {("stored", "stored")}
    settle(tenfold.open_model(folder, device="cpu").model, layout="fast")
    assert len(timed) == asked + 4


def test_python_knows_how_to_measure(opened, timed, tmp_path):
    """The route that the page shows: without it, what is saved would be opened as it was stored."""
    losparse.settle(opened.model)
    opened.model.save_pretrained(tmp_path / "model")
    model = type(opened.model).from_pretrained(tmp_path / "model")
    assert ("joined", "whole") in {(one.few, one.many) for one in compressed_layers(model).values()}


def test_trained_on_it_is_written_measured(elastic, timed, tmp_path):
    """A stage that trains all weights, of a model with an adapter that it merges first."""
    made, folder = elastic
    config = LoraConfig(r=2, target_modules=["gate_proj"], init_lora_weights=False)
    adapted = get_peft_model(tenfold.open_model(folder, device="cpu").model, config)
    save_adapter(adapted, made.tokenizer, tmp_path / "adapter")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"number {n} and the next " * 4}) + "\n" for n in range(12)))
    given = ["adapt", str(tmp_path / "adapter"), "--method", "full", "--data", str(rows), "--steps", "1"]
    assert cli.main([*given, "--device", "cpu", "--out", str(tmp_path / "run")]) == 0
    written = tmp_path / "run/01-full/model"
    assert layouts(written)
    assert set(forms(written).values()) == {("joined", "whole")}
