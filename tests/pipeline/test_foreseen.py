"""What `validate`, `estimate` and `run` refuse before a weight is read."""

import json

import pytest

from tenfold import cli
from tenfold.attend.masformer import convert
from tenfold.errors import ConfigError, ModelError, TenfoldError
from tenfold.kernels.local import AttentionWindow
from tenfold.models.export import save_model
from tenfold.models.reference import ModelRef
from tenfold.models.shape import shape_from, shape_of
from tenfold.models.tiny import tiny_model
from tenfold.pipeline import run as runner
from tenfold.pipeline.estimate import estimate
from tenfold.pipeline.recipe import resolve

SPANS = {"use": "masformer", "window": 16, "passage": 16}
NOWHERE = {**SPANS, "full_layers": []}
TRAIN = {"use": "lora", "max_length": 64}
FILE = {"use": "fpx", "max_length": 64, "budget": "6bits"}
CASES = {
    "positions": ([{**TRAIN, "max_length": 513}], "max_length: 513 is above the 512 positions"),
    "positions of full training": ([{"use": "full", "max_length": 513}], "above the 512 positions"),
    "windows": ([{"use": "evaluate", "tasks": ["perplexity"], "max_length": 1000}], "above the 512 positions"),
    "copies": ([{"use": "evaluate", "tasks": ["copying"]}], "between: 1536 tokens of copying"),
    "needles": ([{"use": "evaluate", "tasks": ["needle"], "passage": 200, "between": 300}], "between: 564 tokens"),
    "context": ([{"use": "gear", "context": 400}], "context: 528 tokens with those that are scored"),
    "passages": ([{**SPANS, "passage": 200, "between": 113}], "passage: 200 tokens, twice and 113 between"),
    "layer": ([{**SPANS, "full_layers": [0, 2]}], "full_layers: 2; the model has layers 0 to 1"),
    "layers": ([{**SPANS, "budget": "3"}], "budget: 3 is 3 layers of 2"),
    "heads": ([{**SPANS, "budget": "5", "by": "heads"}], "budget: 5 is 5 heads of 4"),
    "converted twice": ([SPANS, SPANS], "02-masformer: .* has local spans already"),
    "rank": ([{**TRAIN, "rank": 65}], "rank: 65 is above the width of the model, 64"),
    "rank of adalora": ([{**TRAIN, "use": "adalora", "rank": 100}], "rank: 100 is above the width"),
    "rank of r3m": ([{"use": "r3m", "rank": 65, "max_length": 64}], "rank: 65 is above the width"),
    "no rank for it": ([{**TRAIN, "budget": "100"}], "budget: '100' is 100 parameters, but one rank"),
    "no triplet for it": ([{**TRAIN, "use": "adalora", "budget": "50"}], "less than one triplet"),
    "more than there is": ([{**TRAIN, "use": "adalora", "budget": "900%"}], "at most 100%"),
    "more than matrices hold": ([{**TRAIN, "use": "adalora", "budget": "10M"}], "above the .* hold at the start"),
    "targets": ([{**TRAIN, "targets": ["w_pack"]}], "targets: 'w_pack' matches nothing in this llama model"),
    "targets of adalora": ([{**TRAIN, "use": "adalora", "targets": ["fc1"]}], "matches nothing"),
    "targets of r3m": (
        [{"use": "r3m", "targets": ["fc1"], "max_length": 64}],
        "01-r3m: targets: 'fc1' matches nothing",
    ),
    "in the second stage": ([TRAIN, {**TRAIN, "targets": ["fc1"]}], "02-lora: targets"),
    "nothing to distil": ([{**TRAIN, "distil": 0.5}], "distil: the model has no local spans"),
    "no adapter": ([{"use": "export", "form": "adapter"}], "tiny:llama carries no adapter"),
    "no adapter any more": ([TRAIN, {"use": "export"}, {"use": "export", "form": "adapter"}], "03-export: form"),
    "no spans": ([{"use": "export", "form": "native"}], "form: native: tiny:llama has no local spans"),
    "target mass": (
        [SPANS, {"use": "generate", "prompts": ["be brief"], "emphasise": ["brief"], "target_mass": 0.3}],
        "02-generate: target_mass: tiny:llama has local spans",
    ),
    "sinks": ([SPANS, {"use": "export", "form": "native"}], "sinks is 4"),
    "blocks": ([{**SPANS, "pattern": "block", "sinks": 0}, {"use": "export", "form": "native"}], "not pattern block"),
    "heads of spans": ([SPANS, {"use": "profile"}], "02-profile: tiny:llama has local spans, and profile needs full"),
    "nothing to pack": ([NOWHERE, {"use": "gear", "context": 192}], "02-gear: caches: .* nothing to pack"),
    "nothing packed yet": (
        [{"use": "gear", "context": 131}],
        "context: gear:2 packs nothing of 131 tokens, only from 132",
    ),
    "nothing to pack for a text": ([NOWHERE, {"use": "generate", "kv": "gear:4"}], "kv: .* nothing to pack"),
    "bits of a layer": (
        [{"use": "generate", "kv": "gear:4,layer_bits={2: [8, 8]}"}],
        "layer_bits: 2; the model has layers 0 to 1",
    ),
    "profile": (
        [{"use": "generate", "prompts": ["a b"], "emphasise": ["b"]}],
        "made for a llama model of 30 layers with 9 heads each, and tiny:llama has 2 of 4",
    ),
    "reference": ([{"use": "audit"}], "reference: missing, and tiny:llama has no adapter"),
    "smallest file": ([{**FILE, "budget": "1bits"}], "01-fpx: budget: 1bits is .* bytes, and the smallest plan of"),
    "smallest of few types": ([{**FILE, "palette": ["q8_0"]}], "the smallest plan of q8_0 takes"),
    "compressed for a file": ([{"use": "losparse", "max_length": 64}, FILE], "02-fpx: .* are compressed, and GGUF"),
    "spans for a file": ([SPANS, FILE], "02-fpx: tiny:llama has local spans, and GGUF"),
}
POSSIBLE = {
    "all lengths": [{**TRAIN, "max_length": 512}, {"use": "evaluate", "max_length": 512}],
    "packed where attention is full": [{**SPANS, "full_layers": [1]}, {"use": "generate", "kv": "gear:4"}],
    "all layers": [{**SPANS, "full_layers": [0, 1]}, {**TRAIN, "distil": 0.5}, {"use": "export"}],
    "windows as stock has them": [{**SPANS, "sinks": 0}, {"use": "export", "form": "native"}],
    "adapter": [TRAIN, {"use": "export", "form": "adapter"}],
    "its own heads": [
        {"use": "profile", "samples": 2, "validation": 2},
        {"use": "generate", "prompts": ["a b"], "emphasise": ["b"]},
    ],
    "a widest rank": [{**TRAIN, "rank": 64, "targets": ["q", r".*up_proj"]}],
    "an audited policy": [{"use": "r3m", "target": "dpo", "max_length": 64}, {"use": "audit"}],
    "a reference": [{"use": "audit", "reference": "tiny:llama"}],
    "another size of a file": [
        {**FILE, "id": "first"},
        {**FILE, "model": "tiny:llama", "plan": "${first.plan}", "budget": "5.5bits"},
    ],
}


