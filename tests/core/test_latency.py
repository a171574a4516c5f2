"""The latency model: what it finds, and what it refuses to guess."""

import itertools

import numpy as np
import pytest

from tenfold.core.latency import LatencyModel, TimedCall
from tenfold.errors import DataError

SIZES = list(itertools.product((1, 64, 1024, 8192), (0, 1, 16, 256)))


def calls(noise=0.0, seed=0, repeats=5, sizes=SIZES, attend=1e-6):
    random = np.random.default_rng(seed)
    found = []
    for n_in, n_out in sizes * repeats:
        seconds = 5e-3 + 2e-4 * n_in + n_out * (3e-3 + attend * (n_in + n_out / 2))
        found.append(TimedCall(n_in, n_out, float(seconds * (1 + noise * random.standard_normal()))))
    return found


def test_without_noise_it_is_exact():
    found = LatencyModel.fit(calls(repeats=1))
    assert (found.start, found.read, found.write, found.attend) == pytest.approx((5e-3, 2e-4, 3e-3, 1e-6), rel=1e-6)
    assert found.seconds(100, 10) == pytest.approx(5e-3 + 0.02 + 10 * (3e-3 + 105e-6), rel=1e-6)


def test_numbers_are_never_negative():
    """With a true zero, half of all plain fits would have a negative one."""
    for seed in range(20):
        found = LatencyModel.fit(calls(noise=0.05, seed=seed, attend=0), draws=5)
        assert min(found.start, found.read, found.write, found.attend) >= 0


def test_quantiles_cover_new_calls():
    noise, below, above = 0.1, 0, 0
    for seed in range(20):
        found = LatencyModel.fit(calls(noise=noise, seed=seed), draws=200)
        new = calls(noise=noise, seed=1000 + seed, repeats=1)
        below += sum(call.seconds <= found.quantile(call.n_in, call.n_out, 0.95) for call in new)
        above += sum(call.seconds > found.quantile(call.n_in, call.n_out, 0.5) for call in new)
    assert 0.91 < below / 320 < 0.98
    assert 0.44 < above / 320 < 0.56


def test_another_time_of_a_token_moves_all_of_it():
    found = LatencyModel.fit(calls(noise=0.01))
    other = found.with_write(found.write + 1e-3)
    assert other.seconds(64, 10) == pytest.approx(found.seconds(64, 10) + 10e-3)
    assert other.quantile(64, 10, 0.5) == pytest.approx(found.quantile(64, 10, 0.5) + 10e-3, rel=0.01)
    assert other.seconds(64, 0) == found.seconds(64, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (calls(repeats=1)[:11], "11 measurements"),
        (calls(sizes=[size for size in SIZES if size[1]]), "none with a short prompt"),
        (calls(sizes=[size for size in SIZES if size[0] > 1000]), "none with a short prompt"),
        (calls(sizes=[size for size in SIZES if not size[1]]), "too few different sizes"),
        ([*calls(), TimedCall(5, 5, 0.0)], "cannot have been measured"),
        ([*calls(), TimedCall(5, 5, float("nan"))], "cannot have been measured"),
    ],
)
def test_what_leaves_a_number_open_is_refused(given, message):
    with pytest.raises(DataError, match=message):
        LatencyModel.fit(given)
