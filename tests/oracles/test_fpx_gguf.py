"""Oracle 15 of FPX: a file gives back the weights that the plan was judged by."""

from __future__ import annotations

import os

import pytest
import torch

from tenfold.models.gguf_types import gguf_format
from tenfold.models.gguf_write import gguf_sizes, write_gguf
from tenfold.models.open import open_model
from tenfold.models.tiny import tiny_model
from tenfold.models.vllm_folder import settled_formats

TYPES = ("q8_0", "q4_0", "q4_1", "mxfp4")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3"])
def test_oracle_15_a_file_gives_the_weights_of_the_process_bit_for_bit(kind, tmp_path, monkeypatch):
    """Queries and keys, and all their neighbours, have types of their own; Llama's file also reorders their rows."""
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    opened = tiny_model(kind)
    model = opened.model
    names = [name for name, module in model.named_modules() if getattr(module, "weight", None) is not None]
    matrices = [name for name in names if model.get_submodule(name).weight.ndim == 2]
    if model.lm_head.weight is model.get_input_embeddings().weight:
        matrices.remove("lm_head")
    types = {name: TYPES[index % 4] for index, name in enumerate(matrices)}
    layer = "model.layers.0.self_attn"
    assert types[f"{layer}.q_proj"] != types[f"{layer}.k_proj"]
    with torch.no_grad():
        for name, form in types.items():
            weight = model.get_submodule(name).weight
            weight.copy_(gguf_format(form).weight(weight))
    path = tmp_path / "planned.gguf"
    assert gguf_sizes(model, types, opened.tokenizer) == write_gguf(model, opened.tokenizer, path, types)
    assert gguf_sizes(model, types, opened.tokenizer).total == os.path.getsize(path)
    found = open_model(str(path), device="cpu").model
    for name in matrices:
        assert torch.equal(found.get_submodule(name).weight, model.get_submodule(name).weight), name


def test_oracle_15_what_is_multiplied_as_one_gets_the_most_precise_format_that_was_asked_for():
    """Queries and keys of two formats, which a GGUF file holds as they are, would be wrong or refused in vLLM."""
    model = tiny_model("llama").model
    names = [name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)]
    asked = dict.fromkeys(names, "int4_sym_g32")
    attention, mlp = "model.layers.0.self_attn", "model.layers.1.mlp"
    changed = {f"{attention}.k_proj": "fp8_row", f"{mlp}.up_proj": "bf16", f"{mlp}.down_proj": "nvfp4_a16"}
    settled = settled_formats(model, asked | changed)
    raised = {f"{attention}.{name}_proj": "fp8_row" for name in "qkv"}
    raised |= {f"{mlp}.gate_proj": "bf16", f"{mlp}.up_proj": "bf16", f"{mlp}.down_proj": "nvfp4_a16"}
    assert settled.formats == {name: form for name, form in (asked | raised).items() if name != "lm_head"}
    assert [note for note in settled.notes if "multiplies as one" in note] == [
        f"one format for {attention}.q_proj+k_proj+v_proj, which vLLM multiplies as one: fp8_row",
        f"one format for {mlp}.gate_proj+up_proj, which vLLM multiplies as one: bf16",
    ]
