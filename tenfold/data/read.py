"""One reader for every source: files, folders, hub data sets and the Python reference become typed rows."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, overload

from tenfold.config.stage import Kind, OnBadRow
from tenfold.data.check import build, kind_of, unknown_kind, wrong
from tenfold.data.conversations import in_our_form
from tenfold.data.forms import has_unused_flag, is_unpaired, under_our_names, why_no_lesson
from tenfold.data.groups import DIVIDED, kept_together, places, subject, twin
from tenfold.data.labels import with_labels
from tenfold.data.left_out import LeftOut, Why, left_out_notes, reason_of
from tenfold.data.messages import in_messages
from tenfold.data.rows import KINDS, OUR_COLUMNS, Classification, Row, content
from tenfold.data.sources import RawRow, open_source
from tenfold.errors import ConfigError, DataError

_TRAIN = "train"
_TUNE = ("dev", "valid", "validation", "val")
_TEST = ("test", "eval")


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """An immutable sequence of rows of one kind.

    Args:
        items: the rows.
        kind: what each of them is.
        source: what was read, as the user named it.
        notes: sentences a reader of the results must know: rows left out, splits chosen.
        splits: each row's own ``split`` column, or None.
        others: of each row, the columns that its kind has no use for, under our names.
        records: each row as it stands in the source, with its place.
        columns: the user's column name for each of ours.
        left_out: what was read and is not among the rows, with the reason of each.
        unpaired: whether the source holds unpaired preferences (an answer, and whether it is wanted).

    >>> rows = read_rows("python-reference")
    >>> rows.kind, rows[0].id
    ('text', 'assert')
    """

    items: tuple[Row, ...]
    kind: Kind
    source: str
    notes: tuple[str, ...] = ()
    splits: tuple[str, ...] | None = None
    others: tuple[Mapping[str, Any], ...] = ()
    records: tuple[RawRow, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    unpaired: bool = False

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Row | Rows:
        if isinstance(index, slice):
            splits = self.splits and self.splits[index]
            others, records = self.others[index], self.records[index]
            return replace(self, items=self.items[index], splits=splits, others=others, records=records)
        return self.items[index]

    @cached_property
    def sha256(self) -> str:
        """Hash of ids, splits and contents in order: the same rows hash alike from JSONL, CSV, Parquet or .gz."""
        digest = hashlib.sha256(self.kind.encode())
        for row, split in zip(self.items, self.splits or itertools.repeat("")):  # noqa: B905  repeat has no end
            digest.update(f"\n{row.id}\t{split}\t{content(row)}".encode())
        return digest.hexdigest()

    def split(self, holdout: float) -> tuple[Rows, Rows]:
        """Training and held-out rows.

        Where the rows say themselves to which split they belong (``train`` and ``dev``/``valid``/``test``), that is
        kept and a note says so. Otherwise a row is held out when the hash of its id falls below ``holdout``: the choice
        needs no seed and stays the same when rows are added or reordered.

        Rows of one prompt (one first question, one text; `tenfold.data.groups`) go to one side, that of the smallest of
        their ids. Where such groups are so few or so uneven that much more or less than ``holdout`` would be held out,
        groups are taken in the order of their hashes until it is reached. Where that takes too few prompts to be
        possible, rows of one prompt are divided but for those that say the same, and a note says so.

        Args:
            holdout: share of the rows to hold out, between 0 and 1.

        Raises:
            DataError: when one side would be empty; the remedy names a share that works.

        >>> train, heldout = read_rows("python-reference").split(0.1)
        >>> len(train) > len(heldout) > 0
        True
        """
        if not 0 < holdout < 1:
            raise ConfigError(f"holdout: {holdout} is not between 0 and 1", remedy="give a share such as 0.1")
        own = self._own_split()
        if own is not None:
            held, note = own
        else:
            found, note = self._places(holdout)
            held = [place < holdout for place in found]
            if len(set(held)) < 2:
                raise self._one_sided(found, holdout)
        return self.only([not h for h in held], note), self.only(held, note)

    def _places(self, holdout: float) -> tuple[list[float], str]:
        """Where each row falls in [0, 1), and a note where prompts had to be divided."""
        total, smaller = len(self), min(holdout, 1 - holdout)
        # A prompt with more rows would make twice of a part, so it goes to the larger one, if others fill the smaller.
        most = round(min(2 * smaller, 0.75) * total, 6)
        groups = kept_together(self.items, most, rest=round(smaller * total, 6))
        found = places([row.id for row in self.items], groups, (0, holdout, 1), most=most)
        divided = sum(group.startswith(DIVIDED) for group in groups)
        note = (
            f"{self.source}: {divided} rows share too few prompts to keep each on one side of the split; of them, only "
            "rows that say the same but for their label are kept together."
        )
        return found, note if divided else ""

    def _own_split(self) -> tuple[list[bool], str] | None:
        """Which rows are held out by their own split column, with a note; None where it cannot divide the rows."""
        if self.splits is None or len(set(self.splits)) < 2:
            return None
        names = list(dict.fromkeys(self.splits))
        train = [_TRAIN] if _TRAIN in names else [name for name in names if name in _TUNE]
        rest = [name for name in names if name not in train]
        if not train or not rest:
            return None
        held = [split not in train for split in self.splits]
        note = (
            f"The rows' own split column decides: trained on {', '.join(train)}, held out {', '.join(rest)}; "
            "the setting holdout is not used."
        )
        subjects = [subject(row) for row in self.items]
        known = {name for name, out in zip(subjects, held, strict=True) if not out}
        shared = sum(out and name in known for name, out in zip(subjects, held, strict=True))
        if shared:
            note += f" {shared} of {sum(held)} held-out rows share their prompt or text with a training row."
        return held, note

    def only(self, keep: Sequence[bool], note: str = "") -> Rows:
        """Those of the rows that are to be kept, [rows], with a further note."""
        return replace(
            self,
            items=tuple(itertools.compress(self.items, keep)),
            splits=self.splits and tuple(itertools.compress(self.splits, keep)),
            others=tuple(itertools.compress(self.others, keep)),
            records=tuple(itertools.compress(self.records, keep)),
            notes=(*self.notes, note) if note else self.notes,
        )

    def _one_sided(self, hashes: list[float], holdout: float) -> DataError:
        if len(self) < 2:
            return DataError(
                f"{self.source}: has {len(self)} row, which cannot be split into training and held-out text",
                remedy="give two rows or more: one document per line of a .jsonl file, or per file of a folder",
            )
        if len({twin(row) for row in self.items}) < 2:
            return DataError(
                f"{self.source}: its {len(self)} rows all say the same, so none can be held out from the others",
                remedy="give rows of different texts, or rows with a column split (train, test)",
            )
        low, high = sorted(hashes)[0], sorted(hashes)[-1]
        empty, bound = ("held-out", f"above {low:.4f}") if holdout <= low else ("training", f"below {high:.4f}")
        return DataError(
            f"{self.source}: none of its {len(self)} rows is a {empty} row with holdout {holdout}",
            remedy=f"give a holdout {bound}, more rows, or rows with a column split (train, test)",
        )


def read_rows(
    source: str,
    *,
    rows: Kind | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    on_bad_row: OnBadRow = "stop",
) -> Rows:
    """Read typed rows from any source, checking each; imports neither torch nor transformers.

    Args:
        source: a file (.jsonl, .json, .csv, .tsv, .parquet, .txt; all but Parquet also .gz; a text file is one row), a
            folder of text files (a file is a row), ``hub:user/name``, ``hub:user/name:split`` or
            ``hub:user/name:config/split``, or ``python-reference``.
        rows: what a row is; by default told from the columns of the first one, by the table in ``tenfold.data.rows``.
        columns: our column name -> the source's, e.g. ``{"prompt": "question"}``.
        limit: read at most this many rows.
        on_bad_row: ``stop`` at the first row that cannot be read, or ``skip`` such rows, which are then listed.

    Returns:
        The rows. Ids are the source's own, or a hash of the content, so that they survive reordering. Left out, listed
        in ``left_out`` and counted in ``notes`` are rows without an id that repeat an earlier one word for word, ties
        among preferences, and completions that are labelled as unwanted.

    Raises:
        DataError: naming file, line, column, the row, what was expected and what to do; also where a whole file cannot
            be read, or no row of it.
        ConfigError: when ``columns`` names a column that no kind of row has.

    >>> read_rows("python-reference", limit=3).kind
    'text'
    """
    columns = dict(columns or {})
    _check_columns(columns)
    opened = open_source(source)
    reading = _Reading(kind=rows)
    # Closed here: a file left to the garbage collector stays open for as long as an error's traceback is kept.
    with contextlib.closing(opened.records) as records:
        named = _named(itertools.islice(records, limit), columns)
        for record, values in with_labels(named, classification=rows == "classification"):
            try:
                reading.read(record, values, blank=not opened.editable)
            except DataError as error:
                if on_bad_row == "stop":
                    raise
                reading.leave_out(record, "bad", reason_of(error, record.place))
    if reading.kind is None or not reading.items:
        raise _nothing_left(source, reading.left_out)
    return Rows(
        items=tuple(reading.items),
        kind=reading.kind,
        source=source,
        notes=opened.notes + reading.notes(source),
        splits=reading.own_splits(),
        others=tuple(reading.others),
        records=tuple(reading.records),
        columns=columns,
        left_out=tuple(reading.left_out),
        unpaired=bool(reading.told["unpaired"]),
    )


def _nothing_left(source: str, left_out: Sequence[LeftOut]) -> DataError:
    if not left_out:
        return DataError(f"{source}: has no rows", remedy="give a file with at least one row")
    first = left_out[0]
    return DataError(
        f"{source}: none of its {len(left_out)} rows can be used; {first.place}: {first.reason}",
        remedy="mend the rows, or say which of your columns is which with columns",
    )


class _Reading:
    """What has been read so far, and the checks that need more than one row."""

    def __init__(self, kind: Kind | None) -> None:
        self.kind = kind
        self.items: list[Row] = []
        self.splits: list[Any] = []
        self.others: list[Mapping[str, Any]] = []
        self.records: list[RawRow] = []
        self.left_out: list[LeftOut] = []
        self.told: Counter[str] = Counter()
        self._seen: dict[str, tuple[str, bool]] = {}
        self._first_label: tuple[type, str] | None = None

    def read(self, record: RawRow, named: Mapping[str, Any], *, blank: bool) -> None:
        """Take in one record; ``blank`` leaves out empty texts.

        Raises:
            DataError: for what cannot be read of it.
        """
        if record.error is not None:
            raise record.error
        told: Counter[str] = Counter()
        values = in_our_form(record, in_messages(record, under_our_names(record, named, told)), told)
        no_lesson = why_no_lesson(values)
        told["unpaired"] += is_unpaired(values)
        told["flag"] += has_unused_flag(values)
        self.told.update(told)
        if no_lesson is not None:
            self.leave_out(record, *no_lesson)
        elif blank and _is_blank_text(values):
            self.leave_out(record, "blank", "empty text")
        else:
            self._add(record, values)

    def leave_out(self, record: RawRow, why: Why, reason: str) -> None:
        """Note down a record that is not among the rows."""
        self.left_out.append(LeftOut(record.place, why, reason))

    def _add(self, record: RawRow, values: dict[str, Any]) -> None:
        if self.kind is None:
            kind = kind_of(values)
            if kind is None:
                raise unknown_kind(record, values)
            self.kind = kind
        row = build(self.kind, record, values)
        own_id = values.get("id") is not None
        if row.id in self._seen:
            place, other_own = self._seen[row.id]
            if not own_id and not other_own:
                self.leave_out(record, "repeated", f"repeats {place} word for word")
                return
            raise wrong(
                record,
                "id",
                f"{row.id!r} was already used at {place}",
                remedy="give each row an id of its own, or none",
            )
        if isinstance(row, Classification):
            self._check_label(row, record)
        self._seen[row.id] = (record.place, own_id)
        self.items.append(row)
        self.records.append(record)
        self.splits.append(values.get("split"))
        spec = KINDS[self.kind]
        used = {"id", *spec.needed, *spec.further}
        self.others.append({name: value for name, value in values.items() if name not in used})

    def _check_label(self, row: Classification, record: RawRow) -> None:
        kind = str if isinstance(row.label, str) else float
        if self._first_label is None:
            self._first_label = (kind, record.place)
        elif kind is not self._first_label[0]:
            names = {str: "a name", float: "a number"}
            raise wrong(
                record,
                "label",
                f"{row.label!r} is {names[kind]}, but it is {names[self._first_label[0]]} at {self._first_label[1]}",
                remedy="write all labels as names, or all as numbers",
            )

    def notes(self, source: str) -> tuple[str, ...]:
        notes = left_out_notes(source, self.left_out)
        notes += [f"{source}: {self.told[name]} {said}" for name, said in _TOLD.items() if self.told[name]]
        if self.splits and any(self.splits) and self.own_splits() is None:
            notes.append(f"{source}: the column split holds other values than train, dev, valid, test; it is not used.")
        return tuple(notes)

    def own_splits(self) -> tuple[str, ...] | None:
        known = {_TRAIN, *_TUNE, *_TEST}
        return tuple(self.splits) if all(isinstance(s, str) and s in known for s in self.splits) else None


_TOLD = {
    "implicit": "rows without a prompt: it is what both answers begin with.",
    "differs": "prompts differ from the questions of their conversations, which count; these prompts are not used.",
    "transcript": "prompts are transcripts of Human and Assistant: with a chat template they are read as turns.",
    "alpaca": "rows in Alpaca's form: instruction and input, on lines of their own, are the prompt.",
    "labelled": "rows with two answers and a label, which says which of them is chosen.",
    "flag": "answers have a label 0 or 1, which is not used: if it says whether the answer is wanted, write true "
    "or false.",
    "system": "rows have a column with a system message, which comes first.",
}
"""What is said of forms that were read, by what counts them."""


def _named(records: Iterable[RawRow], columns: dict[str, str]) -> Iterator[tuple[RawRow, dict[str, Any]]]:
    """Records with their columns under our names; what is wrong with one is its error."""
    for record in records:
        try:
            yield record, {} if record.error is not None else _rename(record, columns)
        except DataError as error:
            yield replace(record, error=error), {}


def _check_columns(columns: dict[str, str]) -> None:
    for ours in columns:
        if ours not in OUR_COLUMNS:
            near = difflib.get_close_matches(ours, OUR_COLUMNS, n=1)
            swapped = " (our name comes first, then yours)" if columns[ours] in OUR_COLUMNS else ""
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"columns: {ours!r} is not a column of any kind of row{hint}{swapped}",
                remedy=f"ours are: {', '.join(OUR_COLUMNS)}",
            )


def _rename(record: RawRow, columns: dict[str, str]) -> dict[str, Any]:
    """The record under our column names; a column that the user mapped to a name no longer counts under its own."""
    taken = set(columns.values())
    values = {name: value for name, value in record.values.items() if name not in taken and name not in columns}
    for ours, theirs in columns.items():
        if theirs not in record.values:
            near = difflib.get_close_matches(theirs, list(record.values), n=1)
            raise wrong(
                record,
                theirs,
                f"missing, though columns: {{{ours}: {theirs}}} names it",
                remedy=f"columns: {{{ours}: {near[0]}}}" if near else f"the row has: {', '.join(record.values)}",
            )
        values[ours] = record.values[theirs]
    return values


def _is_blank_text(values: Mapping[str, Any]) -> bool:
    return kind_of(values) == "text" and isinstance(values["text"], str) and not values["text"].strip()
