"""The knapsack against brute force, against an integer programme of scipy, and what it refuses."""

import itertools
import math
import time

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse

from tenfold.compress.fpx import knapsack
from tenfold.compress.fpx.knapsack import solve
from tenfold.errors import ConfigError


def brute(losses, costs, budget):
    """The best of all choices, by the order that `solve` promises."""

    def rank(choice):
        loss = sum(own[option] for own, option in zip(losses, choice, strict=True))
        cost = sum(own[option] for own, option in zip(costs, choice, strict=True))
        # of a unit a change goes before none, and the first change before the second
        order = [(option - 1) % len(own) for own, option in zip(losses, choice, strict=True)]
        return (loss, sum(option > 0 for option in choice), cost, order) if cost <= budget else None

    every = (rank(choice) for choice in itertools.product(*(range(len(own)) for own in losses)))
    return min(every, key=lambda found: (found is None, found))


def random_problem(generator, units, most=4, values=8):
    options = [int(generator.integers(1, most + 1)) for _ in range(units)]
    losses = [generator.integers(0, values, size=count).tolist() for count in options]
    costs = [generator.integers(0, values, size=count).tolist() for count in options]
    least, top = sum(map(min, costs)), sum(map(max, costs))
    return losses, costs, int(generator.integers(least, top + 2))


@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_best_of_all_choices(seed):
    generator = np.random.default_rng(seed)
    for _ in range(100):
        losses, costs, budget = random_problem(generator, int(generator.integers(1, 6)))
        choice = solve(losses, costs, budget)
        loss, changed, cost, order = brute(losses, costs, budget)
        assert sum(own[option] for own, option in zip(losses, choice, strict=True)) == loss
        assert sum(option > 0 for option in choice) == changed
        assert sum(own[option] for own, option in zip(costs, choice, strict=True)) == cost <= budget
        assert [(option - 1) % len(own) for own, option in zip(losses, choice, strict=True)] == order


def milp(losses, costs, budget):
    """The least loss within the budget, by HiGHS."""
    sizes = [len(own) for own in losses]
    one_each = scipy.sparse.block_diag([np.ones((1, size)) for size in sizes])
    found = scipy.optimize.milp(
        np.concatenate(losses),
        integrality=np.ones(sum(sizes)),
        bounds=(0, 1),
        constraints=[
            scipy.optimize.LinearConstraint(one_each, 1, 1),
            scipy.optimize.LinearConstraint(np.concatenate(costs)[None], -np.inf, budget),
        ],
        options={"mip_rel_gap": 0},
    )
    assert found.success
    return found.fun


SHAPES = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
BITS = (8.0625, 6.5625, 4.5, 4.25)


@pytest.mark.parametrize("share", [0.1, 0.4, 0.7, 0.95])
def test_a_model_of_210_matrices_and_four_formats(share):
    generator = np.random.default_rng(int(100 * share))
    losses, costs = [], []
    for out, inner in SHAPES * 30:
        noise = np.exp(generator.normal(0, 1.5)) * out * inner
        losses.append([noise * 4.0**-bits * np.exp(generator.normal(0, 0.3)) for bits in BITS])
        costs.append([math.ceil(out * inner * bits / 8) for bits in BITS])
    least, most = sum(map(min, costs)), sum(map(max, costs))
    budget = int(least + share * (most - least))
    start = time.perf_counter()
    choice = solve(losses, costs, budget)
    print(f"{time.perf_counter() - start:.2f} s")
    assert sum(own[option] for own, option in zip(costs, choice, strict=True)) <= budget
    loss = math.fsum(own[option] for own, option in zip(losses, choice, strict=True))
    assert loss <= milp(losses, costs, budget) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_milliseconds(seed):
    generator = np.random.default_rng(seed)
    losses = generator.exponential(size=(60, 3)).tolist()
    costs = generator.exponential(size=(60, 3)).tolist()
    budget = sum(map(min, costs)) + generator.uniform(2, 20)
    choice = solve(losses, costs, budget)
    assert math.fsum(own[option] for own, option in zip(costs, choice, strict=True)) <= budget * (1 + 1e-11)
    loss = math.fsum(own[option] for own, option in zip(losses, choice, strict=True))
    assert loss == pytest.approx(milp(losses, costs, budget), rel=1e-9)


def test_a_sum_of_tenths_is_what_it_looks_like():
    """In binary 0.1 + 0.1 + 0.1 is above 0.3."""
    assert solve([[1, 0]] * 3, [[0.0, 0.1]] * 3, 0.3) == [1, 1, 1]
    assert solve([[1, 0]] * 3, [[0.0, 0.1]] * 3, 0.3 - 1e-9) == [1, 1, 0]
    for units in range(2, 40):
        assert sum(solve([[1, 0]] * 53, [[0.0, 0.1]] * 53, round(0.1 * units, 1))) == units


def test_equal_units_change_in_module_order():
    assert solve([[0, 0.1]] * 6, [[2, 1]] * 6, 9) == [1, 1, 1, 0, 0, 0]


def test_costs_that_are_losses(monkeypatch):
    """A subset sum, where no bound helps: what is kept of the partial choices holds the budget, and nearly fills it."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(10**6, 10**8, size=300).tolist()
    budget = sum(sizes) // 3
    spent = []
    for kept in (1, 512):  # with one, the greedy choice
        monkeypatch.setattr(knapsack, "KEPT", kept)
        choice = solve([[size, 0] for size in sizes], [[0, size] for size in sizes], budget)
        spent.append(sum(size for size, option in zip(sizes, choice, strict=True) if option))
    assert 0.999 * budget < spent[0] < 0.99999 * budget < spent[1] <= budget


def test_a_loss_that_dwarfs_the_others_hides_none_of_them():
    assert solve([[0, 1e9], [0, 1e-4], [0, 2e-4]], [[1, 0]] * 3, 2) == [0, 1, 0]


def test_negative_losses_are_losses():
    """An estimate may find that a format helps."""
    assert solve([[0, -1], [0, 2]], [[1, 1], [1, 0]], 5) == [1, 0]


@pytest.mark.parametrize(
    ("losses", "costs", "budget", "says"),
    [
        ([[0, 1]], [[8, 4]], 3, "budget: 3 is below 4, what the cheapest"),
        ([[0, 1]], [[0.8, 0.4]], 0.3, "is below 0.4"),
        ([[0, 1]], [[8, 4]], math.nan, "budget: nan"),
        ([[0, math.nan]], [[8, 4]], 9, "losses: unit 0 has"),
        ([[0, 1], [0, 1]], [[8, 4], [8, math.inf]], 9, "costs: unit 1 has"),
        ([[0, 1], []], [[8, 4], []], 9, "unit 1 has no option"),
        ([[0, 1]], [[8]], 9, "different shapes"),
    ],
)
def test_what_cannot_be_solved_is_refused(losses, costs, budget, says):
    with pytest.raises(ConfigError, match=says):
        solve(losses, costs, budget)


def test_the_smallest_budget_is_enough():
    assert solve([[0, 1], [0, 1]], [[8, 4], [8, 3]], 7) == [1, 1]
    assert solve([], [], 0) == []
    assert solve([[0, 1]], [[8, 4]], math.inf) == [0]
