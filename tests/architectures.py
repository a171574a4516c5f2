"""Architectures that people have, as tiny random models, and what can be done with each: the table of docs/models.md.

`tests/models/test_architectures.py` holds every cell of it to what is written here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Kind = Literal["dense", "experts", "recurrent", "hybrid", "pictures"]

_COMMON = {
    "vocab_size": 262,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}  # fmt: skip
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
_TEXT = {**_COMMON, "sliding_window": None}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
           "image_size": 28, "patch_size": 14}  # fmt: skip
_QWEN_TEXT = {**_COMMON, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
_QWEN_VISION = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "out_hidden_size": 32, "patch_size": 4,
                "intermediate_size": 48, "fullatt_block_indexes": [0], "window_size": 16}  # fmt: skip
_QWEN_IDS = {"image_token_id": 261, "video_token_id": 260, "vision_start_token_id": 259, "vision_end_token_id": 258}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2, "mamba_d_conv": 4}


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Args:
        name: that people know.
        model_type: of its configuration.
        fields: of the configuration, beside those that all tiny models share.
        kind: dense, with experts, recurrent, a hybrid of recurrent layers and attention, or for pictures and text.
        refused: operation -> the reason, of `REASONS`; all others work.
    """

    name: str
    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)
    kind: Kind = "dense"
    refused: dict[str, str] = field(default_factory=dict)


OPERATIONS = {
    "open": "opens by its folder; a batch of unequal texts scores and writes as each alone",
    "lora": "`tenfold adapt --method lora`",
    "adalora": "`tenfold adapt`",
    "full": "`tenfold adapt --method full`",
    "export": "`tenfold export` of the adapter, merged; its logits are those of the adapter in PEFT",
    "evaluate": "`tenfold evaluate --tasks perplexity speed memory`",
    "generate": "`tenfold generate`",
    "steer": "`tenfold generate --emphasise`",
    "gear": "`tenfold generate --kv gear:4`",
    "lengthen": "`tenfold lengthen`",
    "reward": "`tenfold align --target reward`",
}
"""What is tried, and how one would do it."""

REASONS = {
    "off the interface": "no causal self-attention that uses transformers' attention interface",
    "own spans": "some of its layers have spans of their own",
    "no full attention": "no layer of full attention alone",
    "latent attention": "its cache holds what keys and values are made of",
    "no head": "have no head for task 'reward'",
}
"""Why something is refused, in short, and what the refusal says."""

OFF = dict.fromkeys(("steer", "gear", "lengthen"), "off the interface")
SPANS = {"lengthen": "own spans"}
HEADLESS = {"reward": "no head"}

