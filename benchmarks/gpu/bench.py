"""One row after the other: checked against float64, timed with the device's own events, written at once."""

from __future__ import annotations

import gc
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Measured = dict[str, Any]

TARGET = 0.1
"""Seconds of repetitions for each time, beyond the warm-up."""
FLUSHED = 2**29
"""Bytes that are written before each repetition: more than any L2 cache holds."""
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Shape:
    """Layers as those of a Llama: what a row calls ``model``.

    Args:
        name: of the model that has them.
        hidden: channels of the residual stream.
        heads: query heads.
        kv_heads: heads of keys and values.
        channels: of a head.
        inner: channels of the feed-forward part.
        layers: of the random models that are built of them.
    """

    name: str
    hidden: int
    heads: int
    kv_heads: int
    channels: int
    inner: int
    layers: int


SHAPES = (Shape("1B", 2048, 32, 8, 64, 8192, 8), Shape("8B", 4096, 32, 8, 128, 14336, 4))
TINY = (Shape("tiny", 64, 4, 2, 16, 128, 2),)


class Bench:
    """Where rows are made and kept.

    Args:
        rehearse: tiny shapes on the CPU; nothing is timed.
        out: JSON lines, appended to; None for none.
        deadline: on `time.monotonic`; no row begins after it.
    """

    def __init__(self, rehearse: bool, out: Path | None, deadline: float) -> None:
        self.rehearse, self.out, self.deadline = rehearse, out, deadline
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.shapes = TINY if rehearse else SHAPES
        self.dtype = torch.bfloat16
        self.kernel = "triton" if find_spec("triton") else "torch"
        self.seed = 0
        self._flush: Tensor | None = None

    def sizes(self, real: Any, tiny: Any) -> Any:
        """What is run on a GPU, or in a rehearsal."""
        return tiny if self.rehearse else real

    def randn(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Fresh standard normal numbers on the device."""
        self.seed += 1
        generator = torch.Generator(self.device).manual_seed(self.seed)
        return torch.randn(*size, generator=generator, device=self.device, dtype=dtype or self.dtype)

    def row(self, part: str, case: Measured, work: Callable[[], Measured]) -> None:
        """Measure and write one row; whatever fails becomes a row that says so, and the run goes on."""
        row: Measured = {"part": part, **case}
        if time.monotonic() > self.deadline:
            row["skipped"] = "the time of this part was over"
        else:
            try:
                row |= work()
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self.write(row)
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def write(self, row: Measured) -> None:
        """Append a row and print it."""
        if self.out is not None:
            with self.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
        print(as_line(row), flush=True)

    # ------------------------------------------------------------------ what is measured

    def check(self, found: Tensor, exact: Tensor, most: float) -> float:
        """How far a result lies from the exact one, ``|found - exact| / |exact|`` over all numbers.

        Args:
            found: any dtype.
            exact: the same in float64, computed in another way.
            most: that is allowed.

        Raises:
            ValueError: it is further away, or not a number: what computes something else is not timed.
        """
        if exact.dtype != torch.float64 or found.shape != exact.shape:
            raise ValueError(f"{list(found.shape)} compared with {exact.dtype} {list(exact.shape)}")
        away = float((found.double() - exact).norm() / exact.norm())
        if not away <= most:  # also where it is not a number
            raise ValueError(f"differs from float64 by {away:.2e}, at most {most:.0e} is allowed")
        return away

    def milliseconds(self, work: Callable[[], object]) -> float | None:
        """Median time of a call between two events of the device, the L2 cache flushed before each.

        None in a rehearsal. What the host needs to launch the call counts where it is longer than the call itself.
        """
        if self.rehearse:
            work()
            return None
        if self._flush is None:
            self._flush = torch.empty(FLUSHED, dtype=torch.int8, device=self.device)
        for _ in range(3):
            work()
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        count = min(50, max(5, math.ceil(TARGET / max(1e-6, time.perf_counter() - began))))
        pairs = []
        for number in range(count):
            self._flush.fill_(number)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs)

    def graph_milliseconds(self, work: Callable[[], object]) -> float | str | None:
        """The same from a graph, where the host launches once; what forbids a graph, in words; None in a rehearsal."""
        if self.rehearse:
            return None
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                work()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                work()
        except RuntimeError as error:
            return f"no graph: {' '.join(str(error).split())[:80]}"
        return self.milliseconds(graph.replay)

    def peak(self, work: Callable[[], object]) -> int | None:
        """Bytes that a call allocates beyond what is there before it, at most; None in a rehearsal."""
        if self.rehearse:
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


COLUMNS = ("ms", "graph_ms", "error", "bytes", "peak")
"""Numbers with a column of their own; what else was measured follows by name."""
CASE = {
    "model": "",
    "layers": "layers ",
    "head_dim": "dim ",
    "batch": "batch ",
    "tokens": "tokens ",
    "window": "window ",
    "of": "",
    "pass": "",
}
"""What says which case a row is of, beside its part and its way, and how the table calls it."""
HEADER = f"{'part':15} {'case':48} {'way':29} {'ms':>9} {'graph ms':>9} {'error':>8} {'MiB':>9} {'peak MiB':>9}"


def as_line(row: Measured) -> str:
    """A row of the table under `HEADER`.

    >>> as_line({"part": "x", "batch": 2, "way": "y", "ms": 1.23456, "error": 0.00123, "bytes": 2**21}).split()
    ['x', 'batch', '2', 'y', '1.235', '-', '1.2e-03', '2.0', '-']
    """
    case = ", ".join(f"{name}{row[key]}" for key, name in CASE.items() if key in row)
    known = ("part", "way", *CASE, *COLUMNS)
    rest = {key: value for key, value in row.items() if key not in known and value is not None}
    if isinstance(row.get("graph_ms"), str):
        rest["graph"] = row["graph_ms"]
    line = f"{row['part']:15} {case:48} {row.get('way', ''):29}"
    if "failed" not in row and "skipped" not in row:
        line += " " + " ".join(f"{_cell(key, row.get(key)):>{8 if key == 'error' else 9}}" for key in COLUMNS)
    more = [f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in rest.items()]
    return "  ".join([line, *more])


def _cell(key: str, value: object) -> str:
    if not isinstance(value, float | int):
        return "-"
    if key == "error":
        return f"{value:.1e}"
    return f"{value:.3f}" if key.endswith("ms") else f"{value / MEBIBYTE:.1f}"
