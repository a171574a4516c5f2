"""How likely a given text is after a marked prompt: the measure for what steering does to an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tenfold.attend.text_marks import Marked, Marks
from tenfold.data.tokens import standing, tokens
from tenfold.errors import ConfigError
from tenfold.models.inference import evaluating, takes_logits_to_keep


class Scores(NamedTuple):
    """Log-probabilities of given answers, each ``[questions]``, float32: of all their tokens, and of the first."""

    total: Tensor
    first: Tensor


def continuation(tokenizer: Any, prompt: Marked, text: str) -> list[int]:
    """The tokens of a text where it stands after the tokens of its prompt.

    Where the end of the prompt merges with the text, they are those of the text within another one.

    Raises:
        ConfigError: a text without a token.

    >>> from tenfold.models.tiny import tiny_tokenizer
    >>> tokenizer = tiny_tokenizer()
    >>> tokenizer.decode(continuation(tokenizer, Marked("The sky is"), " blue"))
    ' blue'
    """
    alone = tokens(tokenizer, prompt.text, special=False)
    whole = tokens(tokenizer, prompt.text + text, special=False)
    found = whole[len(alone) :] if whole[: len(alone)] == alone else standing(tokenizer, text)
    if not found:
        raise ConfigError(f"continuation {text!r} has no token", remedy="give the text of an answer")
    return found


def likelihood(model: Any, marks: Marks, tails: Sequence[Sequence[int]]) -> Scores:
    """Log-probabilities of given tokens after each prompt, in one pass; within `tenfold.attend.pasta.steer` steered.

    Args:
        model: a causal language model.
        marks: the prompts.
        tails: the tokens that follow each, one or more, as `continuation` gives them.

    >>> from tenfold.attend.text_marks import encode
    >>> from tenfold.models.tiny import tiny_model
    >>> opened = tiny_model("llama")
    >>> scores = likelihood(opened.model, encode(opened.tokenizer, ["The sky is", "It is"]), [[40, 41], [40]])
    >>> (scores.total < 0).tolist(), (scores.total == scores.first).tolist()
    ([True, True], [False, True])
    """
    most, device = max(map(len, tails)), marks.input_ids.device
    tail = torch.tensor([[*ids, *[0] * (most - len(ids))] for ids in tails], device=device)
    there = torch.tensor([[1] * len(ids) + [0] * (most - len(ids)) for ids in tails], device=device)
    mask = torch.cat([marks.attention_mask, there.to(marks.attention_mask.dtype)], 1)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    keep = {"logits_to_keep": most + 1} if takes_logits_to_keep(model) else {}
    with evaluating(model):
        ids = torch.cat([marks.input_ids, tail], 1)
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False, **keep).logits
    chosen = logits[:, -most - 1 : -1].float().log_softmax(-1).gather(2, tail[..., None])[..., 0]
    return Scores((chosen * there).sum(1).cpu(), chosen[:, 0].cpu())
