"""A seeded market whose best play and expected yield are known in closed form.

Two assets walk by ticks. Now and then one of them jumps: the jump reverts, halving every ``half_life``, or it goes on.
A rule over what is seen decides which, exactly, so that a perfect reader is always right. Trades leave the market as it
is, and no question depends on earlier answers: a day is asked once, and played at as many latencies as wanted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tenfold.arena.trading.record import check_numbers
from tenfold.errors import ConfigError

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]
Mask = NDArray[np.bool_]

ASSETS = ("ALFA", "BETA")
TICK = 0.01
PAIR_TICKS = 5
"""The paired asset moved if its price changed by this many ticks or more."""
ALLOWED, EXIT, APART = 8, 9, 10
"""In half-lives after a jump: the longest latency that still trades, the market's exit, and the earliest next jump."""
_OPENING = (10_000, 5_000)
_FLOOR = 1_000  # ticks; the walk stays above, so that a tick is never more than 0.1 % of a price


@dataclass(frozen=True)
class MarketRules:
    """What the synthetic market is like.

    Args:
        seconds: length of the day.
        cutoff: seconds after the start; later orders are rejected, and what is held then is sold at the price in force.
            None: the end of the day, which no jump reaches.
        events: jumps a day.
        revert: probability that a jump reverts, the specification's p.
        amplitude: of a jump, as a fraction of the price, A.
        half_life: seconds in which half of a jump that reverts is gone, τ.
        cost: of a round trip, as a fraction of what is traded, c.
        drift: how much further a jump goes that does not revert, as a share of the amplitude, κ.
        notional: the size of every order, in money, counted at the price before the jump.
        cash: of each agent at the start; orders are not limited by it.
        size: what the book displays at each level, in money: who comes first trades at the touch, who comes later at
            what remains of it and at the next levels.
        level: from one level of the book to the next, as a fraction of the price.
        points: of price history in a question.
        spacing: whole seconds between two of them.
        easy: state in words what the prices and volumes say of a jump, instead of the numbers.

    Raises:
        ConfigError: what cannot be meant, or more events than the day has room for.

    >>> rules = MarketRules()
    >>> round(rules.expected_yield(0.9, latency=0.713), 9), round(rules.break_even(0.9), 4)
    (0.000924726, 1.2925)
    """

    seconds: int = 23_400
    cutoff: int | None = None
    events: int = 100
    revert: float = 0.5
    amplitude: float = 0.01
    half_life: float = 0.5
    cost: float = 0.001
    drift: float = 0.5
    notional: float = 1_000.0
    cash: float = 10_000.0
    size: float = 1_000.0
    level: float = 0.001
    points: int = 8
    spacing: int = 60
    easy: bool = False

    def __post_init__(self) -> None:
        above_zero = ("seconds", "events", "amplitude", "half_life", "notional", "cash", "size", "points", "spacing")
        check_numbers(self, above_zero, not_negative=("cost", "drift", "level"))
        if not 0 <= self.revert <= 1:
            raise ConfigError(f"revert: must be in [0, 1], got {self.revert}", remedy="it is a probability")
        if not self.amplitude * (1 + self.drift) < 1:
            raise ConfigError(
                f"amplitude: {self.amplitude} with drift {self.drift} takes a price to 0", remedy="give a smaller one"
            )
        if self.cutoff is not None and not 0 < self.cutoff <= self.seconds:
            raise ConfigError(f"cutoff: {self.cutoff} is not within the day", f"give 1 to {self.seconds} seconds")
        if self.room < 0:
            raise ConfigError(
                f"events: a day of {self.seconds} s has no room for {self.events} of them",
                remedy=f"at most {max(0, (self.seconds - self.first) // self.apart)}, or a shorter half_life",
            )

    @property
    def first(self) -> int:
        """Second of the earliest jump: by then there is a history."""
        return self.points * self.spacing + 1

    @property
    def apart(self) -> int:
        """Seconds from a jump to the next one, at least: the exit and a calm second lie between them."""
        return math.ceil(APART * self.half_life) + 2

    @property
    def room(self) -> int:
        """Seconds of the day that are free to fall between jumps; below 0 where they do not fit."""
        return self.seconds - self.first - self.events * self.apart

    def expected_yield(self, accuracy: float, latency: float) -> float:
        """E(q, L): the expected gain of a jump per unit of notional, for whoever is first in the book.

        Args:
            accuracy: probability of reading a jump rightly, q.
            latency: seconds until the order is there, L; at most `ALLOWED` half-lives.
        """
        p, q, a = self.revert, accuracy, self.amplitude
        gain = a * 2 ** (-latency / self.half_life) - self.cost
        return p * q * gain - (1 - p) * (1 - q) * (self.drift * a + self.cost)

    def break_even(self, accuracy: float) -> float:
        """L*: the latency at which the expected gain is 0; below 0 where an answer at once would lose already."""
        right = self.revert * accuracy
        wrong = (1 - self.revert) * (1 - accuracy) * (self.drift * self.amplitude + self.cost)
        paid = self.cost + (wrong / right if right else math.inf)
        if paid in (0, math.inf):
            return math.inf if paid == 0 else -math.inf
        return self.half_life * math.log2(self.amplitude / paid)


