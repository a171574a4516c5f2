"""What a GGUF file says and transformers' reader (5.23) does not read: carried over, or refused by name."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tenfold.errors import ModelError
from tenfold.models.gguf_rope import FACTORS, carry_rope
from tenfold.models.head_sizes import head_dim

INSTEAD = "give the original model (a folder or hub id) instead"

# fmt: off
SHAPES = frozenset({
    "vocab_size", "context_length", "block_count", "embedding_length", "embedding_length_out",
    "feed_forward_length", "expert_feed_forward_length", "expert_shared_feed_forward_length", "tensor_data_layout",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon", "rope.freq_base", "nextn_predict_layers",
    "leading_dense_block_count", "decoder_block_count", "pooling_type", "token_shift_count",
    "attention.relative_buckets_count", "use_parallel_residual",
})
# fmt: on
"""Keys that the shapes of the tensors repeat, that the reader uses, or that say nothing about the arithmetic."""

SAME_NAME = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "logit_scale": "logit_scale",
    "residual_scale": "residual_multiplier",
    "embedding_scale": "embedding_multiplier",
    "attention.sliding_window": "sliding_window",
    "attention.key_length": "head_dim",
    "expert_weights_norm": "norm_topk_prob",
}
"""Key -> the field of a configuration that means the same, where the configuration has it."""

NEUTRAL = (0, 0.0, 1.0, False, "none", "")
"""Values under which a scale, a cap or a switch changes nothing."""

TRUSTED = frozenset({"gemma4", "gpt-oss", "lfm2", "mamba", "minimax-m2", "qwen35", "qwen35moe", "t5", "t5encoder"})
"""Architectures that the reader arranges by hand, key by key: what it leaves there is no sign of a fault."""

IGNORED_BY_DESIGN = {"qwen2": {"attention.sliding_window"}, "bloom": {"attention.max_alibi_bias"}}
"""Architecture -> keys that llama.cpp does not use either, or that the architecture fixes."""


@dataclass(frozen=True)
class Header:
    """The metadata of one file that decide what the model computes."""

    architecture: str
    keys: Mapping[str, Any]
    """Keys of the architecture, without its prefix."""
    tokenizer: Mapping[str, Any]
    """Keys of the tokenizer, without ``tokenizer.ggml.``; long lists are left out."""
    factors: Mapping[str, np.ndarray]
    """Rotary divisors; each ``[rotary dimensions / 2]``."""
    tensors: tuple[str, ...]
    """Names of all tensors."""


def read_header(file: Path) -> Header:
    """Read metadata and tensor names; of the tensors only the rotary divisors."""
    from gguf import GGUFReader

    reader = GGUFReader(str(file))
    architecture = str(reader.fields["general.architecture"].contents())
    return Header(
        architecture=architecture,
        keys=_under(reader, f"{architecture}."),
        tokenizer=_under(reader, "tokenizer.ggml.", without=("tokens", "scores", "token_type", "merges")),
        factors={one.name: np.array(one.data, dtype=np.float32) for one in reader.tensors if one.name in FACTORS},
        tensors=tuple(one.name for one in reader.tensors),
    )


def _under(reader: Any, prefix: str, without: Container[str] = ()) -> dict[str, Any]:
    """The values of all keys that begin so, named by the rest."""
    rest = {name.removeprefix(prefix): field for name, field in reader.fields.items() if name.startswith(prefix)}
    return {name: field.contents() for name, field in rest.items() if name not in without}


def carry_over(config: Any, header: Header, where: str) -> None:
    """Complete a configuration that the reader made of a file.

    Args:
        config: changed in place.
        header: of the same file.
        where: the file, for errors.

    Raises:
        ModelError: naming each key that says something about the arithmetic and has no place in the configuration.
    """
    text = config.get_text_config()
    if header.architecture not in TRUSTED:
        _settle_rotary_width(text, header, where)
    used = carry_rope(text, header.keys, header.factors, where) | {"rope.dimension_count"}
    _settle_attention(text, header)
    unread = set(header.keys) - used - SHAPES - _read_by_transformers(header.architecture, text.model_type)
    unread -= IGNORED_BY_DESIGN.get(header.architecture, set())
    if header.architecture in TRUSTED:
        return
    refused = [key for key in sorted(unread) if not _carried(text, key, header.keys[key])]
    if refused:
        named = ", ".join(f"{header.architecture}.{key} = {header.keys[key]}" for key in refused)
        raise ModelError(f"{where}: {type(text).__name__} has no place for {named}", remedy=INSTEAD)


def check_tensors(model: Any, header: Header, unexpected: Iterable[str], where: str) -> None:
    """Refuse a file that holds tensors which the model has no place for.

    Args:
        model: as the reader built it.
        header: of the file.
        unexpected: what ``from_pretrained`` reported as unexpected.
        where: the file, for errors.

    Raises:
        ModelError: naming the first tensors that were left out.
    """
    left = [name for name in (*unexpected, *_dropped(model, header)) if name not in FACTORS and "rot_embd" not in name]
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise ModelError(
            f"{where}: the model has no place for the tensors {', '.join(left[:3])}{more} of the file", remedy=INSTEAD
        )


def _dropped(model: Any, header: Header) -> list[str]:
    """The tensors that transformers' older reader, which knows most architectures, passes over without a report."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    try:
        from transformers.integrations.gguf import is_gguf_arch_supported

        if is_gguf_arch_supported(header.architecture):
            return []
    except ImportError:  # before 5.23 there was one reader
        pass
    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config={})
    placed = get_gguf_hf_weights_map(model, processor)
    return [name for name in header.tensors if name not in placed and name.removesuffix(".weight") not in placed]


