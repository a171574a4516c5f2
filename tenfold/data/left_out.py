"""What was read and is not among the rows: where it stands, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeVar

from tenfold.config.stage import OnBadRow
from tenfold.data.rows import Row
from tenfold.errors import DataError

Why = Literal["bad", "refused", "tie", "unwanted", "repeated", "blank"]

T = TypeVar("T")

_SAID = {
    "bad": "cannot be read and were left out (on_bad_row: skip)",
    "refused": "cannot be written as the model reads them and were left out (on_bad_row: skip)",
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
            reason = f": {those[0].reason}" if why in ("bad", "refused") else ""
            notes.append(f"{source}: {len(those)} rows {said} (first: {those[0].place}{reason}).")
    return notes


def reason_of(error: DataError, place: str) -> str:
    """What an error says of a row beyond its place, in one line."""
    return str(error).splitlines()[0].removeprefix(place).lstrip(",: ")


def use_each(
    rows: Sequence[Row], use: Callable[[Row, str], T], on_bad_row: OnBadRow
) -> tuple[list[T | None], tuple[LeftOut, ...]]:
    """Do something with each row that it may be unfit for, such as writing it as the model's chat template does.

    Args:
        rows: as read, or any.
        use: is given a row and where it stands, and raises a DataError for one that is unfit.
        on_bad_row: ``stop`` at the first such row, or ``skip`` them.

    Returns:
        What ``use`` made of each row, None where it refused one, and the list of those.

    Raises:
        DataError: that of the first row, where it is to stop or no row is left.
    """
    # Rows that were read know where they stand in their source.
    places = [record.place for record in getattr(rows, "records", ())] or [f"row {row.id!r}" for row in rows]
    found: list[T | None] = []
    refused, first = [], None
    for row, place in zip(rows, places, strict=True):
        try:
            found.append(use(row, place))
        except DataError as error:
            if on_bad_row == "stop":
                raise
            found.append(None)
            refused.append(LeftOut(place, "refused", reason_of(error, place)))
            first = first or error
    if first is not None and len(refused) == len(found):
        raise first
    return found, tuple(refused)
