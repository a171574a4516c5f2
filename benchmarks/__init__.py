"""One script per claim, ours and the peer in the same process; what each measured lies in a file of rows."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch


def rows_in(results: Path) -> list[dict[str, Any]]:
    """What has been measured so far."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def keep_in(results: Path, row: dict[str, Any]) -> None:
    """Append a row and say so."""
    results.parent.mkdir(exist_ok=True)
    row = {**row, "torch": torch.__version__, "threads": torch.get_num_threads()}
    with results.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print({key: value for key, value in row.items() if not isinstance(value, list)}, flush=True)


def done_in(results: Path, **keys: Any) -> bool:
    """Whether a row with these values is there."""
    return any(all(row.get(key) == value for key, value in keys.items()) for row in rows_in(results))


def section(title: str, command: str, rows: Iterable[dict[str, Any]] = ()) -> None:
    """Begin a table of docs/results: its heading, the command that measured it, and what the rows say of the machine.

    Args:
        title: under which `docs/results/notes` comments on the table.
        command: without `python -m benchmarks.`.
        rows: those that the table is made of.
    """
    rows = list(rows)
    machine = sorted({f"torch {row['torch']}" for row in rows if "torch" in row})
    machine += sorted({row["device"] for row in rows if "device" in row})
    threads = sorted({row["threads"] for row in rows if "threads" in row and "device" not in row})
    if threads:
        machine.append(f"{' or '.join(map(str, threads))} thread{'s' if threads != [1] else ''}")
    print(f"\n## {title}\n\n{', '.join([f'`python -m benchmarks.{command}`', *machine])}\n")
