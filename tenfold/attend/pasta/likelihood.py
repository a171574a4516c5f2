"""How likely a given text is after a marked prompt: the measure for what steering does to an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tenfold.attend.text_marks import Marked, Marks
from tenfold.data.tokens import standing, tokens
from tenfold.errors import ConfigError
from tenfold.models.inference import evaluating, takes_cache, takes_logits_to_keep


class Scores(NamedTuple):
    """Log-probabilities of given answers, each ``[questions]``, float32: of all their tokens, and of the first."""

    total: Tensor
    first: Tensor


class Alternatives(NamedTuple):
    """Continuations of one prompt: log-probabilities, float32, and whether greedy decoding would write them, bool."""

    total: Tensor
    greedy: Tensor


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


def likelihood(
    model: Any, marks: Marks, tails: Sequence[Sequence[int]], *, make_cache: Callable[[], Any] | None = None
) -> Scores:
    """Log-probabilities of given tokens after each prompt; within `tenfold.attend.pasta.steer` steered.

    Args:
        model: a causal language model.
        marks: the prompts.
        tails: the tokens that follow each, one or more, as `continuation` gives them.
        make_cache: makes the cache that the prompts are read into first, as when the tails are written; by default
            prompt and tail are read in one pass without a cache.

    >>> from tenfold.attend.text_marks import encode
    >>> from tenfold.models.tiny import tiny_model
    >>> opened = tiny_model("llama")
    >>> scores = likelihood(opened.model, encode(opened.tokenizer, ["The sky is", "It is"]), [[40, 41], [40]])
    >>> (scores.total < 0).tolist(), (scores.total == scores.first).tolist()
    ([True, True], [False, True])
    """
    tail, there = _right_padded(tails, marks.input_ids.device)
    with evaluating(model):
        if make_cache is None:
            chosen, _ = _in_one_pass(model, marks, tail, there)
        else:
            chosen, _ = _after_the_prompt(model, marks, tail, there, make_cache())
    return Scores((chosen * there).sum(1).cpu(), chosen[:, 0].cpu())


def alternatives(
    model: Any,
    marks: Marks,
    tails: Sequence[Sequence[Sequence[int]]],
    *,
    make_cache: Callable[[], Any] = lambda: None,
) -> list[Alternatives]:
    """How likely several continuations of each prompt are, which is read once.

    Args:
        model: a causal language model.
        marks: the prompts.
        tails: for each prompt its continuations, one or more, as `continuation` gives them.
        make_cache: makes the cache that the prompts are read into; None is the model's own.

    Returns:
        For each prompt its continuations, each ``[continuations]``, on the CPU.

    >>> from tenfold.attend.text_marks import encode
    >>> from tenfold.models.tiny import tiny_model
    >>> opened = tiny_model("llama")
    >>> found = alternatives(opened.model, encode(opened.tokenizer, ["It is"]), [[[40], [41, 42]]])
    >>> found[0].total.shape
    torch.Size([2])
    """
    most = max(map(len, tails))
    flat = [ids for row in tails for ids in (*row, *[row[0]] * (most - len(row)))]
    tail, there = _right_padded(flat, marks.input_ids.device)
    with evaluating(model):
        if takes_cache(model):
            chosen, top = _after_the_prompt(model, marks, tail, there, make_cache())
        else:
            chosen, top = _in_one_pass(model, _repeated(marks, most), tail, there)
    parts = ((chosen * there).sum(1), (top | (there == 0)).all(1))
    totals, greedy = (part.cpu().unflatten(0, (len(tails), most)) for part in parts)
    return [Alternatives(totals[row, : len(texts)], greedy[row, : len(texts)]) for row, texts in enumerate(tails)]


def _right_padded(tails: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    """Tokens, and 1 where there is one, each ``[rows, tokens]``."""
    most = max(map(len, tails))
    tail = torch.tensor([[*ids, *[0] * (most - len(ids))] for ids in tails], device=device)
    return tail, torch.tensor([[1] * len(ids) + [0] * (most - len(ids)) for ids in tails], device=device)


def _repeated(marks: Marks, count: int) -> Marks:
    parts = (marks.input_ids, marks.attention_mask, marks.marked, marks.strength)
    ids, mask, marked, strength = (part.repeat_interleave(count, 0) for part in parts)
    return Marks(ids, mask, marked, strength)


def _in_one_pass(model: Any, marks: Marks, tail: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the tokens of the tails, and whether they are the most probable, ``[rows, tokens]``."""
    most = tail.shape[1]
    mask = torch.cat([marks.attention_mask, there.to(marks.attention_mask.dtype)], 1)
    keep = {"logits_to_keep": most + 1} if takes_logits_to_keep(model) else {}
    ids = torch.cat([marks.input_ids, tail], 1)
    logits = model(ids, attention_mask=mask, position_ids=_positions(mask), use_cache=False, **keep).logits
    return _chosen(logits[:, -most - 1 : -1], tail)


def _after_the_prompt(model: Any, marks: Marks, tail: Tensor, there: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
    """The same with the prompts in a cache; there may be several tails for each, one after the other."""
    repeats, mask = len(tail) // len(marks.input_ids), marks.attention_mask
    keep = {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}
    given = {} if cache is None else {"past_key_values": cache}
    read = model(marks.input_ids, attention_mask=mask, position_ids=_positions(mask), use_cache=True, **given, **keep)
    first = _chosen(read.logits[:, -1:].repeat_interleave(repeats, 0), tail[:, :1])
    if tail.shape[1] == 1:
        return first
    past = read.past_key_values
    if repeats > 1:
        past.batch_repeat_interleave(repeats)
    mask = torch.cat([mask.repeat_interleave(repeats, 0), there[:, :-1].to(mask.dtype)], 1)
    positions = _positions(mask)[:, marks.input_ids.shape[1] :]
    logits = model(
        tail[:, :-1], attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True
    ).logits
    rest = _chosen(logits, tail[:, 1:])
    return torch.cat([first[0], rest[0]], 1), torch.cat([first[1], rest[1]], 1)


def _positions(mask: Tensor) -> Tensor:
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def _chosen(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    chosen = logits.float().log_softmax(-1).gather(2, tokens[..., None])[..., 0]
    return chosen, logits.argmax(-1) == tokens
