"""Content hashes tell models apart, are cheap, and do not depend on places."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tenfold.errors import ModelError
from tenfold.models.export import save_model
from tenfold.models.source import content_hash, locate, resolve_source
from tenfold.models.tiny import tiny_model


@pytest.fixture
def folder(tmp_path):
    opened = tiny_model("llama")
    return save_model(opened.model, opened.tokenizer, tmp_path / "model")


def test_a_copy_has_the_same_hash(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    assert content_hash(copy) == content_hash(folder)


@pytest.mark.parametrize("file", ["config.json", "chat_template.jinja", "model.safetensors"])
def test_a_change_changes_the_hash(folder, file):
    before = content_hash(folder)
    if file == "model.safetensors":
        weights = load_file(folder / file)
        weights["model.norm.weight"] += 1e-3
        save_file(weights, folder / file, metadata={"format": "pt"})
    elif file == "config.json":
        fields = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**fields, "rms_norm_eps": 0.5}))
    else:
        (folder / file).write_text("{{ messages }}")
    assert content_hash(folder) != before


def test_every_tensor_of_a_large_file_counts(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = {f"layer{index}": torch.zeros(1 << 21) for index in range(4)}  # 32 MiB: sampled, not read whole
    hashes = set()
    for name in [None, *weights]:
        changed = {key: value + (1.0 if key == name else 0.0) for key, value in weights.items()}
        save_file(changed, tmp_path / "model.safetensors")
        hashes.add(content_hash(tmp_path))
    assert len(hashes) == 5


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_each_tensor_of_a_large_file_is_read_at_both_ends_and_in_the_middle(tmp_path, share):
    (tmp_path / "config.json").write_text("{}")
    weights = {f"layer{index}": torch.zeros(1 << 21) for index in range(3)}
    hashes = set()
    for name in [None, *weights]:
        changed = {key: value.clone() for key, value in weights.items()}
        if name is not None:
            changed[name][min(int(share * (1 << 21)), (1 << 21) - 1)] = 1.0
        save_file(changed, tmp_path / "model.safetensors")
        hashes.add(content_hash(tmp_path))
    assert len(hashes) == 4


def test_the_reference_beside_an_adapter_counts(tmp_path):
    hashes = set()
    for value in (0.0, 1.0):
        for folder in (tmp_path, tmp_path / "ref", tmp_path / "checkpoint-1"):
            folder.mkdir(exist_ok=True)
            (folder / "adapter_config.json").write_text("{}")
            kept = 0.0 if folder == tmp_path else value
            save_file({"weight": torch.full((2,), kept)}, folder / "adapter_model.safetensors")
        hashes.add(content_hash(tmp_path))
    assert len(hashes) == 2


@pytest.mark.timing
def test_hash_of_the_demo_folder_is_cheap(demo):
    started = time.perf_counter()
    content_hash(Path(demo.identity["resolved"]))
    assert time.perf_counter() - started < 0.3


def test_adapters_are_followed_to_their_base(tmp_path):
    for name, base in (("first", "tiny:llama"), ("second", str(tmp_path / "first")), ("third", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    located, name, chain = resolve_source(str(tmp_path / "second"), (str(tmp_path / "third"),))
    assert (located.name, name) == ("llama", "tiny:llama")
    assert [path.name for path in chain] == ["first", "second", "third"]


@pytest.mark.parametrize(("base", "said"), [(None, "names no base"), (".", "to itself")])
def test_adapters_without_end(tmp_path, base, said):
    fields = {"base_model_name_or_path": str(tmp_path) if base else None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelError, match=said):
        resolve_source(str(tmp_path))


def test_home_is_expanded(tmp_path, monkeypatch, folder):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/model").path == folder
