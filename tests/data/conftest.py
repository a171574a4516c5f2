"""Fixtures of the data tests: a byte-level tokenizer, and the real data where it is at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tenfold.models.tiny import tiny_tokenizer


@pytest.fixture
def tokenizer():
    """One token per byte, with an end-of-text token and a chat template."""
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of public evaluation data; it is not part of the repository."""
    folder = Path(os.environ.get("TENFOLD_DATA", Path(__file__).parents[2] / "../shared/data"))
    if not folder.is_dir():
        pytest.skip("the evaluation data is absent; name its folder in TENFOLD_DATA")
    return folder
