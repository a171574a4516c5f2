"""From rows to token examples, with every cut counted."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from tenfold.config.stage import OnBadRow
from tenfold.data.left_out import LeftOut, left_out_notes, use_each
from tenfold.data.rows import Chat, Completion, Row, Text
from tenfold.data.templates import Conversation, converse, template_notes
from tenfold.data.tokens import tokens, tokens_within
from tenfold.errors import DataError, ModelError

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""The label of a token that is context only, as torch's cross-entropy and transformers have it."""


@dataclass(frozen=True)
class Encoded:
    """Token examples and what became of the rows.

    Args:
        examples: ``{"input_ids": [...], "labels": [...]}`` each; a label of -100 is not learned. The first token of an
            example is never learned, since nothing precedes it. With document boundaries also ``position_ids``, which
            begin again at each row.
        rows: rows given.
        tokens: tokens in ``examples``.
        trained_tokens: labels other than -100.
        truncated_rows: rows that lost tokens because they were longer than ``max_length``.
        tokens_cut: the tokens they lost.
        left_out: rows of which nothing to learn remained.
        notes: sentences for the report.
        refused: rows that the chat template refused, with place and reason.
    """

    examples: list[dict[str, list[int]]]
    rows: int
    tokens: int
    trained_tokens: int
    truncated_rows: int
    tokens_cut: int
    left_out: int
    notes: tuple[str, ...]
    refused: tuple[LeftOut, ...] = ()

    @property
    def sequences(self) -> int:
        """How many examples there are."""
        return len(self.examples)


def encode(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int,
    packing: bool,
    boundaries: bool = False,
    chat: bool | None = None,
    on_bad_row: OnBadRow = "stop",
) -> Encoded:
    """Turn rows of text, completions or conversations into token examples.

    * Text: every token is learned. An end-of-text token follows each row.
    * Completion: only the completion and what ends it are learned. Prompt and completion are one text, so their tokens
      are those of the tokenizer for it, with an end-of-text token behind; a token that reaches over the border is
      learned. With a chat template they are a turn of the user and one of the assistant.
    * Chat: tokens are those of ``apply_chat_template`` for the conversation, and only the assistant's turns are
      learned, as `tenfold.data.templates.converse` finds them, but for those among the ``given`` first messages.
      Notes say which turns are not, and why.

    With ``packing``, rows of text are joined and cut into sequences of ``max_length``; the last, shorter one is kept,
    so no token is lost. Attention then crosses the borders of rows within a sequence, which the end-of-text token
    marks; with ``boundaries`` it does not, as positions begin again at each row, and a row's first token is not
    learned. Rows of other kinds are never packed. Without packing, what is longer than ``max_length`` loses its end.

    Args:
        rows: rows of one of these kinds.
        tokenizer: a transformers tokenizer.
        max_length: tokens per sequence, 3 or more.
        packing: join rows of text.
        boundaries: keep joined rows apart: a token sees those of its own row only.
        chat: whether completions use the chat template; by default where the tokenizer has one.
        on_bad_row: ``stop`` at the first row that the chat template refuses, or ``skip`` such rows: a note counts them,
            and ``refused`` lists them.

    Raises:
        DataError: for rows of other kinds, rows that the chat template refuses, or when nothing to learn remains.
        ModelError: when the tokenizer lacks an end-of-text token, or conversations need a chat template it lacks.

    Example:
        >>> encode(rows, tokenizer, max_length=512, packing=True).trained_tokens  # doctest: +SKIP
        81234
    """
    if max_length < 3:
        raise DataError(f"max_length: {max_length} leaves too little to predict", remedy="give 3 or more")
    if not rows:
        raise DataError("no rows to encode", remedy="give at least one row")
    found, refused = row_tokens(rows, tokenizer, chat=chat, on_bad_row=on_bad_row)
    if packing and isinstance(rows[0], Text):
        examples = _pack([row.ids for row in found], max_length, boundaries)
        return _count(rows, examples, truncated=0, cut=0, left_out=0)
    examples, cuts, left_out, silent = [], [], 0, sum(not any(row.learned) for row in found)
    for ids, learned in ((row.ids, row.learned) for row in found):
        if len(ids) > max_length:
            cuts.append(len(ids) - max_length)
        example = _example(ids[:max_length], learned[:max_length])
        if any(label != IGNORED for label in example["labels"]):
            examples.append(example)
        else:
            left_out += 1
    notes = [*left_out_notes(getattr(rows, "source", "data"), refused), *spoken_notes(found)]
    if silent:
        notes.append(f"{silent} of {len(rows)} rows were left out: they have no answer of the assistant to learn.")
    if silent == len(found):
        raise DataError(
            f"none of the {len(rows)} rows has an answer of the assistant to learn (first: row {rows[0].id!r})",
            remedy="give conversations that end with one, or prompt and completion",
        )
    counted = _count(rows, examples, truncated=len(cuts), cut=sum(cuts), left_out=left_out, silent=silent, notes=notes)
    return replace(counted, refused=refused)


