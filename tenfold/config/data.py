"""The keys by which every stage names its data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from tenfold.config.stage import Kind, OnBadRow, StageConfig, Takes


class DataFields(StageConfig):
    """Where rows come from and how they are read."""

    data_pool: ClassVar[str | None] = "rows"

    data: Annotated[str | None, Takes(("rows",))] = None
    """File (.jsonl, .json, .csv, .tsv, .parquet, .txt, each also .gz), folder of text files, hub id
    (``hub:user/name``),
    ``python-reference``, the language reference that every CPython ships, or ``step-audit:COUNT:SEED``, made-up
    preferences whose truth is known."""
    rows: Kind | None = None
    """What a row is. Default: told from its columns; give it where columns fit two kinds."""
    columns: dict[str, str] = {}
    """Your column name for each of ours: ``{prompt: question}``, on the command line ``--columns prompt question``.
    Give it where a file names its columns otherwise."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Read at most this many rows; for a quick try."""
    on_bad_row: OnBadRow = "stop"
    """``stop`` at the first row that cannot be read, or ``skip`` such rows: the report counts them, and
    ``left_out.jsonl`` in the stage's folder lists them with the reason of each. A file that is damaged beyond single
    rows stops either way. Turn it where a few bad rows are not worth mending."""
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the rows kept for evaluation, chosen by a hash of each row's id, so that it never changes. Raise it
    where an evaluation's intervals are too wide; what is held out is not trained on."""

    @property
    def data_format(self) -> str:
        """Suffix of the format in which rows of the data are written back: its own, else ``.jsonl``.

        >>> DataFields(data="prefs.csv.gz").data_format, DataFields(data="hub:user/name").data_format
        ('.csv', '.jsonl')
        """
        path = Path(self.data or "")
        suffix = (Path(path.stem) if path.suffix.lower() == ".gz" else path).suffix.lower()
        return suffix if suffix in (".json", ".csv", ".tsv") else ".jsonl"