def plan_of(stages, rows, model="tiny:llama", **fields):
    """A plan whose first stages have the rows that they need."""
    kinds = {"r3m": "step-audit:40", "audit": "step-audit:40"}
    needs = {"lora", "full", "adalora", "losparse", "fpx", "masformer", "gear", "evaluate", *kinds}
    stages = [
        {"data": kinds.get(entry["use"], str(rows)), **entry} if entry["use"] in needs else entry for entry in stages
    ]
    return resolve({"model": model, **fields, "stages": stages}, "test")


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_is_refused(case, number_rows):
    stages, message = CASES[case]
    with pytest.raises((ConfigError, ModelError), match=message) as caught:
        runner.check(plan_of(stages, number_rows))
    assert caught.value.remedy
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("case", POSSIBLE)
def test_what_can_be_is_let_through(case, number_rows):
    runner.check(plan_of(POSSIBLE[case], number_rows))


def test_estimate_and_run_refuse_the_same(number_rows, tmp_path):
    from rich.console import Console

    plan = plan_of([TRAIN, {**TRAIN, "targets": ["fc1"]}], number_rows)
    with pytest.raises(ConfigError, match="02-lora: targets"):
        estimate(plan)
    with pytest.raises(ConfigError, match="02-lora: targets"):
        runner.run(plan, tmp_path, Console(quiet=True))
    assert not list(tmp_path.glob("*01-lora")), "nothing was trained first"


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "quantum"])
def test_a_device_that_is_not_there(device, number_rows, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=f"device: .*{device}"):
        runner.check(plan_of([TRAIN], number_rows, device=device))


