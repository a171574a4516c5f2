import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tenfold.core.importance as module
from tenfold.core.importance import Importance, ScoredPart, allocate
from tenfold.errors import ConfigError, RunError


def fill(shape, a, c, m, den):
    """The rule by which the specifications fill tensors."""
    count = math.prod(shape)
    return torch.tensor([((a * i + c) % m - m // 2) / den for i in range(count)], dtype=torch.float64).view(shape)


@pytest.fixture(params=["one by one", "together"])
def blocks(request, monkeypatch):
    """Both layouts of the averages: that of a CPU, and that of an accelerator (which must not look at numbers)."""
    if request.param == "together":

        def together(parts, per_unit):
            block = module._Block(dict(enumerate(parts)), per_unit)
            block._may_look = False
            return [block]

        monkeypatch.setattr(module, "_blocks", together)


def rows(smoothing):
    """The rows of two matrices S after each of five steps, as LoSparse scores them."""
    weights = [fill((4, 3), 7, 3, 11, 10), fill((3, 4), 7, 6, 11, 10)]
    parts = {f"S{i}": [ScoredPart(weight, 0, "sum")] for i, weight in enumerate(weights, 1)}
    found = []
    for resolution in ("entry", "unit"):
        importance = Importance(parts, 0.85, None, smoothing, window=2, resolution=resolution)
        for step in range(5):
            weights[0].grad = fill((4, 3), 5, 2 * (1 + step), 13, 20)
            weights[1].grad = fill((3, 4), 5, 2 * (2 + step), 13, 20)
            importance.observe(step)
            found.append([importance.scores()["S1"] / 3, importance.scores()["S2"] / 4])
    return found[:5], found[5:]


EXPECTED_ROWS = {
    "window": {
        2: ([0.005375, 0.00475, 0.005625, 0.00675], [0.0054375, 0.0105, 0.0054375]),
        4: ([0.01244375, 0.0112875, 0.01253125, 0.0151125], [0.008746875, 0.01426875, 0.009590625]),
    },
    "step": {
        0: ([0.00475, 0.0045, 0.0045, 0.006], [0.0058125, 0.0114375, 0.0058125]),
        4: (
            [0.0259092796875, 0.023288403125, 0.024994996875, 0.030150475],
            [0.017081919140625, 0.025340673046875, 0.021213012890625],
        ),
    },
}


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("smoothing", ["window", "step"])
def test_losparse_row_scores_and_unit_resolution(smoothing):
    by_entry, by_unit = rows(smoothing)
    for step, expected in EXPECTED_ROWS[smoothing].items():
        for found in (by_entry, by_unit):
            for scores, values in zip(found[step], expected, strict=True):
                torch.testing.assert_close(scores, torch.tensor(values, dtype=torch.float64), rtol=1e-12, atol=0)


def test_losparse_allocation():
    (*_, (s1, s2)), _ = rows("window")
    scores, cost = {"S1": s1 * 3, "S2": s2 * 4}, {"S1": 3.0, "S2": 4.0}
    expected = {0.75: ([0, 1, 2, 3], [1], 16), 0.5: ([2, 3], [1], 10), 0.25: ([3], [], 3), 0: ([], [], 0)}
    expected[1] = ([0, 1, 2, 3], [0, 1, 2], 24)
    for share, (first, second, spent) in expected.items():
        found = allocate(scores, 24 * share, cost)
        assert found.masks["S1"].nonzero().flatten().tolist() == first
        assert found.masks["S2"].nonzero().flatten().tolist() == second
        assert found.spent == spent
        assert found.units == len(first) + len(second)


@pytest.mark.usefixtures("blocks")
def test_missing_and_non_finite_gradients_leave_the_averages_alone_and_are_counted():
    first, second = torch.ones(3), torch.ones(2)
    importance = Importance({"a": [ScoredPart(first, 0)], "b": [ScoredPart(second, 0)]})
    first.grad, second.grad = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 1.0])
    importance.observe(0)
    before = {group: score.clone() for group, score in importance.scores().items()}
    first.grad, second.grad = torch.tensor([math.inf, math.nan, 3.0]), None
    importance.observe(1)
    after = importance.scores()
    assert torch.equal(after["a"][:2], before["a"][:2])
    assert after["a"][2] > before["a"][2]
    assert torch.equal(after["b"], before["b"])
    assert (importance.missing, importance.non_finite) == (1, 2)
    first.grad = None
    importance.observe(2)
    assert (importance.missing, importance.non_finite) == (3, 2)


@pytest.mark.usefixtures("blocks")
def test_low_precision_tensors_are_averaged_in_float32():
    weight = torch.full((4,), 1e-3, dtype=torch.float16)
    weight.grad = torch.full((4,), 1e-3, dtype=torch.float16)
    importance = Importance({"a": [ScoredPart(weight, 0)]})
    importance.observe(0)
    score = importance.scores()["a"]
    assert score.dtype == torch.float32
    expected = (float(weight[0]) * float(weight.grad[0])) ** 2 * 0.15 * 0.85 * 0.15
    torch.testing.assert_close(score, torch.full((4,), expected), rtol=1e-5, atol=0)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("smoothing", ["step", "window"])
def test_state_goes_on_as_if_nothing_had_happened(smoothing):
    def fresh():
        torch.manual_seed(0)
        weights = [torch.randn(3, 4), torch.randn(4, 3)]
        return weights, Importance(
            {"a": [ScoredPart(weights[0], 0), ScoredPart(weights[1], 1)]}, smoothing=smoothing, window=3
        )

    def observe(weights, importance, steps):
        for step in steps:
            for index, weight in enumerate(weights):
                weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(10 * step + index))
            importance.observe(step)

    weights, whole = fresh()
    observe(weights, whole, range(10))
    weights, first = fresh()
    observe(weights, first, range(5))
    saved = {key: value.clone() if torch.is_tensor(value) else value for key, value in first.state_dict().items()}
    weights, second = fresh()
    second.load_state_dict(saved)
    observe(weights, second, range(5, 10))
    assert torch.equal(whole.scores()["a"], second.scores()["a"])


