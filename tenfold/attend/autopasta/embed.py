"""Embeddings of texts from the model that is steered itself, so that evidence needs no second one."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from tenfold.attend.autopasta.quote_matching import Embed
from tenfold.data.encode import pad_id
from tenfold.models.inference import evaluating, input_device, max_positions

_BATCH = 16


def hidden_states(model: Any, tokenizer: Any) -> Embed:
    """An embedder for `locate`: the mean over a text's tokens of the model's last hidden state.

    The last state is the one after the final norm, before the head, which is not run; of T5 it is the encoder's.
    Texts go through the model in batches of 16 by length, in evaluation mode and without gradients; padding does not
    count, whatever side the tokenizer pads on.  What is longer than the model's window is cut.

    Such states share a large common part, so that any two texts have a high cosine (with SmolLM2-135M about 0.8 for
    strangers, 0.88 and more for the sentence that is meant).  Tune ``min_similarity`` for the model: the default of
    `locate`, meant for words, would let everything through.

    Args:
        model: a transformers model, also adapted by peft, on any device and in any float type.  Its weights are used
            as they are when the embedder is called; steering that is active then takes part.
        tokenizer: its tokenizer.

    Returns:
        A callable from texts to float32 ``[texts, hidden]`` on the CPU.  A text without tokens is a row of zeros.

    Example:
        >>> from tenfold.models.tiny import tiny_model
        >>> opened = tiny_model()
        >>> hidden_states(opened.model, opened.tokenizer)(["The Nile is long.", "Rome"]).shape
        torch.Size([2, 64])
    """

    def embed(texts: Sequence[str]) -> torch.Tensor:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        body = inner.get_encoder() if model.config.is_encoder_decoder else inner.base_model
        table = torch.zeros(len(texts), model.config.get_text_config().hidden_size)
        lists = [tokenizer(text, verbose=False)["input_ids"][: max_positions(model)] for text in texts]
        order = sorted((row for row, ids in enumerate(lists) if ids), key=lambda row: -len(lists[row]))
        with evaluating(model):
            for first in range(0, len(order), _BATCH):
                batch = order[first : first + _BATCH]
                table[batch] = _means(body, [lists[row] for row in batch], pad_id(tokenizer), input_device(model))
        return table

    return embed


def _means(body: Any, lists: Sequence[list[int]], pad: int, device: torch.device) -> torch.Tensor:
    """Mean last hidden states of one batch, float32 on the CPU, padded on the right by ourselves."""
    length = max(map(len, lists))
    ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids in lists], device=device)
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in lists], device=device)
    options = {"use_cache": False} if "use_cache" in inspect.signature(body.forward).parameters else {}
    states = body(input_ids=ids, attention_mask=mask, **options).last_hidden_state.float()
    mask = mask.to(states.device)
    total = states.masked_fill(mask[:, :, None] == 0, 0).sum(1)  # not a product: padding may hold NaN
    return (total / mask.sum(1, keepdim=True)).cpu()
