"""The running kink: it flags the share that was asked for, follows margins that grow, and does not swing."""

import json
import math

import pytest
import torch

from tenfold.align.r3m.losses import RunningKink, perturbation


@pytest.mark.parametrize("batch", [32, 128, 1024])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_margins_that_stay_keep_the_kink_at_their_quantile(share, batch):
    # The quantiles of a normal distribution, the same in every batch: nothing but the kink itself can move it.
    normal = torch.distributions.Normal(torch.tensor(0.7344), torch.tensor(1.0))
    margins = normal.icdf((torch.arange(batch) + 0.5) / batch)
    running, flagged = RunningKink(share), []
    for _ in range(60):
        flagged.append(float((margins < running.value).float().mean()))
        running.observe(margins.tolist())
    quantile = float(normal.icdf(torch.tensor(share)))
    assert running.value == pytest.approx(quantile, abs=2 / batch / 0.17)  # two margins' distance where they lie loose
    later = flagged[2 + math.ceil(running.enough / batch) :]  # the first batches flag nothing
    assert max(later) <= 1.5 * share + 1 / batch, "what is owed is paid little by little"
    assert all(abs(found - share) <= 0.1 * share + 2 / batch for found in flagged[-20:])


def test_noisy_margins_do_not_make_the_kink_swing():
    # Share 0.3, batches of 128, true quantile 0.21: a batch of its own has a standard deviation of 4 points.
    generator = torch.Generator().manual_seed(0)
    running, flagged = RunningKink(0.3), []
    for number in range(300):
        margins = 0.7344 + torch.randn(128, generator=generator)
        if number > 5:
            assert running.value == pytest.approx(0.21, abs=0.4)
            flagged.append(float((margins < running.value).float().mean()))
        running.observe(margins.tolist())
    spread = torch.tensor(flagged)
    assert float(spread.mean()) == pytest.approx(0.3, abs=0.01)
    assert float(spread.std()) < 0.06


@pytest.mark.parametrize(("share", "pairs"), [(0.02, 20_000), (0.1, 2000), (0.3, 2000)])
@pytest.mark.parametrize("batch", [4, 32])
@pytest.mark.parametrize(("start", "growth", "spread"), [(1, 0, 2), (1, 3, 2), (1, -1, 2), (0, 3, 0)])
def test_the_running_kink_flags_the_share_that_was_asked_for(share, pairs, batch, start, growth, spread):
    generator = torch.Generator().manual_seed(0)
    running, flagged = RunningKink(share), 0
    for done in range(0, pairs, batch):
        middle = start + growth * done / pairs
        # Without a spread of their own margins spread as they grow, as those of a model that has just begun to learn.
        margins = middle + (spread or middle + 0.02) * torch.randn(batch, generator=generator)
        flagged += int((perturbation(margins, running.lam) > 0).sum())
        running.observe(margins.tolist())
    assert flagged / pairs == pytest.approx(share, rel=0.1)


def test_the_running_kink_bears_margins_that_are_all_the_same():
    running = RunningKink(0.1)
    for _ in range(50):
        running.observe([0.0] * 8)
    assert (running.value, running.lam) == (0, 0.5)


def test_a_running_kink_goes_on_where_it_was_saved():
    generator = torch.Generator().manual_seed(0)
    whole, again = RunningKink(0.1), RunningKink(0.1)
    for _ in range(20):
        margins = torch.randn(7, generator=generator).tolist()
        whole.observe(margins)
        again.observe(margins)
        stored = json.loads(json.dumps(again.state_dict(), allow_nan=False))
        again = RunningKink(0.1)
        again.load_state_dict(stored)
        assert again.value == whole.value
    assert whole.value > -math.inf
