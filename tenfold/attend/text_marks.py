"""Marks: which parts of a prompt are emphasised, from the user's text to the model's tokens (PASTA, section 2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenfold.data.encode import pad_id
from tenfold.errors import ConfigError, DataError


@dataclass(frozen=True)
class TextSpan:
    """Characters ``[start, end)`` of a text and how much they weigh.

    Args:
        start: first character.
        end: one past the last.
        strength: factor of the attention to them, above 0: 1 is full weight, less de-emphasises, more exceeds the
            other marks.

    >>> TextSpan(4, 9)
    TextSpan(start=4, end=9, strength=1.0)
    """

    start: int
    end: int
    strength: float = 1.0


@dataclass(frozen=True)
class Marked:
    """A prompt and its marks; `from_tags`, `from_spans`, `from_substrings` and `tenfold.attend.chat_marks` make them.

    Args:
        text: the prompt.
        spans: marked parts of it; where they overlap, the later one decides the strength.
        special: whether the tokenizer adds its special tokens; False for what a chat template has rendered.
    """

    text: str
    spans: tuple[TextSpan, ...] = ()
    special: bool = True


@dataclass(frozen=True)
class Marks:
    """A batch of prompts as tokens, filled on the left, and which tokens are marked.

    Args:
        input_ids: ``[batch, tokens]``, int64.
        attention_mask: ``[batch, tokens]``, int64, 0 for padding.
        marked: ``[batch, tokens]``, bool.
        strength: ``[batch, tokens]``, float32, above 0; 1 where nothing is marked.
        names: what errors call each row; by default ``prompt 1`` and so on.
    """

    input_ids: Tensor
    attention_mask: Tensor
    marked: Tensor
    strength: Tensor
    names: tuple[str, ...] = ()

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model and ``generate`` take."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    @property
    def ends(self) -> list[int]:
        """One past the last token of each row, counted with its padding."""
        places = torch.arange(1, self.attention_mask.shape[1] + 1, device=self.attention_mask.device)
        found: list[int] = (places * self.attention_mask).amax(1).tolist()
        return found

    def name(self, row: int) -> str:
        """What an error calls a row."""
        return self.names[row] if self.names else f"prompt {row + 1}"

    @property
    def empty(self) -> bool:
        """Whether nothing is marked."""
        return not bool(self.marked.any())

    def tokens(self, row: int) -> list[tuple[int, int]]:
        """Runs ``[start, end)`` of marked tokens of a row, in order, counted with its padding."""
        runs: list[tuple[int, int]] = []
        for index in self.marked[row].nonzero()[:, 0].tolist():
            if runs and runs[-1][1] == index:
                runs[-1] = (runs[-1][0], index + 1)
            else:
                runs.append((index, index + 1))
        return runs

    def to(self, device: torch.device | str) -> Marks:
        """The same on another device."""
        ids, mask, marked, strength = (
            part.to(device) for part in (self.input_ids, self.attention_mask, self.marked, self.strength)
        )
        return Marks(ids, mask, marked, strength, self.names)


def from_spans(text: str, spans: Iterable[TextSpan | tuple[int, int] | tuple[int, int, float]]) -> Marked:
    """Mark character spans.

    Args:
        text: the prompt.
        spans: ``(start, end)``, ``(start, end, strength)`` or `TextSpan`.

    Raises:
        DataError: an empty span, one outside the text, a strength that is not above 0.

    >>> from_spans("Be brief.", [(3, 8)]).spans
    (TextSpan(start=3, end=8, strength=1.0),)
    """
    found = tuple(span if isinstance(span, TextSpan) else TextSpan(*span) for span in spans)
    for span in found:
        check_span(span.start, span.end, len(text), "text")
        check_strength(span.strength)
    return Marked(text, found)


def from_tags(
    text: str,
    tags: tuple[str, str] | Mapping[tuple[str, str], float] = ("<mark>", "</mark>"),
    strength: float = 1.0,
    *,
    name: str = "",
) -> Marked:
    """Mark what stands between tags of the user's choice, and take the tags away.

    Args:
        text: the prompt with tags.
        tags: what opens and closes a mark; several pairs, each with its strength, as a mapping.
        strength: of the marks, where there is one pair.
        name: what errors call the text; nothing by default.

    Raises:
        DataError: a tag that does not close or was not opened, tags within tags, nothing between them.

    >>> from_tags("Why? <mark>Be brief.</mark>")
    Marked(text='Why? Be brief.', spans=(TextSpan(start=5, end=14, strength=1.0),), special=True)
    >>> from_tags("[[A]] and ((B))", {("[[", "]]"): 1.0, ("((", "))"): 0.2}).spans[1]
    TextSpan(start=6, end=7, strength=0.2)
    """
    pairs = dict(tags) if isinstance(tags, Mapping) else {tags: strength}
    known = [tag for pair in pairs for tag in pair]
    if not all(known) or len(set(known)) < len(known):
        raise ConfigError(f"tags: {known} are not all different", remedy="give tags such as <mark> and </mark>")
    plain, spans, place, where = "", [], 0, name and f"{name}: "
    opened: tuple[tuple[str, str], int, int] | None = None
    while True:
        # At one place the longer tag counts: "<m>" may begin with "<".
        found = [(at, -len(tag), tag) for tag in known if (at := text.find(tag, place)) >= 0]
        if not found:
            break
        at, _, tag = min(found)
        plain += text[place:at]
        place = at + len(tag)
        if opened is None:
            pair = next((pair for pair in pairs if pair[0] == tag), None)
            if pair is None:
                raise DataError(f"{where}tag {tag!r} at character {at} closes nothing", remedy="open it, or remove it")
            opened = (pair, len(plain), at)
        else:
            pair, start, begin = opened
            if tag != pair[1]:
                raise DataError(
                    f"{where}tag {tag!r} at character {at} stands inside {pair[0]!r} at {begin}",
                    remedy="close one first",
                )
            if start == len(plain):
                raise DataError(
                    f"{where}tag {pair[0]!r} at character {begin} marks nothing", remedy="put text between tags"
                )
            spans.append(TextSpan(start, len(plain), pairs[pair]))
            opened = None
    if opened is not None:
        raise DataError(
            f"{where}tag {opened[0][0]!r} at character {opened[2]} is not closed", f"write {opened[0][1]} after it"
        )
    return from_spans(plain + text[place:], spans)


def from_substrings(
    text: str,
    substrings: str | Sequence[str] | Mapping[str, float],
    occurrence: int | str | Sequence[int | str] = 0,
    strength: float = 1.0,
) -> Marked:
    """Mark parts of the prompt by what they say.

    Args:
        text: the prompt.
        substrings: one or several; a mapping gives each its strength.
        occurrence: which one, counted from 0, or from the end if negative, or ``"all"``; a list has one for each.
        strength: of the marks, where ``substrings`` is not a mapping.

    Raises:
        DataError: a part that is not there so often.

    >>> from_substrings("no, no and no", "no", occurrence=-1).spans
    (TextSpan(start=11, end=13, strength=1.0),)
    """
    parts = [substrings] if isinstance(substrings, str) else list(substrings)
    strengths = dict(substrings) if isinstance(substrings, Mapping) else dict.fromkeys(parts, strength)
    which = [occurrence] * len(parts) if isinstance(occurrence, int | str) else list(occurrence)
    if len(which) != len(parts):
        raise ConfigError(f"occurrence: {len(which)} for {len(parts)} substrings", remedy="give one for each, or one")
    spans = []
    for part, wanted in zip(parts, which, strict=True):
        found = _occurrences(text, part)
        if wanted == "all" and found:
            chosen = found
        elif isinstance(wanted, int) and -len(found) <= wanted < len(found):
            chosen = [found[wanted]]
        else:
            raise DataError(
                f"substring {part!r}, occurrence {wanted!r}: the text has it {len(found)} times",
                remedy="copy it exactly as it stands in the text; occurrences count from 0",
            )
        spans += [TextSpan(at, at + len(part), strengths[part]) for at in chosen]
    return from_spans(text, spans)


def _occurrences(text: str, part: str) -> list[int]:
    found, at = [], text.find(part) if part else -1
    while at >= 0:
        found.append(at)
        at = text.find(part, at + len(part))
    return found


def encode(
    tokenizer: Any,
    prompts: Sequence[Marked | str],
    *,
    max_length: int | None = None,
    device: torch.device | str | None = None,
    names: Sequence[str] = (),
) -> Marks:
    """Prompts as one left-padded batch of tokens; a token is marked if a marked character is in it.

    Args:
        tokenizer: a fast one; its settings are left alone.
        prompts: marked ones, and texts of which nothing is marked.
        max_length: keep the first so many tokens of each prompt.
        device: where the tensors go.
        names: what errors call the prompts; ``prompt 1`` and so on by default.

    Raises:
        DataError: an empty prompt, a mark without a token or beyond ``max_length``.
        ConfigError: a tokenizer that cannot say where its tokens stand, a ``max_length`` below 1.

    Source: section 2.5 of the specification; the published code also takes the token in front of a span.

    >>> from tenfold.models.tiny import tiny_tokenizer
    >>> marks = encode(tiny_tokenizer(), [from_tags("a<mark>bc</mark>d"), "x"])
    >>> marks.marked.int().tolist(), marks.attention_mask.tolist()
    ([[0, 1, 1, 0], [0, 0, 0, 0]], [[1, 1, 1, 1], [0, 0, 0, 1]])
    """
    if max_length is not None and max_length < 1:
        raise ConfigError(f"max_length: {max_length} keeps no token", remedy="give 1 or more, or leave it out")
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"{type(tokenizer).__name__} does not say where its tokens stand in the text",
            remedy="open the model with its fast tokenizer",
        )
    named = names or [f"prompt {number}" for number in range(1, len(prompts) + 1)]
    pairs = zip(prompts, named, strict=True)
    return left_filled([_row(tokenizer, prompt, name, max_length) for prompt, name in pairs], tokenizer, device, names)


def left_filled(
    rows: Sequence[tuple[Sequence[int], Sequence[float | None]]],
    tokenizer: Any,
    device: torch.device | str | None = None,
    names: Sequence[str] = (),
) -> Marks:
    """Prompts that are tokens already as one batch.

    Args:
        rows: for each prompt its tokens, and the strength of each token that is marked, None for others.
        tokenizer: whose padding fills the batch.
        device: where the tensors go.
        names: as for `encode`.

    Raises:
        DataError: no prompts.

    >>> from tenfold.models.tiny import tiny_tokenizer
    >>> left_filled([([5, 6], [None, 1.0]), ([7], [None])], tiny_tokenizer()).marked.int().tolist()
    [[0, 1], [0, 0]]
    """
    if not rows:
        raise DataError("no prompts", remedy="give at least one")
    length = max(len(ids) for ids, _ in rows)
    fill = pad_id(tokenizer)
    strengths = [[*([None] * (length - len(ids))), *marks] for ids, marks in rows]
    return Marks(
        torch.tensor([[*[fill] * (length - len(ids)), *ids] for ids, _ in rows], device=device),
        torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids, _ in rows], device=device),
        torch.tensor([[value is not None for value in row] for row in strengths], device=device),
        torch.tensor(
            [[1.0 if value is None else value for value in row] for row in strengths],
            dtype=torch.float32,
            device=device,
        ),
        tuple(names),
    )


def _row(
    tokenizer: Any, prompt: Marked | str, name: str, max_length: int | None
) -> tuple[list[int], list[float | None]]:
    """Token ids of one prompt, and the strength of each that is marked."""
    prompt = Marked(prompt) if isinstance(prompt, str) else prompt
    found = tokenizer(
        prompt.text, add_special_tokens=prompt.special, return_offsets_mapping=True, truncation=False, verbose=False
    )
    ids, offsets = found["input_ids"], found["offset_mapping"]
    if not ids or not prompt.text:  # special tokens alone are not a prompt
        raise DataError(f"{name} is empty", remedy="give at least one word")
    strengths: list[float | None] = [None] * len(ids)
    limit = len(ids) if max_length is None else max_length
    for span in prompt.spans:
        check_strength(span.strength)
        check_span(span.start, span.end, len(prompt.text), name)
        chosen = tokens_of(offsets, span.start, span.end)
        if not chosen:
            raise DataError(f"{name}: characters {span.start} to {span.end} have no token", remedy="mark some text")
        if chosen[-1] >= limit:
            raise DataError(
                f"{name}: the mark at characters {span.start} to {span.end} reaches token {chosen[-1] + 1}, "
                f"and only {limit} are kept",
                remedy="raise max_length, shorten the prompt, or mark an earlier part",
            )
        for token in chosen:
            strengths[token] = span.strength
    return ids[:limit], strengths[:limit]


def tokens_of(offsets: Sequence[tuple[int, int]], start: int, end: int) -> list[int]:
    """Tokens that share a character with ``[start, end)``; those without a character, as special ones, never do.

    Args:
        offsets: ``[start, end)`` of each token in the text.
        start: first character.
        end: one past the last.

    >>> tokens_of([(0, 0), (0, 4), (4, 7)], 3, 5)
    [1, 2]
    """
    return [index for index, (a, b) in enumerate(offsets) if b > a and b > start and a < end]


def check_span(start: int, end: int, length: int, what: str) -> None:
    """Refuse a span that is empty or outside its text."""
    if not 0 <= start < end <= length:
        raise DataError(
            f"{what}: the span [{start}, {end}) is empty or outside its {length} characters",
            remedy="give [start, end) in characters, counted from 0",
        )


def check_strength(strength: Any) -> None:
    """Refuse a strength that is not a number above 0."""
    number = isinstance(strength, int | float) and not isinstance(strength, bool)
    if not number or not 1e-37 < strength < 1e37:  # what float32 holds
        raise DataError(f"strength {strength!r} is not a number above 0", remedy="1 is full weight, 0.2 a fifth of it")
