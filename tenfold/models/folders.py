"""Folders that appear under their final name only when they are complete, and can be checked later."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tenfold.errors import RunError
from tenfold.files import replace_folder

RECORD = "tenfold.json"
"""The file that marks a folder as ours: what it is, and the size in bytes of every file in it."""


@contextmanager
def write_folder(folder: str | Path, kind: str, *, overwrite: bool = False, **facts: Any) -> Iterator[Path]:
    """Write a folder that others see whole or not at all.

    The body writes into a hidden folder beside the final one, which is renamed at the end. An existing folder that
    carries our record is replaced; any other that holds files is refused.

    Args:
        folder: the final name.
        kind: what it holds, for the record: ``model`` or ``adapter``.
        overwrite: replace whatever is there.
        facts: further entries of the record.

    Yields:
        The folder to write into.

    Raises:
        RunError: the folder is taken, or the disk is full or not writable.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as parent:
    ...     with write_folder(f"{parent}/out", "model") as partial:
    ...         _ = (partial / "weights").write_text("abc")
    ...     is_complete(f"{parent}/out")
    True
    """
    folder = Path(folder)
    if not overwrite and folder.exists() and not (folder / RECORD).exists() and _holds_something(folder):
        raise RunError(
            f"{folder}: exists and was not written by tenfold",
            remedy="choose another folder, or allow overwriting (overwrite=True)",
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = _hidden(folder)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    try:
        yield partial
        sizes = {str(path.relative_to(partial)): path.stat().st_size for path in partial.rglob("*") if path.is_file()}
        record = {"format": 1, "kind": kind, **facts, "files": dict(sorted(sizes.items()))}
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        replace_folder(partial, folder)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def partial_prefix(folder: Path) -> str:
    """How the hidden folders begin that `write_folder` uses on the way to ``folder``."""
    return f".{folder.name}.partial-"


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """The record of a folder that `write_folder` made; None where there is none that can be read."""
    try:
        record = json.loads((Path(folder) / RECORD).read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def is_complete(folder: str | Path) -> bool:
    """Whether every file is there with the size that was recorded when the folder was written."""
    record = read_record(folder)
    if record is None or not isinstance(record.get("files"), dict):
        return False
    try:
        return all((Path(folder) / name).stat().st_size == size for name, size in record["files"].items())
    except OSError:
        return False


def _holds_something(folder: Path) -> bool:
    return not folder.is_dir() or any(folder.iterdir())


def _hidden(folder: Path) -> Path:
    """A new folder beside the final one; with the usual permissions, which ``tempfile`` would not give."""
    hidden = folder.parent / f"{partial_prefix(folder)}{os.getpid()}-{secrets.token_hex(4)}"
    hidden.mkdir()
    return hidden


def _cannot_write(folder: Path, error: OSError) -> RunError:
    reason = error.strerror or str(error)
    return RunError(f"{folder}: cannot be written: {reason}", remedy="free space there, or choose another folder")
