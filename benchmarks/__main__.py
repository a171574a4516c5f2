"""``python -m benchmarks [--quick]``: every benchmark, one after the other."""

import argparse
import importlib
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="minutes instead of hours: the timings, not the quality")
quick = parser.parse_args().quick
for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
    module = importlib.import_module(f"benchmarks.{path.stem}")
    if hasattr(module, "main"):  # others are parts of one
        module.main(["cost"] if quick else [])
