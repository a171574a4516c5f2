"""What an agent sees of the market and of its own account, and what becomes of that account."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tenfold.arena.agents import Turn
from tenfold.arena.trading.record import Line, MarketDecision, MarketPlay, Trade, clock


@dataclass(frozen=True)
class TickerView:
    """One ticker, as an agent sees it.

    Args:
        ticker: its name.
        buy: what one costs now.
        sell: what one brings now.
        high: of the last complete bar; of quotes, the ask.
        low: of the last complete bar; of quotes, the bid.
        held: how many the agent has.
        cost: what it paid for one on average; 0 where it has none.
        past: prices before, oldest first.
        affordable: how many an order to buy would ask for; 0 where there is not enough cash for one.
    """

    ticker: str
    buy: float
    sell: float
    high: float
    low: float
    held: float
    cost: float
    past: tuple[float, ...]
    affordable: float


@dataclass(frozen=True)
class AccountView:
    """All that an agent sees.

    Args:
        time: seconds since midnight.
        left: seconds to the cut-off.
        cash: what the agent has.
        tickers: the market.
    """

    time: float
    left: float
    cash: float
    tickers: tuple[TickerView, ...]


@dataclass
class Account:
    """Cash and holdings of one agent; changed by its trades."""

    cash: float
    held: dict[str, float] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)

    def buy(self, ticker: str, quantity: float, price: float, fee: float = 0.0) -> bool:
        """Buy where cash covers all of it; otherwise nothing happens.

        Args:
            ticker: what.
            quantity: above 0.
            price: of one.
            fee: as a fraction of what is paid.
        """
        paid = quantity * price * (1 + fee)
        if not 0 < paid <= self.cash:
            return False
        held = self.held.get(ticker, 0.0)
        self.cost[ticker] = (held * self.cost.get(ticker, 0.0) + quantity * price) / (held + quantity)
        self.held[ticker] = held + quantity
        self.cash -= paid
        return True

    def sell(self, ticker: str, quantity: float, price: float, fee: float = 0.0) -> float:
        """Sell what is held, at most ``quantity``; nobody sells short. How much was sold."""
        sold = min(quantity, self.held.get(ticker, 0.0))
        if sold <= 0:
            return 0.0
        self.held[ticker] -= sold
        if self.held[ticker] == 0:
            del self.held[ticker], self.cost[ticker]
        self.cash += sold * price * (1 - fee)
        return sold


@dataclass
class Book:
    """An agent's account, and what is written down of it."""

    agent: str
    account: Account
    decisions: list[MarketDecision] = field(default_factory=list)
    trades: list[Trade] = field(default_factory=list)
    equity: list[tuple[float, float]] = field(default_factory=list)

    def value(self, time: float, equity: float) -> None:
        """Write down what the account is worth at a time, seconds since the start of the day."""
        self.equity.append((time, equity))


def play_of(books: Sequence[Book], *, cash: float, **fields: Any) -> MarketPlay:
    """The record of a day that agents played on their own; the other fields are those of `MarketPlay`."""
    trades: list[Trade] = []
    decisions: list[MarketDecision] = []
    for book in books:
        first = len(decisions)  # a book counts its own
        trades += [
            trade if trade.decision is None else replace(trade, decision=first + trade.decision)
            for trade in book.trades
        ]
        decisions += book.decisions
    return MarketPlay(
        cash=cash,
        decisions=tuple(decisions),
        trades=tuple(sorted(trades, key=lambda trade: trade.time)),
        equity={book.agent: Line(*zip((0.0, cash), *book.equity, strict=True)) for book in books},
        **fields,
    )


def account_prompt(tickers: Sequence[str], cash: float, stake: float, spacing: int, quantities: bool = False) -> str:
    """What every question of an account begins with: the papers' content, in our words.

    Args:
        tickers: that are traded.
        cash: at the start.
        stake: share of the cash that an order to buy spends.
        spacing: seconds between two past prices.
        quantities: answers name how many, as `account_question` has it.
    """
    size = f"An order to buy spends {stake:.0%} of your cash; an order to sell sells all that you hold of the ticker."
    form = "Answer with one of the answers offered, and nothing else."
    if quantities:
        size = (
            f"An order is a whole number: above 0 buys, below 0 sells. {stake:.0%} of your cash buy what you can buy."
        )
        form = f'Answer with a dictionary of orders, such as {{"{tickers[0]}": -3}}, and nothing else.'
    return f"""You trade {" and ".join(tickers)} at high frequency, starting the day with {cash:g} in cash. Earn as \
much as you can today.
- Compare prices with their recent average, and see where they are heading.
- Buy low while the trend is up. Sell above what you paid.
- A price far from its recent average is a rare chance: be quick, since the order trades when your answer is there.
- {size}
- You may stop when you have earned enough, and you may hold at any time.
- Sell everything before the cut-off; what is left is sold then at whatever price there is.
Past prices are {spacing} s apart, oldest first. {form}"""


def account_question(
    rules: str, view: AccountView, seed: int, time: float, game: str, quantities: bool = False
) -> Turn:
    """A question about an account.

    Answers: ``hold``, and what can be bought and sold now, by ticker; with ``quantities`` as dictionaries of whole
    numbers by ticker, as the papers have it.
    """
    answers = ["{}" if quantities else "hold"]
    for each in view.tickers:
        for word, sign, amount in (("buy", "", each.affordable), ("sell", "-", each.held)):
            if amount > 0:
                order = f'{{"{each.ticker}": {sign}{amount:.0f}}}' if quantities else f"{word} {each.ticker}"
                answers.append(order)
    head = f"Time {clock(view.time)}, {view.left:.0f} s to the cut-off. Cash {view.cash:.2f}."
    lines = (head, *map(_ticker_line, view.tickers), f"Answer with {' or '.join(answers)}. Your answer:")
    return Turn(rules, "\n".join(lines), tuple(answers), view, seed, time, game)


def _ticker_line(each: TickerView) -> str:
    own = ""
    if each.held:
        margins = [f"{price / each.cost - 1:+.2%}" for price in (each.buy, each.sell)]
        own = f"; you hold {each.held:.10g}, paid {each.cost:.2f}: margins {margins[0]} and {margins[1]}"
    past = " ".join(f"{price:.2f}" for price in each.past)
    can = f"you can buy {each.affordable:.10g}"
    return f"{each.ticker}: buy {each.buy:.2f}, sell {each.sell:.2f}{own}; {can}. Past {past}"
