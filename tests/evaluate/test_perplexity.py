"""Perplexity against a dense float64 computation, and the invariances that must hold."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from tenfold.errors import ConfigError, DataError
from tenfold.evaluate.perplexity import _windows, document_sums, perplexity, ratio
from tenfold.models.scoring import Window, chunked_nll, score
from tests.tokenizers import byte_level


def dense(model, ids: list[int]) -> torch.Tensor:
    """NLL of every token but the first by a full softmax over one sequence."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    return -torch.log_softmax(logits.double(), -1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


def test_equals_a_dense_float64_computation(model, tokenizer, texts):
    model.double()
    found = perplexity(model, tokenizer, texts, max_length=256)
    expected = [dense(model, tokenizer(text)["input_ids"]) for text in texts if len(text) > 1]
    torch.testing.assert_close(found.token_nll, torch.cat(expected), rtol=1e-12, atol=1e-12)
    assert found.nll == pytest.approx(torch.cat(expected).mean().item(), rel=1e-12)
    assert found.perplexity == pytest.approx(math.exp(found.nll))
    scored_bytes = sum(len(text.encode()) - 1 for text in texts if len(text) > 1)
    assert found.bits_per_byte == pytest.approx(torch.cat(expected).sum().item() / math.log(2) / scored_bytes)
    assert found.result.settings["documents_skipped"] == 1
    assert found.document.unique().tolist() == [0, 1, 3]


def test_with_a_beginning_token_every_token_and_byte_counts(model, bos_tokenizer, texts):
    found = perplexity(model, bos_tokenizer, texts, max_length=256)
    assert found.result.settings["bytes"] == found.result.settings["tokens"] == sum(len(t.encode()) for t in texts)
    assert found.result.settings["documents_skipped"] == 0
    first = dense(model, bos_tokenizer(texts[0])["input_ids"])
    torch.testing.assert_close(found.token_nll[: len(first)], first, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trim", [True, False])
def test_the_space_behind_a_token_that_is_not_scored_counts(model, trim):
    """Tokenizers that trim offsets leave the space out of both tokens around it."""
    tokenizer = byte_level(trim)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)  # nothing before a text
    model.resize_token_embeddings(len(tokenizer))
    text = "): yes"
    assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])[:2] == ["):", "Ġ"]
    found = perplexity(model, tokenizer, [text], max_length=16)
    assert found.result.settings["bytes"] == len(" yes")


def test_windows_score_with_the_context_they_promise(model, tokenizer):
    model.double()
    text = "a text that is longer than one window of this test, and longer than two of them"
    ids = tokenizer(text)["input_ids"]
    found = perplexity(model, tokenizer, [text], max_length=16, stride=6)
    assert found.token_ids.tolist() == ids[1:]
    expected = []
    for position in range(1, len(ids)):
        block = 0 if position < 16 else (position - 16) // 6 + 1
        expected.append(dense(model, ids[block * 6 : position + 1])[-1])
    torch.testing.assert_close(found.token_nll, torch.stack(expected), rtol=1e-10, atol=1e-10)


@given(st.integers(0, 60), st.integers(2, 20), st.data())
def test_windows_score_each_token_once(length, max_length, data):
    stride = data.draw(st.integers(1, max_length - 1))
    ids = list(range(length))
    windows = _windows(ids, max_length, stride)
    assert [token for window in windows for token in window.ids[window.start :]] == ids[1:]
    assert all(1 <= window.start < len(window.ids) <= max_length for window in windows)
    assert all(window.start >= max_length - stride for window in windows[1:])


@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_batches_with_padding_give_what_single_documents_give(model, tokenizer, texts, batch_size):
    alone = perplexity(model, tokenizer, texts, max_length=20, stride=5)
    batched = perplexity(model, tokenizer, texts, max_length=20, stride=5, batch_size=batch_size)
    torch.testing.assert_close(batched.token_nll, alone.token_nll, rtol=1e-5, atol=1e-5)
    assert torch.equal(batched.token_ids, alone.token_ids)
    assert torch.equal(batched.document, alone.document)


