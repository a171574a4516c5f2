"""A name with a slip is answered from here, with the nearest that exists; a hub id still goes to the hub."""

from __future__ import annotations

import huggingface_hub
import pytest

from tenfold.errors import ModelError
from tenfold.models.open import open_model
from tenfold.models.source import locate


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A working folder with a run, a GGUF file, and models under their owner's name; a hub that must not be asked."""

    def asked(*_, **__):
        raise AssertionError("the hub was asked")

    for name in ("runs/first/01-lora/adapter", "my-model", "xl", "Qwen/Qwen3-8B"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", asked)
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", asked)


@pytest.mark.parametrize(
    ("source", "nearest"),
    [
        ("demmo", "demo"),
        ("Demo", "demo"),
        ("tinny:llama", "tiny:llama"),
        ("tiny:lama", "tiny:llama"),
        ("tiny-llama", "tiny:llama"),
        ("my-modle", "my-model"),
        ("smal.gguf", "small.gguf"),
        ("./smal.gguf", "small.gguf"),
        ("runs/frist", "runs/first"),
        ("runs/frist/01-lora/adapter", "runs/first/01-lora/adapter"),
        ("./runs/first/01-lora/adaptr", "runs/first/01-lora/adapter"),
        ("Qwen/Qwem3-8B", "Qwen/Qwen3-8B"),
    ],
)
def test_a_slip_is_answered_with_the_nearest(source, nearest):
    with pytest.raises(ModelError, match="nearest") as caught:
        open_model(source, device="cpu")
    assert caught.value.problem.endswith(f"nearest: {nearest}")
    assert caught.value.remedy


@pytest.mark.parametrize(
    "source",
    [
        "./x.gguf",
        "/nowhere/at/all",
        "two words",
        "qqqqqq",
        "a:b",
        "~/nowhere-at-all",
        "~nobody-here/x",
        "./qqqqqq",
        "../qqqqqq",
    ],
)
def test_nothing_is_near(source):
    with pytest.raises(ModelError, match=r"no such folder or file|unknown model") as caught:
        open_model(source, device="cpu")
    assert "nearest" not in str(caught.value)


def test_an_address_is_not_a_name():
    with pytest.raises(ModelError, match="an address") as caught:
        locate("https://huggingface.co/Qwen/Qwen3-0.6B")
    assert "owner/name" in caught.value.remedy


@pytest.mark.parametrize(
    "source",
    [
        "Qwen/Qwen3-0.6B",
        "Qwen/Qwen3-8B-Base",
        "runs/model",
        "nobody/nothing",
        "gpt2",
        "gpt2-xl",
        "t5-small",
        "distilgpt2",
    ],
)
def test_hub_ids_go_to_the_hub(source):
    assert locate(source).kind == "hub"


def test_a_folder_of_adapters_names_them(tmp_path):
    for name in ("english", "french"):
        (tmp_path / "my-model" / name).mkdir()
        (tmp_path / "my-model" / name / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError) as caught:
        locate("my-model")
    assert "english, french" in caught.value.remedy


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("source", ["my.jsonl", "rows/my.csv.gz", "NOTES.TXT", "my.json"])
def test_rows_in_place_of_a_model_are_sent_where_they_belong(source, there, tmp_path):
    if there:
        (tmp_path / source).parent.mkdir(exist_ok=True)
        (tmp_path / source).write_text("{}")
    with pytest.raises(ModelError, match="a file of data, not a model") as caught:
        locate(source)
    assert f"--data {source}" in caught.value.remedy


def test_a_folder_is_no_file_of_rows(tmp_path):
    (tmp_path / "model.txt").mkdir()
    (tmp_path / "model.txt/config.json").write_text("{}")
    assert locate("model.txt").kind == "folder"
    with pytest.raises(ModelError, match="not GGUF"):
        locate("model.txt/config.json")
