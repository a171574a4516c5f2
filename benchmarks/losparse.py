"""LoSparse: one-shot compression, training and speed, beside peers at equal size.

    python -m benchmarks.losparse oneshot  # perplexity against one-shot peers (losparse_oneshot.py)
    python -m benchmarks.losparse table    # what docs/results/losparse.md shows

All are resumable, and those of quality need the real data (TENFOLD_DATA). The files that are named say how each is
measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from benchmarks.losparse_oneshot import oneshot, oneshot_table
from tenfold.compat import quiet_upstream


def table() -> None:
    """Markdown for docs/results."""
    oneshot_table()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts that are asked for; all of them by default."""
    parts: dict[str, Callable[[], None]] = {"oneshot": oneshot, "table": table}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=list(parts), default=[])
    quiet_upstream()
    for part in parser.parse_args(argv).parts or parts:
        parts[part]()


if __name__ == "__main__":
    main()
