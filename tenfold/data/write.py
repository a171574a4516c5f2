"""Rows written as they were read: under the user's own column names, in the format of the file they come from."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tenfold.files import write_text


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows in the format that the name says; whole or not at all.

    Args:
        path: of the file, ending in .jsonl, .json, .csv or .tsv.
        rows: columns and values; lists and objects become JSON in the cells of a table.

    Raises:
        OSError: the file cannot be written.
    """
    if path.suffix in (".csv", ".tsv"):
        write_text(path, _table(list(rows), "\t" if path.suffix == ".tsv" else ","))
        return
    lines = [json.dumps(row, ensure_ascii=False, default=str) for row in rows]
    write_text(
        path, "[\n" + ",\n".join(lines) + "\n]\n" if path.suffix == ".json" else "".join(f"{x}\n" for x in lines)
    )


def _table(rows: list[Mapping[str, Any]], delimiter: str) -> str:
    names = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO(newline="")
    table = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    table.writerow(names)
    table.writerows([as_cell(row.get(name)) for name in names] for row in rows)
    return text.getvalue()


def as_cell(value: Any) -> Any:
    """A value as a cell of a table holds it.

    >>> as_cell(["a"]), as_cell(None), as_cell(0.5)
    ('["a"]', '', 0.5)
    """
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict | tuple) else value
