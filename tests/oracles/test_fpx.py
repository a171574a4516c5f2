"""Oracles 1 to 8, 10 and 13 of section 7 of the specification: formats and selection, without a model."""

import itertools
import json
import math

import pytest
import torch

from tenfold.compress.fpx.assign import average_bits, best_gamma, most_tolerant
from tenfold.compress.fpx.epsilon import OutputError
from tenfold.compress.fpx.knapsack import solve
from tenfold.core.floats import e2m1, e4m3
from tenfold.core.weight_formats import FORMATS, weight_format

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def fill(rows, columns, a, b):
    i = torch.arange(rows * columns, dtype=torch.float64)
    return (torch.sin(a * i) + b * torch.cos(1.7 * a * i) ** 3).float().view(rows, columns)


def read(x, weight, name):
    """The error of a layer's outputs when weight and inputs are in a format."""
    form = weight_format(name)
    found = OutputError()
    found.add(x @ weight.T, form.inputs(x) @ form.weight(weight).T)
    return found


def test_01_element_tables():
    ties = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5: 4, 7: 6, -2.5: -2, 5.1: 6, -0.3: -0.5}
    assert e2m1(torch.tensor(list(ties))).tolist() == list(ties.values())
    assert e4m3(torch.tensor([448.0, 465.0, -465.0])).tolist() == [448, 448, -448]
    assert e4m3(torch.tensor(math.nan)).isnan()
    assert e2m1(torch.tensor(math.nan)).isnan()


@pytest.mark.parametrize("name", [name for name in FORMATS if "fp4" in name])
@pytest.mark.parametrize("c", [0.25, 1.0, 8.0])
def test_01_what_a_format_holds_stays(name, c):
    weight = c * torch.tensor([E2M1 + [-value for value in E2M1]] * 3)
    assert torch.equal(weight_format(name).weight(weight), weight)
    assert torch.equal(weight_format(name).inputs(weight), weight)


@pytest.mark.parametrize("name", FORMATS)
def test_02_zeros(name):
    form = weight_format(name)
    zero, some = torch.zeros(5, 40), fill(5, 40, 0.3, 1)
    assert torch.equal(form.weight(zero), zero)
    assert torch.equal(form.inputs(zero), zero)
    for x, weight in ((zero, some), (some, zero)):
        found = read(x, weight, name)
        assert found.epsilon == found.token_mean == 0
        assert torch.equal(form.inputs(x) @ form.weight(weight).T, torch.zeros(5, 5))
    some[2] = 0  # a row or block of zeros among others
    assert torch.equal(form.weight(some)[2], some[2])
    assert form.weight(some).isfinite().all()


def test_03_gaussian_weights():
    wanted = {
        "fp4_tensor": 0.1301,
        "fp4_row": 0.1134,
        "nvfp4": 0.0953,
        "mxfp4": 0.1147,
        "int4_g32": 0.0785,
        "fp8_tensor": 0.02648,
        "fp8_row": 0.02631,
        "int8_row": 0.00747,
    }
    torch.manual_seed(0)
    weight = torch.randn(512, 512)
    for name, error in wanted.items():
        rounded = weight_format(name).weight(weight)
        assert float((rounded - weight).norm() / weight.norm()) == pytest.approx(error, rel=0.01), name


X = fill(24, 64, 0.13, 0.5)


def weights():
    d = 0.01 * fill(32, 64, 0.53, 8)
    d[5, 7] = 3
    return {
        "a": fill(32, 64, 0.29, 0),
        "b": fill(48, 64, 0.41, 2),
        "c": fill(16, 64, 0.07, 0.3),
        "d": d,
        "e": 100 * fill(64, 64, 0.91, 1),
    }