def test_stride_does_not_matter_when_documents_fit(model, tokenizer, texts):
    values = [perplexity(model, tokenizer, texts, max_length=100, stride=s).token_nll for s in (1, 50, 99)]
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(model, tokenizer, texts):
    torch.nn.init.zeros_(model.lm_head.weight)
    found = perplexity(model, tokenizer, texts, max_length=64)
    assert found.perplexity == pytest.approx(len(tokenizer), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(math.log2(len(tokenizer)), rel=1e-5)
    assert found.stderr == pytest.approx(0, abs=1e-6)


def test_half_precision_and_models_without_logits_to_keep(model, tokenizer, texts):
    full = perplexity(model, tokenizer, texts, max_length=20, stride=5)

    class Plain(torch.nn.Module):
        """Hides the arguments that not every model has."""

        def __init__(self):
            super().__init__()
            self.inner, self.config, self.dtype = model, model.config, model.dtype
            self.get_input_embeddings = model.get_input_embeddings

        def forward(self, input_ids, attention_mask, use_cache):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    torch.testing.assert_close(perplexity(Plain(), tokenizer, texts, max_length=20, stride=5).token_nll, full.token_nll)
    half = perplexity(model.bfloat16(), tokenizer, texts, max_length=20, stride=5)
    assert half.nll == pytest.approx(full.nll, rel=1e-2)
    assert half.result.settings["dtype"] == "bfloat16"


def test_chunked_nll_of_many_chunks_equals_the_dense_one(monkeypatch):
    monkeypatch.setattr("tenfold.models.scoring._CHUNK_ELEMENTS", 70)
    logits = torch.randn(23, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(23) % 10
    expected = -logits.log_softmax(-1)[torch.arange(23), targets]
    torch.testing.assert_close(chunked_nll(logits, targets), expected)


def test_order_of_scores_is_the_order_of_windows(model):
    windows = [Window([1, 2, 3], 1), Window(list(range(9)), 4), Window([5, 6], 1)]
    alone = [score(model, [window], pad_id=0)[0] for window in windows]
    done = []
    together = score(model, windows, pad_id=0, batch_size=2, progress=lambda a, b: done.append((a, b)))
    assert [len(part) for part in together] == [2, 5, 1]
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert done == [(2, 3), (3, 3)]


def test_standard_error_is_that_of_a_ratio_between_documents():
    assert ratio(torch.tensor([3.0]), torch.tensor([2.0])) == (1.5, None)
    generator = torch.Generator().manual_seed(0)
    effects = torch.randn(4000, 50, dtype=torch.float64, generator=generator)
    means, errors = zip(*(ratio(row * 7, torch.full((50,), 7.0)) for row in effects), strict=True)
    assert torch.tensor(errors).mean().item() == pytest.approx(torch.tensor(means).std().item(), rel=0.05)


def test_document_sums():
    sums, counts = document_sums(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3, 3, 9]))
    assert (sums.tolist(), counts.tolist()) == ([3.0, 4.0], [2.0, 1.0])


def test_the_model_is_left_as_it_was(model, tokenizer, texts):
    model.train()
    model.model.layers[0].eval()
    perplexity(model, tokenizer, texts, max_length=32)
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training
    assert torch.is_grad_enabled()


def test_impossible_settings_and_texts(model, tokenizer):
    for options in (
        {"max_length": 1},
        {"max_length": 513},
        {"max_length": 8, "stride": 8},
        {"max_length": 8, "stride": 0},
    ):
        with pytest.raises(ConfigError, match=list(options)[-1]):
            perplexity(model, tokenizer, ["abc"], **options)
    with pytest.raises(DataError, match="no token to score in 2 documents"):
        perplexity(model, tokenizer, ["", "a"], max_length=8)
