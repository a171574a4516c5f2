r"""What margins say of labels once they are recalibrated, and how many of the labels are wrong.

A model may be too sure (one trained with a small ``lam`` is), or not sure enough (a policy after little DPO is). With a
temperature T, and a share e of labels that were turned over,

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
from torch import Tensor
from torch.nn.functional import logsigmoid

_STEEPEST = 8.0
"""Largest absolute logarithm of the temperature, relative to the size of the margins."""
_STARTS = (0.02, 0.3)
"""Shares to begin with: the likelihood may have two peaks, one with hardly a flipped label and one with many."""
_LIKELY = 3.841459 / 2
"""Nats by which the best likelihood may exceed that of a share inside the 95 % interval (Wilks)."""
_FINE = 1e-3
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

    >>> sure = torch.tensor([8.0, 9.0, 7.5, 8.5] * 10 + [-8.0] * 4)
    >>> found = recalibrate(sure, flips=True)
    >>> round(found.wrong, 2)
    0.09
    """
    scaled, size = _scaled(margins)
    fits = (
        [_descended(scaled, start, free=True) for start in _STARTS] if flips else [_descended(scaled, 0.0, free=False)]
    )
    nats, steepness, wrong = min(fits, key=lambda fit: float(fit[0].mean()))
    return Recalibrated(nats, size / steepness, wrong)


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

    def inside(share: float) -> bool:
        return float(_descended(scaled, share, free=False)[0].sum()) <= enough

    return _end(best.wrong, 0.0, inside), _end(best.wrong, 0.5 - _FINE, inside)


def _end(inner: float, outer: float, inside: Callable[[float], bool]) -> float:
    """The end of the interval between a share inside and the last one possible."""
    if abs(outer - inner) < _FINE or inside(outer):
        return outer
    while abs(outer - inner) > _FINE:
        middle = (inner + outer) / 2
        inner, outer = (middle, outer) if inside(middle) else (inner, middle)
    return outer


def _scaled(margins: Tensor) -> tuple[Tensor, float]:
    exact = margins.detach().double().cpu()
    size = float(exact.square().mean().sqrt()) or 1.0
    return exact / size, size


def _descended(margins: Tensor, wrong: float, *, free: bool) -> tuple[Tensor, float, float]:
    """A local minimum: nats of each pair, 1 / T, e; the latter stays where it is unless it is free."""
    steepness = torch.zeros((), dtype=torch.float64, requires_grad=True)  # its logarithm
    # The logit of 2e.
    mixed = torch.tensor(math.log(2 * wrong / (1 - 2 * wrong)) if wrong else -math.inf, dtype=torch.float64)
    parameters = [steepness, mixed.requires_grad_()] if free else [steepness]

    def nats() -> Tensor:
        likely = logsigmoid(margins * steepness.clamp(-_STEEPEST, _STEEPEST).exp())
        if wrong:
            likely = torch.logaddexp(logsigmoid(mixed) - math.log(2), logsigmoid(-mixed) + likely)
        return -likely

    optimizer = torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nats().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = math.exp(min(max(steepness.item(), -_STEEPEST), _STEEPEST))
    return nats().detach(), found, float(torch.sigmoid(mixed.detach())) / 2
