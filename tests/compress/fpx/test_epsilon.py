"""Relative errors of outputs: sums over parts are those of the whole, and a token of zeros counts as none."""

import math

import pytest
import torch

from tenfold.compress.fpx.assign import best_gamma, most_tolerant
from tenfold.compress.fpx.epsilon import OutputError
from tenfold.errors import ConfigError


def test_parts_add_up_to_the_definition():
    generator = torch.Generator().manual_seed(0)
    wanted, found = (torch.randn(4, 10, 7, generator=generator) for _ in range(2))
    read = OutputError()
    for part in range(4):
        read.add(wanted[part], found[part])
    exact, error = wanted.double(), wanted.double() - found.double()
    assert read.epsilon == pytest.approx(float(error.norm() / exact.norm()), rel=1e-6)
    assert read.token_mean == pytest.approx(float((error.norm(dim=-1) / exact.norm(dim=-1)).mean()), rel=1e-6)


def test_bfloat16_is_summed_in_more():
    wanted = torch.ones(1, 4096, dtype=torch.bfloat16)
    read = OutputError()
    read.add(wanted, 1.5 * wanted)
    assert read.epsilon == read.token_mean == pytest.approx(0.5)


def test_what_zeros_become():
    read = OutputError()
    assert (read.epsilon, read.token_mean) == (0, 0)
    read.add(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0], [3.0, 3.0]]))
    assert (read.epsilon, read.token_mean) == (pytest.approx(0.2), pytest.approx(0.1))
    read.add(torch.zeros(1, 2), torch.ones(1, 2))
    assert read.token_mean == math.inf
    nothing = OutputError()
    nothing.add(torch.zeros(1, 2), torch.ones(1, 2))
    assert nothing.epsilon == math.inf


def test_nan_is_not_a_small_error():
    read = OutputError()
    read.add(torch.ones(2, 2), torch.tensor([[1.0, math.nan], [1.0, 1.0]]))
    assert math.isnan(read.epsilon)
    assert math.isnan(read.token_mean)
    with pytest.raises(ConfigError, match="errors: that of layer 1 is NaN"):
        most_tolerant([0.1, read.epsilon], 0.5)


@pytest.mark.parametrize("gamma", [-0.1, 1.1, math.nan])
def test_shares_beyond_all(gamma):
    with pytest.raises(ConfigError, match="gamma: "):
        most_tolerant([0.1, 0.2], gamma)


def test_gamma_that_cannot_be_chosen():
    with pytest.raises(ConfigError, match="no gamma is as fast as 3") as error:
        best_gamma({0: 1, 1: 2}, {0: 9, 1: 5}, limit=3)
    assert "the fastest takes 5" in str(error.value)
    with pytest.raises(ConfigError, match=r"that of gamma 0.5 is NaN"):
        best_gamma({0: 1, 0.5: math.nan})