@pytest.mark.parametrize(
    ("name", "wanted", "order"),
    [
        ("fp4_tensor", (0.0984, 0.2922, 0.0711, 0.1663, 0.7797), "cadbe"),
        ("fp4_row", (0.0925, 0.2638, 0.0599, 0.1243, 0.8025), "cadbe"),
        ("nvfp4", (0.0893, 0.2554, 0.0474, 0.1300, 0.7197), "cadbe"),
        ("nvfp4_a16", (0.0406, 0.1717, 0.0316, 0.0777, 0.4999), "cadbe"),
        ("mxfp4", (0.1868, 0.3147, 0.1097, 0.1394, 0.7738), "cdabe"),
        ("fp8_row", (0.0216, 0.0605, 0.0139, 0.0351, 0.1694), "cadbe"),
    ],
)
def test_04_deterministic_epsilon(name, wanted, order):
    found = {layer: read(X, weight, name).epsilon for layer, weight in weights().items()}
    assert list(found.values()) == pytest.approx(list(wanted), abs=1e-4)  # the specification allows 2e-3
    assert "".join(sorted(found, key=found.__getitem__)) == order


@pytest.mark.parametrize("c", [1, 2, 3, 1e-3])
def test_05_scale_invariance(c):
    assert read(X, c * weights()["a"], "fp4_tensor").epsilon == pytest.approx(0.09841, abs=2e-5)


def test_06_assignment():
    errors = [0.3, 0.1, 0.2, 0.1, 0.5, 0.4, 0.05, 0.6, 0.7, 0.8]
    assert set(most_tolerant(errors, 0.3)) == {6, 1, 3}
    assert set(most_tolerant(errors, 0.2)) == {6, 1}
    assert most_tolerant(errors, 0) == []
    assert sorted(most_tolerant(errors, 1)) == list(range(10))
    taken = [most_tolerant(errors, tenth / 10) for tenth in range(11)]
    assert all(set(less) < set(more) for less, more in itertools.pairwise(taken))
    assert [average_bits(len(low), 10) for low in taken] == pytest.approx([8 - 0.4 * tenth for tenth in range(11)])
    assert json.dumps(most_tolerant(errors, 0.7)) == json.dumps(most_tolerant(list(errors), 0.7))


def test_07_counts():
    for gamma, layers, count in ((0.29, 100, 29), (0.58, 50, 29), (0.6, 210, 126)):
        assert len(most_tolerant([0.0] * layers, gamma)) == count


def saving(required):
    """Units A, B and C by loss and saving: which of them change, and the loss of all."""
    units = {"A": (1, 10), "B": (2, 1), "C": (3, 12)}
    before = sum(saved for _, saved in units.values())
    choice = solve(
        [[0, loss] for loss, _ in units.values()], [[saved, 0] for _, saved in units.values()], before - required
    )
    changed = [name for name, option in zip(units, choice, strict=True) if option]
    return changed, sum(units[name][0] for name in changed)


def test_08_knapsack():
    assert saving(12) == (["C"], 3)
    assert saving(11) == (["C"], 3)  # as {A, B}, with fewer units
    assert saving(22) == (["A", "C"], 4)


@pytest.mark.parametrize(
    ("name", "epsilon", "token_mean"),
    [("fp4_tensor", 0.1806, 0.9751), ("fp4_row", 0.1782, 0.1464), ("nvfp4", 0.1403, 0.1403)],
)
def test_10_a_massive_token(name, epsilon, token_mean):
    x = fill(33, 96, 0.37, 0.5)
    x[0] *= 200
    found = read(x, fill(40, 96, 0.29, 0), name)
    assert (found.epsilon, found.token_mean) == pytest.approx((epsilon, token_mean), abs=2e-3)


def test_13_best_gamma_of_the_paper():
    """Table 2: milliseconds and yield of the 14B model, win rate of the 3B model."""
    milliseconds = {0: 801, 0.2: 713, 0.4: 623, 0.6: 558, 0.8: 503, 1: 489}
    gains = {0: 23.14, 0.2: 26.52, 0.4: 12.93, 0.6: 0, 0.8: 0, 1: 0}
    assert best_gamma(gains) == 0.2
    assert best_gamma({0: 72.5, 0.2: 77.5, 0.3: 80, 0.4: 62.5, 0.6: 12.5, 0.8: 0, 1: 0}) == 0.3
    assert best_gamma(gains, milliseconds, limit=600) == 0.6
    assert best_gamma(dict(reversed(gains.items())), milliseconds, limit=600) == 0.6
