"""What needs a long memory: passages that come twice, and a number that stands somewhere in a long text.

Perplexity hides what a model with local attention forgets; these two do not (MASFormer specification, section 9).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tenfold.attend.text_marks import Marks
from tenfold.data.read import Rows
from tenfold.data.rows import Text
from tenfold.data.tokens import shared, standing
from tenfold.errors import DataError
from tenfold.models.inference import evaluating, predictions_at
from tenfold.stage.results import Metric, Result


def repeated(ids: Tensor, passage: int, between: int) -> list[tuple[Tensor, Tensor]]:
    """Passages that come twice with other text between; the second copies are scored: they need long-range copying.

    Args:
        ids: a long text, ``[tokens]``.
        passage: tokens of a passage.
        between: tokens between its two copies.

    Returns:
        One text for each ``passage + between`` tokens of ``ids``, for `text_loss`.

    >>> [(ids.tolist(), scored.int().tolist()) for ids, scored in repeated(torch.arange(5), 2, 1)]
    [([0, 1, 2, 0, 1], [0, 0, 0, 0, 1])]
    """
    length = passage + between
    texts = []
    for start in range(0, len(ids) - length + 1, length):
        part = ids[start : start + length]
        whole = torch.cat([part, part[:passage]])
        # Which passage begins again can be known only after its first token.
        texts.append((whole, torch.arange(len(whole)) > length))
    return texts


def spread(
    ids: Tensor, length: int, count: int, source: str, fields: str = "passages, passage or between"
) -> list[Tensor]:
    """So many pieces of a text, evenly spread over it; they do not overlap.

    Args:
        ids: of the text, ``[tokens]``.
        length: tokens of a piece.
        count: how many.
        source: of the text, for an error.
        fields: of the configuration that decide length and count, for an error.

    Raises:
        DataError: the text is too short; names ``source``.

    >>> [piece.tolist() for piece in spread(torch.arange(9), 2, 3, "numbers")]
    [[0, 1], [3, 4], [7, 8]]
    """
    if len(ids) < length * count:
        raise DataError(
            f"{source}: {len(ids)} tokens, and {count} pieces of {length} are needed",
            remedy=f"give more text, or fewer or shorter pieces: a smaller {fields}",
        )
    last = len(ids) - length
    starts = [number * last // max(1, count - 1) for number in range(count)]
    return [ids[start : start + length] for start in starts]


def copying(
    model: Any,
    pieces: Sequence[Tensor],
    passage: int,
    *,
    subject: str = "model",
    progress: Callable[[int, int], None] = lambda done, total: None,
    make_cache: Callable[[], Any] | None = None,
) -> Result:
    """How well ordinary text and second copies of passages are predicted.

    Args:
        model: a causal language model.
        pieces: token ids ``[tokens]`` of texts, longer than ``passage``. Each is scored on its second half, and, with
            its first ``passage`` tokens once more behind it, on these.
        passage: tokens of a passage.
        subject: which model this is, for the report.
        progress: called with pieces done and pieces in all.
        make_cache: makes the cache that the first half of a piece is read into, and the rest through; by default all is
            read at once.

    Returns:
        ``text_nll`` and ``repeat_nll``, nats a token, means over pieces.
    """
    plain, copies = [], []
    with evaluating(model):
        for number, ids in enumerate(pieces):
            progress(number, len(pieces))
            whole, scored = repeated(ids, passage, len(ids) - passage)[0]
            # One pass gives both: what comes later changes nothing of what came before.
            half = (torch.arange(len(whole)) >= len(ids) // 2) & (torch.arange(len(whole)) < len(ids))
            logits, tokens = predictions_at(model, whole, half | scored, make_cache=make_cache)
            losses = torch.nn.functional.cross_entropy(logits, tokens, reduction="none")
            first = int(half.sum())
            plain.append(float(losses[:first].mean()))
            copies.append(float(losses[first:].mean()))
    metrics = (_nats("text_nll", plain), _nats("repeat_nll", copies))
    settings = {"pieces": len(pieces), "tokens": len(pieces[0]), "passage": passage}
    return Result(task="copying", subject=subject, metrics=metrics, settings=settings)


def _nats(name: str, values: Sequence[float]) -> Metric:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    mean = statistics.mean(values)
    return Metric(name=name, value=mean, unit="nats/token", count=len(values), stderr=error, better="lower")


def needle(
    model: Any,
    tokenizer: Any,
    pieces: Sequence[Tensor],
    *,
    subject: str = "model",
    progress: Callable[[int, int], None] = lambda done, total: None,
    make_cache: Callable[[], Any] | None = None,
    emphasise: str = "gold",
    steering: Callable[[Marks], AbstractContextManager[Any]] | None = None,
) -> Result:
    """Whether a number that stands somewhere in a long text is found again at its end.

    A sentence with a five-digit number is put into each piece, deeper from piece to piece, and the piece is followed by
    the beginning of that sentence. Numbers come from the piece's index: every model is asked the same.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        pieces: token ids ``[tokens]`` of texts.
        subject: which model this is, for the report.
        progress: called with pieces done and pieces in all.
        make_cache: makes the cache that a piece is read into, and from which its number is found; by default all is
            read at once.
        emphasise: with ``steering``, what it emphasises: ``gold``, the sentence that tells the number; ``question``,
            what asks for it at the end; ``whole``, all before the question.
        steering: emphasises marks, as `tenfold.engines.session.Session.steering` does; by default nothing is.

    Returns:
        ``found``: share of numbers that greedy decoding would write; ``needle_nll``: nats a token of the number.
    """
    found: list[bool] = []
    losses: list[float] = []
    with evaluating(model):
        for index, ids in enumerate(pieces):
            progress(index, len(pieces))
            number = 7919 * (index + 13) % 90000 + 10000
            text = hidden(tokenizer, ids, (index + 0.5) / len(pieces), number)
            with nullcontext() if steering is None else steering(text.marks(emphasise)):
                logits, tokens = predictions_at(model, text.ids, text.scored, make_cache=make_cache)
            found.append(bool((logits.argmax(-1) == tokens).all()))
            losses.append(float(torch.nn.functional.cross_entropy(logits, tokens)))
    share = statistics.mean(found)
    error = math.sqrt(share * (1 - share) / len(found))
    metrics = (
        Metric(name="found", value=share, count=len(found), stderr=error, better="higher"),
        _nats("needle_nll", losses),
    )
    settings = {"pieces": len(pieces), "tokens": len(pieces[0])}
    return Result(task="needle", subject=subject, metrics=metrics, settings=settings)


class Hidden(NamedTuple):
    """A text with a number in it that is asked for at its end; places are tokens ``[start, end)``."""

    ids: Tensor
    """``[tokens]``."""
    scored: Tensor
    """Which tokens are those of the number at the end, ``[tokens]``, bool."""
    told: tuple[int, int]
    """Where the number is told."""
    asked: tuple[int, int]
    """Where it is asked for."""

    def marks(self, emphasise: str) -> Marks:
        """The prompt, which ends in front of the number, with the part emphasised that `needle` calls so."""
        begin, end = {"gold": self.told, "question": self.asked, "whole": (0, self.asked[0])}[emphasise]
        prompt = self.ids[None, : self.asked[1]]
        marked = torch.zeros_like(prompt, dtype=torch.bool)
        marked[:, begin:end] = True
        return Marks(prompt, torch.ones_like(prompt), marked, torch.ones(prompt.shape))


def hidden(tokenizer: Any, ids: Tensor, depth: float, number: int) -> Hidden:
    """A text with a number in it that is asked for at its end.

    Args:
        tokenizer: of the text.
        ids: the text, ``[tokens]``.
        depth: where in it, 0 (first) to 1 (last).
        number: to be found.

    """
    place = round(depth * len(ids))
    told = f"\n\nRemember this: the secret number of the lighthouse is {number}"
    statement, asked = standing(tokenizer, f"{told}.\n\n"), standing(tokenizer, told)
    begun = shared(asked, standing(tokenizer, told.removesuffix(f" {number}")))
    whole = torch.cat([ids[:place], torch.tensor(statement), ids[place:], torch.tensor(asked)])
    start = len(whole) - len(asked)
    scored = torch.arange(len(whole)) >= start + begun
    return Hidden(whole, scored, (place, place + len(statement)), (start, start + begun))


def joined_ids(tokenizer: Any, rows: Rows) -> Tensor:
    """The tokens of all texts of the rows, ``[tokens]``, empty lines between them."""
    joined = "\n\n".join(row.text for row in rows if isinstance(row, Text))
    return torch.tensor(tokenizer(joined, verbose=False)["input_ids"])
