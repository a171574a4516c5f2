"""Days of trading as a page to look at: prices, trades, what everybody is worth, and what each agent saw and said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tenfold.arena.replay_page import Pieces, replay_page, shortened
from tenfold.arena.trading.record import Line, MarketPlay, Outcome, Prices
from tenfold.errors import ConfigError
from tenfold.files import write_text

OUTCOMES: Mapping[Outcome, tuple[str, str]] = {
    "traded": ("●", "traded, at least in part"),
    "passed": ("–", "no order wanted"),
    "invalid": ("✗", "not a valid answer"),
    "late": ("◷", "the order came when its chance was over"),
    "busy": ("…", "not asked, because the agent was still thinking"),
    "rejected": ("⊘", "the order came at the cut-off or later"),
    "unfilled": ("○", "the order found nothing to trade with"),
}
"""A sign for each outcome, and what it means."""


def market_page(plays: Sequence[MarketPlay], path: Path) -> None:
    """Write days of trading to one HTML file, which shows them along their time, each chosen from a list.

    Args:
        plays: one or more, such as one day at several latencies; about 0.5 MB each.
        path: of the file.

    Raises:
        ConfigError: no day.
        OSError: the file cannot be written.

    >>> import tempfile
    >>> from tenfold.arena.trading.agents import ScriptedTrader
    >>> from tenfold.arena.trading.market_day import play_market
    >>> page = Path(tempfile.mkdtemp()) / "market.html"
    >>> market_page([play_market([ScriptedTrader(0.9, name="quick")], seed=0)], page)
    >>> "<title>synthetic market: quick" in page.read_text()
    True
    """
    if not plays:
        raise ConfigError("plays: none are given", remedy="give one or more")
    pieces = Pieces()
    games = [_day(play, pieces) for play in plays]
    titles = list(dict.fromkeys(game["title"] for game in games))
    data = {"outcomes": OUTCOMES, "games": games, "pieces": pieces.all}
    write_text(path, replay_page("market", "; ".join(titles), data))


def _day(play: MarketPlay, pieces: Pieces) -> dict[str, Any]:
    agents, assets = list(play.equity), list(play.prices)
    return {
        "title": f"{play.mode} market: {', '.join(agents)}",
        "mode": play.mode,
        "rules": pieces.places(play.rules),
        "notes": play.notes,
        "cash": play.cash,
        "start": play.start,
        "cutoff": play.cutoff,
        "agents": agents,
        "yields": shortened(play.yields.values()),
        "assets": [_prices(name, prices) for name, prices in play.prices.items()],
        "equity": [_line(line) for line in play.equity.values()],
        "marks": [[mark.time, assets.index(mark.asset), mark.text] for mark in play.marks],
        "trades": [
            {
                "agent": agents.index(trade.agent),
                "asset": assets.index(trade.asset),
                "side": trade.side,
                "quantity": shortened([trade.quantity])[0],
                "price": shortened([trade.price])[0],
                "time": trade.time,
                "reason": trade.reason,
                "decision": trade.decision,
            }
            for trade in play.trades
        ],
        "decisions": [
            {
                "agent": agents.index(each.agent),
                "asked": each.asked,
                "seconds": each.seconds,
                "saw": pieces.places(each.state),
                "said": pieces.places(each.said),
                "choice": each.choice,
                "outcome": each.outcome,
            }
            for each in play.decisions
        ],
    }


def _prices(name: str, prices: Prices) -> dict[str, Any]:
    return {
        "name": name,
        "times": shortened(prices.times),
        "buy": shortened(prices.buy),
        "sell": shortened(prices.sell),
        "buySize": shortened(prices.buy_size),
        "sellSize": shortened(prices.sell_size),
    }


def _line(line: Line) -> dict[str, Any]:
    return {"times": shortened(line.times), "values": shortened(line.values)}
