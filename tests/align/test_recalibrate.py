"""Temperature and share of flipped labels: against a fine grid, for margins of all shapes."""

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from tenfold.align.recalibrate import recalibrate, wrong_interval


def labelled(better, share, seed):
    """Margins of labels drawn by Bradley-Terry, of which a share was flipped."""
    rng = np.random.default_rng(seed)
    right = np.where(rng.random(len(better)) < 0.5 * (1 + np.tanh(better / 2)), 1, -1)
    return torch.tensor(np.where(rng.random(len(better)) < share, -1, 1) * right * better)


def shapes():
    rng = np.random.default_rng(0)
    normal = labelled(3 * rng.normal(size=300), 0.1, 1)
    yield "normal", normal
    yield "one far above", torch.cat([normal, torch.tensor([1000.0], dtype=torch.float64)])
    yield "one far below", torch.cat([normal, torch.tensor([-1000.0], dtype=torch.float64)])
    yield "student", labelled(3 * rng.standard_t(3, size=400), 0.05, 2)
    yield "very heavy", labelled(3 * rng.normal(size=300) / rng.random(300), 0.05, 3)
    yield "too large, all right", labelled(3 * rng.normal(size=300) / rng.random(300), 0.0, 4) * 30
    yield "many wrong", labelled(4 * rng.normal(size=500), 0.35, 5)


def by_grid(margins):
    """Least nats, its share, and the ends of the 95 % interval."""
    shares = torch.linspace(0, 0.499, 250, dtype=torch.float64)
    temperatures = torch.logspace(-3, 4, 500, dtype=torch.float64) * margins.abs().median()
    likely = logsigmoid(margins / temperatures[:, None])
    profile = torch.stack([-torch.logaddexp(e.log(), (1 - 2 * e).log() + likely).sum(1).max() for e in shares])
    inside = shares[profile <= profile.min() + 3.841459 / 2]
    return float(profile.min()), float(shares[profile.argmin()]), float(inside.min()), float(inside.max())


@pytest.mark.parametrize(("name", "margins"), list(shapes()), ids=lambda value: value if isinstance(value, str) else "")
def test_against_a_grid(name, margins):
    found = recalibrate(margins, flips=True)
    low, high = wrong_interval(margins, found)
    nats, share, lower, upper = by_grid(margins)
    assert float(found.nats.sum()) == pytest.approx(nats, abs=0.01)
    assert float(found.nats.sum()) <= nats + 1e-6
    assert found.wrong == pytest.approx(share, abs=0.003)
    assert (low, high) == (pytest.approx(lower, abs=0.003), pytest.approx(upper, abs=0.003))
    assert low <= found.wrong <= high


def test_what_margins_cannot_tell():
    for margins in (torch.zeros(5), torch.ones(1), torch.full((30,), 1e-200), torch.tensor([1e38, -1e38, 5.0])):
        for flips in (True, False):
            found = recalibrate(margins, flips=flips)
            assert found.nats.isfinite().all()
            assert 0 <= found.wrong <= 0.5
        low, high = wrong_interval(margins, found)
        assert 0 <= low <= high <= 0.5


@pytest.mark.parametrize("seed", range(4))
def test_without_flips_it_is_a_temperature(seed):
    margins = labelled(3 * np.random.default_rng(seed).normal(size=4000), 0.0, seed + 7)
    found = recalibrate(7 * margins, flips=False)
    assert found.wrong == 0
    assert found.temperature == pytest.approx(7, rel=0.1)
    nats = [float(-logsigmoid(7 * margins / (factor * found.temperature)).sum()) for factor in (0.995, 1, 1.005)]
    assert nats[1] == min(nats)
    torch.testing.assert_close(found.nats, -logsigmoid(7 * margins / found.temperature), atol=1e-9, rtol=1e-9)
