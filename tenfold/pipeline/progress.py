"""Progress that a person sees in a terminal, and that stays readable in a log."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LOG_INTERVAL = 10.0
"""Seconds between two lines where there is no terminal."""


class Progress:
    """One bar at a time in a terminal; a line every ten seconds elsewhere.

    Use it as a context manager and call it with what is done: ``progress("train", 3, 100, "loss 2.31")``.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: RichProgress | None = None
        self._task: tuple[str, TaskID] | None = None
        self._last = 0.0

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            columns = (
                TextColumn("  {task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}"),
            )
            self._bar = RichProgress(*columns, console=self.console, transient=True)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def __call__(self, label: str, done: int, total: int, detail: str = "") -> None:
        """Say that `done` of `total` parts of `label` are done."""
        if self._bar:
            if self._task is None or self._task[0] != label:
                for task in self._bar.task_ids:
                    self._bar.remove_task(task)
                self._task = (label, self._bar.add_task(label, total=total, detail=detail))
            self._bar.update(self._task[1], completed=done, total=total, detail=detail)
            return
        now = time.monotonic()
        if now - self._last >= LOG_INTERVAL or done == total:
            self._last = now
            self.console.print(f"  {label}: {done}/{total} {detail}".rstrip(), highlight=False)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, highlight=False)
