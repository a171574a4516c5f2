"""Recorded markets, bars or quotes, played without looking ahead: one account for each agent.

A question is asked when something stirs, of what is known by then. An order trades at what the market shows when it
arrives. Agents are too small to move the market, and do not meet each other in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta

import numpy as np

from tenfold.arena.agents import Agent
from tenfold.arena.trading.account import (
    Account,
    AccountView,
    Book,
    TickerView,
    account_prompt,
    account_question,
    play_of,
)
from tenfold.arena.trading.files import SECOND, zone_of
from tenfold.arena.trading.record import (
    DRAWN,
    MarketDecision,
    MarketPlay,
    Outcome,
    Prices,
    Trade,
    check_answers,
    check_names,
    check_numbers,
    check_times,
)
from tenfold.arena.trading.tapes import Instants, Tape, instants_of, past_prices, stirred
from tenfold.errors import ConfigError, DataError


@dataclass(frozen=True)
class ReplayRules:
    """How a recorded day is traded.

    Args:
        zone: of the exchange, in which the next two are told; whatever zone the files are in.
        opens: no questions before; None: from the first record on.
        cutoff: orders that arrive at that time or later are rejected, and what is held is sold; None, or where the
            record of a ticker ends before: the end of the record.
        cash: of each agent at the start.
        stake: share of the cash that an order to buy spends.
        lot: quantities are multiples of this.
        fee: of each trade, as a fraction of its value.
        trigger: ask when a bar's range (or a spread), a price's distance from its recent mean, or from the own cost,
            reaches this fraction.
        cooling: seconds from one question to the next, at least.
        points: of price history in a question.
        spacing: whole seconds between two of them.

    Raises:
        ConfigError: what cannot be meant.
    """

    zone: str
    opens: str | None = "09:30:00"
    cutoff: str | None = "15:30:00"
    cash: float = 10_000.0
    stake: float = 0.5
    lot: float = 1.0
    fee: float = 0.0
    trigger: float = 0.002
    cooling: float = 60.0
    points: int = 10
    spacing: int = 60

    def __post_init__(self) -> None:
        zone_of(self.zone)
        check_numbers(self, ("cash", "stake", "lot", "points", "spacing"), ("fee", "trigger", "cooling"))
        if self.stake > 1:
            raise ConfigError(f"stake: {self.stake} of the cash", remedy="nobody borrows: at most 1")
        check_times(self, "opens", "cutoff")
        if self.opens and self.cutoff and time.fromisoformat(self.opens) >= time.fromisoformat(self.cutoff):
            raise ConfigError(f"cutoff: {self.cutoff} is not after opens, {self.opens}", remedy="give a later time")


def play_replay(agents: Sequence[Agent], tapes: Sequence[Tape], rules: ReplayRules, seed: int = 0) -> MarketPlay:
    """A recorded day, played by each agent on its own.

    Args:
        agents: one or more.
        tapes: one for each ticker, of the same day.
        rules: how it is traded.
        seed: of what agents draw.

    Raises:
        ConfigError: no agents, or two of one name.
        DataError: no tape, two of one ticker, several days, or nothing recorded between opening and cut-off.
    """
    check_names([agent.name for agent in agents])
    session = _Session(tapes, rules, seed)
    books = [session.play(agent) for agent in agents]
    return play_of(
        books,
        mode="replay",
        rules=session.prompt,
        cash=rules.cash,
        start=session.opening,
        cutoff=session.seconds(session.end),
        prices=session.drawn(),
        notes=tuple(note for tape in tapes for note in tape.notes),
    )


class _Session:
    """A day between opening and cut-off."""

    def __init__(self, tapes: Sequence[Tape], rules: ReplayRules, seed: int) -> None:
        names = [tape.ticker for tape in tapes]
        if not names or len(set(names)) < len(names):
            raise DataError(f"tickers: {', '.join(names) or 'none'}", remedy="give one file for each of them")
        self.tapes, self.rules, self.seed = {tape.ticker: tape for tape in tapes}, rules, seed
        self.begin, self.end, self.opening = _bounds(tapes, rules)
        self.instants: Instants = instants_of(tapes, self.begin, self.end)
        if not len(self.instants):
            raise DataError(
                f"{', '.join(names)}: nothing is recorded from {rules.opens} to {rules.cutoff} in {rules.zone}",
                remedy="check the day and both time zones, the files' and the exchange's; or set opens and cutoff",
            )
        self.entries = {name: tape.seen.at(self.instants) for name, tape in self.tapes.items()}
        signals = (stirred(tape.seen, self.instants, rules.points, rules.spacing, rules.trigger) for tape in tapes)
        self.stirs = np.logical_or.reduce(list(signals))
        self.prompt = account_prompt(names, rules.cash, rules.stake, rules.spacing)

    def seconds(self, instant: int) -> float:
        """Since the beginning."""
        return (instant - self.begin) / SECOND

    def play(self, agent: Agent) -> Book:
        book = Book(agent.name, Account(self.rules.cash))
        account, free = book.account, self.begin
        for number, instant in enumerate(self.instants.tolist()):
            if instant >= free and (self.stirs[number] or self._margin(account, number)):
                free = self._decide(agent, book, number, instant)
        for ticker in list(account.held):
            price = float(self.tapes[ticker].seen.sell[self.entries[ticker][-1]])
            quantity = account.sell(ticker, math.inf, price, self.rules.fee)
            book.trades.append(Trade(agent.name, ticker, -1, quantity, price, self.seconds(self.end), "cut-off"))
        self._value(book)
        return book

    def _margin(self, account: Account, number: int) -> bool:
        """Whether a price is as far from what was paid as a trigger asks for."""
        for ticker, cost in account.cost.items():
            seen, entry, least = self.tapes[ticker].seen, self.entries[ticker][number], self.rules.trigger
            if seen.high[entry] >= cost * (1 + least) or seen.low[entry] <= cost * (1 - least):
                return True
        return False

    def _decide(self, agent: Agent, book: Book, number: int, instant: int) -> int:
        """Ask, trade, write down; when the next question may come."""
        account = book.account
        view = self._view(account, number, instant)
        seed = (self.seed * 1_000_003 + number) % 2**31
        question = account_question(self.prompt, view, seed, self.seconds(instant), f"replay {self.seed}")
        answers = agent.answer([question])
        check_answers(agent.name, answers, 1)
        answer = answers[0]
        arrival = instant + round(answer.seconds * SECOND)
        valid = answer.choice in question.answers
        outcome: Outcome = "passed" if valid else "invalid"
        done = arrival
        if valid and answer.choice is not None and answer.choice != "hold":
            kind, _, ticker = answer.choice.partition(" ")
            side = 1 if kind == "buy" else -1
            trade = self._trade(account, ticker, side, arrival)
            outcome = "rejected" if trade is None else "traded" if trade[1] > 0 else "unfilled"
            if trade is not None and trade[1] > 0:
                done, quantity, price = trade
                at = self.seconds(done)
                book.trades.append(Trade(agent.name, ticker, side, quantity, price, at, "order", len(book.decisions)))
        asked = self.seconds(instant)
        book.decisions.append(
            MarketDecision(agent.name, asked, answer.seconds, question.state, answer.text, answer.choice, outcome)
        )
        return max(instant + round(self.rules.cooling * SECOND), done)

    def _trade(self, account: Account, ticker: str, side: int, arrival: int) -> tuple[int, float, float] | None:
        """When, how much and at what price an order trades; None for one that would do so at the cut-off or later."""
        offer = self.tapes[ticker].offer(side, arrival)
        if offer is None or offer.time >= self.end:
            return None
        if side > 0:
            quantity = min(self._lots(account.cash, offer.price), self._whole(offer.size))
            bought = account.buy(ticker, quantity, offer.price, self.rules.fee)
            return offer.time, quantity if bought else 0.0, offer.price
        return offer.time, account.sell(ticker, offer.size, offer.price, self.rules.fee), offer.price

    def _lots(self, cash: float, price: float) -> float:
        """How many an order to buy asks for: whole lots that the stake covers, fees included."""
        return self._whole(self.rules.stake * cash / (price * (1 + self.rules.fee)))

    def _whole(self, amount: float) -> float:
        return amount if math.isinf(amount) else math.floor(amount / self.rules.lot) * self.rules.lot

    def _view(self, account: Account, number: int, instant: int) -> AccountView:
        views = []
        for ticker, tape in self.tapes.items():
            seen, entry = tape.seen, self.entries[ticker][number]
            buy = float(seen.buy[entry])
            views.append(
                TickerView(
                    ticker,
                    buy,
                    float(seen.sell[entry]),
                    float(seen.high[entry]),
                    float(seen.low[entry]),
                    account.held.get(ticker, 0.0),
                    account.cost.get(ticker, 0.0),
                    past_prices(seen, instant, self.rules.points, self.rules.spacing),
                    self._lots(account.cash, buy),
                )
            )
        time_of_day = self.opening + self.seconds(instant)
        return AccountView(time_of_day, (self.end - instant) / SECOND, account.cash, tuple(views))

    def _value(self, book: Book) -> None:
        """The line of equity: what is held counts what it would bring, at each trade and about every minute."""
        trades = sorted(book.trades, key=lambda trade: trade.time)
        minutes = np.arange(60.0, self.seconds(self.end), 60.0).tolist()
        cash, held, place = self.rules.cash, dict.fromkeys(self.tapes, 0.0), 0
        for at in sorted({*minutes, *(trade.time for trade in trades)}):
            while place < len(trades) and trades[place].time <= at:
                trade = trades[place]
                value = trade.quantity * trade.price
                cash -= trade.side * value + self.rules.fee * value
                held[trade.asset] += trade.side * trade.quantity
                place += 1
            worth = sum(amount * self._bid(ticker, at) for ticker, amount in held.items() if amount)
            book.value(at, cash + worth)
        book.value(self.seconds(self.end), book.account.cash)

    def _bid(self, ticker: str, at: float) -> float:
        seen = self.tapes[ticker].seen
        return float(seen.sell[seen.at(np.array([self.begin + round(at * SECOND)]))[0]])

    def drawn(self) -> dict[str, Prices]:
        """What was seen of the prices, thinned out."""
        kept = self.instants[:: max(1, len(self.instants) // DRAWN)]
        times = tuple(((kept - self.begin) / SECOND).tolist())
        found = {}
        for name, tape in self.tapes.items():
            seen, at = tape.seen, tape.seen.at(kept)
            sizes = [seen.buy_size[at], seen.sell_size[at]] if np.isfinite(seen.buy_size).all() else []
            lines = (seen.buy[at], seen.sell[at], *sizes)
            found[name] = Prices(times, *(tuple(line.tolist()) for line in lines))
        return found


def _bounds(tapes: Sequence[Tape], rules: ReplayRules) -> tuple[int, int, float]:
    """First and last instant of the session, and the time of day at the first, in seconds."""
    zone = zone_of(rules.zone)
    first = max(int(tape.seen.known[0]) for tape in tapes)
    last = min(int(tape.seen.known[-1]) for tape in tapes)
    days = {tape.ticker: datetime.fromtimestamp(int(tape.seen.known[0]) // SECOND, zone).date() for tape in tapes}
    if len(set(days.values())) > 1:
        told = ", ".join(f"{name} {day}" for name, day in days.items())
        raise DataError(f"tickers of different days in {rules.zone}: {told}", remedy="give files of one day")
    day = next(iter(days.values()))

    def instant(text: str) -> int:
        moment = datetime.combine(day, time.fromisoformat(text), zone) - datetime(1970, 1, 1, tzinfo=UTC)
        return moment // timedelta(microseconds=1) * 1_000

    begin = first if rules.opens is None else max(first, instant(rules.opens))
    # A ticker of which nothing is recorded any more would go on at a price that nobody quotes.
    end = last if rules.cutoff is None else min(last, instant(rules.cutoff))
    local = datetime.fromtimestamp(begin // SECOND, zone)
    return begin, end, local.hour * 3_600 + local.minute * 60 + local.second + begin % SECOND / SECOND
