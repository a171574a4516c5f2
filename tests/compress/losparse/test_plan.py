import itertools

import pytest
import torch

from tenfold.compress.losparse.factors import stored
from tenfold.compress.losparse.plan import RankAndRows, choices_of, curve, half, nearest, points, spend, weighed
from tenfold.errors import ConfigError


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_a_curve_is_what_is_really_lost(shape):
    matrix = random(*shape) * torch.linspace(0.1, 3, shape[0])[:, None].double()
    found = curve(matrix, shares=[0, 0.3, 0.7])
    for choice, numbers, loss in zip(found.choices, found.numbers, found.loss, strict=True):
        others = found.order[choice.kept :]
        if len(others):
            u, s, vh = torch.linalg.svd(matrix[others], full_matrices=False)
            low = (u[:, : choice.rank] * s[: choice.rank]) @ vh[: choice.rank]
            assert abs(float((matrix[others] - low).square().sum()) - float(loss)) < 1e-9
        else:
            assert loss == 0
        assert numbers == stored(*shape, *choice) <= shape[0] * shape[1]
    assert {choice.kept for choice in found.choices} == {0, int(0.3 * shape[0]), int(0.7 * shape[0]), shape[0]}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (8, 8), (20, 3)])
def test_a_curve_counts_errors_by_what_outputs_cost(shape, whole):
    out = shape[0]
    matrix, root = random(*shape), random(out, out, seed=2)
    outputs = root @ root.T if whole else torch.linspace(0.1, 5, out).double()
    found = curve(matrix, outputs, shares=[0, 0.25, 0.13, 0.8])
    for choice, loss in zip(found.choices[:-1], found.loss, strict=False):
        others = found.order[choice.kept :]
        price = (outputs if whole else torch.diag(outputs))[others][:, others]
        values, vectors = torch.linalg.eigh(price)
        root = vectors * values.sqrt() @ vectors.T
        lost = torch.linalg.svdvals(root @ matrix[others])[choice.rank :].square().sum()
        assert abs(float(lost - loss)) < 1e-9
        factor = half(price)
        torch.testing.assert_close(weighed(weighed(matrix[others], factor), factor, undo=True), matrix[others])


def test_choices_and_their_costs_follow_from_the_shape():
    for elastic in (False, True):
        found = curve(random(40, 30), elastic=elastic)
        assert found.choices == choices_of(40, 30, elastic=elastic)
        for (rank, kept), numbers in zip(found.choices[:-1], found.numbers, strict=False):
            assert numbers == rank * 30 + kept * 30 + (40 - rank - kept) * rank + elastic * kept * rank < 40 * 30


def test_one_factor_serves_all_shares(monkeypatch):
    made = []
    true = torch.linalg.cholesky
    monkeypatch.setattr(torch.linalg, "cholesky", lambda matrix: made.append(1) or true(matrix))
    for shape, count in (((6, 40), 1), ((40, 6), 0)):
        root = random(shape[0], shape[0])
        curve(random(*shape), root @ root.T)
        assert len(made) == count
        made.clear()


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_nearest_is_the_truncated_decomposition(shape):
    matrix = random(*shape)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    for rank in (0, 1, 5, 7):
        torch.testing.assert_close(nearest(matrix, rank), (u[:, :rank] * s[:rank]) @ vh[:rank], rtol=0, atol=1e-9)


def test_rows_of_their_own_are_kept_and_others_share():
    """Ten rows in one direction, and two that are like no other and matter: one rank and two rows lose nothing."""
    matrix = torch.cat((torch.outer(random(10), random(8)), 3 * random(2, 8, seed=1)))
    order = curve(matrix).order
    assert set(order[:2].tolist()) == {10, 11}
    found = curve(matrix, shares=[0, 2.5 / 12])
    choice = spend({"m": found}, stored(12, 8, 1, 2))["m"]
    assert choice == RankAndRows(rank=1, kept=2)


def test_rows_that_save_little_are_doubted():
    matrix = torch.cat((random(10, 8), 1.5 * random(2, 8, seed=1)))
    found = {"m": curve(matrix, shares=[0, 2.5 / 12])}
    taken = [spend(found, stored(12, 8, 3, 2), doubt=doubt)["m"].kept for doubt in (1, 4)]
    assert taken == [2, 0]


def test_a_small_budget_is_spent_as_well_as_any_choice_can():
    """Against all combinations; a price reaches only some of them, and what is left is spent after it."""
    curves = {str(seed): curve(random(6, 5, seed=seed) * 2.0**seed) for seed in range(3)}
    for budget in (20, 37, 50, 71, 88):
        chosen = spend(curves, budget)
        place = {name: curves[name].choices.index(choice) for name, choice in chosen.items()}
        spent = sum(float(curves[name].numbers[at]) for name, at in place.items())
        loss = sum(float(curves[name].loss[at]) for name, at in place.items())
        assert spent <= budget
        best = min(
            sum(float(curves[name].loss[at]) for name, at in zip(curves, points, strict=True))
            for points in itertools.product(*(range(len(found.choices)) for found in curves.values()))
            if sum(float(curves[name].numbers[at]) for name, at in zip(curves, points, strict=True)) <= budget
        )
        assert loss <= 1.25 * best + 1e-9


def test_matrices_compete_in_one_unit():
    """What matters a hundred times more is kept first, whatever its shape."""
    chosen = spend({"small": curve(random(8, 8)), "large": curve(100 * random(8, 8, seed=1))}, 70)
    assert chosen["large"] == RankAndRows(0, 8)
    assert chosen["small"].rank + chosen["small"].kept <= 1


SMOL = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
SMOL |= {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.8, 0.95])
def test_the_budget_is_met_on_real_shapes(share):
    curves = {}
    for layer in range(30):
        for role, (out, inner) in SMOL.items():
            slope = 1 + 0.1 * ((layer * 7 + len(role)) % 10)
            spectra = {
                kept: (1 + torch.arange(min(out - kept, inner))).double() ** -slope * (1 - kept / out)
                for kept in (0, out // 10, out // 2)
            }
            curves[f"{layer}.{role}"] = points(out, inner, spectra, torch.arange(out))
    whole = 106_168_320
    chosen = spend(curves, share * whole)
    spent = sum(stored(*SMOL[name.split(".")[1]], *choice) for name, choice in chosen.items())
    assert 0.998 * share * whole <= spent <= share * whole


def test_a_price_of_ones_own():
    curves = {"a": curve(random(8, 8)), "b": curve(random(8, 8, seed=1))}

    def price(name, choice):
        return 4 * stored(8, 8, *choice) + (32 if choice.kept < 8 else 0)

    chosen = spend(curves, 300, price)
    assert 200 < sum(price(name, choice) for name, choice in chosen.items()) <= 300
    assert spend(curves, 1e9, price) == {"a": RankAndRows(0, 8), "b": RankAndRows(0, 8)}


def test_a_budget_that_buys_nothing_is_refused_with_the_least_that_does():
    curves = {"a": curve(random(8, 6)), "b": curve(random(5, 9))}
    with pytest.raises(ConfigError, match=r"give 6 or more"):  # a row of a
        spend(curves, 5)
    assert sum(choice.rank + choice.kept for choice in spend(curves, 13).values()) >= 1
