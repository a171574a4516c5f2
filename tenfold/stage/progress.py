"""Progress that a person sees in a terminal, and that stays readable in a log."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from tenfold.stage.numbers import quantity

LOG_INTERVAL = 10.0
"""Seconds between two lines where there is no terminal."""
SILENCE, LONGEST_SILENCE = 5.0, 60.0
"""Seconds without a line after which one says what is at work; twice as many after each, up to the second."""


class Progress:
    """One bar at a time in a terminal; elsewhere a line every ten seconds, of parts without steps as well.

    Use it as a context manager and call it with what is done: ``progress("train", 3, 100, "loss 2.31")``. A part whose
    steps are not known is named by `begin`.

    Args:
        console: where it goes.
        said: gets what `say` prints, so that nobody needs to say it again.
    """

    def __init__(self, console: Console, said: set[str] | None = None) -> None:
        self.console = console
        self.said = set() if said is None else said
        self._bar: RichProgress | None = None
        self._task: tuple[str, TaskID] | None = None
        self._last = 0.0
        self._label, self._began = "", time.monotonic()
        self._told, self._patience = self._began, SILENCE
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            columns = (
                TextColumn("  {task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}", markup=False),
            )
            self._bar = RichProgress(*columns, console=self.console, transient=True)
            self._bar.start()
        else:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._bar:
            self._bar.stop()
            self._bar = None

    def __call__(self, label: str, done: int, total: int, detail: str = "") -> None:
        """Say that `done` of `total` parts of `label` are done."""
        now = self._at_work(label)
        if self._bar:
            self._show(label, done, total, detail)
        elif now - self._last >= LOG_INTERVAL or done == total:
            self._last = now
            self._tell()
            self.console.print(
                f"  {label}: {done}/{total} {detail}".rstrip(), markup=False, emoji=False, highlight=False
            )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the terminal to something else while the block runs."""
        if self._bar is None:
            yield
            return
        self._bar.stop()
        try:
            yield
        finally:
            self._bar.start()

    def begin(self, label: str) -> None:
        """Say what is at work from now on, where nobody knows how many steps it has."""
        self._at_work(label)
        if self._bar:
            self._show(label, 0, None, "")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._tell()
        self.said.add(text.strip())
        self.console.print(text, markup=False, emoji=False, highlight=False)

    def beat(self, now: float) -> None:
        """Print what is at work where nothing was printed for a while; called every second."""
        if self._label and now - self._told >= self._patience:
            self._tell()
            took = quantity(now - self._began, "s")
            self.console.print(f"  {self._label}: for {took}", markup=False, emoji=False, highlight=False)

    def _tell(self) -> None:
        self._told, self._patience = time.monotonic(), min(2 * self._patience, LONGEST_SILENCE)

    def _at_work(self, label: str) -> float:
        now = time.monotonic()
        if label != self._label:
            self._label, self._began, self._told, self._patience = label, now, now, SILENCE
        return now

    def _show(self, label: str, done: int, total: int | None, detail: str) -> None:
        assert self._bar is not None
        if self._task is None or self._task[0] != label:
            for task in self._bar.task_ids:
                self._bar.remove_task(task)
            self._task = (label, self._bar.add_task(label, total=total, detail=detail))
        self._bar.update(self._task[1], completed=done, total=total, detail=detail)

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            self.beat(time.monotonic())