def test_a_device_that_is_there(number_rows, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    runner.check(plan_of([TRAIN], number_rows, device="cuda:1"))
    with pytest.raises(ConfigError, match="this machine has 2 GPUs"):
        runner.check(plan_of([TRAIN], number_rows, device="cuda:2"))


def test_a_hub_that_is_away_is_a_note(number_rows):
    *_, note = runner.check(plan_of([TRAIN], number_rows, model="someone/some-model"))
    assert note.startswith("someone/some-model: the hub could not be asked")


def test_a_hub_without_such_a_model_is_an_error(number_rows, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    def absent(*_, **__):
        raise RepositoryNotFoundError("404 Client Error", response=type("R", (), {"headers": {}, "request": None})())

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", absent)
    with pytest.raises(ModelError, match="not to be had from the hub"):
        runner.check(plan_of([TRAIN], number_rows, model="someone/some-model"))


def test_the_configuration_of_a_hub_is_looked_at(number_rows, tmp_path, monkeypatch):
    import huggingface_hub

    (tmp_path / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 32}')
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(tmp_path / "config.json"))
    with pytest.raises(ConfigError, match="max_length: 64 is above the 32 positions"):
        runner.check(plan_of([TRAIN], number_rows, model="someone/some-model"))


@pytest.fixture
def folder(tmp_path):
    opened = tiny_model("qwen3")
    opened.model.save_pretrained(tmp_path / "model")
    opened.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_is_looked_at(folder, number_rows):
    with pytest.raises(ConfigError, match="01-lora: max_length: 600 is above the 512"):
        runner.check(plan_of([{**TRAIN, "max_length": 600}], number_rows, model=str(folder)))


def test_a_converted_folder_is_looked_at_and_estimated(tmp_path, number_rows):
    opened = tiny_model("llama")
    convert(opened.model, full_layers=[0], span=AttentionWindow("sliding", 16))
    save_model(opened.model, opened.tokenizer, tmp_path / "model")
    model = str(tmp_path / "model")
    with pytest.raises(ConfigError, match="targets: 'fc1' matches nothing"):
        runner.check(plan_of([{**TRAIN, "targets": ["fc1"]}], number_rows, model=model))
    [_, found] = estimate(plan_of([TRAIN], number_rows, model=model))
    [_, plain] = estimate(plan_of([TRAIN], number_rows))
    assert found.amounts["trainable parameters"] == plain.amounts["trainable parameters"]
    assert found.amounts["activations"] == pytest.approx(plain.amounts["activations"], rel=0.5)


def test_a_saved_reward_model_needs_no_reference(tmp_path, number_rows):
    opened = tiny_model("llama", task="reward")
    opened.model.save_pretrained(tmp_path / "model")
    opened.tokenizer.save_pretrained(tmp_path / "model")
    runner.check(plan_of([{"use": "audit"}], number_rows, model=str(tmp_path / "model")))


def test_an_architecture_that_nobody_knows(folder, number_rows):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "quux"}))
    with pytest.raises(ModelError, match="unknown architecture"):
        runner.check(plan_of([TRAIN], number_rows, model=str(folder)))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2", "t5", "deberta-v2"])
def test_the_shape_is_that_of_the_model(kind, tmp_path):
    model = tiny_model(kind).model
    model.config.save_pretrained(tmp_path)
    saved = shape_from(json.loads((tmp_path / "config.json").read_text()), "saved")
    config = model.config.get_text_config(decoder=True)
    for shape in (shape_of(ModelRef(f"tiny:{kind}")), saved):
        assert shape.model_type == model.config.model_type
        assert (shape.layers, shape.hidden, shape.heads) == (
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
        )
        assert shape.positions == getattr(config, "max_position_embeddings", None)
        if hasattr(config, "num_key_value_heads") and kind not in ("gpt2", "t5"):
            assert shape.kv_heads == config.num_key_value_heads


def test_parts_of_a_composite_model_speak_for_it():
    inner = {"num_hidden_layers": 3, "max_position_embeddings": 99}
    shape = shape_from({"model_type": "gemma3", "text_config": inner, "vision_config": {"num_hidden_layers": 7}}, "x")
    assert (shape.layers, shape.positions) == (3, 99)


def test_the_command_line_says_it_with_exit_code_2(number_rows, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: tiny:llama\nstages:\n  - {{use: lora, data: {number_rows}, max_length: 4096}}\n")
    for verb in ("validate", "estimate", "run"):
        assert cli.main([verb, str(recipe)]) == 2
        assert "01-lora: max_length: 4096 is above the 512 positions" in capsys.readouterr().err
    assert issubclass(ConfigError, TenfoldError)
