"""Tiny random models of every supported architecture, with a working tokenizer, from code alone."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from tenfold.errors import ConfigError
from tenfold.models.opened import Opened, check_task, describe, settle_padding

_SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<|im_start|>", "<|im_end|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Grouped-query heads (4 over 2) wherever the architecture has them, so that no test passes by accident of symmetry.
_DECODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _DECODER),
    "mistral": ("mistral", {**_DECODER, "sliding_window": None}),
    "qwen2": ("qwen2", _DECODER),
    "qwen3": ("qwen3", {**_DECODER, "head_dim": 16}),
    # One layer of each kind: Gemma 3 alternates sliding-window and full attention.
    "gemma3": (
        "gemma3_text",
        {
            **_DECODER,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "t5": ("t5", {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}),
    "deberta-v2": (
        "deberta-v2",
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            # As in DeBERTa-v3: relative positions with shared keys, no absolute ones.
            "relative_attention": True,
            "position_buckets": 32,
            "max_relative_positions": -1,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
        },
    ),
}


def tiny_model(kind: str = "llama", *, task: str | None = None, seed: int = 0, **overrides: Any) -> Opened:
    """A random model of a few ten thousand parameters that behaves like a real one of its architecture.

    Needs no files. Weights depend on ``seed`` alone, and the global random state is left as it was.

    Args:
        kind: ``llama``, ``mistral``, ``qwen2``, ``qwen3``, ``gemma3``, ``gpt2``, ``t5`` or ``deberta-v2``.
        task: ``causal``, ``seq2seq``, ``classification`` or ``reward``. Default: what the architecture is for
            (``seq2seq`` for T5, ``classification`` for DeBERTa, else ``causal``).
        seed: of the weights.
        overrides: fields of the architecture's configuration, such as ``num_hidden_layers=4``.

    Returns:
        The model in float32 on the CPU, and a byte-level tokenizer with pad, bos, eos and a chat template.

    Raises:
        ConfigError: unknown kind or task.
        ModelError: the architecture has no head for the task.

    >>> opened = tiny_model("qwen2", seed=1)
    >>> ids = opened.tokenizer("hello", return_tensors="pt")
    >>> opened.model(**ids).logits.shape
    torch.Size([1, 5, 262])
    """
    import torch
    from transformers import AutoConfig

    from tenfold.models.heads import auto_class

    weights = tiny_identity(kind, seed, **overrides)
    task = task or {"t5": "seq2seq", "deberta-v2": "classification"}.get(kind, "causal")
    check_task(task)
    tokenizer = tiny_tokenizer(kind)
    model_type, fields = KINDS[kind]
    ids = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if kind == "t5":
        ids["decoder_start_token_id"] = tokenizer.pad_token_id
    config = AutoConfig.for_model(model_type, **{**ids, **fields, **overrides})
    if task == "reward":
        config.num_labels = 1
    builder = auto_class(config, task, f"tiny:{kind}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = builder.from_config(config).float().eval()
    settle_padding(model, tokenizer)
    source = f"tiny:{kind}"
    return Opened(model, tokenizer, describe(model, source, source, weights))


def tiny_configuration(kind: str) -> dict[str, Any]:
    """The fields of a tiny model's configuration as its ``config.json`` would hold them.

    Raises:
        ConfigError: unknown kind.

    >>> tiny_configuration("gpt2")["model_type"]
    'gpt2'
    """
    tiny_identity(kind)  # the error for an unknown one
    model_type, fields = KINDS[kind]
    return {"model_type": model_type, **fields}


def tiny_identity(kind: str, seed: int = 0, **overrides: Any) -> str:
    """The hash that stands for a tiny model's weights: of everything they are made from, the task's head apart.

    Raises:
        ConfigError: unknown kind.

    >>> tiny_identity("llama") == tiny_identity("llama", seed=0), tiny_identity("llama") == tiny_identity("gpt2")
    (True, False)
    """
    if kind not in KINDS:
        raise ConfigError(f"tiny:{kind}: unknown kind", remedy=f"give one of: {', '.join(KINDS)}")
    made_from = {"kind": kind, "seed": seed, "fields": {**KINDS[kind][1], **overrides}}
    return hashlib.sha256(json.dumps(made_from, sort_keys=True, default=str).encode()).hexdigest()


def tiny_tokenizer(kind: str = "llama") -> Any:
    """A byte-level tokenizer: one token per byte of UTF-8, so that every text round-trips.

    Args:
        kind: as in `tiny_model`; T5 ends every text with ``<eos>`` and DeBERTa frames it, as theirs do.

    >>> tokenizer = tiny_tokenizer()
    >>> tokenizer.decode(tokenizer("naïve")["input_ids"])
    'naïve'
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = {"t5": "$A <eos>", "deberta-v2": "<bos> $A <eos>"}.get(kind)
    if template:
        special = [(token, vocabulary[token]) for token in ("<bos>", "<eos>") if token in template]
        pair = f"{template} $B:1 <eos>:1"
        tokenizer.post_processor = processors.TemplateProcessing(single=template, pair=pair, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=_CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
