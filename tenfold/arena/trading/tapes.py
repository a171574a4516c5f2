"""Recorded markets as a trader meets them: what is known at an instant, and what an order trades at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tenfold.arena.trading.files import SECOND, Bars, Quotes

Floats = NDArray[np.float64]
Instants = NDArray[np.int64]
WINDOW = 61
"""Bars of the running median that prints are compared with."""


@dataclass(frozen=True)
class Offer:
    """What an order meets: it trades at ``time`` (nanoseconds) and ``price``, at most ``size`` of it."""

    time: int
    price: float
    size: float


@dataclass(frozen=True)
class Seen:
    """What is known of a ticker, by the instant at which each entry gets known; entries do not depend on later ones.

    Args:
        known: [entries] nanoseconds since 1970, not decreasing.
        mid: [entries] price for histories.
        buy: [entries] what one costs.
        sell: [entries] what one brings.
        high: [entries] highest of the bar; of quotes, the ask.
        low: [entries] lowest of the bar; of quotes, the bid.
        buy_size: [entries] how many are displayed to be bought; infinite where nobody tells.
        sell_size: [entries] how many can be sold at that price.
    """

    known: Instants
    mid: Floats
    buy: Floats
    sell: Floats
    high: Floats
    low: Floats
    buy_size: Floats
    sell_size: Floats

    def at(self, instants: Instants) -> Instants:
        """The entry that is the last one known at each instant; -1 before the first."""
        return np.searchsorted(self.known, instants, side="right") - 1


class Tape(Protocol):
    """One ticker's recording."""

    ticker: str
    zone: str
    seen: Seen
    notes: tuple[str, ...]

    def offer(self, side: int, arrival: int) -> Offer | None:
        """What an order (1 buys, -1 sells) that arrives then trades at; None where nothing comes any more."""
        ...


class QuoteTape:
    """Best bids and asks: an order trades at the touch that is in force when it arrives, up to its displayed size."""

    def __init__(self, quotes: Quotes) -> None:
        self.ticker, self.zone, self.notes = quotes.ticker, quotes.zone, quotes.notes
        middle, sizes = (quotes.bid + quotes.ask) / 2, (quotes.ask_size, quotes.bid_size)
        self.seen = Seen(quotes.time, middle, quotes.ask, quotes.bid, quotes.ask, quotes.bid, *sizes)

    def offer(self, side: int, arrival: int) -> Offer | None:
        """The touch in force; of quotes of one instant, the last."""
        at = int(self.seen.at(np.array([arrival]))[0])
        if at < 0:
            return None
        seen = self.seen
        price, size = (seen.buy, seen.buy_size) if side > 0 else (seen.sell, seen.sell_size)
        return Offer(arrival, float(price[at]), float(size[at]))


class BarTape:
    """Bars: an order trades at the open of the first bar that begins at its arrival or later, half a spread worse.

    Prints off the market are kept out without looking ahead: what is seen of a bar is clipped to ``clip`` around the
    median of the last `WINDOW` closes, its own included; an order passes over a bar that opens farther than that from
    the median of the closes before it, instead of trading at a price that nobody else got.

    Args:
        bars: of one ticker.
        half_spread: as a fraction of the price.
        clip: as a fraction of the median; None trusts every print.
    """

    def __init__(self, bars: Bars, half_spread: float = 0.000_05, clip: float | None = 0.005) -> None:
        self.ticker, self.zone, self._start, self._open = bars.ticker, bars.zone, bars.start, bars.open
        self._half = half_spread
        high, low, close, notes = bars.high, bars.low, bars.close, []
        good = np.ones(len(bars.start), dtype=bool)
        if clip is not None:
            median = running_median(bars.close, WINDOW)
            high, low, close = (np.clip(x, median * (1 - clip), median * (1 + clip)) for x in (high, low, close))
            good[1:] = np.abs(bars.open[1:] - median[:-1]) <= clip * median[:-1]
            off = int(((high != bars.high) | (low != bars.low)).sum())
            notes = [f"{bars.ticker}: {off} bars have prints off the market by more than {clip:.1%}."] * (off > 0)
        self.notes = (*bars.notes, *notes)
        self._good = np.flatnonzero(good)
        known, middle = bars.start + bars.length, (high + low) / 2
        buy, sell, unknown = close * (1 + half_spread), close * (1 - half_spread), np.full(len(close), np.inf)
        self.seen = Seen(known, middle, buy, sell, high, low, unknown, unknown)

    def offer(self, side: int, arrival: int) -> Offer | None:
        """The open of the next bar that is on the market."""
        at = np.searchsorted(self._start[self._good], arrival)
        if at == len(self._good):
            return None
        bar = self._good[at]
        return Offer(int(self._start[bar]), float(self._open[bar]) * (1 + side * self._half), np.inf)


def running_median(values: Floats, window: int) -> Floats:
    """[n] The median of the last ``window`` values up to each one; of fewer at the beginning.

    >>> running_median(np.array([3.0, 1.0, 2.0, 9.0, 9.0]), 3).tolist()
    [3.0, 2.0, 2.0, 2.0, 9.0]
    """
    head = [float(np.median(values[: end + 1])) for end in range(min(window - 1, len(values)))]
    if len(values) < window:
        return np.array(head)
    rest = np.median(np.lib.stride_tricks.sliding_window_view(values, window), axis=1)
    return np.concatenate([head, rest])


def past_prices(seen: Seen, instant: int, points: int, spacing: int) -> tuple[float, ...]:
    """Prices that were in force ``spacing`` seconds apart before an instant, oldest first; fewer near the beginning."""
    when = instant - SECOND * spacing * np.arange(points, 0, -1)
    at = seen.at(when)
    return tuple(float(price) for price in seen.mid[at[at >= 0]])


def stirred(seen: Seen, instants: Instants, points: int, spacing: int, threshold: float) -> NDArray[np.bool_]:
    """[instants] Whether the last bar's range, or the distance from the mean of past prices, reaches a threshold.

    Args:
        seen: of one ticker.
        instants: nanoseconds, each with something known by then.
        points: as the next, of `past_prices`.
        spacing: in seconds.
        threshold: as a fraction of the price.
    """
    now = seen.at(instants)
    total, count = np.zeros(len(instants)), np.zeros(len(instants))
    for point in range(1, points + 1):
        at = seen.at(instants - SECOND * spacing * point)
        total += np.where(at >= 0, seen.mid[at], 0.0)
        count += at >= 0
    mean = np.divide(total, count, out=seen.mid[now].copy(), where=count > 0)
    low = seen.low[now]
    wide: NDArray[np.bool_] = (seen.high[now] - low) / low >= threshold
    return wide | (np.abs(seen.mid[now] - mean) >= threshold * mean)


def instants_of(tapes: Sequence[Tape], begin: int, end: int) -> Instants:
    """When something gets known of any ticker, ``begin`` included and ``end`` not."""
    known = np.unique(np.concatenate([tape.seen.known for tape in tapes]))
    return known[(known >= begin) & (known < end)]
