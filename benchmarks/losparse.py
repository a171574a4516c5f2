"""LoSparse: one-shot compression, training and speed, beside peers at equal size.

    python -m benchmarks.losparse oneshot         # perplexity against one-shot peers (losparse_oneshot.py)
    python -m benchmarks.losparse training        # language modelling after 20,000 tokens (losparse_training.py)
    python -m benchmarks.losparse classification  # kinds of question, with frozen rows (losparse_training.py)
    python -m benchmarks.losparse machine         # what memory and arithmetic give (losparse_speed.py); an idle machine
    python -m benchmarks.losparse layers          # one matrix, dense and compact; an idle machine
    python -m benchmarks.losparse decode          # whole models, dense and compact; an idle machine
    python -m benchmarks.losparse table           # what docs/results/losparse.md shows

All are resumable, and those of quality need the real data (TENFOLD_DATA). The files that are named say how each is
measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.losparse_oneshot import oneshot, oneshot_table
from benchmarks.losparse_speed import decode, layers, machine, speed_tables
from benchmarks.losparse_training import TOKENS, classification, training, training_tables
from tenfold.compat import quiet_upstream


def table() -> None:
    """Markdown for docs/results."""
    oneshot_table()
    training_tables()
    speed_tables()


def cost() -> None:
    """The timings."""
    machine()
    layers()
    decode()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts that are asked for; all of them by default."""
    parts: dict[str, Callable[..., None]] = {
        "oneshot": oneshot, "training": training, "classification": classification, "machine": machine,
        "layers": layers, "decode": decode, "table": table,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*parts, "cost"], default=[])
    parser.add_argument("--seeds", type=int, default=2, help="of training and classification")
    parser.add_argument("--kept", type=float, nargs="+", help="shares of these two; 0.5 and 0.3 by default")
    parser.add_argument("--methods", nargs="+", default=(), help="of oneshot or one of these two; all by default")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a run of these two")
    parser.add_argument("--device", default="cpu", help="of these two and of oneshot")
    given = parser.parse_args(argv)
    quiet_upstream()
    shared = {"methods": given.methods, "device": given.device}
    options = {"seeds": given.seeds, "tokens": given.tokens, **shared} | ({"kept": given.kept} if given.kept else {})
    parts |= {name: partial(parts[name], **options) for name in ("training", "classification")}
    parts |= {"oneshot": partial(oneshot, **shared), "cost": cost}
    for part in given.parts or [name for name in parts if name != "cost"]:
        parts[part]()


if __name__ == "__main__":
    main()
