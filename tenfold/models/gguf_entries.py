"""Metadata of GGUF files as values: a key, what it says, and how it is stored."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

_KINDS = ("UINT8", "INT8", "UINT16", "INT16", "UINT32", "INT32", "UINT64", "INT64", "FLOAT32", "FLOAT64", "BOOL")
_FORMS = dict(zip(_KINDS, "BbHhIiQqfd?", strict=True))
"""Kind of a number -> its letter in ``struct``."""


@dataclass(frozen=True)
class Entry:
    """One key of a file.

    Args:
        key: with its prefix.
        value: a truth value, number, text, or list of one of these.
        kind: how it is stored, a ``gguf.GGUFValueType``.
        items: the same of the items of a list.
    """

    key: str
    value: Any
    kind: Any
    items: Any = None


def entries(values: Mapping[str, Any], prefix: str = "") -> list[Entry]:
    """Values with the storage that llama.cpp's own converter gives them.

    >>> [one] = entries({"block_count": 2}, "llama.")
    >>> one.key, one.value, one.kind.name
    ('llama.block_count', 2, 'UINT32')
    """
    return [_entry(prefix + key, value) for key, value in values.items()]


def entries_of(file: Path, prefix: str) -> list[Entry]:
    """The keys of a file that begin so, as they are stored there."""
    facts = file.stat()
    return [one for one in _read(file, facts.st_size, facts.st_mtime_ns) if one.key.startswith(prefix)]


@lru_cache(maxsize=2)
def _read(file: Path, size: int, changed: int) -> list[Entry]:
    """All keys; ``gguf.GGUFReader`` takes half a minute for what this takes a second for, a list of 150,000 merges."""
    with file.open("rb") as stream:
        count = struct.unpack("<4sIQQ", stream.read(24))[-1]
        return [_read_entry(stream) for _ in range(count)]


def _read_entry(stream: BinaryIO) -> Entry:
    from gguf import GGUFValueType as Kind

    key = _read_value(stream, Kind.STRING)
    kind = Kind(_read_value(stream, Kind.UINT32))
    if kind != Kind.ARRAY:
        return Entry(key, _read_value(stream, kind), kind)
    items, count = Kind(_read_value(stream, Kind.UINT32)), _read_value(stream, Kind.UINT64)
    if items == Kind.STRING:
        return Entry(key, [_read_value(stream, items) for _ in range(count)], kind, items)
    form = f"<{count}{_FORMS[items.name]}"
    return Entry(key, list(struct.unpack(form, stream.read(struct.calcsize(form)))), kind, items)


def _read_value(stream: BinaryIO, kind: Any) -> Any:
    if kind.name == "STRING":
        return stream.read(struct.unpack("<Q", stream.read(8))[0]).decode()
    form = f"<{_FORMS[kind.name]}"
    return struct.unpack(form, stream.read(struct.calcsize(form)))[0]


def writer_of(file: Path, architecture: str, keys: list[Entry]) -> Any:
    """A ``gguf.GGUFWriter`` to which these keys were added; nothing is on disk yet."""
    from gguf import GGUFValueType, GGUFWriter

    class Writer(GGUFWriter):
        """With lists of nothing, such as the merges of a tokenizer of bytes, which llama.cpp wants to see."""

        def _pack_val(self, val: Any, vtype: Any, add_vtype: bool, sub_type: Any = None) -> bytes:
            if vtype == GGUFValueType.ARRAY and len(val) == 0:
                return bytes(self._pack("I", vtype) + self._pack("I", sub_type) + self._pack("Q", 0))
            return bytes(super()._pack_val(val, vtype, add_vtype, sub_type))

    writer = Writer(str(file), architecture)
    for one in keys:
        writer.add_key_value(one.key, one.value, one.kind, one.items)
    return writer


def _entry(key: str, value: Any) -> Entry:
    from gguf import GGUFValueType as Kind

    single = {bool: Kind.BOOL, int: Kind.UINT32, float: Kind.FLOAT32, str: Kind.STRING}
    if not isinstance(value, list):
        return Entry(key, value, single[type(value)])
    first = type(value[0]) if value else str
    return Entry(key, value, Kind.ARRAY, Kind.INT32 if first is int else single[first])
