"""The architectures that can be written as GGUF: what a file says of the arithmetic, how it names and lays out tensors.

The mirror of `tenfold.models.gguf_metadata` and `tenfold.models.gguf_rope`, which read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tenfold.errors import ModelError
from tenfold.models.changes import changes_of, compression
from tenfold.models.head_sizes import head_dim
from tenfold.models.quantised import refuse_quantised


@dataclass(frozen=True)
class Family:
    """An architecture of llama.cpp, and what its files do differently.

    Args:
        name: llama.cpp's.
        activation: of the MLP, the only one that llama.cpp computes there.
        interleaved: rows of queries and keys stand in the order of neighbouring pairs that turn, not of halves.
        one_added: norms are stored with the one that the model adds to them.
        biases: of which tensors llama.cpp reads a bias.
    """

    name: str
    activation: str = "silu"
    interleaved: bool = False
    one_added: bool = False
    biases: tuple[str, ...] = ()


_ATTENTION = ("attn_q", "attn_k", "attn_v")
_LLAMA = Family("llama", interleaved=True, biases=(*_ATTENTION, "attn_output", "ffn_gate", "ffn_up", "ffn_down"))
FAMILIES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Family("qwen2", biases=_ATTENTION),
    "Qwen3ForCausalLM": Family("qwen3"),
    "Gemma3ForCausalLM": Family("gemma3", activation="gelu_pytorch_tanh", one_added=True),
}
"""Class of ``transformers`` -> family."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a file, made when it is asked for.

    Args:
        name: in the file.
        module: whose weight it is; empty for norms, biases and rotary divisors, which are always f32.
        shape: rows first.
        values: makes the numbers, float32 in the file's order.
    """

    name: str
    module: str
    shape: tuple[int, ...]
    values: Callable[[], np.ndarray] = field(compare=False, repr=False)


def family_of(model: Any) -> Family:
    """The family of a model that can be written as it is.

    Raises:
        ModelError: another architecture; adapters, quantised or compressed layers, local spans; naming which.
    """
    if hasattr(model, "peft_config"):
        raise ModelError("adapters are attached to this model", remedy="write merge(model)")
    refuse_quantised(model, "the model cannot be written as GGUF", "open it without load, and write that")
    if (method := compression(model.config)) is not None:
        raise ModelError(
            f"GGUF has no form for layers compressed by {method}", remedy="export the dense form of the model"
        )
    if changed := changes_of(model):
        raise ModelError(f"GGUF has no form for {', '.join(changed)}", remedy="write the model before it is converted")
    name = type(model).__name__
    if name not in FAMILIES:
        raise ModelError(f"{name} cannot be written as GGUF", remedy=f"give one of: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def architecture_keys(model: Any) -> dict[str, Any]:
    """The keys of the architecture, without its prefix.

    Raises:
        ModelError: for what the configuration says and llama.cpp does not compute, by name.
    """
    family, config = family_of(model), model.config
    _refuse_arithmetic(config, family)
    width = head_dim(config)
    keys = {
        "vocab_size": model.get_input_embeddings().weight.shape[0],
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": width,
        "attention.value_length": width,
        "rope.dimension_count": width,
    }
    if family.name == "gemma3":
        keys |= {
            "attention.sliding_window": config.sliding_window,
            "attention.sliding_window_pattern": _period(config.layer_types),
            "rope.freq_base_swa": float(config.rope_parameters["sliding_attention"]["rope_theta"]),
        }
    return keys | _rope_keys(_rope(config))


def file_tensors(model: Any) -> list[FileTensor]:
    """All tensors of the file that this model becomes; a head that shares the embedding's weight has none of its own.

    Raises:
        ModelError: a parameter that llama.cpp has no place for, by name.
    """
    from gguf import MODEL_ARCH, get_tensor_name_map

    family, config = family_of(model), model.config
    names = get_tensor_name_map(MODEL_ARCH[family.name.upper()], config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if family.interleaved else {}
    parameters = dict(model.named_parameters())  # the tied ones once
    extra = sorted(set(model.state_dict()) - set(dict(model.named_parameters(remove_duplicate=False))))
    found = []
    for name, parameter in parameters.items():
        stored = names.get_name(name, (".weight", ".bias"))
        bias_of = stored.split(".")[-2] if stored is not None and stored.endswith(".bias") else None
        if stored is None or (bias_of is not None and bias_of not in family.biases):
            extra.append(name)
            continue
        module = name.removesuffix(".weight") if parameter.ndim == 2 else ""
        turned = heads.get(name.split(".")[-2])
        added = float(family.one_added and parameter.ndim == 1)
        found.append(FileTensor(stored, module, tuple(parameter.shape), _reader(parameter, turned, added)))
    if extra:
        raise ModelError(
            f"llama.cpp's {family.name} has no place for {', '.join(extra[:3])}", remedy="write a plain model"
        )
    if (divisors := _divisors(_rope(config), head_dim(config))) is not None:
        found.append(FileTensor("rope_freqs.weight", "", divisors.shape, lambda: divisors))
    return found


def _reader(parameter: Any, heads: int | None, added: float) -> Callable[[], np.ndarray]:
    def values() -> np.ndarray:
        import torch

        numbers: np.ndarray = parameter.detach().to("cpu", torch.float32).numpy()
        if heads is not None:
            halves = numbers.reshape(heads, 2, numbers.shape[0] // heads // 2, *numbers.shape[1:])
            numbers = halves.swapaxes(1, 2).reshape(numbers.shape)
        return np.ascontiguousarray(numbers + np.float32(added)) if added else np.ascontiguousarray(numbers)

    return values


def _refuse_arithmetic(config: Any, family: Family) -> None:
    wanted: dict[str, tuple[Any, ...]] = {
        "hidden_act": (family.activation, None),
        "hidden_activation": (family.activation, None),
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "use_bidirectional_attention": (None, False),
    }
    if family.name == "gemma3":
        whole = config.num_hidden_layers == 62  # llama.cpp knows Gemma 3 27B by its layers
        scalar = config.hidden_size // config.num_attention_heads if whole else head_dim(config)
        wanted["query_pre_attn_scalar"] = (scalar,)
    else:
        if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
            wanted["sliding_window"] = (None,)
        if type(config).__name__ == "MistralConfig":
            wanted["sliding_window"] = (None,)
    for name, allowed in wanted.items():
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            raise ModelError(
                f"llama.cpp's {family.name} has no place for {name} = {value}; it computes {allowed[0]}",
                remedy="serve this model with transformers or vLLM",
            )


def _period(kinds: list[str]) -> int:
    """The n of which every n-th layer has full attention, as llama.cpp counts; n past the last layer means none has."""
    sliding = [kind == "sliding_attention" for kind in kinds]
    for period in range(1, len(kinds) + 2):
        if sliding == [layer % period < period - 1 for layer in range(len(kinds))]:
            return period
    raise ModelError(
        f"layer_types: llama.cpp has no place for {kinds}", remedy="serve this model with transformers or vLLM"
    )


def _rope(config: Any) -> dict[str, Any]:
    """How the rotary embedding of full attention is scaled; refused where llama.cpp computes another one."""
    rope = dict(config.rope_parameters)
    sliding = rope.get("sliding_attention", {})
    rope = dict(rope.get("full_attention", rope))
    known = {
        "default": set[str](),
        "linear": {"factor"},
        "yarn": {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"},
        "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    }
    known["longrope"] = {
        "short_factor",
        "long_factor",
        "original_max_position_embeddings",
        "factor",
        "attention_factor",
    }
    kind = rope.setdefault("rope_type", "default")
    left = {key: value for key, value in rope.items() if value is not None and key not in known.get(kind, ())}
    same = {"rope_type": kind, "rope_theta": rope["rope_theta"], "partial_rotary_factor": 1.0, "truncate": True}
    wrong = sorted(key for key, value in left.items() if same.get(key) != value)
    by_length = kind == "longrope" and (
        rope["short_factor"] != rope["long_factor"] or rope.get("attention_factor") != 1.0
    )  # equal lists are how `tenfold.models.gguf_rope` reads divisors; others depend on the length of the text
    if kind not in known or wrong or by_length or sliding.get("rope_type", "default") != "default":
        raise ModelError(
            f"rope_parameters: llama.cpp does not compute {config.rope_parameters}",
            remedy="serve this model with transformers or vLLM",
        )
    return rope


def _rope_keys(rope: dict[str, Any]) -> dict[str, Any]:
    keys: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    if rope["rope_type"] not in ("linear", "yarn"):
        return keys
    factor = float(rope["factor"])
    keys |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": factor}
    if rope["rope_type"] == "yarn":
        keys["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
        for name in ("beta_fast", "beta_slow"):
            if rope.get(name) is not None:
                keys[f"rope.scaling.yarn_{name}"] = float(rope[name])
        if rope.get("attention_factor") is not None:  # ggml multiplies what the file gives by YaRN's own correction
            keys["rope.scaling.attn_factor"] = float(rope["attention_factor"]) / (0.1 * math.log(factor) + 1.0)
    return keys


def _divisors(rope: dict[str, Any], width: int) -> np.ndarray | None:
    """What divides the frequency of each pair of dimensions: ``[width / 2]`` float32, or None."""
    if rope["rope_type"] == "longrope":
        return np.array(rope["long_factor"], dtype=np.float32)
    if rope["rope_type"] != "llama3":
        return None
    waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, width, 2) / width)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((rope["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1)
    divisors: np.ndarray = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return divisors.astype(np.float32)