TABLE = (
    Architecture("Llama, SmolLM2", "llama"),
    Architecture("Mistral", "mistral", {"sliding_window": None}),
    Architecture("Qwen2", "qwen2"),
    Architecture("Qwen3", "qwen3", {"head_dim": 8}),
    Architecture("Gemma 2", "gemma2", {**_WINDOWS, "head_dim": 8, "query_pre_attn_scalar": 8}, refused=SPANS),
    Architecture("Gemma 3", "gemma3_text", {**_WINDOWS, "head_dim": 8, "query_pre_attn_scalar": 8}, refused=SPANS),
    Architecture("Phi-2", "phi", {"partial_rotary_factor": 0.5}),
    Architecture("Phi-3", "phi3"),
    Architecture("OLMo", "olmo"),
    Architecture("OLMo 2", "olmo2"),
    Architecture("OPT", "opt", {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    Architecture("BLOOM", "bloom", {"n_layer": 2, "n_head": 4}, refused=OFF),
    Architecture("GPT-NeoX, Pythia", "gpt_neox", {"rotary_pct": 0.5}),
    Architecture("GPT-2", "gpt2", _GPT2),
    Architecture("GPT-J", "gptj", {**_GPT2, "rotary_dim": 4}, refused=OFF),
    Architecture("CodeGen", "codegen", {**_GPT2, "rotary_dim": 4}, refused={**OFF, **HEADLESS}),
    Architecture("StarCoder", "gpt_bigcode", _GPT2),
    Architecture("StarCoder2", "starcoder2"),
    Architecture("Falcon", "falcon", refused=OFF),
    Architecture("MPT", "mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 512}, refused=OFF),
    Architecture("Command R", "cohere", refused=HEADLESS),
    Architecture("Command R7B", "cohere2", _WINDOWS, refused={**SPANS, **HEADLESS}),
    Architecture("Granite", "granite", refused=HEADLESS),
    Architecture("StableLM", "stablelm"),
    Architecture("Nemotron", "nemotron", {"head_dim": 8}),
    Architecture("GLM-4", "glm4", {"head_dim": 8}),
    Architecture("SmolLM3", "smollm3"),
    Architecture("EXAONE 4", "exaone4", _WINDOWS, refused=SPANS),
    Architecture("InternLM3", "internlm3", refused=HEADLESS),
    Architecture("Mixtral", "mixtral", _EXPERTS, "experts"),
    Architecture("Qwen3-MoE", "qwen3_moe", {**_EXPERTS, "head_dim": 8}, "experts"),
    Architecture("DeepSeek-V3", "deepseek_v3", {**_EXPERTS, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
                 "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
                 "num_key_value_heads": 4}, "experts", {"gear": "latent attention"}),
    Architecture("gpt-oss", "gpt_oss", {**_EXPERTS, **_WINDOWS, "head_dim": 8}, "experts", SPANS),
    Architecture("Granite-MoE", "granitemoe", _EXPERTS, "experts", HEADLESS),
    Architecture("OLMoE", "olmoe", _EXPERTS, "experts", HEADLESS),
    Architecture("Mamba", "mamba", {"state_size": 8}, "recurrent", {**OFF, **HEADLESS}),
    Architecture("Mamba-2", "mamba2", {"state_size": 8, "num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1,
                 "chunk_size": 16}, "recurrent", {**OFF, **HEADLESS}),
    Architecture("Falcon-Mamba", "falcon_mamba", {"state_size": 8}, "recurrent", {**OFF, **HEADLESS}),
    Architecture("RecurrentGemma", "recurrent_gemma", {"num_hidden_layers": 3, "lru_width": 32, "head_dim": 8,
                 "attention_window_size": 512, "num_key_value_heads": 1}, "hybrid",
                 {"gear": "no full attention", **SPANS, **HEADLESS}),
    Architecture("Jamba", "jamba", {**_EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1,
                 "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8}, "hybrid"),
    Architecture("Qwen3-Next", "qwen3_next", {**_EXPERTS, "head_dim": 8,
                 "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
                 "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}, "hybrid"),
    Architecture("LFM2", "lfm2", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48}, "hybrid",
                 HEADLESS),
    Architecture("Falcon-H1", "falcon_h1", {**_MAMBA, "mamba_d_ssm": 64, "head_dim": 8}, "hybrid",
                 {"gear": "no full attention", **HEADLESS}),
    Architecture("Bamba", "bamba", {**_MAMBA, "attn_layer_indices": [1]}, "hybrid", HEADLESS),
    Architecture("Granite 4", "granitemoehybrid", {**_EXPERTS, **_MAMBA, "layer_types": ["mamba", "attention"],
                 "shared_intermediate_size": 48}, "hybrid", HEADLESS),
    Architecture("Zamba2", "zamba2", {"num_hidden_layers": 4, "hybrid_layer_ids": [1, 3], "mamba_d_state": 8,
                 "n_mamba_heads": 4, "mamba_headdim": 16, "mamba_ngroups": 1, "num_mem_blocks": 1,
                 "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "adapter_rank": 4, "chunk_size": 16},
                 "hybrid", OFF),
    Architecture("Gemma 3 with pictures", "gemma3", {"text_config": {**_COMMON, **_WINDOWS, "head_dim": 8},
                 "vision_config": _VISION, "mm_tokens_per_image": 4}, "pictures", SPANS),
    Architecture("Llava", "llava", {"text_config": {"model_type": "llama", **_COMMON},
                 "vision_config": {"model_type": "clip_vision_model", **_VISION}, "image_token_index": 261},
                 "pictures", HEADLESS),
    Architecture("Qwen2-VL", "qwen2_vl", {"text_config": _QWEN_TEXT, "vision_config": _QWEN_VISION, **_QWEN_IDS},
                 "pictures", HEADLESS),
    Architecture("Qwen2.5-VL", "qwen2_5_vl", {"text_config": _QWEN_TEXT, "vision_config": _QWEN_VISION, **_QWEN_IDS},
                 "pictures", HEADLESS),
    Architecture("Qwen3-VL", "qwen3_vl", {"text_config": {**_QWEN_TEXT, "head_dim": 8},
                 "vision_config": {**_QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
                 **_QWEN_IDS}, "pictures", HEADLESS),
    Architecture("Idefics3", "idefics3", {"text_config": {"model_type": "llama", **_COMMON}, "vision_config": _VISION,
                 "image_token_id": 261, "scale_factor": 1}, "pictures", HEADLESS),
    Architecture("SmolVLM", "smolvlm", {"text_config": {"model_type": "llama", **_COMMON}, "vision_config": _VISION,
                 "image_token_id": 261, "scale_factor": 1}, "pictures", HEADLESS),
    Architecture("Mistral Small 3.1, Pixtral", "mistral3", {"text_config": {"model_type": "mistral", **_TEXT},
                 "vision_config": {"model_type": "pixtral", **_VISION, "head_dim": 16}, "image_token_index": 261,
                 "spatial_merge_size": 1}, "pictures", HEADLESS),
    Architecture("InternVL", "internvl", {"text_config": {"model_type": "qwen2", **_COMMON}, "image_token_id": 261,
                 "vision_config": {**_VISION, "image_size": [28, 28], "patch_size": [14, 14]}}, "pictures", HEADLESS),
)  # fmt: skip


def configuration(row: Architecture) -> Any:
    """Its configuration, of a size that runs in milliseconds."""
    from transformers import AutoConfig

    if row.kind == "pictures":
        return AutoConfig.for_model(row.model_type, **row.fields)
    base = AutoConfig.for_model(row.model_type)
    shared = {key: value for key, value in _COMMON.items() if hasattr(base, key)}
    return AutoConfig.for_model(row.model_type, **{**shared, **row.fields})


def stock(model_type: str) -> Any:
    """The class of transformers by which one opens it."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    pictures = [row.model_type for row in TABLE if row.kind == "pictures" and row.model_type != "gemma3"]
    return AutoModelForImageTextToText if model_type in pictures else AutoModelForCausalLM


def save(row: Architecture, folder: Path) -> Path:
    """A random model of it with a tokenizer of bytes, as people have one: a folder."""
    import torch

    from tenfold.models.tiny import tiny_tokenizer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = stock(row.model_type).from_config(configuration(row)).float().eval()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
