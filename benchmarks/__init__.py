"""One script per claim, ours and the peer in the same process; what each measured lies in a file of rows."""

from __future__ import annotations

import json
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
