"""Which rows belong together, and where each falls when rows are divided: what is learnt of one tells of the others.

Rows of one prompt go to one side whatever they answer, and the same two answers whatever their label. Texts are
compared without case and with any white space as one space; other near copies are not looked for.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from typing import Any

from tenfold.data.rows import Chat, Choice, Classification, Completion, Preference, Question, Row, Text, content
from tenfold.data.transcripts import ANSWER

NEAR = 0.15
"""How far the size of a part may stray from what was asked, as a part of it, before rows are laid out evenly."""

DIVIDED = "\0"
"""How the group of rows begins whose subject is divided."""


def hash_share(key: str) -> float:
    """Where in [0, 1) a key falls, evenly and for ever the same.

    >>> round(hash_share("a"), 4)
    0.2899
    """
    return int(hashlib.sha256(f"tenfold-v1|{key}".encode()).hexdigest()[:8], 16) / 2**32


def subject(row: Row) -> str:
    r"""What a row is about, equal for rows that must not be divided.

    It is the prompt of a preference, completion or choice, of a conversation its first question, the question, the
    text or the pair of texts. A dialogue as a prompt (messages, or a transcript of HH-RLHF) counts by its first
    question, since data sets hold one dialogue at several lengths.

    >>> subject(Completion("1", "What  is it?", "a")) == subject(Completion("2", "what is it?\n", "b"))
    True
    """
    if isinstance(row, Chat):
        return _first_question(row.messages) or _folded(content(row))
    if isinstance(row, Preference):
        return _first_question(row.history) or _folded(row.prompt.split(ANSWER)[0])
    if isinstance(row, Completion | Choice):
        return _folded(row.prompt)
    if isinstance(row, Question):
        return _folded(row.question)
    return twin(row)


def twin(row: Row) -> str:
    """A row without its id and its label, equal for rows that say the same.

    >>> twin(Preference("1", "p", "a", "b")) == twin(Preference("2", "p", "b", "a"))
    True
    """
    if isinstance(row, Preference):
        said = [_folded(json.dumps(message, sort_keys=True, ensure_ascii=False)) for message in row.history]
        return _joined(*said, _folded(row.prompt), *sorted((_folded(row.chosen), _folded(row.rejected))))
    if isinstance(row, Classification):
        return _joined(_folded(row.text), _folded(row.text_pair or ""))
    if isinstance(row, Choice):
        return _joined(_folded(row.prompt), *map(_folded, row.options))
    if isinstance(row, Question):
        passages = (row.context,) if isinstance(row.context, str) else row.context
        return _joined(_folded(row.question), *map(_folded, passages))
    return _folded(row.text if isinstance(row, Text) else content(row))


def _joined(*parts: str) -> str:
    return "\0".join(parts)


def _first_question(messages: Sequence[dict[str, Any]]) -> str:
    return next((_folded(str(message["content"])) for message in messages if message["role"] == "user"), "")


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def kept_together(rows: Sequence[Row], most: float, rest: float = math.inf) -> list[str]:
    """The group of each row: its subject, and its twins alone where a subject has too many rows to go to one side.

    Args:
        rows: all that are divided.
        most: rows of one subject from which it is too large.
        rest: where all other subjects have so many rows together, those too large are kept whole, too.
    """
    subjects = [subject(row) for row in rows]
    sizes = Counter(subjects)
    large = {name for name, size in sizes.items() if size > most}
    if not large or len(rows) - sum(sizes[name] for name in large) >= rest:
        return subjects
    return [DIVIDED + twin(row) if name in large else name for row, name in zip(rows, subjects, strict=True)]


def places(
    ids: Sequence[str],
    groups: Sequence[Hashable],
    edges: Sequence[float],
    *,
    salt: str = "",
    near: float = NEAR,
    most: float = math.inf,
) -> list[float]:
    """Where in [0, 1) each row falls, at one place with all of its group.

    It is the hash of the smallest id of the group, so that neither order nor number of the other rows matters. Where
    groups of several rows are so few or so uneven that a part would get much more or less than its share, or rows so
    few that a part would get none, groups are laid out evenly: in the order of their hashes, each at the middle of its
    rows.

    Args:
        ids: of the rows, [rows].
        groups: of the rows, [rows].
        edges: of the parts, from 0 to 1, [parts + 1].
        salt: makes a hash that is independent of others.
        near: how far the size of a part may stray from its share, as a part of it.
        most: rows from which a group is laid out in the largest part.

    >>> ids, groups = [str(n) for n in range(60)], [n // 12 for n in range(60)]
    >>> [sum(place < share for place in places(ids, groups, (0, share, 1))) for share in (0.2, 0.4)]
    [12, 24]
    """
    sizes = Counter(groups)
    first: dict[Hashable, str] = {}
    for id, group in zip(ids, groups, strict=True):
        first[group] = min(first.get(group, id), id)
    place = {group: hash_share(f"{salt}{id}") for group, id in first.items()}
    uneven = len(sizes) < len(ids) and not _near(place, sizes, edges, near)
    if uneven or _is_a_part_empty(place.values(), edges):
        widths = [upper - lower for lower, upper in itertools.pairwise(edges)]
        side = 1 if widths[-1] >= max(widths) else -1  # where the largest part is: behind, or in front
        order = sorted(place, key=lambda group: (side * (sizes[group] > most), place[group], first[group]))
        before = 0
        for group in order:
            place[group] = (before + (sizes[group] - side) / 2) / len(ids)  # one group can fill the smaller part
            before += sizes[group]
    return [place[group] for group in groups]


def _is_a_part_empty(places: Collection[float], edges: Sequence[float]) -> bool:
    return any(not any(lower <= at < upper for at in places) for lower, upper in itertools.pairwise(edges))


def _near(place: dict[Hashable, float], sizes: Counter[Hashable], edges: Sequence[float], near: float) -> bool:
    """Whether every part has about its share of the rows."""
    for lower, upper in itertools.pairwise(edges):
        due = (upper - lower) * sizes.total()
        if abs(sum(sizes[group] for group, at in place.items() if lower <= at < upper) - due) > near * due:
            return False
    return True
