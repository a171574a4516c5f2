"""Tokens of a text as a whole, and which of them write a part of it.

A text that is tokenised piece by piece gives other tokens than the whole: some tokenizers put a mark before each text
(SentencePiece's ``▁``), and merges cross the borders. So texts are tokenised whole, and parts are found by characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_ANCHORS = ("\n", ".", "a")
"""What a text is put behind, to see its tokens without the mark of a beginning; a newline first, as in transformers."""


def tokens(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """The tokens of a text, however long.

    Args:
        tokenizer: a transformers tokenizer.
        text: the text.
        special: with the special tokens that the tokenizer adds; not for what a chat template rendered.
    """
    # verbose=False: longer than the model's context is expected, and cut or packed by the caller.
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def tokens_within(
    tokenizer: Any, text: str, spans: Sequence[tuple[int, int]], *, special: bool = True
) -> tuple[list[int], list[bool]]:
    """The tokens of a text, and for each whether it writes a part of one of the spans.

    A token that reaches over the beginning of a span counts, since it is the first that the part needs; one that
    reaches over the end does not, since it also writes what follows.

    Args:
        tokenizer: fast or slow; slow ones do not know their offsets, so the text up to each border is tokenised, too.
        text: the text.
        spans: characters ``[start, end)``, in order, none within another.
        special: as for `tokens`.

    >>> from tenfold.models.tiny import tiny_tokenizer
    >>> tokens_within(tiny_tokenizer(), "1+1=2", [(4, 5)])[1]
    [False, False, False, False, True]
    """
    if tokenizer.is_fast:
        found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        ids, offsets = found["input_ids"], found["offset_mapping"]
    else:
        ids, offsets = tokens(tokenizer, text, special=special), None
    inside = [False] * len(ids)
    for start, end in spans:
        if offsets is None:
            first, last = (_leading(tokenizer, text, ids, border, special) for border in (start, end))
        else:
            first, last = _run(offsets, start, end)
            # Where white space without an owner stands at the border, the token before it may reach over, too.
            gap = first < last and offsets[first][0] > start
            first -= gap and _leading(tokenizer, text, ids, start, special) < first
        inside[first:last] = [True] * max(0, last - first)
    return ids, inside


def _run(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """The tokens ``[first, last)`` that write a part of ``[start, end)``.

    All between the first and the last: where a normalizer puts something in, its offsets may lie anywhere.
    """
    # Where offsets leave out spaces (ByteLevel's trim_offsets), a token of spaces has only the place where it ends.
    chosen = [i for i, (a, b) in enumerate(offsets) if start < b <= end and (a < end or a == b)]
    return (chosen[0], chosen[-1] + 1) if chosen else (0, 0)


def _leading(tokenizer: Any, text: str, ids: list[int], border: int, special: bool) -> int:
    """How many of the tokens of a text write what stands before a character, and nothing else."""
    if border >= len(text):
        return len(ids)
    return shared(ids, tokens(tokenizer, text[:border], special=special))


def shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items two sequences, or characters two texts, have in common from the beginning.

    >>> shared("abcd", "abd")
    2
    """
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def standing(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that stands within another one: without the mark of a beginning, without special tokens.

    >>> from tenfold.models.tiny import tiny_tokenizer
    >>> standing(tiny_tokenizer(), " blue") == tiny_tokenizer()(" blue")["input_ids"]
    True
    """
    for anchor in _ANCHORS:
        before = tokens(tokenizer, anchor, special=False)
        whole = tokens(tokenizer, anchor + text, special=False)
        if before and whole[: len(before)] == before:
            return whole[len(before) :]
    return tokens(tokenizer, text, special=False)
