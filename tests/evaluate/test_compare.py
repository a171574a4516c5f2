"""The paired comparison: closed forms, coverage of its interval, refusal of different tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tenfold.core.statistics import t_quantile
from tenfold.errors import DataError
from tenfold.evaluate.compare import compare
from tenfold.evaluate.perplexity import Perplexity
from tenfold.stage.results import Result


def scored(nll: torch.Tensor, document: torch.Tensor, subject: str) -> Perplexity:
    result = Result(task="perplexity", subject=subject, metrics=())
    ids = torch.arange(len(nll))
    return Perplexity(result, nll.mean().item(), 0, 0, None, token_nll=nll, token_ids=ids, document=document)


def test_closed_form():
    document = torch.tensor([0, 0, 1, 1])
    before = scored(torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), document, "before")
    after = scored(torch.tensor([0.5, 1.5, 3.0, 4.0]).double(), document, "after")
    found = compare(before, after)
    # Document sums are -1 and 0, residuals -0.5 and 0.5: var = 2 / 1 * 0.5 / 16.
    stderr = math.sqrt(2 * 0.5 / 16)
    assert found.difference == -0.25
    assert found.improved == 0.5
    assert found.perplexity_ratio == pytest.approx(math.exp(-0.25))
    assert found.interval == pytest.approx((-0.25 - 12.7062 * stderr, -0.25 + 12.7062 * stderr), rel=1e-4)
    assert found.result.subject == "after - before"
    low, high = found.result.metric("perplexity_ratio").interval
    assert (math.log(low), math.log(high)) == pytest.approx(found.interval)


def test_a_model_equals_itself():
    one = scored(torch.rand(10).double(), torch.arange(10) // 3, "a")
    found = compare(one, one)
    assert (found.difference, found.interval, found.improved, found.perplexity_ratio) == (0, (0, 0), 0, 1)


def test_one_document_has_no_interval():
    one = scored(torch.rand(5).double(), torch.zeros(5, dtype=torch.int64), "a")
    assert compare(one, one).interval is None


def test_the_interval_covers_the_truth_although_tokens_of_a_document_agree():
    generator = torch.Generator().manual_seed(1)
    document = torch.arange(8).repeat_interleave(20)
    zero = scored(torch.zeros(160, dtype=torch.float64), document, "zero")
    covered = 0
    for _ in range(1000):
        effect = torch.randn(8, dtype=torch.float64, generator=generator)[document]
        noise = 0.3 * torch.randn(160, dtype=torch.float64, generator=generator)
        low, high = compare(zero, scored(effect + noise, document, "after")).interval
        covered += low <= 0 <= high
    assert 0.93 < covered / 1000 < 0.97


@pytest.mark.parametrize(
    ("degrees", "expected"), [(1, 12.7062), (2, 4.3027), (5, 2.5706), (30, 2.0423), (1000, 1.9623)]
)
def test_t_quantile_agrees_with_the_tables(degrees, expected):
    assert t_quantile(degrees) == pytest.approx(expected, abs=1e-4)


def test_different_tokens_are_refused():
    one = scored(torch.rand(4).double(), torch.tensor([0, 0, 1, 1]), "a")
    for other in (
        replace(one, token_ids=torch.tensor([0, 1, 2, 9])),
        replace(one, document=torch.tensor([0, 1, 1, 1])),
        scored(torch.rand(5).double(), torch.zeros(5), "b"),
    ):
        with pytest.raises(DataError, match="different tokens"):
            compare(one, other)
