"""What the kernels and methods cost on one large GPU, beside what it offers without them.

    python -m benchmarks.gpu                        # every part, in at most 5 minutes
    python -m benchmarks.gpu packing pasta          # some of them
    python -m benchmarks.gpu --rehearse             # tiny shapes on the CPU: checks the code paths, no timings

It needs torch with CUDA, Triton, transformers, peft and pydantic, and no files: weights are random, of the shapes of
a Llama of 1B and of 8B. Each row is first compared with float64; what differs, and what fails in any other way, is a
row that says so. Every part has a process and a share of the time of its own, so that nothing that one of them does
to the device or to the clock costs the others.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "gpu.jsonl"
PARTS = {
    "attention": ("benchmarks.gpu.gear", "attention", 0.25),
    "decode": ("benchmarks.gpu.gear", "decoding", 0.15),
    "packing": ("benchmarks.gpu.gear", "packing", 0.05),
    "pasta": ("benchmarks.gpu.pasta", "pasta", 0.10),
    "local": ("benchmarks.gpu.local", "local", 0.20),
    "adalora": ("benchmarks.gpu.adalora", "steps", 0.10),
    "losparse": ("benchmarks.gpu.losparse", "products", 0.15),
}
"""Module, function, and its share of the time; what a part leaves goes to the next."""
GRACE = 15
"""Seconds after which a row that has begun is ended with its part."""
ABSENT = 3
"""Exit code of `_machine` where there is no GPU."""


def _machine(rehearse: bool, out: Path | None) -> None:
    """The first row: what this is measured on. It comes from a process of its own: CUDA begins only once in one."""
    import torch
    import transformers

    from benchmarks.gpu.bench import HEADER, Bench

    if not rehearse and not torch.cuda.is_available():
        sys.exit(ABSENT)
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kernel": Bench(True, None, 0).kernel,
    }
    device = "a rehearsal on the CPU" if rehearse else torch.cuda.get_device_name()
    if not rehearse:
        memory = torch.cuda.get_device_properties(0).total_memory // 2**30
        versions |= {"cuda": torch.version.cuda, "GiB": memory}
        torch.ones(1, device="cuda").sum().item()
    print(HEADER)
    Bench(rehearse, out, 0).write({"part": "machine", "device": device, **versions, "time": time.strftime("%F %T")})


def _part(name: str, rehearse: bool, out: Path | None, deadline: float) -> None:
    """One part, in a process of its own."""
    import torch

    from benchmarks.gpu.bench import Bench
    from tenfold.compat import quiet_upstream

    warnings.simplefilter("ignore")
    quiet_upstream()
    if rehearse:
        torch.set_num_threads(1)
    gc.freeze()  # each row collects garbage, which need not go through all that was imported
    module, function, _ = PARTS[name]
    getattr(importlib.import_module(module), function)(Bench(rehearse, out, deadline))


def _begin(method: str) -> Any:
    """How processes are made. With ``fork`` they have all that is imported here, which takes longer than a part."""
    context: Any = multiprocessing.get_context(method)
    if method == "fork":
        for module, _, _ in PARTS.values():
            importlib.import_module(module)
    return context


def run(parts: Sequence[str], rehearse: bool, out: Path | None, seconds: float) -> int:
    """Every part in turn; returns the exit code."""
    began = time.monotonic()
    context = _begin("fork")
    code = _wait(context, _machine, (rehearse, out), 120)
    if code not in (0, ABSENT):  # something that was imported has begun CUDA here: then each process imports for itself
        context = _begin("spawn")
        code = _wait(context, _machine, (rehearse, out), 120)
    if code == ABSENT:
        print(
            "No GPU is here, so nothing was measured: run this where torch has CUDA (--rehearse checks the code alone)."
        )
        return 0
    if code:
        print(f"The GPU cannot be used: the first process ended with {code}.")
        return 1
    share = sum(PARTS[name][2] for name in parts)
    until, left = began, seconds
    for name in parts:
        until += left * PARTS[name][2] / share
        begun = time.monotonic()
        code = _wait(context, _part, (name, rehearse, out, until), max(1.0, until + GRACE - begun))
        if code:
            why = (
                f"the process of this part ended with {code}"
                if code > 0
                else f"the process was ended by signal {-code}"
            )
            from benchmarks.gpu.bench import Bench

            Bench(True, out, 0).write({"part": name, "failed": f"{why} after {time.monotonic() - begun:.0f} s"})
    return 0


def _wait(context: Any, work: Any, arguments: tuple[Any, ...], seconds: float) -> int:
    process = context.Process(target=work, args=arguments)
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    return int(process.exitcode)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument(
        "--out", type=Path, help="JSON lines, appended to (benchmarks/results/gpu.jsonl; none in a rehearsal)"
    )
    parser.add_argument("--seconds", type=float, default=300, help="for all parts together (300)")
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny shapes on the CPU: checks the code paths, no timings"
    )
    given = parser.parse_args(argv)
    if unknown := sorted(set(given.parts) - set(PARTS)):
        parser.error(f"unknown part {unknown[0]!r}: give some of {', '.join(PARTS)}")
    out = given.out or (None if given.rehearse else RESULTS)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking whether there is a GPU then begins nothing
    if given.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
    return run(given.parts or list(PARTS), given.rehearse, out, given.seconds)


if __name__ == "__main__":
    sys.exit(main())