def test_states_of_other_parts_are_refused():
    saved = Importance({"a": [ScoredPart(torch.ones(3), 0)]}).state_dict()
    with pytest.raises(RunError, match=r"0\.average is \[3\], expected \[4\]"):
        Importance({"a": [ScoredPart(torch.ones(4), 0)]}).load_state_dict(saved)


def test_released_scores_are_gone():
    importance = Importance({"a": [ScoredPart(torch.ones(3), 0)]})
    importance.release()
    with pytest.raises(RunError, match="released"):
        importance.scores()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"beta1": 1.0}, "beta1: 1 is outside"),
        ({"beta2": 0.0}, "beta2: 0 is outside"),
        ({"resolution": "unit"}, "only exact without an uncertainty"),
        ({"window": 0}, "window: 0"),
    ],
)
def test_impossible_averages_are_refused(arguments, says):
    with pytest.raises(ConfigError, match=says):
        Importance({"a": [ScoredPart(torch.ones(3), 0)]}, **arguments)


numbers = st.floats(0, 1, width=32) | st.just(0.0) | st.just(math.nan)
score_sets = st.lists(st.lists(numbers, min_size=1, max_size=6), min_size=1, max_size=5).map(
    lambda lists: {f"m{i}": torch.tensor(values) for i, values in enumerate(lists)}
)


def kept(allocation):
    return {(group, i) for group, mask in allocation.masks.items() for i in mask.nonzero().flatten().tolist()}


