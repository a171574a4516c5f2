"""Tokenizers of GGUF files: how text is split before merging, and which tokens end a turn."""

from __future__ import annotations

from typing import Any

from tenfold.models.gguf_metadata import Header

DIGITS_APART = frozenset({"smollm", "starcoder", "codeshell", "refact", "command-r", "exaone", "minerva-7b"})
"""Values of ``tokenizer.ggml.pre`` for GPT-2's splitting after every digit was cut off, which transformers' reader
(5.23) splits like GPT-2 alone; the names are llama.cpp's."""

END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")
"""What llama.cpp ends an answer at, whatever the end-of-text token is."""


def carry_tokenizer(model: Any, tokenizer: Any, header: Header) -> None:
    """Complete what the reader made of a file's tokenizer.

    Args:
        model: its ``generation_config`` gets every token that ends an answer.
        tokenizer: a fast tokenizer, changed in place.
        header: of the file.
    """
    from tokenizers import pre_tokenizers

    if header.tokenizer.get("model") == "gpt2" and header.tokenizer.get("pre") in DIGITS_APART:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    generation = getattr(model, "generation_config", None)
    if generation is None or tokenizer.eos_token_id is None:
        return
    known = generation.eos_token_id if generation.eos_token_id is not None else tokenizer.eos_token_id
    ends = [*(known if isinstance(known, list) else [known]), *_ends_of_turn(tokenizer, header)]
    ends = list(dict.fromkeys(ends))
    generation.eos_token_id = ends if len(ends) > 1 else ends[0]


def _ends_of_turn(tokenizer: Any, header: Header) -> list[int]:
    stated = [header.tokenizer[key] for key in ("eot_token_id", "eom_token_id") if key in header.tokenizer]
    if not tokenizer.chat_template:
        return [int(token) for token in stated]
    added = tokenizer.get_added_vocab()
    return [int(token) for token in stated] + [added[token] for token in END_OF_TURN if token in added]
