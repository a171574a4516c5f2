"""From a file, folder, hub id or a source that ships with tenfold to raw records, each knowing where it came from.

Nothing here knows what a row means; torch is never imported, so that data is checked before any weight is loaded.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import gzip
import itertools
import json
import shlex
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from os.path import expanduser  # Path.expanduser raises where there is no such user
from pathlib import Path
from typing import Any

from tenfold.data.python_reference import python_reference
from tenfold.data.step_audit import from_source, preference_values
from tenfold.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".rst")
FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", *TEXT_SUFFIXES)


@dataclass(frozen=True)
class RawRow:
    """One raw row.

    Args:
        place: where it stands, as an error should name it ("train.jsonl, line 7").
        values: its columns.
        flat: whether every value is text because the format has nothing else (CSV, TSV).
        error: why it could not be read; its values are empty then. What cannot be read beyond one row is raised.
    """

    place: str
    values: Mapping[str, Any]
    flat: bool = False
    error: DataError | None = None


@dataclass(frozen=True)
class Source:
    """Raw records and what a reader must be told about how they were obtained.

    Who stops before the end of ``records`` closes them, and with them the file. ``editable`` is False where the user
    cannot mend a row (hub data sets).
    """

    records: Generator[RawRow]
    notes: tuple[str, ...] = ()
    editable: bool = True


def open_source(source: str) -> Source:
    """The records of ``source``; files are read as they are consumed.

    Raises:
        DataError: when there is no such file, its format is unknown, or it cannot be read.
    """
    if source == "python-reference":
        topics, notes = python_reference()
        rows = (RawRow(f"topic {name!r}", {"id": name, "text": text}) for name, text in topics.items())
        return Source(rows, notes)
    if source.partition(":")[0] == "step-audit":
        items = enumerate(from_source(source), start=1)
        return Source(RawRow(f"{source}, row {number}", preference_values(item)) for number, item in items)
    if source.startswith("hub:"):
        return _hub(source)
    path = Path(expanduser(source))
    if path.is_dir():
        return Source(_folder(path))
    if not path.exists():
        raise _no_such_file(path)
    packed = path.suffix.lower() == ".gz"
    suffix = Path(path.stem).suffix.lower() if packed else path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        return Source(_text_files([path], path.parent))
    if suffix == ".jsonl":
        return Source(_jsonl(path))
    if suffix == ".json":
        return Source(_json(path))
    if suffix in (".csv", ".tsv"):
        return Source(_csv(path, "\t" if suffix == ".tsv" else ","))
    if suffix == ".parquet" and not packed:
        return Source(_parquet(path))
    raise DataError(
        f"{path}: unknown kind of file {''.join(path.suffixes[-2:])!r}",
        remedy=f"give one of {', '.join(FILE_SUFFIXES)} (all but .parquet also .gz), a folder, or hub:user/name",
    )


def _no_such_file(path: Path) -> DataError:
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        remedy = f"did you mean {path.parent / near[0]}?"
    else:
        remedy = (
            "give a file, a folder, hub:user/name (a data set of the Hugging Face hub), python-reference or step-audit"
        )
    return DataError(f"{path}: no such file or folder", remedy=remedy)


def _lines(path: Path) -> Iterator[str]:
    r"""The lines of a UTF-8 file with their ends; only ``\n`` ends a line, so that numbers agree with editors.

    Raises:
        DataError: when it is not UTF-8 or cannot be read, naming the line.
    """
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    number = 0
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1 or b"\0" in line:
                    _refuse_wide(path, line, number)
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        # Latin-1 with letters where it has none: quotation marks and dashes of Windows.
        encoding = "LATIN1" if set(error.object) & {0x81, 0x8D, 0x8F, 0x90, 0x9D} else "WINDOWS-1252"
        raise DataError(
            f"{path}, line {number}, byte {error.start + 1}: not UTF-8 (byte 0x{byte:02x})",
            remedy=f"convert it: {_conversion(path, encoding)}",
        ) from None
    except (OSError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(
            f"{path}, after line {number}: cannot be read: {reason}", remedy="copy the file again and check its rights"
        ) from None


_WIDE = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",  # first, since one begins like UTF-16
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip


def _refuse_wide(path: Path, line: bytes, number: int) -> None:
    """Name the encoding of a file of two or four bytes a character, as Excel and PowerShell write them."""
    mark = next((mark for mark in _WIDE if number == 1 and line.startswith(mark)), b"")
    if mark:
        found = _WIDE[mark]
    elif b"\0" not in line:
        return
    elif number == 1 and (line[1:2] == b"\0" or line[:1] == b"\0"):
        found = "UTF-16LE" if line[1:2] == b"\0" else "UTF-16BE"
    else:
        raise DataError(
            f"{path}, line {number}, byte {line.index(0) + 1}: a zero byte, expected text",
            remedy="copy the file again, or write it anew",
        )
    raise DataError(f"{path}: {found}, not UTF-8", remedy=f"convert it: {_conversion(path, found)}")


def _conversion(path: Path, encoding: str) -> str:
    """A command that writes the file as UTF-8 beside it."""
    packed = path.suffix.lower() == ".gz"
    target = path.with_name(f"utf8-{path.stem if packed else path.name}")
    source = f"gzip -dc {shlex.quote(str(path))} | " if packed else ""
    file = "" if packed else f" {shlex.quote(str(path))}"
    return f"{source}iconv -f {encoding} -t UTF-8{file} > {shlex.quote(str(target))}"


def _jsonl(path: Path) -> Generator[RawRow]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            problem = f"column {error.colno}: malformed JSON: {error.msg}\n  row: {shorten(line.strip())}"
            malformed = DataError(f"{place}, {problem}", remedy="one complete JSON object per line")
            yield RawRow(place, {}, error=malformed)
        else:
            yield _object(values, place)


def _json(path: Path) -> Generator[RawRow]:
    text = "".join(_lines(path))
    if not text.strip():
        return
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        lines = error.msg == "Extra data"
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}: malformed JSON: {error.msg}\n"
            f"  text: {shorten(text.splitlines()[error.lineno - 1].strip())}",
            remedy="one object per line is the format .jsonl: rename the file" if lines else "a JSON list of objects",
        ) from None
    if not isinstance(values, list):
        raise DataError(
            f"{path}: holds {_json_type(values)}, expected a list of objects",
            remedy='write [{"text": "..."}, ...], or one object per line in a .jsonl file',
        )
    for number, value in enumerate(values, start=1):
        yield _object(value, f"{path}, row {number}")


def _object(value: Any, place: str) -> RawRow:
    if isinstance(value, dict):
        return RawRow(place, value)
    problem = f"holds {_json_type(value)}, expected an object\n  row: {shorten(json.dumps(value))}"
    return RawRow(place, {}, error=DataError(f"{place}: {problem}", remedy='write {"text": "..."}'))


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _csv(path: Path, delimiter: str) -> Generator[RawRow]:
    # The module's limit of 128 KiB per field is a process-wide setting: lift it for this read only.
    limit = csv.field_size_limit(2**31 - 1)
    start = 1
    try:
        reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        for fields in reader:
            place = f"{path}, line {start}"
            start = reader.line_num + 1
            if not fields:
                continue
            if header is None:
                header = _header(fields, place)
            elif len(fields) != len(header):
                uneven = DataError(
                    f"{place}: {len(fields)} fields, but the header names {len(header)} ({', '.join(header)})\n"
                    f"  row: {shorten(delimiter.join(fields))}",
                    remedy=f'put fields that hold {delimiter!r} or a newline in double quotes; write " inside as ""',
                )
                yield RawRow(place, {}, flat=True, error=uneven)
            else:
                yield RawRow(place, dict(zip(header, fields, strict=True)), flat=True)
    except csv.Error as error:
        raise DataError(
            f"{path}, line {start}: malformed {path.suffixes[0][1:].upper()}: {error}",
            remedy='close every double quote, and write " inside a quoted field as ""',
        ) from None
    finally:
        csv.field_size_limit(limit)


def _header(fields: list[str], place: str) -> list[str]:
    names = [name.strip() for name in fields]
    other = next((mark for mark in ";\t" if len(names) == 1 and mark in names[0]), None)
    if other is not None:
        raise DataError(
            f"{place}: the header has one column, {shorten(repr(names[0]), 60)}, in which {other!r} separates names",
            remedy="name a file with tabs .tsv"
            if other == "\t"
            else "write commas, as CSV UTF-8 of a spreadsheet has them, or tabs in a .tsv file",
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or "" in names:
        wrong = f"names {twice[0]!r} twice" if twice else "has a column without a name"
        raise DataError(f"{place}: the header {wrong}", remedy="the first line names each column once, e.g. text,label")
    return names


def _parquet(path: Path) -> Generator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for values in batch.to_pylist():
                    number += 1
                    yield RawRow(f"{path}, row {number}", values)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path}, after row {number}: not readable as Parquet: {str(error).splitlines()[0]}",
            remedy="copy the file again, or write it anew with pandas or pyarrow",
        ) from None


def _folder(path: Path) -> Generator[RawRow]:
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file()
        and (Path(file.stem) if file.suffix.lower() == ".gz" else file).suffix.lower() in TEXT_SUFFIXES
    )
    if not files:
        raise DataError(
            f"{path}: no text files in this folder or below it",
            remedy=f"text files end in {', '.join(TEXT_SUFFIXES)}; name other files one by one",
        )
    yield from _text_files(files, path)


def _text_files(files: Iterable[Path], root: Path) -> Generator[RawRow]:
    for file in files:
        yield RawRow(str(file), {"id": file.relative_to(root).as_posix(), "text": "".join(_lines(file))})


def _hub(source: str) -> Source:
    """``hub:user/name``, ``hub:user/name:split`` or ``hub:user/name:config/split``."""
    name, _, rest = source.removeprefix("hub:").partition(":")
    config, _, split = rest.rpartition("/")
    if not name:
        raise DataError(f"{source}: names no data set", remedy="write hub:user/name or hub:user/name:config/split")
    import datasets

    try:
        data = datasets.load_dataset(name, config or None, split=split or None)
    except Exception as error:  # the hub's client raises its own, requests', httpx' and datasets' errors
        raise DataError(
            f"{source}: cannot be loaded: {type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0]}",
            remedy="check the name and the network, or download the data and name the file",
        ) from error
    notes: tuple[str, ...] = ()
    if isinstance(data, Mapping):
        split = "train" if "train" in data else next(iter(data))
        if len(data) > 1:
            others = ", ".join(sorted(set(data) - {split}))
            notes = (f"{source} has several splits: read {split}, left {others}.",)
        data = data[split]
    records = (
        RawRow(f"{source}, row {number}", values) for number, values in zip(itertools.count(1), data, strict=False)
    )
    return Source(records, notes, editable=False)


def shorten(text: str, width: int = 160) -> str:
    """At most ``width`` characters of ``text``, with dots where something is left out.

    >>> shorten("abcdefgh", 6)
    'abc...'
    """
    return text if len(text) <= width else text[: width - 3] + "..."
