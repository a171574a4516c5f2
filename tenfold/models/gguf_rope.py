"""Rotary embeddings of a GGUF file: what transformers' reader (5.23) leaves out, as ``rope_parameters``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tenfold.errors import ModelError

SCALING = "rope.scaling."
FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that divide the frequency of each pair of dimensions; each ``[rotary dimensions / 2]``."""

KEPT = frozenset({"rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved", "truncate"})
"""What a configuration knows of its rotary embedding besides how it is scaled."""

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every Llama 3.1, 3.2 and 3.3 was published with; their files hold only the divisors that come of it."""


def carry_rope(config: Any, keys: Mapping[str, Any], factors: Mapping[str, np.ndarray], where: str) -> set[str]:
    """Put the file's rotary scaling into a configuration.

    Args:
        config: of the text model; changed in place. Where it tells layer types apart (Gemma 3), what is scaled is full
            attention, as in llama.cpp.
        keys: metadata of the architecture, without its prefix.
        factors: the tensors of `FACTORS` that the file has.
        where: the file, for errors.

    Returns:
        The keys that were used.

    Raises:
        ModelError: for a scaling that transformers has no form for.
    """
    used = {key for key in keys if key.startswith(SCALING) or key in ("rope.scale_linear", "rope.freq_base_swa")}
    rope = config.rope_parameters if getattr(config, "rope_parameters", None) else None
    if rope is None:
        if factors or keys.get(f"{SCALING}type", "none") != "none":
            raise ModelError(
                f"{where}: rotary scaling in the file, but {type(config).__name__} has no rotary embedding",
                remedy="give the original model (a folder or hub id) instead",
            )
        return used
    if "full_attention" in rope:
        if "rope.freq_base_swa" in keys and "sliding_attention" in rope:
            rope["sliding_attention"]["rope_theta"] = float(keys["rope.freq_base_swa"])
        rope["full_attention"] = _scaled(rope["full_attention"], config, keys, factors, where)
        config.rope_parameters = rope
    else:
        config.rope_parameters = _scaled(rope, config, keys, factors, where)
    return used


def _scaled(
    rope: dict[str, Any], config: Any, keys: Mapping[str, Any], factors: Mapping[str, np.ndarray], where: str
) -> dict[str, Any]:
    kept = {key: value for key, value in rope.items() if key in KEPT}
    factor = float(keys.get(f"{SCALING}factor") or keys.get("rope.scale_linear") or 1.0)
    # llama.cpp reads a factor without a type as linear scaling
    kind = str(keys.get(f"{SCALING}type", "linear"))
    length = int(keys.get(f"{SCALING}original_context_length") or config.max_position_embeddings)
    if "rope_factors_long.weight" in factors or "rope_factors_short.weight" in factors:
        return kept | _longrope(config, keys, factors, length)
    if "rope_freqs.weight" in factors:
        if kind == "yarn" and factor != 1.0:
            raise ModelError(
                f"{where}: both yarn scaling and rope_freqs, which transformers cannot combine",
                remedy="give the original model (a folder or hub id) instead",
            )
        return kept | _divided(config, factors["rope_freqs.weight"], factor if kind == "linear" else 1.0)
    if factor == 1.0 or kind == "none":
        return rope
    if kind == "linear":
        return kept | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return kept | _yarn(keys, factor, length, where)
    raise ModelError(
        f"{where}: rope.scaling.type {kind!r} has no form in transformers",
        remedy="give the original model (a folder or hub id) instead",
    )


def _yarn(keys: Mapping[str, Any], factor: float, length: int, where: str) -> dict[str, Any]:
    if float(keys.get(f"{SCALING}yarn_ext_factor", 1.0)) != 1.0:
        raise ModelError(
            f"{where}: rope.scaling.yarn_ext_factor {keys[f'{SCALING}yarn_ext_factor']} has no form in transformers",
            remedy="give the original model (a folder or hub id) instead",
        )
    found = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
    for name in ("beta_fast", "beta_slow"):
        if f"{SCALING}yarn_{name}" in keys:
            found[name] = float(keys[f"{SCALING}yarn_{name}"])
    given = keys.get(f"{SCALING}yarn_attn_factor", keys.get(f"{SCALING}attn_factor", 1.0))
    if float(given) != 1.0:
        # ggml multiplies what the file gives by YaRN's own correction; transformers replaces that by what it is given
        found["attention_factor"] = float(given) * (0.1 * math.log(factor) + 1.0)
    return found


def _longrope(config: Any, keys: Mapping[str, Any], factors: Mapping[str, np.ndarray], length: int) -> dict[str, Any]:
    found = [factors[name] for name in ("rope_factors_short.weight", "rope_factors_long.weight") if name in factors]
    rope = {
        "rope_type": "longrope",
        "short_factor": _floats(found[0]),
        "long_factor": _floats(found[-1]),
        "original_max_position_embeddings": length,
        "factor": config.max_position_embeddings / length,
    }
    given = keys.get(f"{SCALING}attn_factor")
    if given is not None:
        rope["attention_factor"] = float(given)
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = length
    return rope


def _divided(config: Any, divisors: np.ndarray, linear: float) -> dict[str, Any]:
    """Frequencies divided one by one: Llama 3's rule where it gives these divisors, else they themselves."""
    divisors = divisors.astype(np.float64) * linear
    largest = float(divisors.max())
    if np.allclose(divisors, _llama3_divisors(config, largest, len(divisors)), rtol=1e-4):
        return {"rope_type": "llama3", "factor": round(largest, 4), **LLAMA3}
    # longrope is the one form in which transformers takes a list; short and long agree, so length plays no part
    return {
        "rope_type": "longrope",
        "short_factor": _floats(divisors),
        "long_factor": _floats(divisors),
        "original_max_position_embeddings": config.max_position_embeddings,
        "factor": 1.0,
        "attention_factor": 1.0,
    }


def _llama3_divisors(config: Any, factor: float, count: int) -> np.ndarray:
    """The divisors of Llama 3's rule: long waves are stretched by ``factor``, short ones are left, smoothly between."""
    waves = 2 * np.pi * config.rope_parameters["rope_theta"] ** (np.arange(count) / count)
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    smooth = np.clip((LLAMA3["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1)
    divisors: np.ndarray = 1 / ((1 - smooth) / factor + smooth)
    return divisors


def _floats(values: np.ndarray) -> list[float]:
    return [float(value) for value in values]
