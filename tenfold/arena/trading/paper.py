"""The published rules of HFTBench, kept to show what they measure: they look ahead, and pay for being late.

An order trades at the low or high of the very second that it was asked about, moved towards the average of the *whole*
day the later it comes; simulated time stands still meanwhile. `tenfold.arena.trading.replay` is what to use instead.
(arXiv 2505.19481 as released, section 2.2 of the specification; section 5 lists what is wrong with it.)
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, time

import numpy as np

from tenfold.arena.agents import Action, Agent
from tenfold.arena.trading.account import (
    Account,
    AccountView,
    Book,
    TickerView,
    account_prompt,
    account_question,
    play_of,
)
from tenfold.arena.trading.files import SECOND, Bars, zone_of
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
from tenfold.errors import ConfigError, DataError

Parser = Callable[[str, Sequence[str]], dict[str, int] | None]
POINTS, SPACING = 20, 60
"""Past prices in a question, and the seconds between them."""


@dataclass(frozen=True)
class PaperRules:
    """The published market.

    Args:
        lookahead: must be said to be true: prices move towards an average of the whole day.
        window: seconds of latency after which an order trades at that average.
        trigger: None: ask as the released code does, where a ticker is not held, or `parity_trigger`. A fraction: ask
            where a bar's range, or its distance from what was paid, reaches it, as the paper's text has it.
        threshold: of the released trigger, in percent.
        cutoff: time of day, in the files' own zone, after which the first question is the last one.
        cash: of each agent at the start.
        stake: share of the cash that an order to buy spends, unless the answer names quantities.

    Raises:
        ConfigError: ``lookahead`` is not true, or a value that cannot be meant.
    """

    lookahead: bool
    window: float = 1.5
    trigger: float | None = None
    threshold: float = 0.03
    cutoff: str = "15:30:00"
    cash: float = 10_000.0
    stake: float = 0.98

    def __post_init__(self) -> None:
        if self.lookahead is not True:
            raise ConfigError(
                "lookahead: the published rules trade at an average that holds the future",
                remedy="say lookahead: true to have them all the same, or play a replay",
            )
        check_numbers(self, above_zero=("window", "cash", "stake"), not_negative=("threshold",))
        check_times(self, "cutoff")


def decayed_price(price: float, average: float, delay: float, window: float = 1.5) -> float:
    """The published price of a late order (`TradingEnv`): moved linearly to the average of the day.

    Args:
        price: low or high of the second.
        average: mean of all highs and lows of the day, the future included.
        delay: seconds, 0 or more.
        window: seconds after which only the average is left.

    >>> round(decayed_price(100.0, 97.0, delay=0.3), 9)
    99.4
    """
    share = min(delay / window, 1.0)
    return (1 - share) * price + share * average


def parity_trigger(bars: Sequence[tuple[float, float]], costs: Sequence[float | None], threshold: float = 0.03) -> bool:
    """Whether the released code asks: where a ticker is not held, or has moved far enough from what was paid for it.

    Args:
        bars: (high, low) of each ticker.
        costs: what was paid for one; None where none is held.
        threshold: in percent.
    """
    return any(
        cost is None or max(abs(high - cost), abs(low - cost)) / cost * 100 >= threshold
        for (high, low), cost in zip(bars, costs, strict=True)
    )


def released_orders(text: str, tickers: Sequence[str]) -> dict[str, int]:
    """Quantities as the released parser finds them: double quotes only, the first match anywhere, else 0.

    >>> released_orders('''<think>"AMZN": 5</think>{"AMZN": -3, 'NVDA': 4}''', ["AMZN", "NVDA"])
    {'AMZN': 5, 'NVDA': 0}
    """
    found = {ticker: re.search(rf'"{re.escape(ticker)}"\s*:\s*(-?\d+)', text) for ticker in tickers}
    return {ticker: int(match[1]) if match else 0 for ticker, match in found.items()}


def stated_orders(text: str, tickers: Sequence[str]) -> dict[str, int] | None:
    """Quantities of the last dictionary after any thoughts, 0 for tickers that it leaves out; None where there is none.

    >>> stated_orders('''<think>"AMZN": 5</think>{"AMZN": -3, 'NVDA': 4}''', ["AMZN", "NVDA"])
    {'AMZN': -3, 'NVDA': 4}
    >>> stated_orders("buy 5 AMZN", ["AMZN"]) is None
    True
    """
    said = text.rpartition("</think>")[2]
    if "<think>" in said:  # it never came to an end
        return None
    blocks = re.findall(r"\{[^{}]{0,1000}\}", said)
    try:
        orders = ast.literal_eval(blocks[-1]) if blocks else None
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        orders = None
    if not isinstance(orders, dict) or any(type(amount) is not int for amount in orders.values()):
        return None
    return {ticker: orders.get(ticker, 0) for ticker in tickers}


PARSERS: dict[str, Parser] = {"released": released_orders, "stated": stated_orders}
"""How quantities are read from an answer that names them: as the released code does, or as they were meant."""


def play_paper(
    agents: Sequence[Agent], bars: Sequence[Bars], rules: PaperRules, parser: str | None = None, seed: int = 0
) -> MarketPlay:
    """A day under the published rules, played by each agent on its own.

    Args:
        agents: one or more.
        bars: one for each ticker; steps are the seconds that all have.
        rules: the published market.
        parser: None: answers are such as ``buy NVDA``. A name of `PARSERS`: texts that name quantities by ticker.
        seed: of what agents draw.

    Raises:
        ConfigError: no agents, two of one name, or an unknown parser.
        DataError: no step that all tickers have.
    """
    check_names([agent.name for agent in agents])
    if parser is not None and parser not in PARSERS:
        raise ConfigError(f"parser: unknown parser {parser!r}", remedy=f"one of {', '.join(PARSERS)}, or null")
    day = _Day(bars, rules, PARSERS[parser] if parser else None, seed)
    books = [day.play(agent) for agent in agents]
    return play_of(
        books,
        mode="paper",
        rules=day.prompt,
        cash=rules.cash,
        start=float(day.clock[0]),
        cutoff=float(day.times[-1]),
        prices=day.drawn(),
        notes=(
            "Look-ahead: late orders trade at the average of the whole day, and orders at once at the low or high of a "
            "second that is not over. Nobody could have earned this.",
        ),
    )


class _Day:
    """The seconds that all tickers have."""

    def __init__(self, bars: Sequence[Bars], rules: PaperRules, parser: Parser | None, seed: int) -> None:
        self.rules, self.parser, self.seed = rules, parser, seed
        self.names = [each.ticker for each in bars]
        common = bars[0].start if bars else np.array([], dtype=np.int64)
        for each in bars[1:]:
            common = np.intersect1d(common, each.start)
        if not len(common) or len(set(self.names)) < len(self.names):
            raise DataError(
                f"tickers {', '.join(self.names)}: no second that all have", remedy="one file for each, of one day"
            )
        at = {each.ticker: np.searchsorted(each.start, common) for each in bars}
        self.high = {each.ticker: each.high[at[each.ticker]].tolist() for each in bars}
        self.low = {each.ticker: each.low[at[each.ticker]].tolist() for each in bars}
        self.last = {each.ticker: float(each.close[-1]) for each in bars}
        self.average = {each.ticker: float(np.concatenate([each.high, each.low]).mean()) for each in bars}
        self.times = (common - common[0]) / SECOND
        first = datetime.fromtimestamp(int(common[0]) // SECOND, zone_of(bars[0].zone))
        self.clock = self.times + (first.hour * 3_600 + first.minute * 60 + first.second)
        last = time.fromisoformat(rules.cutoff)
        self.cutoff = last.hour * 3_600 + last.minute * 60 + last.second
        self.prompt = account_prompt(self.names, rules.cash, rules.stake, SPACING, parser is not None)

    def middle(self, name: str, step: int) -> float:
        return (self.high[name][step] + self.low[name][step]) / 2

    def drawn(self) -> dict[str, Prices]:
        """The prices, thinned out; one buys at the low."""
        kept = slice(None, None, max(1, len(self.times) // DRAWN))
        times = tuple(self.times[kept].tolist())
        return {name: Prices(times, tuple(self.low[name][kept]), tuple(self.high[name][kept])) for name in self.names}

    def play(self, agent: Agent) -> Book:
        book = Book(agent.name, Account(self.rules.cash))
        for step, now in enumerate(self.clock.tolist()):
            if not self._asks(book.account, step):
                continue
            self._decide(agent, book, step)
            if now > self.cutoff:
                break
        book.value(float(self.times[-1]), self._worth(book.account, self.last))
        return book

    def _asks(self, account: Account, step: int) -> bool:
        least = self.rules.trigger
        pairs = [(self.high[name][step], self.low[name][step]) for name in self.names]
        costs = [account.cost.get(name) for name in self.names]
        if least is None:
            return parity_trigger(pairs, costs, self.rules.threshold)
        return any(
            (high - low) / low >= least
            or (cost is not None and (high >= cost * (1 + least) or low <= cost * (1 - least)))
            for (high, low), cost in zip(pairs, costs, strict=True)
        )

    def _decide(self, agent: Agent, book: Book, step: int) -> None:
        account = book.account
        seed, now = (self.seed * 1_000_003 + step) % 2**31, float(self.times[step])
        view, game = self._view(account, step), f"paper {self.seed}"
        question = account_question(self.prompt, view, seed, now, game, self.parser is not None)
        answers = agent.answer([question])
        check_answers(agent.name, answers, 1)
        answer = answers[0]
        orders = self._orders(answer, question.answers, account, step)
        traded = False
        for name, quantity in (orders or {}).items():
            quote = self.low[name][step] if quantity > 0 else self.high[name][step]
            price = decayed_price(quote, self.average[name], answer.seconds, self.rules.window)
            if quantity > 0:
                done = float(quantity) if account.buy(name, quantity, price) else 0.0
            else:
                done = account.sell(name, -quantity, price)
            if done:
                side = 1 if quantity > 0 else -1
                book.trades.append(Trade(agent.name, name, side, done, price, now, "order", len(book.decisions)))
                traded = True
        wanted = any((orders or {}).values())
        outcome: Outcome = "invalid" if orders is None else "traded" if traded else "unfilled" if wanted else "passed"
        book.decisions.append(
            MarketDecision(agent.name, now, answer.seconds, question.state, answer.text, answer.choice, outcome)
        )
        if traded:
            book.value(now, self._worth(account, {name: self.middle(name, step) for name in self.names}))

    def _orders(
        self, answer: Action, offered: Sequence[str], account: Account, step: int
    ) -> Mapping[str, float] | None:
        """Quantities by ticker, above 0 to buy; None where the answer is not valid."""
        if self.parser is not None:
            return self.parser(answer.text, self.names)
        if answer.choice not in offered:
            return None
        kind, _, name = (answer.choice or "").partition(" ")
        if kind == "hold":
            return {}
        return {name: self._affordable(account, name, step) if kind == "buy" else -account.held[name]}

    def _affordable(self, account: Account, name: str, step: int) -> float:
        return float(math.floor(self.rules.stake * account.cash / self.low[name][step]))

    def _view(self, account: Account, step: int) -> AccountView:
        views = []
        for name in self.names:
            low, high = self.low[name][step], self.high[name][step]
            held, cost = account.held.get(name, 0.0), account.cost.get(name, 0.0)
            past, can = self._past(name, step), self._affordable(account, name, step)
            views.append(TickerView(name, low, high, high, low, held, cost, past, can))
        now = float(self.clock[step])
        return AccountView(now, max(0.0, self.cutoff - now), account.cash, tuple(views))

    def _past(self, name: str, step: int) -> tuple[float, ...]:
        """Middles of the seconds a minute apart before, oldest first (released: newest first)."""
        when = self.times[step] - SPACING * np.arange(POINTS, 0, -1)
        at = np.searchsorted(self.times, when, side="right") - 1
        return tuple(self.middle(name, each) for each in at[at >= 0].tolist())

    def _worth(self, account: Account, prices: Mapping[str, float]) -> float:
        return account.cash + sum(amount * prices[name] for name, amount in account.held.items())
