"""Which cap to train with, by the margins that trainings with several caps give to pairs they have not seen.

Margins cannot be compared as they are: a small ``lam`` inflates them. So each training's margins are first recalibrated
(`tenfold.align.recalibrate`), with a share of flipped judges where these may be wrong themselves. What remains, in nats
a pair, says how well the training ranks. The count of agreements is the coarser judge: it forgets by how much.

R3M specification, section 2.3 (why to recalibrate); the paper takes the best final score, which asks for a judge; this
way to do without trusted labels is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tenfold.align.r3m.losses import kink
from tenfold.align.recalibrate import recalibrate
from tenfold.errors import ConfigError, DataError

LEAST = 10
"""Pairs below which nothing is chosen; a choice that is worth something needs a hundred."""


@dataclass(frozen=True)
class Candidate:
    """What one cap brought.

    Args:
        lam: the cap.
        agreement: share of the judging labels with which its model agrees.
        nats: negative log-likelihood of these labels by the recalibrated model, nats a pair.
        behind: how much more that is than the chosen cap's, nats a pair, 0 or more.
        stderr: standard error of ``behind``, over pairs.
        temperature: T; above 1 the margins were too large.
        wrong: e, the estimated share of flipped judging labels, 0 to 0.5; 0 where they are trusted. It takes whatever
            labels contradict a sure model for flips spread evenly, so it is too large where flips are of the clearest
            pairs, and too small where the model has learnt to be unsure.
    """

    lam: float
    agreement: float
    nats: float
    behind: float
    stderr: float
    temperature: float
    wrong: float


@dataclass(frozen=True)
class CapChoice:
    """The cap to train with, and all that were tried, largest first."""

    lam: float
    candidates: tuple[Candidate, ...]


def choose_lam(margins: Mapping[float, Tensor], *, trusted: bool) -> CapChoice:
    """Choose the cap whose model explains pairs best that it has not seen.

    Args:
        margins: of each cap that was tried, the margins of the same judging pairs in the same order, [pairs]. They come
            from `tenfold.align.margins.score_pairs` on a trusted set, or from `tenfold.align.margins.cross_fit` on the
            training pairs themselves.
        trusted: whether the judging labels are known to be right. If not, a share of flipped ones is estimated with
            the temperature.

    Returns:
        The choice; among equals the largest cap.

    Raises:
        ConfigError: nothing was tried, or a cap is out of its range.
        DataError: fewer than 10 pairs, different numbers of them, or a margin that is not finite.

    >>> import torch
    >>> better = torch.tensor([2.0, 1.0, 3.0, -0.5, 1.5, 2.5, 0.8, 1.2, 0.1, 2.0])
    >>> choose_lam({1.0: better.roll(3) - 1, 0.5: 4 * better}, trusted=True).lam
    0.5
    """
    if not margins:
        raise ConfigError("lams: nothing was tried", remedy="give caps such as 1, 0.75, 0.5, 0.25")
    lams = sorted(margins, reverse=True)
    _check({lam: margins[lam] for lam in lams})
    fits = {lam: recalibrate(margins[lam], flips=not trusted) for lam in lams}
    best = min(lams, key=lambda lam: round(float(fits[lam].nats.mean()), 9))
    candidates = []
    for lam in lams:
        nats, temperature, wrong = fits[lam]
        more = nats - fits[best].nats
        candidates.append(
            Candidate(
                lam=lam,
                agreement=float((margins[lam] > 0).double().mean()),
                nats=float(nats.mean()),
                behind=float(more.mean()),
                stderr=float(more.std()) / math.sqrt(len(more)),
                temperature=temperature,
                wrong=wrong,
            )
        )
    return CapChoice(best, tuple(candidates))


def _check(margins: Mapping[float, Tensor]) -> None:
    first = next(iter(margins.values()))
    for lam, values in margins.items():
        kink(lam)  # refuses what is not a cap
        if values.shape != (len(first),) or len(first) < LEAST:
            raise DataError(
                f"lam {lam:g}: margins of shape {list(values.shape)}",
                remedy=f"give every cap the margins of the same {LEAST} pairs or more, best of a hundred or more",
            )
        bad = (~values.isfinite()).nonzero()[:, 0].tolist()
        if bad:
            raise DataError(
                f"lam {lam:g}: the margin of pair {bad[0]} is not finite", remedy="check that training did not diverge"
            )
