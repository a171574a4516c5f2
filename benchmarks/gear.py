"""GEAR: bytes, quality at equal bytes, and time of a token, beside the caches of transformers.

    python -m benchmarks.gear cost       # decoding and prefill, the caches taking turns; an idle machine
    python -m benchmarks.gear bytes      # the setting of the specification, section 2.4: one block of 1,024 tokens
    python -m benchmarks.gear quality    # resumable; needs the real data (TENFOLD_DATA)
    python -m benchmarks.gear table      # what docs/methods/gear.md shows

Peers: DynamicCache, StaticCache and QuantizedCache (quanto and hqq, 4 bits) of transformers, and our own storage at 16
bits read by the same kernel, which isolates what compression buys. Keys and values of the timed caches are random:
no prompt need be read, and the time of a step does not depend on them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, QuantizedCache, StaticCache

from benchmarks.adalora import alternate, quotient, spread
from benchmarks.pasta import interval, rows_in
from tenfold.attend.attention import installed
from tenfold.cache.gear import GearCache
from tenfold.cache.gear.measure import measure_decoding, measure_quality
from tenfold.compat import quiet_upstream
from tenfold.evaluate.inference import evaluating, prompt_ids
from tenfold.models.open import open_model

RESULTS = Path(__file__).parent / "results" / "gear.jsonl"
DATA = Path(os.environ.get("TENFOLD_DATA", Path(__file__).parents[2] / "shared" / "data"))
CONTEXTS = (1024, 4096, 8192, 16384)

rows = partial(rows_in, RESULTS)


def keep(row: dict[str, Any]) -> None:
    """Append a row and say so."""
    row = {**row, "torch": torch.__version__, "threads": torch.get_num_threads()}
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print({key: value for key, value in row.items() if not isinstance(value, list)}, flush=True)


OURS: dict[str, dict[str, Any]] = {
    "gear 4": {"bits": 4},
    "gear 2": {"bits": 2},
    "gear-full 4": {"bits": 4, "variant": "gear"},
    "our 16 bits": {"bits": 16},
}


def caches(model: Any, context: int) -> dict[str, Callable[[], Any]]:
    """Every cache that is timed."""
    config = model.config
    found: dict[str, Callable[[], Any]] = {
        "DynamicCache": lambda: DynamicCache(config=config),
        "StaticCache": lambda: StaticCache(config=config, max_cache_len=context + 128),
    }
    for backend in ("quanto", "hqq"):
        found[f"{backend} 4"] = partial(QuantizedCache, backend=backend, config=config, nbits=4)
    return found | {name: partial(GearCache, config, **keys) for name, keys in OURS.items()}


def cost(dtypes: Sequence[str] = ("bfloat16", "float32")) -> None:
    """One token after a long context."""
    for dtype in dtypes:
        model = open_model("demo", device="cpu", dtype=dtype).model.eval()
        for context in CONTEXTS:
            done = {row["cache"] for row in rows() if row["part"] == "decode" and (row["dtype"], row["context"]) == (dtype, context)}
            if done:
                continue
            made = caches(model, context)
            for name, seconds in measure_decoding(model, made, context=context, steps=5, repeats=5).items():
                keep({"part": "decode", "dtype": dtype, "context": context, "cache": name, "seconds": seconds})


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts that are asked for; all of them by default."""
    parts: dict[str, Callable[[], None]] = {"cost": cost}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=list(parts), default=[])
    quiet_upstream()
    for part in parser.parse_args(argv).parts or parts:
        parts[part]()


if __name__ == "__main__":
    main()