def _count(
    rows: Sequence[Row],
    examples: list[dict[str, list[int]]],
    *,
    truncated: int,
    cut: int,
    left_out: int,
    silent: int = 0,
    notes: Sequence[str] = (),
) -> Encoded:
    if not examples:
        raise DataError(
            f"none of the {len(rows)} rows has a token to learn within max_length", remedy="raise max_length"
        )
    notes = list(notes)
    if truncated:
        notes.append(f"{truncated} of {len(rows)} rows were longer than max_length and lost {cut} tokens at their end.")
    if left_out > silent:
        lost = left_out - silent
        notes.append(f"{lost} of {len(rows)} rows were left out: nothing to learn stood within max_length.")
    return Encoded(
        examples=examples,
        rows=len(rows),
        tokens=sum(len(example["input_ids"]) for example in examples),
        trained_tokens=sum(label != IGNORED for example in examples for label in example["labels"]),
        truncated_rows=truncated,
        tokens_cut=cut,
        left_out=left_out,
        notes=tuple(notes),
    )


def _example(ids: list[int], learned: list[bool]) -> dict[str, list[int]]:
    labels = [token if learn else IGNORED for token, learn in zip(ids, learned, strict=True)]
    return {"input_ids": ids, "labels": [IGNORED, *labels[1:]]}


def _pack(documents: list[list[int]], max_length: int, boundaries: bool) -> list[dict[str, list[int]]]:
    stream = [token for ids in documents for token in ids]
    borders = [*range(0, len(stream), max_length), len(stream)]
    if len(borders) > 2 and borders[-1] - borders[-2] == 1:
        # A sequence of one token has nothing to predict and its mean loss is NaN: lend it one of its neighbour's.
        borders[-2] -= 1
    pieces = [(start, end) for start, end in itertools.pairwise(borders) if end - start > 1]
    if not boundaries:
        return [_example(stream[start:end], [True] * (end - start)) for start, end in pieces]
    begins = set(itertools.accumulate((len(ids) for ids in documents), initial=0))
    examples = []
    for start, end in pieces:
        positions: list[int] = []
        for at in range(start, end):
            # A row that goes on from the sequence before begins again, too: what it continues is not there.
            positions.append(0 if at == start or at in begins else positions[-1] + 1)
        example = _example(stream[start:end], [position > 0 for position in positions])
        examples.append({**example, "position_ids": positions})
    return [example for example in examples if any(label != IGNORED for label in example["labels"])]


class RowTokens(NamedTuple):
    """A row as tokens.

    Args:
        ids: of the whole row.
        learned: for each, whether training learns it; a first one is not, for nothing precedes it.
        size: bytes (UTF-8) of the text that is learned; an end-of-text token behind it has none.
        talk: the conversation, where the row is one.
    """

    ids: list[int]
    learned: list[bool]
    size: int
    talk: Conversation | None = None


