"""Opening: the right head, type and place, and errors that name the file and the remedy."""

from __future__ import annotations

import json
import re
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig

from tenfold.errors import ConfigError, ModelError
from tenfold.models.export import save_adapter, save_model
from tenfold.models.heads import auto_class
from tenfold.models.open import open_model, open_tokenizer
from tenfold.models.tiny import tiny_model


@pytest.fixture
def folder(tmp_path) -> Path:
    opened = tiny_model("llama")
    return save_model(opened.model, opened.tokenizer, tmp_path / "model")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def edit(file: Path, **fields) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gemma3"])
def test_folder_round_trip(tmp_path, kind):
    opened = tiny_model(kind)
    again = open_model(save_model(opened.model, opened.tokenizer, tmp_path / "model"), device="cpu")
    assert set(again.model.state_dict()) == set(opened.model.state_dict())
    for name, weight in opened.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], weight)
    assert again.tokenizer.chat_template == opened.tokenizer.chat_template
    assert not again.model.training


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2"])
def test_tiny_source(kind):
    assert open_model(f"tiny:{kind}", device="cpu").identity["source"] == f"tiny:{kind}"


def test_tasks(tmp_path, folder):
    assert open_model(folder, "reward", device="cpu").model.config.num_labels == 1
    assert open_model(folder, "classification", num_labels=4, device="cpu").model.score.out_features == 4
    t5 = tiny_model("t5")
    saved = save_model(t5.model, t5.tokenizer, tmp_path / "t5")
    assert open_model(saved, "seq2seq", device="cpu").model.config.is_encoder_decoder
    with pytest.raises(ModelError, match="no head for task 'causal'; they have seq2seq"):
        open_model(saved, device="cpu")


@pytest.mark.parametrize(
    ("kind", "head", "task", "said"),
    [
        ("bert", "ForMaskedLM", "causal", "bert is an encoder: its attention sees the tokens"),
        ("roberta", "ForMaskedLM", "causal", "roberta is an encoder"),
        ("bart", "ForConditionalGeneration", "causal", "bart has an encoder beside its decoder"),
        ("bart", "ForConditionalGeneration", "reward", "bart has an encoder beside its decoder"),
    ],
)
def test_what_transformers_opens_for_a_task_that_it_cannot_do_is_refused(kind, head, task, said):
    """An encoder's loss would be that of tokens that it sees."""
    config = AutoConfig.for_model(kind, architectures=[head])
    with pytest.raises(ModelError, match=said) as caught:
        auto_class(config, task, "theirs")
    assert "open it with task=" in caught.value.remedy
    assert ("'classification'" in caught.value.remedy) == (kind != "bart")
    assert auto_class(AutoConfig.for_model("bert", is_decoder=True), "causal", "theirs")
    assert auto_class(AutoConfig.for_model("bert"), "classification", "theirs")


def test_the_tokenizer_alone_is_that_of_the_model_with_its_adapters(folder, tmp_path, monkeypatch):
    opened = open_model(folder, device="cpu")
    opened.tokenizer.chat_template = "{{ messages[0].content }}"
    adapted = get_peft_model(opened.model, LoraConfig(target_modules=["q_proj"]))
    adapter = save_adapter(adapted, opened.tokenizer, tmp_path / "adapter", base=str(folder))
    whole = {"base": open_model(folder, device="cpu"), "adapter": open_model(adapter, device="cpu")}
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("opened"))
    for name, found in {"base": open_tokenizer(folder), "adapter": open_tokenizer(adapter)}.items():
        assert found.get_vocab() == whole[name].tokenizer.get_vocab()
        assert found.chat_template == whole[name].tokenizer.chat_template
    assert open_tokenizer(folder, adapters=[adapter]).chat_template == "{{ messages[0].content }}"
    with pytest.raises(ModelError, match="no such folder"):
        open_tokenizer("./nothing")


@pytest.mark.parametrize(("kind", "task"), [("bert", "seq2seq"), ("modernbert", "causal"), ("distilbert", "seq2seq")])
def test_an_encoder_is_told_that_it_classifies(kind, task):
    with pytest.raises(ModelError, match="they have classification, reward") as caught:
        auto_class(AutoConfig.for_model(kind), task, "theirs")
    assert caught.value.remedy == "open it with task='classification'"


