"""The versioned record of a stage, ``summary.json``: what the pipeline writes, and the report and ``compare`` read."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import model_validator

from tenfold.config.base import Record
from tenfold.stage.results import Result

SCHEMA_VERSION = 1


class Series(Record):
    """One line or group of bars of a figure."""

    name: str
    x: tuple[float | str, ...]
    y: tuple[float | None, ...]
    low: tuple[float, ...] | None = None
    """Lower ends of the error bars."""
    high: tuple[float, ...] | None = None
    """Upper ends of the error bars."""

    @model_validator(mode="after")
    def _equal_lengths(self) -> Self:
        lengths = {len(values) for values in (self.x, self.y, self.low, self.high) if values is not None}
        if len(lengths) > 1:
            raise ValueError(f"series {self.name!r}: x, y, low and high have different lengths: {sorted(lengths)}")
        return self


class Figure(Record):
    """A plot as data; the report draws it."""

    kind: Literal["line", "bar", "heatmap"]
    title: str
    x_label: str = ""
    y_label: str = ""
    series: tuple[Series, ...] = ()
    """Lines or bars; for a heatmap one series per row, ``name`` the row's label, ``x`` the columns' labels."""
    full: float | None = None
    """For a heatmap, the value in full colour, so that two of them can be compared. Default: the largest of its own."""
    caption: str = ""
    """What the reader should see in it."""


class Table(Record):
    """A table of strings and numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | int | None, ...], ...]


class Sample(Record):
    """A prompt and what the models wrote."""

    prompt: str
    outputs: dict[str, str]
    """Subject (``before``, ``after``) -> text."""


class StageSummary(Record):
    """All that a finished stage reports. ``timings`` are the only fields that differ between repeats."""

    schema_version: int = SCHEMA_VERSION
    tenfold_version: str
    index: int
    stage: str
    """The registered name, the recipe's ``use``."""
    fingerprint: str
    """Hash of everything the result depends on: configuration, inputs, seed, earlier stages."""
    previous: str = ""
    """Fingerprint of the stage before, on whose result this one rests; empty for the first."""
    code: str = ""
    """Hash of the code of the stage."""
    config: dict[str, Any]
    """The resolved configuration."""
    seed: int
    inputs: dict[str, Any] = {}
    """Model and data with their hashes."""
    attached: dict[str, Any] = {}
    """What the method touched: modules, parameters, bytes."""
    results: tuple[Result, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    samples: tuple[Sample, ...] = ()
    notes: tuple[str, ...] = ()
    """Sentences the reader must know: rows cut, modules skipped, departures."""
    artefact: str | None = None
    """Folder of the artefact, relative to the stage folder."""
    artefacts: dict[str, str] = {}
    """All artefacts by name, relative to the stage folder."""
    replays: str | None = None
    """A page of what was played, relative to the stage folder."""
    continues_with: Literal["adapter", "model"] | None = None
    """What the artefact is to the next stage: an adapter on top of the model, or the model itself."""
    timings: dict[str, float] = {}
    """Seconds by part."""
    environment: dict[str, Any] = {}
    """Versions, processor, threads, device."""

    @property
    def folder(self) -> str:
        """Name of the stage's folder in the run folder: ``01-lora``."""
        return f"{self.index:02d}-{self.stage}"