@dataclass(frozen=True)
class Market:
    """A day that was drawn; arrays have one entry a jump.

    Args:
        rules: what the market is like.
        seed: that it was drawn from.
        start: [events] second of each jump.
        asset: [events] 0 or 1, which of `ASSETS` jumps.
        side: [events] 1 up, -1 down.
        reverts: [events] whether it reverts.
        fundamental: [events] the price before it.
        pair_move: [events] ticks by which the other asset moves with it.
        imbalance: [events, 3] bought minus sold in the last three seconds, oldest first.
        seeds: [events] for whatever agents draw.
        mid: [2, seconds + 1] price of each asset at each second.
    """

    rules: MarketRules
    seed: int
    start: Whole
    asset: Whole
    side: Whole
    reverts: Mask
    fundamental: Floats
    pair_move: Whole
    imbalance: Whole
    seeds: Whole
    mid: Floats

    def exits(self) -> tuple[Floats, Floats]:
        """[events] second and displacement at which the market closes what was opened, at the latest at the cut-off."""
        rules = self.rules
        end = self.start + EXIT * rules.half_life
        cutoff = float(rules.seconds if rules.cutoff is None else rules.cutoff)
        home = np.where(self.reverts, 0.0, rules.amplitude * (1 + rules.drift))
        early = displacement(rules, self.reverts, np.maximum(cutoff - self.start, 0.0))
        return np.minimum(end, cutoff), np.where(end <= cutoff, home, early)


def displacement(rules: MarketRules, reverts: Mask | np.bool_, after: Floats) -> Floats:
    """How far a price stands from its fundamental, in the direction of its jump, as a fraction of the fundamental.

    Args:
        rules: what the market is like.
        reverts: [...] whether it is a jump that reverts.
        after: [...] seconds since the jump, from 0 to the exit.
    """
    left = 2.0 ** (-after / rules.half_life)
    # The drift begins when no order can come any more: how late an order is does not change what a wrong one loses.
    gone = np.clip((after / rules.half_life - ALLOWED) / (EXIT - ALLOWED), 0.0, 1.0)
    found: Floats = rules.amplitude * np.where(reverts, left, 1 + rules.drift * gone)
    return found


def draw_market(seed: int, rules: MarketRules | None = None) -> Market:
    """A day of the market. The same draws are made whatever the probabilities and amplitudes are.

    What is seen of a jump (its imbalances, the other asset's move) is drawn so that either condition of the rule alone
    leaves a quarter of the jumps wrong where half of them revert: a jump goes on because exactly one of the two fails.
    """
    rules = rules or MarketRules()
    rng, n = np.random.default_rng(seed), rules.events
    start = rules.first + rules.apart * np.arange(n) + np.sort(rng.integers(0, rules.room + 1, n))
    steps = rng.integers(-1, 2, (2, rules.seconds + 1))
    asset, side = rng.integers(0, 2, n), 1 - 2 * rng.integers(0, 2, n)
    reverts = rng.random(n) < rules.revert
    pair_fails = ~reverts & (rng.random(n) < 0.5)
    volume_fits = reverts | pair_fails
    share = rng.uniform(0.5, 1.0, n)
    against = np.where(volume_fits, 2, 0) + rng.integers(0, 2, n)  # of the three seconds: 2 or 3, or else 0 or 1
    ranks = rng.random((n, 3)).argsort(axis=1)
    volumes = 10 * rng.integers(1, 50, (n, 3))
    imbalance = np.where(ranks < against[:, None], -side[:, None], side[:, None]) * volumes
    seeds = rng.integers(0, 2**31, n)
    fundamental, pair_move, mid = _walk(rules, start, asset, side, reverts, np.where(pair_fails, share, 0.0), steps)
    return Market(rules, seed, start, asset, side, reverts, fundamental, pair_move, imbalance, seeds, mid)


def _walk(
    rules: MarketRules, start: Whole, asset: Whole, side: Whole, reverts: Mask, share: Floats, steps: Whole
) -> tuple[Floats, Whole, Floats]:
    """Prices of the day: the fundamentals before each jump, how many ticks the pair moved, and all seconds."""
    pause = math.ceil(EXIT * rules.half_life)
    seconds = np.arange(pause, dtype=np.float64)
    fundamental, pair_move = np.empty(len(start)), np.zeros(len(start), dtype=np.int64)
    mid = np.empty((2, rules.seconds + 1))
    level, done = np.array(_OPENING), 0
    for i, (at, which, sign) in enumerate(zip(start, asset, side, strict=True)):
        path = np.maximum(level[:, None] + steps[:, done:at].cumsum(axis=1), _FLOOR)
        mid[:, done:at] = path * TICK
        level, done = path[:, -1].copy(), at + pause
        fundamental[i] = level[which] * TICK
        if share[i]:
            moved = max(PAIR_TICKS, round(share[i] * rules.amplitude * level[1 - which]))
            pair_move[i] = sign * moved
            level[1 - which] += pair_move[i]
        mid[1 - which, at:done] = level[1 - which] * TICK
        mid[which, at:done] = fundamental[i] * (1 + sign * displacement(rules, reverts[i], seconds))
        if not reverts[i]:
            level[which] = round(level[which] * (1 + sign * rules.amplitude * (1 + rules.drift)))
    mid[:, done:] = np.maximum(level[:, None] + steps[:, done:].cumsum(axis=1), _FLOOR) * TICK
    return fundamental, pair_move, mid


def book_level(before: Floats, quantity: float, size: float) -> Floats:
    """The mean level at which an order trades, 0 for the touch, where each level of the book displays ``size``.

    Args:
        before: what others have taken out of the book by then.
        quantity: of the order, above 0.
        size: of each level, above 0.

    >>> book_level(np.array([0.0, 80.0]), 80, 100).tolist()  # 80 at the touch; 20 at the touch and 60 at the next level
    [0.0, 0.75]
    """

    def taken(amount: Floats) -> Floats:  # the integral of the level over what is taken
        whole = np.floor(amount / size)
        return size * whole * (whole - 1) / 2 + whole * (amount - whole * size)

    found: Floats = (taken(before + quantity) - taken(before)) / quantity
    return found