def carry_biases(config: Any, header: Header) -> None:
    """Switch on the biases that the file has and the configuration can have (Llama-shaped models with biases)."""
    text = config.get_text_config()
    for field, places in (("attention_bias", ("attn_q", "attn_output")), ("mlp_bias", ("ffn_up", "ffn_down"))):
        if getattr(text, field, None) is False and all(f"blk.0.{place}.bias" in header.tensors for place in places):
            setattr(text, field, True)


def _read_by_transformers(architecture: str, model_type: str) -> set[str]:
    """Keys that transformers turns into fields of a configuration."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING

    known = GGUF_TO_TRANSFORMERS_MAPPING["config"]
    table = known.get(architecture) or known.get(model_type.removesuffix("_text")) or {}
    return {key for key, field in table.items() if field not in (None, -1)}


def _carried(config: Any, key: str, value: Any) -> bool:
    """Put one key into the configuration; whether that was possible, or there was nothing to do."""
    if key == "attention.causal":
        return bool(value)
    if key == "attention.value_length":
        return bool(value == getattr(config, "head_dim", value))
    if key == "attention.scale":
        return _carried_scale(config, float(value))
    if key == "attention.sliding_window_pattern" and hasattr(config, "layer_types"):
        config.layer_types = _layer_types(value, config.num_hidden_layers)
        return True
    field = SAME_NAME.get(key)
    if field is not None and hasattr(config, field):
        setattr(config, field, value)
        return True
    if key == "attention.key_length":
        return bool(value == config.hidden_size // config.num_attention_heads)
    return value is not True and isinstance(value, int | float | str) and value in NEUTRAL  # True equals 1.0


def _carried_scale(config: Any, scale: float) -> bool:
    """The factor of attention's logits: Gemma's field holds the inverse of its square, Granite's the factor itself."""
    if hasattr(config, "query_pre_attn_scalar"):
        config.query_pre_attn_scalar = scale**-2
        return True
    if hasattr(config, "attention_multiplier"):
        config.attention_multiplier = scale
        return True
    return scale == 0 or bool(np.isclose(scale, head_dim(config) ** -0.5, rtol=1e-5))


def _layer_types(pattern: int | list[bool], layers: int) -> list[str]:
    """Which layers slide: a flag for each, or a number n of which every n-th is full, as llama.cpp reads them."""
    flags = [layer % pattern < pattern - 1 for layer in range(layers)] if isinstance(pattern, int) else pattern
    return ["sliding_attention" if sliding else "full_attention" for sliding in flags]


def _settle_attention(config: Any, header: Header) -> None:
    """Gemma 2 and 3 do not store their factor of attention's logits: llama.cpp knows it by the size of the model."""
    largest = {"gemma2": 46, "gemma3": 62}.get(header.architecture)
    if largest is None:
        return
    heads = int(config.num_attention_heads)
    whole = config.num_hidden_layers == largest
    width = header.keys.get("attention.key_length", config.head_dim)
    config.query_pre_attn_scalar = config.hidden_size // heads if whole else width


def _settle_rotary_width(config: Any, header: Header, where: str) -> None:
    """How many dimensions of a head turn: a field where the architecture can turn a part of them."""
    turning = header.keys.get("rope.dimension_count")
    rope = getattr(config, "rope_parameters", None)
    if turning is None or not rope:
        return
    width = int(header.keys.get("attention.key_length") or head_dim(config))
    if turning == int(width * rope.get("partial_rotary_factor", 1.0)):
        return
    if "partial_rotary_factor" not in rope:
        raise ModelError(
            f"{where}: {turning} of the {width} dimensions of a head turn, which {type(config).__name__} cannot",
            remedy=INSTEAD,
        )
    config.rope_parameters = rope | {"partial_rotary_factor": turning / width}
