r"""What margins say of labels once they are recalibrated, and how many of the labels are wrong.

A model may be too sure (one trained with a small ``lam`` is), or not sure enough (a policy after little DPO is). With a
temperature T, and a share e of flipped labels,

.. math:: P(\text{label}) = e + (1 - 2e)\,\sigma(m / T)

and both are taken to be the most likely ones. They can be told apart, for a temperature bends all margins, while flips
leave a floor: however sure the model is, a share e of the labels contradicts it. A model that learnt wrong labels by
heart shows none. R3M specification, sections 2.3 and 8.4; the mixture is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy.optimize import brentq
from scipy.stats import chi2
from torch import Tensor
from torch.nn.functional import logsigmoid

_TEMPERATURES = torch.logspace(-3, 3, 61, dtype=torch.float64)
"""Where the temperature is looked for first, in units of the middle margin: the likelihood may have several peaks."""
_SHARES = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.49)
"""Where the share of flipped labels is looked for first."""
_LIKELY = float(chi2.ppf(0.95, 1)) / 2
"""Nats by which the best likelihood may exceed that of a share inside the 95 % interval (Wilks)."""
_FINE = 5e-4
"""How exactly the ends of the interval are found."""


class Recalibrated(NamedTuple):
    """The most likely temperature and share of flipped labels.

    Args:
        nats: negative log-likelihood of each label, [pairs], float64.
        temperature: T; above 1 the margins were too large.
        wrong: e, 0 to 0.5. It takes whatever labels contradict a sure model for flips spread evenly: it is too large
            where flips are of the clearest pairs, and too small where the model has learnt to be unsure.
    """

    nats: Tensor
    temperature: float
    wrong: float


def recalibrate(margins: Tensor, *, flips: bool) -> Recalibrated:
    """Fit the temperature, and the share of flipped labels where there may be some.

    Args:
        margins: [pairs], finite, in units of reward.
        flips: whether labels may be wrong; if not, the share is 0.

    >>> sure = torch.tensor([3.0, 6.0, 4.0, 5.0] * 40 + [-6.0, -5.0] * 8)
    >>> found = recalibrate(sure, flips=True)
    >>> round(found.wrong, 2)
    0.09
    """
    scaled, size = _scaled(margins)
    at = _at(scaled, 0.0)
    if flips:
        at = min((_at(scaled, share) for share in _SHARES), key=lambda found: found.nats)
        at = min(at, _descended(scaled, at), key=lambda found: found.nats)
    exact = (torch.tensor(value, dtype=torch.float64) for value in at[1:])
    return Recalibrated(_nats(scaled, *exact), size * at.temperature, at.wrong)


def wrong_interval(margins: Tensor, best: Recalibrated) -> tuple[float, float]:
    """The 95 % interval of the share of flipped labels, by profile likelihood; from 0 where there may be none.

    Args:
        margins: [pairs], finite.
        best: what `recalibrate` found for them, with flips.

    >>> margins = torch.tensor([2.0, 1.0, -0.5])
    >>> wrong_interval(margins, recalibrate(margins, flips=True))[0]
    0.0
    """
    scaled, _ = _scaled(margins)
    enough = float(best.nats.sum()) + _LIKELY

    def beyond(share: float) -> float:
        return len(scaled) * _at(scaled, share).nats - enough

    return _end(best.wrong, 0.0, beyond), _end(best.wrong, 0.5 - _FINE, beyond)


def _end(inner: float, outer: float, beyond: Callable[[float], float]) -> float:
    """Where the interval ends between a share inside and the last one possible."""
    if beyond(outer) <= 0:
        return outer
    if beyond(inner) >= 0:  # of so few pairs that the best share is the only one
        return inner
    return float(brentq(beyond, inner, outer, xtol=_FINE))


class _Point(NamedTuple):
    nats: float
    """Of a pair, mean."""
    temperature: float
    wrong: float


def _scaled(margins: Tensor) -> tuple[Tensor, float]:
    """Margins in units of the middle one: a few large ones must not hide the others."""
    exact = margins.detach().double().cpu()
    size = float(exact.abs().median()) or float(exact.abs().mean()) or 1.0
    return exact / size, size


def _nats(margins: Tensor, temperature: Tensor, wrong: Tensor) -> Tensor:
    """Of each pair; temperature and share are broadcast."""
    # Adding logarithms keeps what a sure model makes tiny; at a share of 0 the first is minus infinity.
    return -torch.logaddexp(wrong.log(), (1 - 2 * wrong).log() + logsigmoid(margins / temperature))


def _at(margins: Tensor, share: float) -> _Point:
    """The best temperature for a share of flipped labels: among many, then among ever nearer ones."""
    wrong, temperatures = torch.tensor(share, dtype=torch.float64), _TEMPERATURES
    for _ in range(4):
        means = _nats(margins, temperatures[:, None], wrong).mean(1)
        index = int(means.argmin())
        best = _Point(float(means[index]), float(temperatures[index]), share)
        low, high = temperatures[max(index - 1, 0)], temperatures[min(index + 1, len(temperatures) - 1)]
        temperatures = torch.logspace(float(low.log10()), float(high.log10()), 11, dtype=torch.float64)
    return best


def _descended(margins: Tensor, start: _Point) -> _Point:
    """Downhill from a point in both."""
    first = min(max(start.wrong, 0.002), 0.498)
    cooling = torch.tensor(math.log(start.temperature), dtype=torch.float64, requires_grad=True)
    logit = torch.tensor(math.log(2 * first / (1 - 2 * first)), dtype=torch.float64, requires_grad=True)  # of 2e
    optimizer = torch.optim.LBFGS([cooling, logit], max_iter=100, line_search_fn="strong_wolfe")

    def there() -> tuple[Tensor, Tensor]:
        return cooling.clamp(-7, 7).exp(), torch.sigmoid(logit) / 2

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = _nats(margins, *there()).mean()
        value.backward()
        return value

    optimizer.step(closure)
    with torch.no_grad():
        temperature, wrong = there()
        return _Point(float(_nats(margins, temperature, wrong).mean()), float(temperature), float(wrong))