def row_tokens(
    rows: Sequence[Row], tokenizer: Any, *, chat: bool | None = None, on_bad_row: OnBadRow = "stop"
) -> tuple[list[RowTokens], tuple[LeftOut, ...]]:
    """Tokens of each row, whole, and which of them are learned, as `encode` has them.

    Args:
        rows: of text, completions or conversations.
        tokenizer: a transformers tokenizer.
        chat: as for `encode`.
        on_bad_row: as for `encode`.

    Returns:
        The tokens of the rows, in order, and what the chat template refused.

    Raises:
        DataError: as `encode`.
        ModelError: as `encode`.

    >>> from tenfold.models.tiny import tiny_tokenizer
    >>> found, _ = row_tokens([Completion("1", "1+1=", "2")], tiny_tokenizer(), chat=False)
    >>> found[0].learned, found[0].size
    ([False, False, False, False, True, True], 1)
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ModelError("the tokenizer has no end-of-text token", "name an eos_token in tokenizer_config.json")
    found, refused = use_each(rows, lambda row, place: _tokens(row, tokenizer, eos, chat, place), on_bad_row)
    return [row for row in found if row is not None], refused


def spoken_notes(rows: Sequence[RowTokens]) -> list[str]:
    """What is to be said of conversations of which not all that the assistant said is learned."""
    return template_notes([row.talk for row in rows if row.talk is not None])


def _tokens(row: Row, tokenizer: Any, eos: int, chat: bool | None, place: str) -> RowTokens:
    """The tokens of a row and which of them are to be learned."""
    if isinstance(row, Text):
        ids = tokens(tokenizer, row.text)
        return _ended(RowTokens(ids, [True] * len(ids), len(row.text.encode())), eos)
    if isinstance(row, Completion):
        if tokenizer.chat_template is not None if chat is None else chat:
            return _conversation(Chat(row.id, row.messages, given=len(row.messages) - 1), tokenizer, place)
        whole = row.prompt + row.completion
        found = tokens_within(tokenizer, whole, [(len(row.prompt), len(whole))])
        return _ended(RowTokens(*found, len(row.completion.encode())), eos)
    if isinstance(row, Chat):
        return _conversation(row, tokenizer, place)
    raise DataError(
        f"{place} is a {type(row).__name__.lower()} row, which has no text to continue",
        remedy="give rows of text, completions or conversations",
    )


def _ended(row: RowTokens, eos: int) -> RowTokens:
    """With an end-of-text token, which is learned, where the tokenizer adds none."""
    ids = row.ids if row.ids[-1:] == [eos] else [*row.ids, eos]
    return row._replace(ids=ids, learned=[*row.learned[: len(ids) - 1], True])


def _conversation(row: Chat, tokenizer: Any, place: str) -> RowTokens:
    talk = converse(tokenizer, row.messages, place, given=row.given, **row.options)
    size = sum(len(talk.text[start:end].encode()) for start, end in talk.spans)
    # The template writes the special tokens that are wanted, also that of the beginning.
    return RowTokens(*tokens_within(tokenizer, talk.text, talk.spans, special=False), size, talk)


def pad_id(tokenizer: Any) -> int:
    """The token to fill batches with: the tokenizer's own, else its end-of-text token, which is masked either way."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def collate(examples: Sequence[dict[str, list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """A batch, padded on the right; with ``functools.partial(collate, pad_id=...)`` a Trainer's ``data_collator``.

    Args:
        examples: as ``encode`` makes them.
        pad_id: the token to fill with.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` (-100 on padding), each ``[batch, tokens]``, int64; with
        document boundaries ``position_ids`` instead of the mask, 0 on padding, which is a document of its own then:
        transformers looks for documents only where no mask is given.

    >>> collate([{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7], "labels": [-100]}], pad_id=0)["labels"]
    tensor([[-100,    6],
            [-100, -100]])
    """
    import torch

    length = max(len(example["input_ids"]) for example in examples)

    def padded(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([example[key] + [fill] * (length - len(example[key])) for example in examples])

    batch = {"input_ids": padded("input_ids", pad_id), "labels": padded("labels", IGNORED)}
    if "position_ids" in examples[0]:
        return {**batch, "position_ids": padded("position_ids", 0)}
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    return {**batch, "attention_mask": (torch.arange(length) < lengths[:, None]).long()}
