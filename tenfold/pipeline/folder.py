"""The run folder: who writes there, what is finished, what a killed process left."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from tenfold.errors import FolderError, RunError, TenfoldError
from tenfold.files import replace_folder
from tenfold.pipeline.ownership import LOCK, RECORD, Owned
from tenfold.pipeline.recipe import ResolvedRecipe
from tenfold.stage.context import RESUME, STORE


def finish(work: Path, final: Path, ours: Owned) -> None:
    """Give a complete working folder its name; what only a resume needs goes first."""
    for path in (*work.glob("checkpoint-*"), *work.glob(f"{RESUME}*"), *work.glob(".*.partial-*")):
        shutil.rmtree(path)
    for name in ("fingerprint", STORE):
        (work / name).unlink(missing_ok=True)
    ours.check_folder(final)
    ours.remember_folder(work, final)
    replace_folder(work, final)


def sweep(out: Path) -> None:
    """Remove what a killed process left between two renames; the lock is held, so nobody else is at work."""
    for path in out.glob(".*.old"):
        shutil.rmtree(path, ignore_errors=True)
    for path in out.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def refuse_foreign(plan: ResolvedRecipe, out: Path) -> None:
    """Two recipes do not share a folder: neither would know which figures are its own."""
    expected = {step.folder for step in plan.steps}
    foreign = sorted(path.parent.name for path in out.glob("[0-9][0-9]-*/summary.json"))
    foreign = [name for name in foreign if name not in expected]
    if foreign:
        raise FolderError(
            f"{out} holds stages of another recipe: {', '.join(foreign)}",
            remedy="choose another folder with --out, or remove this one",
        )


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """One run at a time in a folder."""
    lock = FileLock(out / LOCK)
    try:
        with lock.acquire(timeout=0):
            yield
    except Timeout:
        raise RunError(
            f"another run is at work in {out}", remedy="wait for it, stop it, or choose another folder with --out"
        ) from None


@contextmanager
def removed_if_refused(out: Path, made: list[Path]) -> Iterator[None]:
    """Leave no folder behind of a run that was refused before it wrote anything; the lock must be held.

    Args:
        out: the run folder.
        made: the folders that did not exist before this run, the innermost first.
    """
    try:
        yield
    except TenfoldError:
        if made and {path.name for path in out.iterdir()} <= {LOCK, RECORD}:
            with suppress(OSError):  # another run has begun here since
                for name in (RECORD, LOCK):
                    (out / name).unlink(missing_ok=True)
                for folder in made:
                    folder.rmdir()
        raise


@contextmanager
def writable(out: Path) -> Iterator[list[Path]]:
    """A folder that can be written, and which folders were made for it; a full disk is told from a fault."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / LOCK).touch()
    except OSError as error:
        raise FolderError(f"{out}: {error.strerror}", remedy="choose a folder you can write with --out") from error
    try:
        yield made
    except TenfoldError:
        raise
    except Exception as error:
        if not _is_full(error, out):
            raise
        raise RunError(
            f"{out}: no space left ({shutil.disk_usage(out).free / 2**20:.1f} MiB free)",
            remedy="free some space and give the same command again: what is finished is kept",
        ) from error


def _is_full(error: Exception, out: Path) -> bool:
    """Whether an error means a full disk: torch and safetensors say so each in its own way, or hardly at all."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    if "No space left" in text:
        return True
    return shutil.disk_usage(out).free < 2**20 and ("inline_container" in text or "iostream" in text)
