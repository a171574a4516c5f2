"""What was read and is not among the rows: where it stands, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from tenfold.errors import DataError

Why = Literal["bad", "tie", "unwanted", "repeated", "blank"]

_SAID = {
    "bad": "cannot be read and were left out (on_bad_row: skip)",
    "tie": "are ties, which say nothing of which answer is better, and were left out",
    "unwanted": "are labelled as unwanted answers (unpaired preferences) and were left out",
    "repeated": "without an id repeat an earlier row word for word and were left out",
    "blank": "with empty text were left out",
}


class LeftOut(NamedTuple):
    """One row that was left out."""

    place: str
    """Where it stands, as an error names it."""
    why: Why
    """What kind of reason it is."""
    reason: str
    """The reason, in words."""


def left_out_notes(source: str, left_out: Sequence[LeftOut]) -> list[str]:
    """One sentence for each kind of reason, with the number and the first of its rows.

    >>> left_out_notes("d.jsonl", [LeftOut("d.jsonl, line 3", "blank", "empty text")])
    ['d.jsonl: 1 rows with empty text were left out (first: d.jsonl, line 3).']
    """
    notes = []
    for why, said in _SAID.items():
        those = [one for one in left_out if one.why == why]
        if those:
            reason = f": {those[0].reason}" if why == "bad" else ""
            notes.append(f"{source}: {len(those)} rows {said} (first: {those[0].place}{reason}).")
    return notes


def reason_of(error: DataError, place: str) -> str:
    """What an error says of a row beyond its place, in one line."""
    return str(error).splitlines()[0].removeprefix(place).lstrip(",: ")
