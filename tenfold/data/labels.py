"""What the labels of a CSV file are, where every cell is text: a matter of the whole column, not of one cell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from decimal import Decimal
from itertools import chain
from typing import Any

from tenfold.data.check import kind_of, wrong
from tenfold.data.sources import RawRow

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_CODE = re.compile(r"[+-]?0[0-9]+")
_MISSING = ("nan", "na", "n/a", "null", "none", "inf", "-inf")

_Read = Iterable[tuple[RawRow, dict[str, Any]]]


def with_labels(rows: _Read, *, classification: bool) -> _Read:
    """Rows of a CSV or TSV file with their labels as numbers where all are; other rows as they come.

    A label that is missing (``nan``, ``NA``, ...) where others are numbers is the error of its record.

    Whole numbers, also written ``0.0``, are classes, others are values to be predicted. One number with a leading zero
    (``007``) makes codes of all, which are names.

    Args:
        rows: records with their columns under our names; read at once where they are labelled.
        classification: whether the rows were said to be labelled; else told from the first one.

    >>> table = [(RawRow(f"line {n}", {}, flat=True), {"text": "a", "label": f"{n}.0"}) for n in range(3)]
    >>> [values["label"] for _, values in with_labels(table, classification=False)]
    [0, 1, 2]
    """
    stream = iter(rows)
    head = []
    for pair in stream:
        head.append(pair)
        if pair[0].error is None:
            break
    if not head:
        return []
    whole = chain(head, stream)
    record, values = head[-1]
    if not record.flat or not (classification or kind_of(values) == "classification"):
        return whole
    return _typed(list(whole))


def _typed(rows: list[tuple[RawRow, dict[str, Any]]]) -> Iterator[tuple[RawRow, dict[str, Any]]]:
    cells = [str(values.get("label") or "").strip() for _, values in rows]
    words = [cell for cell in cells if cell and cell.lower() not in _MISSING]
    if not words or not all(_NUMBER.fullmatch(cell) for cell in words) or any(_CODE.fullmatch(cell) for cell in words):
        yield from rows
        return
    whole = all(float(cell).is_integer() for cell in words)
    for (record, values), cell in zip(rows, cells, strict=True):
        if cell.lower() in _MISSING:
            remedy = "mend or remove the row; all other labels are numbers"
            error = record.error or wrong(record, "label", f"{cell!r} among numbers", remedy)
            yield replace(record, error=error), values
            continue
        yield record, {**values, "label": int(Decimal(cell)) if whole else float(cell)} if cell else values
