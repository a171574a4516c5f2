"""Metadata of GGUF files as values: a key, what it says, and how it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any


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


@lru_cache(maxsize=2)  # a vocabulary of 262,144 tokens takes seconds
def _read(file: Path, size: int, changed: int) -> list[Entry]:
    from gguf import GGUFReader

    fields = {name: field for name, field in GGUFReader(str(file)).fields.items() if "." in name and field.types}
    return [
        Entry(name, one.contents(), one.types[0], one.types[1] if len(one.types) > 1 else None)
        for name, one in fields.items()
    ]


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
