"""Runs of recipes, as tests make and compare them."""

import warnings
from pathlib import Path
from typing import Any

from rich.console import Console

from tenfold.pipeline import run as runner
from tenfold.pipeline.recipe import resolve
from tenfold.stage.record import StageSummary


def execute(recipe: dict[str, Any], out: Path) -> list[StageSummary]:
    """Run a recipe, silently."""
    with warnings.catch_warnings():
        # TRL sets the old name itself, see tenfold.compat.
        warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
        return runner.run(resolve(recipe, "test"), out, Console(quiet=True))


def figures(summaries: list[StageSummary]) -> list[tuple[str, str, str, float]]:
    """All that was measured but times and memory: task, subject, name and value."""
    return [
        (result.task, result.subject, metric.name, metric.value)
        for summary in summaries
        for result in summary.results
        for metric in result.metrics
        if metric.kind == "figure"
    ]
