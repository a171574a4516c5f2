"""What a run may write over: its own files, and nothing else.

A run folder carries a record of the files that runs have written there. A folder that holds something and has no such
record is somebody else's; so is a file in a run folder that no run wrote, or a recipe that was edited since.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from tenfold.errors import FolderError
from tenfold.files import write_text

RECORD = ".tenfold.json"
"""Marks a run folder: file name -> hashes of what runs wrote under it, or none where any content is theirs."""
LOCK = ".lock"
ELSEWHERE = "give a new folder with --out"


class Owned:
    """A run folder and the record of what runs wrote into it, or beside it on the user's demand."""

    def __init__(self, folder: Path, written: dict[str, list[str]]) -> None:
        self.folder = folder
        self._written = written

    def check_text(self, path: Path) -> None:
        """Refuse to write over a file whose content no run of this folder wrote.

        Raises:
            FolderError: naming the file.
        """
        if not path.exists() and not path.is_symlink():
            return
        if (
            path.is_file()
            and not path.is_symlink()
            and _sha256(path.read_bytes()) in self._written.get(self._name(path), ())
        ):
            return
        raise FolderError(
            f"{path}: was not written by a run in {self.folder}, or was changed since, and would be lost",
            remedy=f"move it away, or {ELSEWHERE}",
        )

    def write(self, path: Path, text: str) -> None:
        """Write a file that may be written over again as long as nobody else changes it.

        Raises:
            FolderError: as `check_text`.
        """
        self.check_text(path)
        # Recorded first: whenever the process is killed, what lies there is known.
        self._remember({self._name(path): [_sha256(text.encode())]})
        write_text(path, text)

    def check_folder(self, folder: Path) -> None:
        """Refuse to replace a stage's folder that holds a file of somebody else.

        Raises:
            FolderError: naming one of them.
        """
        known = {name for name in self._written if name.startswith(f"{folder.name}/")}
        there = _files(folder) if folder.is_dir() else [folder] * folder.exists()
        strangers = sorted(str(path) for path in there if f"{folder.name}/{path.relative_to(folder)}" not in known)
        if strangers:
            more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
            raise FolderError(
                f"{strangers[0]}{more}: no run wrote this, and the stage that is to run again would remove it",
                remedy=f"move it away, or {ELSEWHERE}",
            )

    def remember_folder(self, work: Path, final: Path) -> None:
        """Note the files of a stage that is about to get its final name."""
        self._remember({f"{final.name}/{path.relative_to(work)}": [] for path in _files(work)})

    def _name(self, path: Path) -> str:
        """What a file is called in the record: a moved run folder knows its own files again."""
        folder = path.parent.resolve()
        return path.name if folder == self.folder.resolve() else str(folder / path.name)

    def _remember(self, files: dict[str, list[str]]) -> None:
        for name, hashes in files.items():
            known = self._written.setdefault(name, [])
            known += [value for value in hashes if value not in known]
        write_text(self.folder / RECORD, json.dumps({"written": self._written}, indent=1))


def check_out(out: Path) -> None:
    """Refuse a run folder that is not ours, before anything is written.

    Raises:
        FolderError: it is a file, or holds files that no run wrote.
    """
    if out.is_symlink() and not out.exists():
        raise FolderError(f"{out}: a link to nothing", remedy=ELSEWHERE)
    if out.exists() and not out.is_dir():
        raise FolderError(f"{out}: a file, and a folder is asked for", remedy=ELSEWHERE)
    if not out.is_dir() or (out / RECORD).is_file():
        return
    try:
        there = sorted(path.name for path in out.iterdir() if not _is_lock(path))
    except OSError as error:
        raise FolderError(f"{out}: {error.strerror}", remedy=ELSEWHERE) from error
    if there:
        named = ", ".join(there[:3]) + (f" and {len(there) - 3} more" if len(there) > 3 else "")
        raise FolderError(f"{out}: holds files that no run wrote ({named})", remedy=f"{ELSEWHERE}, such as runs/NAME")


def owned(out: Path) -> Owned:
    """The record of a run folder that `check_out` has let pass; made where it is new."""
    try:
        written = dict(json.loads((out / RECORD).read_text(encoding="utf-8"))["written"])
    except FileNotFoundError:
        written = {}
        write_text(out / RECORD, json.dumps({"written": written}))
    except (OSError, ValueError, KeyError, TypeError):
        raise FolderError(f"{out / RECORD}: damaged: nobody knows what runs wrote", remedy=ELSEWHERE) from None
    return Owned(out, written)


def _is_lock(path: Path) -> bool:
    """The lock of a run that is just beginning; somebody else's would hold something."""
    return path.name == LOCK and path.is_file() and not path.stat().st_size


def _files(folder: Path) -> Iterable[Path]:
    return (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
