"""The choice of the cap: what recalibration undoes, what it estimates, and that it finds the better model."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from tenfold.align.r3m.choose import choose_lam
from tenfold.align.r3m.losses import pair_loss
from tenfold.errors import ConfigError, DataError


def drawn(seed, count, share, spread=3.0):
    """True margins of labels drawn by Bradley-Terry, of which a share was flipped."""
    generator = torch.Generator().manual_seed(seed)
    better = torch.randn(count, generator=generator, dtype=torch.float64) * spread
    label = torch.rand(count, generator=generator, dtype=torch.float64) < torch.sigmoid(better)
    wrong = torch.rand(count, generator=generator, dtype=torch.float64) < share
    return torch.where(label ^ wrong, better, -better)


def by_grid(margins, shares):
    """The least nats over a fine grid of temperatures and shares of flips."""
    temperatures = torch.logspace(-1.5, 1.5, 400, dtype=torch.float64)
    scaled = margins / temperatures[:, None]
    return min(
        (float((-(e + (1 - 2 * e) * torch.sigmoid(scaled)).log()).mean(1).min()), e) for e in shares.tolist()
    )  # fmt: skip


@pytest.mark.parametrize("trusted", [True, False])
def test_recalibration_is_the_most_likely_one(trusted):
    margins = drawn(0, 2000, 0.15) * 2.5
    found = choose_lam({0.5: margins}, trusted=trusted).candidates[0]
    assert (found.wrong == 0) == trusted
    shares = torch.zeros(1) if trusted else torch.linspace(0, 0.49, 99)
    nats, share = by_grid(margins, shares)
    assert found.nats <= nats + 1e-9
    assert found.nats == pytest.approx(nats, abs=2e-4)
    assert found.wrong == pytest.approx(share, abs=0.01)
    assert found.agreement == pytest.approx(float((margins > 0).double().mean()))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("scale", [0.2, 1.0, 40.0])
def test_temperature_and_flips_are_found_again(share, scale):
    found = choose_lam({0.75: drawn(1, 20_000, share) * scale}, trusted=False).candidates[0]
    assert found.wrong == pytest.approx(share, abs=0.02)
    assert found.temperature == pytest.approx(scale, rel=0.12)


def test_a_larger_margin_alone_is_no_better_model_and_the_largest_of_equals_is_taken():
    margins = drawn(2, 500, 0.1)
    for trusted in (True, False):
        choice = choose_lam({0.25: 3 * margins, 1.0: margins, 0.5: 0.2 * margins}, trusted=trusted)
        assert choice.lam == 1.0
        assert [one.lam for one in choice.candidates] == [1.0, 0.5, 0.25]
        assert all(abs(one.behind) < 1e-6 for one in choice.candidates)


def test_how_far_behind_is_paired():
    margins, generator = drawn(3, 2000, 0.0), torch.Generator().manual_seed(0)
    noisy = margins + torch.randn(2000, generator=generator, dtype=torch.float64)
    choice = choose_lam({1.0: noisy, 0.5: margins}, trusted=True)
    assert choice.lam == 0.5
    worse = choice.candidates[0]
    ours = -logsigmoid(margins / choice.candidates[1].temperature)
    theirs = -logsigmoid(noisy / worse.temperature)
    assert worse.behind == pytest.approx(float((theirs - ours).mean()), abs=1e-6)
    assert worse.stderr == pytest.approx(float((theirs - ours).std()) / math.sqrt(2000), rel=1e-3)
    assert worse.behind > 2 * worse.stderr


LAMS = (1.0, 0.75, 0.5, 0.25)


def fitted(x, lam):
    """A linear reward; the labels are in the signs of the features' differences."""
    weights = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = pair_loss(x @ weights, "r3m", lam=lam, smoothing=0.1).mean() + 5e-4 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


@pytest.mark.parametrize("trusted", [True, False])
def test_where_the_clearest_labels_are_wrong_it_loses_little_to_the_best_cap_and_beats_the_plain_loss(trusted):
    lost, gained = [], []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        w = rng.normal(size=10)
        w *= 3 / np.linalg.norm(w)
        x = rng.normal(size=(1000, 10))
        worth = x @ w
        label = np.where(rng.random(1000) < 1 / (1 + np.exp(-worth)), 1, -1)
        label[np.argsort(-abs(worth))[:100]] *= -1
        clean = rng.normal(size=(200, 10))
        right = np.where(rng.random(200) < 1 / (1 + np.exp(-clean @ w)), 1, -1)
        rows, fresh = torch.tensor(x * label[:, None]), torch.tensor(rng.normal(size=(5000, 10)))
        judges = torch.tensor(clean * right[:, None])
        accuracy, margins = {}, {}
        for lam in LAMS:
            weights = fitted(rows, lam)
            accuracy[lam] = float(((fresh @ weights > 0) == (fresh @ torch.tensor(w) > 0)).double().mean())
            crossed = torch.cat([rows[:500] @ fitted(rows[500:], lam), rows[500:] @ fitted(rows[:500], lam)])
            margins[lam] = judges @ weights if trusted else crossed
        lam = choose_lam(margins, trusted=trusted).lam
        lost.append(max(accuracy.values()) - accuracy[lam])
        gained.append(accuracy[lam] - accuracy[1.0])
    assert sum(lost) / len(lost) < 0.01
    assert sum(gained) / len(gained) > 0.02


def test_labels_that_a_model_knows_for_sure_and_labels_of_which_it_knows_nothing():
    sure = torch.linspace(1, 3, 50)
    assert choose_lam({1.0: sure}, trusted=False).candidates[0].nats < 1e-6
    assert choose_lam({1.0: torch.zeros(50)}, trusted=True).candidates[0].nats == pytest.approx(math.log(2))
    assert choose_lam({1.0: -sure}, trusted=True).candidates[0].nats == pytest.approx(math.log(2), abs=1e-3)


def test_bad_input():
    good = torch.ones(20)
    with pytest.raises(ConfigError, match="nothing was tried"):
        choose_lam({}, trusted=True)
    with pytest.raises(ConfigError, match=r"lam: 1.5 is outside \(0, 1\]"):
        choose_lam({1.5: good}, trusted=True)
    with pytest.raises(DataError, match=r"lam 0.5: margins of shape \[19\]"):
        choose_lam({1.0: good, 0.5: good[1:]}, trusted=True)
    with pytest.raises(DataError, match="10 pairs or more"):
        choose_lam({1.0: good[:9]}, trusted=True)
    with pytest.raises(DataError, match="lam 1: the margin of pair 3 is not finite"):
        choose_lam({1.0: torch.where(torch.arange(20) == 3, torch.nan, good)}, trusted=True)
