"""Read a run folder back: recipe, summaries and logged steps."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tenfold.errors import FolderError, RunError
from tenfold.stage.record import SCHEMA_VERSION, StageSummary

STAGE_FOLDER = re.compile(r"\d{2,}-.+")

Metrics = dict[str, list[dict[str, Any]]]
"""Stage folder -> the lines of its ``metrics.jsonl``."""


def load_run(folder: Path) -> tuple[str, list[StageSummary], Metrics]:
    """Read what a run has finished so far.

    Args:
        folder: the run folder, with ``recipe.yaml`` and one folder ``NN-name`` per finished stage.

    Returns:
        The resolved recipe, the summaries in order (up to the first that rests on a stage that was made again since),
        and the logged steps by stage folder (``01-lora``).

    Raises:
        RunError: when the folder is not a run, or a file in it is damaged or of a newer version.
    """
    recipe = folder / "recipe.yaml"
    if not recipe.is_file():
        problem = "not a run: it has no recipe.yaml" if folder.is_dir() else "no such folder"
        raise FolderError(f"{folder}: {problem}", remedy="give a folder that `tenfold run RECIPE --out FOLDER` wrote")
    folders = sorted(
        (path for path in folder.iterdir() if path.is_dir() and STAGE_FOLDER.fullmatch(path.name)),
        key=lambda path: (int(path.name.partition("-")[0]), path.name),
    )
    summaries: list[StageSummary] = []
    for path in folders:
        summary = load_summary(path / "summary.json")
        if summaries and summary.previous not in ("", summaries[-1].fingerprint):
            break  # an earlier stage was made again since: this one rests on what is no longer there
        summaries.append(summary)
    folders = folders[: len(summaries)]
    metrics = {path.name: load_metrics(path / "metrics.jsonl") for path in folders}
    return _read(recipe), summaries, metrics


def load_summary(path: Path) -> StageSummary:
    """Read one ``summary.json``.

    Raises:
        RunError: when it is absent, damaged, or of a newer version of tenfold.
    """
    text = _read(path)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise RunError(f"{path}, line {error.lineno}: not JSON: {error.msg}", remedy=_again(path)) from None
    if not isinstance(values, dict):
        raise RunError(f"{path}: not the summary of a stage", remedy=_again(path))
    version = values.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        writer = values.get("tenfold_version", "a newer one")
        raise RunError(
            f"{path}: schema_version {version} was written by tenfold {writer}; this one reads up to {SCHEMA_VERSION}",
            remedy="pip install --upgrade tenfold",
        )
    try:
        return StageSummary.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RunError(f"{path}: {place}: {first['msg']}", remedy=_again(path)) from None


def load_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; none where there is no such file.

    Raises:
        RunError: when a line is damaged; names file and line.
    """
    if not path.exists():  # a stage without steps
        return []
    rows = []
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RunError(f"{path}, line {number}: not JSON: {error.msg}", remedy=_again(path)) from None
        if not isinstance(row, dict) or "step" not in row:
            raise RunError(f"{path}, line {number}: no object with the key 'step'", remedy=_again(path))
        rows.append(row)
    return rows


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RunError(f"{path}: not UTF-8 at byte {error.start}", remedy=_again(path)) from None
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}", remedy=_again(path)) from None


def _again(path: Path) -> str:
    return f"remove {path.parent} and give the same `tenfold run` again: finished stages are kept"
