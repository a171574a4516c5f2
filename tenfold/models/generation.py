"""Tokens from a model, greedily and as transformers writes them: what `tenfold.engines.session` builds on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from tenfold.data.encode import pad_id
from tenfold.errors import ConfigError
from tenfold.models.inference import evaluating


def continue_inputs(
    model: Any,
    tokenizer: Any,
    inputs: Mapping[str, Any],
    *,
    max_new_tokens: int = 64,
) -> list[str]:
    """Continue prompts that are tokens already, greedily.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        inputs: ``input_ids`` and ``attention_mask``, each ``[batch, tokens]``, filled on the left, and what else
            ``model.generate`` takes, such as ``past_key_values``.
        max_new_tokens: stop after this many tokens, or at the end of the turn.

    Returns:
        The new text of each row, special tokens left out.
    """
    ids = continue_ids(model, tokenizer, inputs, max_new_tokens=max_new_tokens)
    texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts


def continue_ids(
    model: Any,
    tokenizer: Any,
    inputs: Mapping[str, Any],
    *,
    max_new_tokens: int = 64,
) -> list[list[int]]:
    """As `continue_inputs`: the new tokens of each row, the one that ends its turn included."""
    config = decoding(model, tokenizer, max_new_tokens)
    with evaluating(model):
        return _continue(model, inputs, config)


def _continue(model: Any, inputs: Mapping[str, Any], config: GenerationConfig) -> list[list[int]]:
    ids = model.generate(**inputs, generation_config=config)
    return [up_to_end(row, config.eos_token_id) for row in ids[:, inputs["input_ids"].shape[1] :].tolist()]


def up_to_end(ids: list[int], ends: Sequence[int] | None) -> list[int]:
    """Tokens up to the first that ends a turn, which is among them.

    >>> up_to_end([5, 6, 2, 0, 0], [2])
    [5, 6, 2]
    """
    end = next((at for at, token in enumerate(ids) if token in (ends or ())), len(ids))
    return ids[: end + 1]


def left_padded(
    tokenizer: Any, prompts: Sequence[str], *, special: bool, device: torch.device
) -> dict[str, torch.Tensor]:
    """Token ids and their mask, each ``[batch, tokens]``, filled on the left; the tokenizer's settings stay alone.

    Args:
        tokenizer: any.
        prompts: none of them empty.
        special: whether the tokenizer adds its special tokens.
        device: where the tensors go.

    Raises:
        ConfigError: a prompt without a token.
    """
    encoded = [tokenizer(prompt, add_special_tokens=special, verbose=False)["input_ids"] for prompt in prompts]
    if any(not ids for ids in encoded):
        raise ConfigError("an empty prompt cannot be continued", remedy="give each prompt at least one word")
    length = max(map(len, encoded))
    fill = pad_id(tokenizer)
    return {
        "input_ids": torch.tensor([[fill] * (length - len(ids)) + ids for ids in encoded], device=device),
        "attention_mask": torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in encoded], device=device),
    }


def decoding(model: Any, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """Plain greedy decoding, whatever the model's own defaults; it ends at every end token that either names."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    ends = sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None})
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=1.0,
        top_k=50,  # the library's default, about which greedy decoding does not warn
        top_p=1.0,
        repetition_penalty=1.0,
        num_beams=1,
        eos_token_id=ends or None,
        pad_token_id=pad_id(tokenizer),
    )
