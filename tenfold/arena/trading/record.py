"""What is kept of a day of trading: enough to draw it, to count it and to explain every trade."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import time
from typing import Any, Literal

from tenfold.arena.agents import Action
from tenfold.errors import ConfigError, DataError

Outcome = Literal["traded", "passed", "invalid", "late", "busy", "rejected", "unfilled"]
"""What became of a question: ``traded`` at least in part; ``passed``, no order wanted; ``invalid``, none of the answers
allowed; ``late``, an order when its chance was over; ``busy``, not asked, because the agent was still thinking;
``rejected``, an order at or after the cut-off; ``unfilled``, an order that found nothing to trade with (cash, holding
or displayed size)."""

DRAWN = 2_000
"""About how many prices of an asset are kept for drawing."""

Reason = Literal["order", "exit", "cut-off"]
"""Why there is a trade: the agent's order, the market's own exit from it, the liquidation at the cut-off."""


@dataclass(frozen=True)
class MarketDecision:
    """A question and what became of it.

    Args:
        agent: who was asked.
        asked: seconds since the start of the day.
        seconds: that the answer took; it landed at ``asked + seconds``.
        state: what the agent saw; the rules, which do not change, stand in `MarketPlay`.
        said: as it was said.
        choice: which of the valid answers that is, or None.
        outcome: what became of it.
    """

    agent: str
    asked: float
    seconds: float
    state: str
    said: str
    choice: str | None
    outcome: Outcome


@dataclass(frozen=True)
class Trade:
    """Something bought or sold.

    Args:
        agent: for whom.
        asset: of what.
        side: 1 bought, -1 sold.
        quantity: above 0.
        price: of one, with spread and worse levels of the book, without fees.
        time: seconds since the start of the day.
        reason: why.
        decision: place of the decision in `MarketPlay.decisions`; None for a trade of the market's own.
    """

    agent: str
    asset: str
    side: int
    quantity: float
    price: float
    time: float
    reason: Reason = "order"
    decision: int | None = None


@dataclass(frozen=True)
class Line:
    """A curve over the day: ``values[i]`` at ``times[i]`` seconds since its start."""

    times: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Prices:
    """What the market showed of an asset over the day.

    Args:
        times: seconds since its start, increasing.
        buy: what one cost then. (By the published rules that is less than what one brought.)
        sell: what one brought then.
        buy_size: how many were displayed to be bought; empty where that is not told.
        sell_size: how many could be sold at that price; empty where that is not told.
    """

    times: tuple[float, ...]
    buy: tuple[float, ...]
    sell: tuple[float, ...]
    buy_size: tuple[float, ...] = ()
    sell_size: tuple[float, ...] = ()


@dataclass(frozen=True)
class Mark:
    """Something that happened to an asset at a time of the day, in words; agents did not see them."""

    time: float
    asset: str
    text: str


@dataclass(frozen=True)
class MarketPlay:
    """A day of trading.

    Args:
        mode: ``synthetic``, ``replay`` or ``paper``.
        rules: what every agent was told, the same for each question.
        cash: with which each agent began.
        start: the clock at the start of the day, seconds since midnight.
        cutoff: seconds since the start of the day.
        prices: of each asset, thinned out for drawing.
        decisions: all, in the order of asking.
        trades: all, in time's order.
        equity: of each agent, cash and what is held at its price.
        marks: what happened.
        notes: sentences that whoever reads the figures must know.
    """

    mode: str
    rules: str
    cash: float
    start: float
    cutoff: float
    prices: Mapping[str, Prices]
    decisions: tuple[MarketDecision, ...]
    trades: tuple[Trade, ...]
    equity: Mapping[str, Line]
    marks: tuple[Mark, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def yields(self) -> dict[str, float]:
        """Of each agent, (equity at the end - cash) / cash."""
        return {name: (line.values[-1] - self.cash) / self.cash for name, line in self.equity.items()}

    def outcomes(self, agent: str) -> Counter[Outcome]:
        """How often each outcome befell an agent's questions."""
        return Counter(decision.outcome for decision in self.decisions if decision.agent == agent)

    def as_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, texts and numbers."""
        return asdict(self)


def clock(seconds: float) -> str:
    """A time of day.

    >>> clock(34_200.5)
    '09:30:00'
    """
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{second:02}"


def check_numbers(rules: object, above_zero: Sequence[str], not_negative: Sequence[str] = ()) -> None:
    """Refuse values of a market's rules that cannot be meant.

    Args:
        rules: whose attributes they are.
        above_zero: names of those that are finite and above 0.
        not_negative: names of those that are finite, 0 or more.

    Raises:
        ConfigError: naming the first that is not.
    """
    for name in (*above_zero, *not_negative):
        value = getattr(rules, name)
        if not 0 <= value < float("inf") or (value == 0 and name in above_zero):
            least = "above 0" if name in above_zero else "0 or more"
            raise ConfigError(f"{name}: must be finite and {least}, got {value}", remedy="give such a number")


def check_times(rules: object, *names: str) -> None:
    """Refuse what is neither a time of day nor None.

    Raises:
        ConfigError: naming the first that is not.
    """
    for name in names:
        value = getattr(rules, name)
        try:
            if time.fromisoformat("00:00:00" if value is None else value).tzinfo is not None:
                raise ValueError
        except (TypeError, ValueError):
            raise ConfigError(f"{name}: {value!r}", remedy="write HH:MM:SS") from None


def check_names(names: Sequence[str]) -> None:
    """Refuse a market without agents, or with two of one name.

    Raises:
        ConfigError: naming them.
    """
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or not names:
        what = f"two are called {twice[0]!r}" if twice else "there are none"
        raise ConfigError(f"agents: {what}", remedy="give one or more, each with a name of its own")


def check_answers(agent: str, answers: Sequence[Action], expected: int) -> None:
    """Refuse answers that no clock can be charged with.

    Raises:
        DataError: another number of answers than questions, or a time below 0 or not finite.
    """
    if len(answers) != expected:
        raise DataError(f"{agent}: {len(answers)} answers to {expected} questions", "one answer for each, in order")
    for number, answer in enumerate(answers, 1):
        if not 0 <= answer.seconds < float("inf"):
            raise DataError(f"{agent}, answer {number}: took {answer.seconds} s", "seconds are finite, 0 or more")
