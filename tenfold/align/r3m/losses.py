r"""R3M: a reward learnt from preferences of which some are wrong (Bukharin et al. 2024, arXiv 2406.15568).

A pair has a margin :math:`m = r(\text{chosen}) - r(\text{rejected})`. Each pair may be bent by
:math:`\delta \ge 0`, for which it pays :math:`\lambda\delta`:

.. math:: \min_{\delta\ge0} -\log\sigma(m+\delta) + \lambda\delta

The best :math:`\delta` has a closed form, :math:`\max(c - m, 0)` with the kink
:math:`c = \log\frac{1-\lambda}\lambda`, so what is trained is a plain loss of the margin: Bradley-Terry above the kink,
a line of slope :math:`-\lambda` below it. ``lam`` caps what one pair can pull; 1 is off, and smaller is more robust.
The mathematics alone: tensors in, tensors out. R3M specification, sections 2 and 8.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tenfold.errors import ConfigError

PairLoss = Literal["r3m", "bt", "cdpo", "rdpo", "trimmed"]


def kink(lam: float) -> float:
    """The margin below which a pair is flagged: there the model gives its label less than ``1 - lam``.

    Args:
        lam: the cap, in (0, 1].

    Returns:
        ``log((1 - lam) / lam)``; minus infinity at 1, where no pair is flagged.

    Raises:
        ConfigError: ``lam`` is out of its range.

    Section 2.2.

    >>> round(kink(0.75), 4), kink(0.5), kink(1.0)
    (-1.0986, 0.0, -inf)
    """
    if not 0 < lam <= 1:
        raise ConfigError(f"lam: {lam} is outside (0, 1]", remedy="give 0.5 to 0.95, or 1 for the plain loss")
    return -math.inf if lam == 1 else math.log((1 - lam) / lam)


def r3m_loss(margin: Tensor, lam: float) -> Tensor:
    """The loss of each pair, with the best perturbation already in it.

    There is no state and nothing to alternate: a step on this loss is the paper's pair of steps (section 2.3).

    Args:
        margin: ``[pairs]`` or any other shape; half precision is computed in float32.
        lam: the cap, in (0, 1]; 1 gives the very bits of TRL's Bradley-Terry loss.

    Returns:
        Like ``margin``, 0 or more, float32 (float64 where the margins are). NaN where the margin is, but with a finite
        gradient: look at the margins.

    Raises:
        ConfigError: ``lam`` is out of its range.

    Section 2.3.

    >>> r3m_loss(torch.tensor([-4.0, 0.0, 2.0]), 0.5)
    tensor([2.6931, 0.6931, 0.1269])
    """
    if lam == 1:
        return _bradley_terry(_exact(margin))
    return lipschitz_envelope(_bradley_terry, margin, lam, kink(lam))


def lipschitz_envelope(loss: Callable[[Tensor], Tensor], margin: Tensor, lam: float, threshold: float) -> Tensor:
    r"""What R3M makes of any convex loss: the largest function below it that falls no faster than ``lam``.

    It is :math:`\inf_{\delta\ge0} L(m+\delta) + \lambda\delta`: the loss itself above the threshold, a line below it.

    Args:
        loss: elementwise and convex.
        margin: any shape.
        lam: the cap on the slope, above 0.
        threshold: where the slope of ``loss`` passes ``-lam``: ``target - lam / 2`` of a squared loss (IPO), 1 of a
            hinge loss (SLiC) with ``lam`` below 1.

    Returns:
        Like ``margin``, float32 (float64 where the margins are).

    Section 2.6.

    >>> squared = lambda m: (m - 1) ** 2
    >>> lipschitz_envelope(squared, torch.tensor([-2.0, 0.75, 1.0]), lam=1.0, threshold=0.5)
    tensor([2.7500, 0.0625, 0.0000])
    >>> hinge = lambda m: (1 - m).relu()
    >>> lipschitz_envelope(hinge, torch.tensor([-1.0, 2.0]), lam=0.5, threshold=1.0)
    tensor([1., 0.])
    """
    margin = _exact(margin)
    # clamp, not torch.maximum: at the threshold itself maximum halves the gradient.
    return loss(margin.clamp(min=threshold)) + lam * (threshold - margin).relu()


def perturbation(margin: Tensor, lam: float) -> Tensor:
    """How far the model had to be bent to accept each label; above 0 for the suspects.

    Args:
        margin: any shape.
        lam: the cap, in (0, 1].

    Returns:
        Like ``margin``, 0 or more, in units of the reward, float32 (float64 where the margins are); all 0 at ``lam`` 1.

    Raises:
        ConfigError: ``lam`` is out of its range.

    Section 2.2.

    >>> perturbation(torch.tensor([-4.0, 0.0, 2.0]), 0.5)
    tensor([4., 0., 0.])
    """
    margin = _exact(margin)
    return torch.zeros_like(margin) if lam == 1 else (kink(lam) - margin).clamp(min=0)


def pair_loss(margin: Tensor, loss: PairLoss, *, lam: float, smoothing: float) -> Tensor:
    r"""The loss of each pair, by name.

    ``bt`` is Bradley-Terry, :math:`L(m) = -\log\sigma(m)`; ``r3m`` caps its slope; ``trimmed`` caps its value: a
    flagged pair costs :math:`-\log(1-\lambda)` and pulls no more (section 8.1; not convex, so it wants a good start).
    With the smoothing :math:`e`, ``cdpo`` is :math:`(1-e)L(m) + eL(-m)`, and ``rdpo`` is
    :math:`((1-e)L(m) - eL(-m)) / (1-2e)`, which has no lower bound.

    Args:
        margin: any shape.
        loss: the name.
        lam: the cap of ``r3m`` and ``trimmed``, in (0, 1].
        smoothing: the share of flipped labels that ``cdpo`` and ``rdpo`` reckon with, in [0, 0.5).

    Returns:
        Like ``margin``, float32 (float64 where the margins are).

    Raises:
        ConfigError: a number is out of its range.

    >>> margin = torch.tensor([-3.0, 1.0])
    >>> pair_loss(margin, "trimmed", lam=0.75, smoothing=0.1), pair_loss(margin, "cdpo", lam=0.75, smoothing=0.1)
    (tensor([1.3863, 0.3133]), tensor([2.7486, 0.4133]))
    """
    margin = _exact(margin)
    if loss == "r3m":
        return r3m_loss(margin, lam)
    if loss == "trimmed":
        return _bradley_terry(margin.clamp(min=kink(lam)))
    if loss == "bt":
        return _bradley_terry(margin)
    if not 0 <= smoothing < 0.5:
        raise ConfigError(f"smoothing: {smoothing} is outside [0, 0.5)", remedy="give 0.1")
    right, flipped = (1 - smoothing) * _bradley_terry(margin), smoothing * _bradley_terry(-margin)
    return right + flipped if loss == "cdpo" else (right - flipped) / (1 - 2 * smoothing)


def expected_flags(margins: Tensor, lam: float) -> tuple[float, float]:
    """How many pairs would be flagged if all labels were right, for unlikely labels happen.

    What is flagged beyond it estimates the wrong labels. It trusts the model: probabilities that are too sure (a small
    ``lam`` makes them so) expect too few.

    Args:
        margins: ``[pairs]``.
        lam: the cap, in (0, 1].

    Returns:
        The expected number, and its standard error, as each pair is flagged or not with a chance of its own (the
        Poisson-binomial distribution).

    Raises:
        ConfigError: ``lam`` is out of its range.

    Section 2.7, whose formula is for ``lam`` above 0.5; this one is for any.

    >>> [round(number, 3) for number in expected_flags(torch.tensor([3.0, -3.0, 0.5]), 0.75)]
    [0.095, 0.301]
    """
    size, threshold = margins.detach().double().abs(), kink(lam)
    # The model takes one of the two answers for the better by `size`; the label says so, or it says the contrary.
    agrees, contradicts = size < threshold, -size < threshold
    chance = torch.sigmoid(size) * agrees + torch.sigmoid(-size) * contradicts
    return float(chance.sum()), float((chance * (1 - chance)).sum().sqrt())


class RunningKink:
    """The kink as a share of the pairs: it follows the margin below which that share lies, while margins grow.

    A quantile of a few margins is a bad one (of 8 margins the lowest tenth would flag 19%), so margins wait until
    enough have come to expect five below it; then the kink moves once, halfway to the quantile of all that wait.
    Following comes late, and an average of quantiles is a little too low: what was flagged too little or too much so
    far is made up for little by little, so that the share is that of the whole run and about that of every batch.
    Until the first time the kink is minus infinity, which flags nothing.

    Args:
        share: of the pairs that shall be flagged, in (0, 0.5].

    Raises:
        ConfigError: ``share`` is out of its range.

    Section 8.2, where the making up for is ours.

    >>> running = RunningKink(0.1)
    >>> running.lam
    1.0
    >>> for start in (-2, -1.5, -2.5):
    ...     running.observe(torch.linspace(start, start + 9.8, 50).tolist())
    >>> round(running.value, 2), round(running.lam, 2)
    (-1.08, 0.75)
    """

    RATE = 0.5
    """How far the kink moves towards the quantile of the last margins: 1 would forget all before them."""
    BELOW = 5
    """Margins that are expected below the quantile when it is taken."""
    ROUNDS = 3
    """Moves over which what is owed is spread: fewer than the kink needs to follow would make it swing."""
    MOST = 0.5
    """No quantile is taken further from the share than this part of it, however much is owed."""

    def __init__(self, share: float) -> None:
        if not 0 < share <= 0.5:
            raise ConfigError(f"share: {share} is outside (0, 0.5]", remedy="give 0.01 to 0.3")
        self.share = share
        self.value = -math.inf
        self._owed = 0.0
        self._waiting: list[float] = []

    @property
    def lam(self) -> float:
        """The cap that has its kink here, in (0, 1]."""
        # Above a kink of 30 no pair pulls at all; there the exponential would overflow one day.
        return 1 / (1 + math.exp(min(self.value, 30.0)))

    @property
    def enough(self) -> int:
        """Margins that are waited for until the kink moves."""
        return math.ceil(self.BELOW / self.share)

    def observe(self, margins: Sequence[float], *, judged: bool = True) -> None:
        """Take in the margins of a batch, all finite.

        Args:
            margins: [pairs].
            judged: whether the kink as it is now judged them; in a warm-up nothing does, and nothing is owed.
        """
        if judged:
            self._owed += self.share * len(margins) - sum(margin < self.value for margin in margins)
        self._waiting.extend(margins)
        if len(self._waiting) < self.enough:
            return
        # One move, however many wait: what is owed does not change until the next batch is judged.
        most = self.MOST * self.share
        level = self.share + min(max(self._owed / (self.ROUNDS * len(self._waiting)), -most), most)
        found, self._waiting = _quantile(self._waiting, level), []
        self.value = found if math.isinf(self.value) else self.value + self.RATE * (found - self.value)

    def state_dict(self) -> dict[str, Any]:
        """What makes another one go on from here; plain values, fit for JSON."""
        value = None if math.isinf(self.value) else self.value
        return {"value": value, "owed": self._owed, "waiting": list(self._waiting)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.value = -math.inf if state["value"] is None else float(state["value"])
        self._owed, self._waiting = float(state["owed"]), list(state["waiting"])


def _quantile(sample: list[float], level: float) -> float:
    """The value below which that share of all is expected to lie, judged by a sample (Weibull's plotting position).

    A level that the sample cannot tell gives its lowest or its highest value.
    """
    ordered = sorted(sample)
    place = min(max(level * (len(ordered) + 1) - 1, 0.0), len(ordered) - 1.0)
    lower = min(int(place), len(ordered) - 2)
    return ordered[lower] + (place - lower) * (ordered[lower + 1] - ordered[lower])


def _bradley_terry(margin: Tensor) -> Tensor:
    return -logsigmoid(margin)


def _exact(margin: Tensor) -> Tensor:
    """In float32 at least: bfloat16 is wrong by 0.02 here."""
    return margin if margin.dtype == torch.float64 else margin.float()