def test_dtype(folder):
    edit(folder / "config.json", dtype="bfloat16")
    assert open_model(folder, device="cpu").model.dtype == torch.float32
    assert open_model(folder, device="cpu", dtype="auto").identity["dtype"] == "bfloat16"
    assert open_model(folder, device="cpu", dtype=torch.float16).model.dtype == torch.float16
    assert open_model("tiny:llama", device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16
    for wrong in ("int8", "bf16"):
        with pytest.raises(ConfigError, match="not a floating-point type"):
            open_model(folder, dtype=wrong)


def test_device_map_is_passed_through(folder):
    assert open_model(folder, device_map={"": "meta"}, dtype="float32").model.device.type == "meta"
    with pytest.raises(ConfigError, match="device and device_map"):
        open_model(folder, device="cpu", device_map="auto")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device")
def test_device_that_is_not_there():
    with pytest.raises(ConfigError, match="cuda"):
        open_model("tiny:llama", device="cuda")


def test_pad_token_falls_back_to_end_of_sequence(folder):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            fields = json.loads((folder / name).read_text())
            fields.pop("pad_token", None)
            (folder / name).write_text(json.dumps(fields))
    edit(folder / "config.json", pad_token_id=None)
    opened = open_model(folder, device="cpu")
    assert opened.tokenizer.pad_token == "<eos>"
    assert opened.model.config.pad_token_id == opened.tokenizer.eos_token_id


def test_wrong_arguments(folder):
    with pytest.raises(ConfigError, match="unknown task 'casual'"):
        open_model(folder, "casual")
    with pytest.raises(ConfigError, match="num_labels"):
        open_model(folder, num_labels=3)


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/model", "a/b/c"])
def test_no_such_path(source):
    with pytest.raises(ModelError, match="no such folder"):
        open_model(source)


def test_empty_source():
    with pytest.raises(ModelError, match="empty"):
        open_model("")


def test_folder_without_model(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        open_model(tmp_path)


def test_a_file_that_is_no_model(tmp_path):
    for name, message in (("notes.bin", "not GGUF"), ("notes.txt", "a file of data, not a model")):
        (tmp_path / name).write_text("hello")
        with pytest.raises(ModelError, match=message):
            open_model(tmp_path / name)


def test_malformed_config(folder):
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(ModelError, match=r"config\.json: not readable as JSON"):
        open_model(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_weights_name_file_and_size(folder, keep):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    size = weights.stat().st_size
    with pytest.raises(ModelError, match=re.escape(f"{weights}: truncated or corrupt safetensors file ({size} bytes)")):
        open_model(folder)


def test_corrupt_header(folder):
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[8:40] = b"\xff" * 32
    weights.write_bytes(bytes(content))
    with pytest.raises(ModelError, match="corrupt"):
        open_model(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        open_model(folder)


def test_sharded_index_naming_a_missing_shard(tmp_path):
    opened = tiny_model("llama")
    opened.model.save_pretrained(tmp_path, max_shard_size="100KB")
    opened.tokenizer.save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert open_model(tmp_path, device="cpu").identity["parameters"] == opened.identity["parameters"]
    shards[1].unlink()
    with pytest.raises(ModelError, match=rf"names {shards[1].name}, which is missing"):
        open_model(tmp_path)


def test_missing_weights_are_never_random(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 weights are in no file"):
        open_model(folder, device="cpu")
    with pytest.raises(ModelError, match="1 weights are in no file"):
        open_model(folder, "reward", device="cpu")


def test_shapes_that_do_not_fit_the_configuration(folder):
    edit(folder / "config.json", intermediate_size=96)
    with pytest.raises(ModelError, match="cannot be opened"):
        open_model(folder, device="cpu")


def test_unknown_architecture(folder):
    edit(folder / "config.json", model_type="novel", architectures=["NovelModel"])
    with pytest.raises(ModelError, match="unknown architecture") as caught:
        open_model(folder, device="cpu")
    assert "upgrade transformers" in caught.value.remedy


def test_code_of_the_model_runs_only_by_name(folder):
    code = "raise SystemExit('ran')\n"
    (folder / "configuration_novel.py").write_text(code)
    edit(folder / "config.json", model_type="novel", auto_map={"AutoConfig": "configuration_novel.NovelConfig"})
    with pytest.raises(ModelError, match="Python code of its own") as caught:
        open_model(folder, device="cpu")
    assert "trust_remote_code=True" in caught.value.remedy


def test_no_tokenizer(folder):
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"holds no tokenizer \(no tokenizer\.json") as caught:
        open_model(folder, device="cpu")
    assert "save_pretrained" in caught.value.remedy


@pytest.mark.usefixtures("offline")
def test_hub_that_cannot_be_reached():
    with pytest.raises(ModelError, match="nobody/nothing: no such folder, and not to be had from the hub"):
        open_model("nobody/nothing", device="cpu")
