"""How long a call of a model takes, by the tokens that go in and come out: four numbers from a dozen measurements.

FPX specification, 2.3.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from tenfold.errors import DataError

FEWEST = 12
"""Measurements that a fit needs."""
_SHORT = 0.1
"""Of the longest prompt, what the shortest one may have at most."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TimedCall:
    """A measurement.

    Args:
        n_in: tokens of the prompt, at least one.
        n_out: tokens that were decoded after it, 0 or more.
        seconds: that it took.
    """

    n_in: int
    n_out: int
    seconds: float


@dataclass(frozen=True)
class LatencyModel:
    r""":math:`T_0+n_{in}t_{pre}+n_{out}(t_{dec}+t_{kv}n_{ctx})` with :math:`n_{ctx}=n_{in}+n_{out}/2`, in seconds.

    Args:
        start: :math:`T_0`, of every call.
        read: :math:`t_{pre}`, of a token of the prompt.
        write: :math:`t_{dec}`, of a token that is decoded, but for what its context takes.
        attend: :math:`t_{kv}`, of a token that is decoded for each token before it.
        draws: of the bootstrap: the four numbers, fitted again to residuals that were drawn anew, and one more
            residual, relative.

    >>> grid = [(n_in, n_out) for n_in in (1, 64, 1024) for n_out in (0, 1, 16, 256)]
    >>> calls = [TimedCall(n_in, n_out, 1 + 2 * n_in + n_out * 3) for n_in, n_out in grid]
    >>> found = LatencyModel.fit(calls)
    >>> round(found.seconds(10, 5), 6), round(found.quantile(10, 5, 0.95), 6)
    (36.0, 36.0)
    """

    start: float
    read: float
    write: float
    attend: float
    draws: tuple[tuple[float, float, float, float, float], ...] = ()

    @classmethod
    def fit(cls, calls: Sequence[TimedCall], *, draws: int = 200, seed: int = 0) -> LatencyModel:
        """Non-negative least squares of relative errors, so that short calls count as much as long ones.

        Args:
            calls: measured; some of them without decoding, and some of those with few tokens.
            draws: of the residual bootstrap.
            seed: of these.

        Raises:
            DataError: too few calls, times that are not positive, or calls that leave one of the numbers open.
        """
        table, seconds = _checked(calls)
        rows = table / seconds[:, None]
        found, _ = nnls(rows, np.ones(len(rows)))
        residuals = 1 / (rows @ found) - 1  # measured over predicted
        # What is fitted is drawn towards its points.
        residuals *= np.sqrt(len(rows) / (len(rows) - table.shape[1]))
        random = np.random.default_rng(seed)
        again = []
        for _ in range(draws):
            taken = (table @ found) * (1 + random.choice(residuals, len(rows)))
            one, _ = nnls(table / taken[:, None], np.ones(len(rows)))
            a, b, c, d = map(float, one)
            again.append((a, b, c, d, float(random.choice(residuals))))
        start, read, write, attend = map(float, found)
        return cls(start, read, write, attend, tuple(again))

    def seconds(self, n_in: int, n_out: int) -> float:
        """What a call is predicted to take.

        Args:
            n_in: tokens of the prompt.
            n_out: tokens to decode.
        """
        return float(_table([(n_in, n_out)])[0] @ (self.start, self.read, self.write, self.attend))

    def quantile(self, n_in: int, n_out: int, share: float) -> float:
        """What this share of such calls does not exceed: 0.5 for the median, 0.95 for p95.

        Args:
            n_in: tokens of the prompt.
            n_out: tokens to decode.
            share: 0 to 1.
        """
        row = _table([(n_in, n_out)])[0]
        taken = [float(row @ numbers) * (1 + residual) for *numbers, residual in self.draws]
        return float(np.quantile(taken, share)) if taken else self.seconds(n_in, n_out)

    def with_write(self, seconds: float) -> LatencyModel:
        """The same with another time of a token that is decoded, such as a plan's.

        Args:
            seconds: of it, the context apart.
        """
        more = seconds - self.write
        draws = tuple((a, b, max(0.0, c + more), d, residual) for a, b, c, d, residual in self.draws)
        return replace(self, write=seconds, draws=draws)


def _table(sizes: Sequence[tuple[int, int]]) -> Floats:
    return np.array([(1, n_in, n_out, n_out * (n_in + n_out / 2)) for n_in, n_out in sizes], dtype=np.float64)


def _checked(calls: Sequence[TimedCall]) -> tuple[Floats, Floats]:
    if len(calls) < FEWEST:
        raise DataError(f"calls: {len(calls)} measurements for four numbers", remedy=f"give {FEWEST} or more")
    for call in calls:
        if not (call.n_in >= 1 and call.n_out >= 0 and 0 < call.seconds < float("inf")):
            raise DataError(f"calls: {call} cannot have been measured", remedy="leave it out")
    shortest = min((call.n_in for call in calls if not call.n_out), default=None)
    longest = max(call.n_in for call in calls)
    if shortest is None or shortest > max(1, _SHORT * longest):
        raise DataError(
            "calls: none with a short prompt and nothing decoded, so that what every call takes cannot be told apart",
            remedy=f"measure one with n_out=0 and at most {max(1, int(_SHORT * longest))} tokens",
        )
    table = _table([(call.n_in, call.n_out) for call in calls])
    seconds = np.array([call.seconds for call in calls])
    scaled = table / table.max(0).clip(min=1)
    if np.linalg.matrix_rank(scaled, tol=1e-9) < table.shape[1]:
        raise DataError(
            "calls: too few different sizes of prompts and answers", remedy="give three of each, in all combinations"
        )
    return table, seconds
