"""The benchmark of a GPU without one: its code on tiny shapes, its clock on a device that is made up, its failures."""

import json
import math
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import adalora, gear, local, pasta
from benchmarks.gpu import bench as module
from benchmarks.gpu.bench import Bench, as_line

ROWS = {gear.attention: 5, gear.decoding: 3, gear.packing: 3, pasta.pasta: 8, local.local: 13, adalora.steps: 5}


def rows_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def bench_into(folder, seconds=600.0):
    bench = Bench(True, folder / "rows.jsonl", time.monotonic() + seconds)
    bench.kernel = "torch"  # the interpreter of Triton needs a process of its own
    return bench


@pytest.mark.filterwarnings("ignore")  # of peers: flex attention on a CPU, PEFT
@pytest.mark.parametrize("part", ROWS, ids=lambda part: part.__name__)
def test_every_row_of_a_rehearsal_is_checked(part, tmp_path):
    part(bench_into(tmp_path))
    rows = rows_in(tmp_path / "rows.jsonl")
    assert len(rows) == ROWS[part]
    for row in rows:
        assert not {"failed", "skipped"} & set(row), row
        assert "error" in row or row["way"] == "peft adalora"
        assert all(row.get(key) is None for key in ("ms", "graph_ms", "peak", "waits"))


@pytest.mark.slow
def test_the_whole_rehearsal(tmp_path):
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", tmp_path / "rows.jsonl"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    rows = rows_in(tmp_path / "rows.jsonl")
    assert len(rows) == 1 + sum(ROWS.values())
    assert rows[0]["kernel"] == "triton"
    assert not [row for row in rows if "failed" in row or "skipped" in row]
    assert len(run.stdout.splitlines()) == len(rows) + 1


def test_a_wrong_kernel_is_not_timed(tmp_path, monkeypatch):
    timed = []
    monkeypatch.setattr(Bench, "milliseconds", lambda self, work: timed.append(work))
    real = gear.attend
    monkeypatch.setattr(gear, "attend", lambda *given, **named: real(*given, **named) * 1.05)
    gear.attention(bench_into(tmp_path))
    rows = rows_in(tmp_path / "rows.jsonl")
    assert ["failed" in row for row in rows] == [False, False, True, True, True]
    assert "differs from float64 by 5.0" in rows[2]["failed"]
    assert len(timed) == 2


def test_emphasis_that_does_nothing_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(pasta, "_ways", lambda: ("sdpa, steered",))
    real = pasta._block
    monkeypatch.setattr(
        pasta, "_block", lambda net, *given: real(net, given[0], "plain" if net.dtype == torch.bfloat16 else given[1])
    )
    pasta.pasta(bench_into(tmp_path))
    assert all("differs from float64" in row["failed"] for row in rows_in(tmp_path / "rows.jsonl"))


def test_what_fails_or_comes_too_late_is_a_row(tmp_path):
    bench = bench_into(tmp_path)
    bench.row("x", {"way": "first"}, lambda: 1 / 0)
    bench.row("x", {"way": "second"}, lambda: {"ms": 2.0})
    bench.deadline = time.monotonic() - 1
    bench.row("x", {"way": "third"}, lambda: {"ms": 2.0})
    rows = rows_in(tmp_path / "rows.jsonl")
    assert rows[0] == {"part": "x", "way": "first", "failed": "ZeroDivisionError: division by zero"}
    assert rows[1] == {"part": "x", "way": "second", "ms": 2.0}
    assert rows[2] == {"part": "x", "way": "third", "skipped": "the time of this part was over"}
    assert "ZeroDivisionError" in as_line(rows[0])


@pytest.mark.parametrize("wrong", [math.nan, 1.1])
def test_what_is_no_number_or_another_one_is_refused(tmp_path, wrong):
    exact = torch.ones(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="differs from float64"):
        bench_into(tmp_path).check(torch.tensor([1.0, 1.0, wrong]), exact, 1e-2)
    with pytest.raises(ValueError, match="compared with"):
        bench_into(tmp_path).check(torch.ones(2), exact, 1e-2)


def test_a_part_that_hangs_or_dies_ends_alone(tmp_path, monkeypatch, capsys):
    def part(name, rehearse, out, deadline):
        if name == "packing":
            os._exit(7)
        if name == "pasta":
            time.sleep(60)
        Bench(rehearse, out, deadline).write({"part": name})

    monkeypatch.setattr(command, "_part", part)
    monkeypatch.setattr(command, "_machine", lambda rehearse, out: None)
    monkeypatch.setattr(command, "GRACE", 0)
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(command, "PARTS", dict.fromkeys(("packing", "pasta", "local"), ("json", "", 1.0)))
    assert command.run(["packing", "pasta", "local"], True, out, 9) == 0
    rows = rows_in(out)
    assert [row["part"] for row in rows] == ["packing", "pasta", "local"]
    assert "ended with 7" in rows[0]["failed"]
    assert "signal 9" in rows[1]["failed"]
    assert "failed" not in rows[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device")
def test_without_a_gpu_it_says_so_and_stops(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(command, "PARTS", {"packing": ("json", "", 1.0)})
    assert command.run(["packing"], False, tmp_path / "rows.jsonl", 5) == 0
    assert "No GPU is here, so nothing was measured" in capfd.readouterr().out
    assert not (tmp_path / "rows.jsonl").exists()


class Event:
    """An event of a device whose clock counts the pieces of work that it was given."""

    work = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = Event.work

    def elapsed_time(self, later):
        return later.time - self.time


def test_the_clock_and_the_counts_of_a_device(tmp_path, monkeypatch):
    def warn(mode):
        modes.append(mode)

    monkeypatch.setattr(module, "FLUSHED", 8)
    modes, used = [], SimpleNamespace(now=100, most=100)
    for name, value in {
        "Event": Event,
        "synchronize": lambda: None,
        "memory_allocated": lambda: used.now,
        "reset_peak_memory_stats": lambda: setattr(used, "most", used.now),
        "max_memory_allocated": lambda: used.most,
        "set_sync_debug_mode": warn,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    bench = bench_into(tmp_path)
    bench.rehearse = False

    def work():
        Event.work += 3.0
        used.most = max(used.most, used.now + 40)
        if modes and modes[-1] == "warn":
            import warnings

            for _ in range(2):
                warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            warnings.warn("something else", stacklevel=1)

    assert bench.milliseconds(work) == 3.0
    assert bench.peak(work) == 40
    assert adalora._waits(bench, work) == 2
    assert modes == ["warn", "default"]
