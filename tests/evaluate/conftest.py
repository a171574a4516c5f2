"""Fixtures of the evaluation tests: tiny random models with a byte-level tokenizer."""

from __future__ import annotations

import pytest

from tenfold.models.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def model():
    """A tiny Llama in float32; tests may change it."""
    return tiny_model().model


@pytest.fixture
def tokenizer():
    """One token per byte; puts nothing before a text."""
    return tiny_tokenizer()


@pytest.fixture
def bos_tokenizer():
    """The same, with a beginning-of-text token before and none after each text."""
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    special = [("<bos>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B:1", special_tokens=special
    )
    return tokenizer


TEXTS = [
    "The first document, of some length.",
    "A second one: naïve café.",
    "x",
    "Third and last, with more words in it.",
]


@pytest.fixture
def texts():
    """Documents of several lengths; the one of a single token has nothing to score without a token before it."""
    return list(TEXTS)
