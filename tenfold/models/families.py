"""How each architecture names its modules: one table entry per model type."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

GROUPS: dict[str, tuple[str, ...]] = {
    "attention": ("q", "k", "v", "o", "qkv", "cross_q", "cross_k", "cross_v", "cross_o", "pos_q", "pos_k"),
    "mlp": ("gate", "up", "down", "gate_up", "fc1", "fc2"),
}
GROUPS["all-linear"] = GROUPS["attention"] + GROUPS["mlp"]


@dataclass(frozen=True)
class Family:
    """Module names of one architecture.

    Args:
        block: the name of a block, with ``{i}`` for its index.
        inside: names within a block, as regular expressions, and their roles.
        outside: the same for what is not in a block.
        gated: roles that differ where ``config.is_gated_act`` holds.
        stack: of every module; an encoder-decoder tells them apart by ``encoder.`` and ``decoder.`` in the name.

    >>> pattern, role = FAMILIES["llama"].compiled(gated=False)[0]
    >>> role, bool(pattern.fullmatch("model.layers.7.self_attn.q_proj"))
    ('q', True)
    """

    block: str
    inside: dict[str, str]
    outside: dict[str, str]
    gated: dict[str, str] = field(default_factory=dict)
    stack: Literal["decoder", "encoder", "both"] = "decoder"

    def compiled(self, gated: bool) -> list[tuple[re.Pattern[str], str]]:
        """Patterns of whole module names under any prefix, each with its role; ``gated`` as in the configuration."""
        roles = {**self.inside, **self.gated} if gated else self.inside
        block = self._block()
        pairs = [(rf"{block}\.{name}", role) for name, role in roles.items()] + list(self.outside.items())
        return [(re.compile(rf"(?:.*\.)?{pattern}"), role) for pattern, role in pairs]

    def in_block(self, name: str) -> bool:
        """Whether a module belongs to one of the blocks."""
        return re.fullmatch(rf"(?:.*\.)?{self._block()}\..*", name) is not None

    def stack_of(self, name: str) -> Literal["decoder", "encoder"]:
        """The stack that a module belongs to."""
        if self.stack == "both":
            return "decoder" if re.match(r"(.*\.)?(decoder|lm_head|classification_head)\b", name) else "encoder"
        return self.stack

    def _block(self) -> str:
        return re.escape(self.block).replace(r"\{i\}", r"(?P<layer>\d+)")


_LLAMA_INSIDE = {
    r"self_attn\.q_proj": "q",
    r"self_attn\.k_proj": "k",
    r"self_attn\.v_proj": "v",
    r"self_attn\.o_proj": "o",
    r"mlp\.gate_proj": "gate",
    r"mlp\.up_proj": "up",
    r"mlp\.down_proj": "down",
    r"(input|post_attention|pre_feedforward|post_feedforward)_layernorm": "norm",
    r"self_attn\.[qk]_norm": "norm",
}
_LLAMA_OUTSIDE = {"embed_tokens": "embed", "norm": "norm", "lm_head": "head", "score": "head"}
_LLAMA = Family("layers.{i}", _LLAMA_INSIDE, _LLAMA_OUTSIDE)

_PHI3 = Family(
    "layers.{i}",
    {
        r"self_attn\.qkv_proj": "qkv",
        r"self_attn\.o_proj": "o",
        r"mlp\.gate_up_proj": "gate_up",
        r"mlp\.down_proj": "down",
        r"(input|post_attention)_layernorm": "norm",
    },
    _LLAMA_OUTSIDE,
)

_GPT2 = Family(
    "h.{i}",
    {
        r"attn\.c_attn": "qkv",
        r"attn\.c_proj": "o",
        r"mlp\.c_fc": "fc1",
        r"mlp\.c_proj": "fc2",
        r"ln_[12]": "norm",
    },
    {"wte": "embed", "wpe": "position", "ln_f": "norm", "lm_head": "head", "score": "head"},
)

_T5 = Family(
    "block.{i}",
    {
        **{rf"layer\.\d\.SelfAttention\.{role}": role for role in "qkvo"},
        **{rf"layer\.\d\.EncDecAttention\.{role}": f"cross_{role}" for role in "qkvo"},
        r"layer\.\d\.SelfAttention\.relative_attention_bias": "position",
        r"layer\.\d\.DenseReluDense\.wi": "fc1",
        r"layer\.\d\.DenseReluDense\.wi_0": "gate",
        r"layer\.\d\.DenseReluDense\.wi_1": "up",
        r"layer\.\d\.DenseReluDense\.wo": "fc2",
        r"layer\.\d\.layer_norm": "norm",
    },
    {
        "shared": "embed",
        "embed_tokens": "embed",
        "final_layer_norm": "norm",
        "lm_head": "head",
        r"classification_head\.(dense|out_proj)": "head",
    },
    gated={r"layer\.\d\.DenseReluDense\.wo": "down"},
    stack="both",
)

_DEBERTA = Family(
    "layer.{i}",
    {
        r"attention\.self\.query_proj": "q",
        r"attention\.self\.key_proj": "k",
        r"attention\.self\.value_proj": "v",
        r"attention\.self\.pos_query_proj": "pos_q",
        r"attention\.self\.pos_key_proj": "pos_k",
        r"attention\.output\.dense": "o",
        r"intermediate\.dense": "fc1",
        r"output\.dense": "fc2",
        r"(attention\.)?output\.LayerNorm": "norm",
    },
    {
        r"embeddings\.word_embeddings": "embed",
        r"embeddings\.position_embeddings": "position",
        r"encoder\.rel_embeddings": "position",
        r"(embeddings|encoder)\.LayerNorm": "norm",
        r"pooler\.dense": "head",
        "classifier": "head",
    },
    stack="encoder",
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "phi3": _PHI3,
    "gpt2": _GPT2,
    "t5": _T5,
    "deberta-v2": _DEBERTA,
}
"""By ``config.model_type``. SmolLM2 is a ``llama``; DeBERTa-v3 is a ``deberta-v2``."""
