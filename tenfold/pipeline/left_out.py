"""What was read for a stage and left out: a table of the first for the report, and a file of all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tenfold.files import write_text
from tenfold.stage.record import Table

if TYPE_CHECKING:
    from tenfold.data.left_out import LeftOut
    from tenfold.data.read import Rows

LEFT_OUT = "left_out.jsonl"
"""In the stage's folder: place, kind of reason and reason of each row that was left out."""
SHOWN = 10


def write_left_out(
    folder: Path, rows: Rows | None, others: Mapping[str, Rows], refused: Sequence[LeftOut] = ()
) -> tuple[Table, ...]:
    """Write the list into the folder where there is something to list, and give the table of the first.

    Args:
        folder: of the stage.
        rows: its data.
        others: its further rows, by key.
        refused: what the stage itself left out of them.

    Raises:
        OSError: the file cannot be written.
    """
    found = [one for some in (rows, *others.values()) if some is not None for one in some.left_out]
    found += refused
    if not found:
        return ()
    lines = (json.dumps(one._asdict(), ensure_ascii=False) + "\n" for one in found)
    write_text(folder / LEFT_OUT, "".join(lines))
    title = f"Rows left out: {len(found)}" + (f", the first {SHOWN}; {LEFT_OUT} has all" if len(found) > SHOWN else "")
    return (
        Table(title=title, columns=("place", "reason"), rows=tuple((one.place, one.reason) for one in found[:SHOWN])),
    )