@given(score_sets, st.integers(0, 40))
def test_counts_are_exact_and_kept_sets_nested(scores, budget):
    total = sum(len(score) for score in scores.values())
    found = allocate(scores, budget)
    assert len(kept(found)) == int(found.units) == int(found.spent) == min(budget, total)
    assert kept(found) <= kept(allocate(scores, budget + 1))
    assert found.not_numbers == sum(int(score.isnan().sum()) for score in scores.values())


@given(score_sets, st.floats(0, 60), st.lists(st.floats(0.5, 8), min_size=5, max_size=5))
def test_costs_are_never_exceeded_and_kept_sets_nested(scores, budget, prices):
    cost = dict(zip(scores, prices, strict=False))
    found = allocate(scores, budget, cost)
    assert float(found.spent) <= budget * (1 + 1e-9)
    assert float(found.spent) == pytest.approx(sum(cost[group] for group, _ in kept(found)))
    assert kept(found) <= kept(allocate(scores, budget * 1.5 + 0.1, cost))


@given(score_sets, st.integers(0, 40), st.integers(0, 3), st.integers(3, 6))
def test_floors_and_caps(scores, budget, floor, cap):
    found = allocate(scores, budget, floor=dict.fromkeys(scores, floor), cap=dict.fromkeys(scores, cap))
    least = sum(min(floor, len(score)) for score in scores.values())
    most = sum(min(cap, len(score)) for score in scores.values())
    assert int(found.units) == max(least, min(budget, most))
    for group, mask in found.masks.items():
        assert min(floor, len(scores[group])) <= int(mask.sum()) <= cap


def test_ties_go_to_the_first_group_and_the_first_index():
    scores = {"a": torch.ones(3), "b": torch.ones(3)}
    assert kept(allocate(scores, 4)) == {("a", 0), ("a", 1), ("a", 2), ("b", 0)}


def test_not_a_number_ranks_last():
    found = allocate({"a": torch.tensor([math.nan, 0.0, 1.0])}, 2)
    assert kept(found) == {("a", 1), ("a", 2)}
    assert found.not_numbers == 1


def test_what_was_dropped_stays_dropped_where_asked():
    scores = {"a": torch.tensor([3.0, 2.0, 1.0])}
    previous = {"a": torch.tensor([False, True, True])}
    assert kept(allocate(scores, 2, previous=previous)) == {("a", 1), ("a", 2)}
    assert kept(allocate(scores, 2, previous=previous, floor={"a": 1})) == {("a", 0), ("a", 1)}


def test_the_first_unit_that_does_not_fit_ends_it():
    scores = {"cheap": torch.tensor([1.0]), "dear": torch.tensor([20.0])}
    assert kept(allocate(scores, 5, {"cheap": 1.0, "dear": 10.0})) == set()


def test_impossible_costs_and_floors_are_refused():
    scores = {"a": torch.ones(3)}
    with pytest.raises(ConfigError, match="cost of a: 0 is not above 0"):
        allocate(scores, 1, cost=0)
    with pytest.raises(ConfigError, match="a: the floor 3 is above the cap 2"):
        allocate(scores, 1, floor={"a": 3}, cap={"a": 2})


@pytest.mark.parametrize("budget", [-1, -1e-12, math.nan])
def test_impossible_budgets_are_refused(budget):
    with pytest.raises(ConfigError, match=r"budget: .* is not 0 or more"):
        allocate({"a": torch.ones(3)}, budget)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_scores_rank_as_their_float32_copies(dtype):
    """Divided by its cost in half precision, a score falls together with its neighbours."""
    generator = torch.Generator().manual_seed(0)
    costs = {"a": 3.0, "b": 7.0, "c": 11.0}
    for _ in range(50):
        scores = {group: torch.rand(20, generator=generator).to(dtype) for group in costs}
        copies = {group: score.float() for group, score in scores.items()}
        found, right = allocate(scores, 200, costs), allocate(copies, 200, costs)
        assert all(torch.equal(found.masks[group], right.masks[group]) for group in costs)
