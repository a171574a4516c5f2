"""The keys by which every stage names its data."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from tenfold.config.stage import Kind, StageConfig, Takes


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
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the rows kept for evaluation, chosen by a hash of each row's id, so that it never changes. Raise it
    where an evaluation's intervals are too wide; what is held out is not trained on."""
