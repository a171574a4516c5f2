"""Texts that a model writes by itself: what it must not forget beside the texts that it is compressed by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from tenfold.errors import ConfigError
from tenfold.models.inference import evaluating, input_device

BATCH = 16
"""Texts that are written at once."""


def own_text(
    model: Any, tokenizer: Any, tokens: int, *, length: int = 256, seed: int = 0,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> list[Tensor]:  # fmt: skip
    """Let a model write from its own distribution, each text from a token at random.

    Few tokens of a user's texts say little of directions that other texts need, and one budget takes these away first.
    What the model writes goes everywhere that it can go. (Data-free calibration: Liu et al. 2023, arXiv 2305.17888;
    Williams et al. 2024, arXiv 2410.17170.)

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, whose special tokens begin no text.
        tokens: how many in all, 1 or more, rounded up to whole texts.
        length: of a text, 2 or more.
        seed: of all that is drawn; the global random state stays as it was.
        tell: called with texts done, and how many there are.

    Returns:
        Token ids of each text, ``[length]``.

    Raises:
        ConfigError: fewer than 1 token, or texts of fewer than 2.

    >>> from tenfold.models.tiny import tiny_model
    >>> opened = tiny_model("llama")
    >>> [len(ids) for ids in own_text(opened.model, opened.tokenizer, 20, length=8)]
    [8, 8, 8]
    """
    if tokens < 1:
        raise ConfigError(f"tokens: must be 1 or more, got {tokens}", remedy="leave own texts out, or ask for some")
    if length < 2:
        raise ConfigError(
            f"length: must be 2 or more, got {length}: the first token is drawn, not written by the model", "256"
        )
    device, special = input_device(model), set(tokenizer.all_special_ids)
    plain = torch.tensor([token for token in range(len(tokenizer)) if token not in special])
    drawing = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, min_new_tokens=length - 1, max_new_tokens=length - 1,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    count = -(-tokens // length)
    written: list[Tensor] = []
    with evaluating(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        first = plain[torch.randint(len(plain), (count, 1))].to(device)
        for batch in first.split(BATCH):
            ids = model.generate(batch, attention_mask=torch.ones_like(batch), generation_config=drawing)
            written += list(ids)
            tell(len(written), count)
    return written
