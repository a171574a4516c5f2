"""A fixture of the data tests: a byte-level tokenizer."""

from __future__ import annotations

import pytest

from tenfold.models.tiny import tiny_tokenizer


@pytest.fixture
def tokenizer():
    """One token per byte, with an end-of-text token and a chat template."""
    return tiny_tokenizer()
