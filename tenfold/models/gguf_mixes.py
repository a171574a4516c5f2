"""llama.cpp's own mixes: which type each matrix gets when ``llama-quantize`` is asked for Q4_K_M and the like.

The rules are those of ``src/llama-quant.cpp`` at ggml-org/llama.cpp 007dbbf, for models without experts. They gave the
types of published Q4_K_M files of Gemma 3 270M and Qwen2.5 Coder 0.5B, tensor for tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tenfold.errors import ConfigError
from tenfold.models.gguf_architectures import family_of, file_tensors
from tenfold.models.gguf_types import settled_type


@dataclass(frozen=True)
class _Place:
    """Where a matrix stands, as far as the rules ask."""

    layer: int
    layers: int
    group: int
    """Query heads that share a key head."""
    weighted: bool
    """Whether there is an importance."""

    @property
    def first(self) -> bool:
        """In the first eighth of the layers."""
        return self.layer < self.layers // 8

    @property
    def more(self) -> bool:
        """In the first or last eighth, or every third layer between."""
        return self.first or self.layer >= 7 * self.layers // 8 or (self.layer - self.layers // 8) % 3 == 2

    @property
    def middle(self) -> bool:
        return self.layers // 8 <= self.layer < 7 * self.layers // 8


_Rule = Callable[[_Place], str | bool]
"""The type of a matrix, or something false for that of most."""


@dataclass(frozen=True)
class _Mix:
    """The type of most matrices, and of those that have their own: by the part of the tensor's name."""

    most: str
    rules: dict[str, _Rule]
    head: str = "q6_k"


def _always(kind: str) -> _Rule:
    return lambda place: kind


def _more(kind: str) -> dict[str, _Rule]:
    return dict.fromkeys(("attn_v", "ffn_down"), lambda place: place.more and kind)


def _shared(kind: str) -> _Rule:
    return lambda place: place.group >= 4 and kind


def _first(kind: str) -> _Rule:
    return lambda place: place.first and kind


def _four_bit_codebook(most: str) -> _Mix:
    down: _Rule = lambda place: place.first and not place.weighted and "q5_k"  # noqa: E731
    return _Mix(most, {"attn_v": _shared("q5_k"), "ffn_down": down})


_MIXES = {
    "q8_0": _Mix("q8_0", {}, head="q8_0"),
    "q6_k": _Mix("q6_k", {}),
    "q5_k_m": _Mix("q5_k", _more("q6_k")),
    "q5_k_s": _Mix("q5_k", {}),
    "q5_1": _Mix("q5_1", {}),
    "q5_0": _Mix("q5_0", {"ffn_down": lambda place: place.weighted and place.first and "q5_1"}),
    "q4_k_m": _Mix("q4_k", _more("q6_k")),
    "q4_k_s": _Mix("q4_k", {"attn_v": lambda place: place.layer < 4 and "q5_k", "ffn_down": _first("q5_k")}),
    "q4_1": _Mix("q4_1", {}),
    "q4_0": _Mix("q4_0", {"ffn_down": lambda place: place.weighted and place.first and "q4_1"}),
    "iq4_nl": _four_bit_codebook("iq4_nl"),
    "iq4_xs": _four_bit_codebook("iq4_xs"),
    "q3_k_l": _Mix("q3_k", dict.fromkeys(("attn_v", "ffn_down", "attn_output"), _always("q5_k"))),
    "q3_k_m": _Mix(
        "q3_k",
        {
            "attn_v": lambda place: "q5_k" if place.layer < 2 else "q4_k",
            "ffn_down": lambda place: "q5_k" if place.layer < place.layers // 16 else "q4_k",
            "attn_output": _always("q4_k"),
        },
    ),
    "q3_k_s": _Mix("q3_k", {}),
    "iq3_m": _Mix("iq3_s", {"attn_v": _always("q4_k"), "ffn_down": _first("q4_k"), "attn_output": _always("q4_k")}),
    "iq3_s": _Mix("iq3_s", {"attn_v": _shared("q4_k")}),
    "iq3_xs": _Mix(
        "iq3_s",
        {
            "attn_v": _shared("q4_k"),
            **dict.fromkeys(("attn_q", "attn_k"), _always("iq3_xxs")),
            **dict.fromkeys(("ffn_gate", "ffn_up"), lambda place: place.middle and "iq3_xxs"),
        },
    ),
    "q2_k": _Mix(
        "q2_k",
        {
            "attn_v": lambda place: "q4_k" if place.group >= 4 else "q3_k",
            **dict.fromkeys(("ffn_down", "attn_output"), _always("q3_k")),
        },
    ),
    "q2_k_s": _Mix("q2_k", {"attn_v": _shared("q4_k"), "ffn_down": _first("q4_k")}),
}


def native_mix(name: str, model: Any, *, weighted: bool = False) -> dict[str, str]:
    """The types that llama.cpp would choose, for `write_gguf` and `gguf_sizes`.

    Args:
        name: of the mix, as ``llama-quantize`` takes it: ``Q4_K_M``.
        model: of an architecture that can be written.
        weighted: whether an importance will be given, on which some rules depend.

    Returns:
        A type by the name of each matrix's module; already the substitute (`settled_type`) where rows do not divide.

    Raises:
        ConfigError: unknown mix.
        ModelError: as `write_gguf`.

    >>> from tenfold.models.tiny import tiny_model
    >>> native_mix("Q4_0", tiny_model("llama").model)["model.embed_tokens"]
    'q4_0'
    """
    mix = _MIXES.get(name.lower())
    if mix is None:
        raise ConfigError(f"unknown mix {name!r}", remedy=f"give one of: {', '.join(_MIXES).upper()}")
    config, matrices = model.config, [one for one in file_tensors(model) if one.module]
    layers, group = config.num_hidden_layers, config.num_attention_heads // config.num_key_value_heads
    head = "output.weight" if any(one.name == "output.weight" for one in matrices) else "token_embd.weight"
    large = layers == 80 and (group > 1 or family_of(model).name == "qwen2")  # known to llama.cpp as 70B
    found = {}
    for one in matrices:
        part = one.name.split(".")[-2]
        if one.name == head:
            kind = mix.head if settled_type(mix.most, one.shape[-1]) == mix.most else "q8_0"
        else:
            layer = int(one.name.split(".")[1]) if one.name.startswith("blk.") else 0
            rule = mix.rules.get(part)
            own = rule(_Place(layer, layers, group, weighted)) if rule else False
            kind = own if isinstance(own, str) else mix.most
            if large and part == "attn_v" and kind in ("q3_k", "q4_k"):
                kind = "q5_k"
        found[one.module] = settled_type(kind, one.shape[-1])
    return found
