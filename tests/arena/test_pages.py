"""Replay pages: everything is in them, exactly, as data; nothing that is said in a game becomes markup."""

import base64
import hashlib
import itertools
import json
import re
import tomllib
from collections import Counter
from dataclasses import replace
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from tenfold.arena.agents import Action
from tenfold.arena.fighting.moves import MOVES
from tenfold.arena.fighting.page import fight_page
from tenfold.arena.fighting.play import Harness, play_fight, replay
from tenfold.arena.fighting.rules import FIELDS, FRAMES
from tenfold.arena.fighting.scripted import ScriptedFighter
from tenfold.arena.replay_page import Pieces, packed
from tenfold.arena.trading.agents import RandomTrader, ScriptedTrader
from tenfold.arena.trading.market_day import play_market
from tenfold.arena.trading.page import OUTCOMES, market_page
from tenfold.arena.trading.record import Line, MarketDecision, MarketPlay, Outcome, Prices, Trade
from tenfold.arena.trading.synthetic import MarketRules
from tenfold.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "tenfold/arena/pages"
NASTY = "</script><b>bold</b><!--<script>\\u003c & \"'\r\n\ud83d é"
EMPTY = {"meta", "input", "br"}


class Page(HTMLParser):
    """The elements of a page, each closed where it must be, and what its scripts hold."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.scripts, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names)
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        else:
            self.texts.append((self.open[-1] if self.open else "", data))

    def text(self, places):
        return "".join(self.data["pieces"][place] for place in places)


def unpacked(runs):
    steps = [step for step, times in zip(runs[::2], runs[1::2], strict=True) for _ in range(times)]
    return list(itertools.accumulate(steps))


class Restless:
    """Moves about and guards at random, says more than asked for, and now and then what is no move."""

    def __init__(self, name, says=("stand guard", "low guard", "close", "away", "jump in", "wait"), slowest=0.1):
        self.name, self.says, self.slowest = name, says, slowest

    def answer(self, questions):
        found = []
        for question in questions:
            draw = np.random.default_rng(question.seed)
            text = self.says[int(draw.integers(len(self.says)))]
            seconds = float(draw.uniform(0, self.slowest))
            found.append(Action(text, text if text in question.answers else None, seconds))
        return found


def page_of(write, what, tmp_path, name="page.html"):
    write(what, tmp_path / name)
    return Page((tmp_path / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def fights():
    """One to its end by knock-out, one asked ahead, one with answers that are no move."""
    good, bad = ScriptedFighter(0.9, 0.1), ScriptedFighter(0.3, 0.4)
    ahead = Harness(pipelined=True, predict=True, hold="back")
    return [
        play_fight((good, bad), seed=0),
        play_fight((bad, good), seed=1, harness=(ahead, Harness())),
        play_fight((Restless("odd", ("dance", NASTY, "jab", "close")), good), seed=2),
    ]


@pytest.fixture(scope="module")
def day():
    rules = MarketRules(events=30, seconds=6000)
    return play_market([ScriptedTrader(0.9, 0.2, name="quick"), RandomTrader(0.5)], seed=3, rules=rules)


@pytest.mark.parametrize("values", [[], [0], [7] * 5, [1, 2, 3, 3, 3, -9, 0], list(range(0, 50, 5))])
def test_runs_of_equal_steps_are_the_values_again(values):
    assert unpacked(packed(values)) == values


@pytest.mark.parametrize("text", ["", ",", "\n\n", "a, b\r\nc,", NASTY, "no comma", "x,\u2028y"])
def test_pieces_are_the_text_again(text):
    pieces = Pieces()
    pieces.places("a, b, c")
    assert "".join(pieces.all[place] for place in pieces.places(text)) == text


def test_frames_are_exactly_those_of_the_replay(fights, tmp_path):
    page = page_of(fight_page, fights, tmp_path)
    assert page.data["rules"]["fields"] == list(FIELDS)
    for game, record in zip(page.data["games"], fights, strict=True):
        states = list(replay(record.inputs))
        assert game["frames"] == len(states) - 1 == record.frames
        assert game["bell"] == record.bell
        for side in (0, 1):
            columns = [unpacked(runs) for runs in game["fighters"][side]]
            assert [list(state) for state in zip(*columns, strict=True)] == [fight.fighters[side] for fight in states]


def test_a_fight_holds_every_decision(fights, tmp_path):
    page = page_of(fight_page, fights, tmp_path)
    for game, record in zip(page.data["games"], fights, strict=True):
        assert game["names"] == list(record.names)
        for shown, decisions in zip(game["decisions"], record.decisions, strict=True):
            assert len(decisions) > 5
            for one, decision in zip(shown, decisions, strict=True):
                assert (page.text(one["saw"]), page.text(one["said"])) == (decision.saw, decision.said)
                facts = (one["asked"], one["begins"], one["seconds"], one["move"])
                assert facts == (decision.frame, decision.begins, decision.seconds, decision.move)
                assert one["begins"] is None or one["asked"] <= one["lands"] <= one["begins"] < one["ends"]


def test_a_move_ends_when_its_agent_is_asked_again(fights, tmp_path):
    page = page_of(fight_page, fights, tmp_path)
    for place, sides in ((0, (0, 1)), (1, (1,)), (2, (0, 1))):  # who is asked ahead is not waited for
        for side in sides:
            for one, after in itertools.pairwise(page.data["games"][place]["decisions"][side]):
                assert one["ends"] == after["asked"]


def test_what_is_drawn_of_the_rules_is_their_own(fights, tmp_path):
    rules = page_of(fight_page, fights[:1], tmp_path).data["rules"]
    assert [move["name"] for move in rules["moves"]] == list(MOVES)
    for drawn, move in zip(rules["moves"], MOVES.values(), strict=True):
        assert (drawn["startup"], drawn["lastActive"]) == (move.startup, move.startup + move.active)
        assert (drawn["reach"], drawn["level"]) == (max(move.reach, 0), move.height)
        hit = move.startup + move.active + move.recovery
        missed = hit + (move.recovery // 2 if move.reach > 0 else 0)
        assert drawn["lengths"] == [missed, hit, hit + 10 * (move.reach > 0)]
    assert sorted(rules["modes"].values()) == list(range(len(rules["doing"])))


@pytest.mark.parametrize(
    ("says", "slowest", "decisions"),
    [(("close", "away", "jump in", "low guard", "wait", "jab"), 0.05, 250), (("stand guard", "low guard"), 0.0, 848)],
    ids=["moving", "deciding all the time"],
)
def test_the_longest_fight_stays_small(says, slowest, decisions, tmp_path):
    record = play_fight((Restless("one", says, slowest), Restless("two", says, slowest)), seed=5)
    assert record.frames == FRAMES
    assert min(len(side) for side in record.decisions) > decisions
    fight_page([record], tmp_path / "fight.html")
    assert (tmp_path / "fight.html").stat().st_size < 400_000


def test_a_record_that_its_inputs_do_not_lead_to_is_refused(fights, tmp_path):
    wrong = replace(fights[0], health=(fights[0].health[0] - 1, fights[0].health[1]))
    with pytest.raises(DataError, match=r"seed 0.*its inputs end with health"):
        fight_page([wrong], tmp_path / "fight.html")
    assert not (tmp_path / "fight.html").exists()


def test_nothing_to_show_is_refused(tmp_path):
    for write in (fight_page, market_page):
        with pytest.raises(ConfigError, match=r"(records|plays): none are given"):
            write([], tmp_path / "page.html")


def test_a_day_is_all_in_its_page(day, tmp_path):
    page = page_of(market_page, [day], tmp_path)
    (game,) = page.data["games"]
    assert page.text(game["rules"]) == day.rules
    assert game["agents"] == list(day.equity)
    assert len(day.decisions) == 60
    for shown, decision in zip(game["decisions"], day.decisions, strict=True):
        assert (page.text(shown["saw"]), page.text(shown["said"])) == (decision.state, decision.said)
        assert game["agents"][shown["agent"]] == decision.agent
        facts = tuple(shown[name] for name in ("asked", "seconds", "choice", "outcome"))
        assert facts == (decision.asked, decision.seconds, decision.choice, decision.outcome)
    assert len(day.trades) > 10
    for shown, trade in zip(game["trades"], day.trades, strict=True):
        assert (game["agents"][shown["agent"]], game["assets"][shown["asset"]]["name"]) == (trade.agent, trade.asset)
        facts = tuple(shown[name] for name in ("side", "time", "reason", "decision"))
        assert facts == (trade.side, trade.time, trade.reason, trade.decision)
        assert (shown["price"], shown["quantity"]) == pytest.approx((trade.price, trade.quantity), rel=1e-8)
    for shown, (name, prices) in zip(game["assets"], day.prices.items(), strict=True):
        assert shown["name"] == name
        for column, values in (("times", prices.times), ("buy", prices.buy), ("sell", prices.sell)):
            assert shown[column] == pytest.approx(values, rel=1e-8)
        assert shown["buySize"] == pytest.approx(prices.buy_size, rel=1e-8)
    for shown, line in zip(game["equity"], day.equity.values(), strict=True):
        assert (shown["times"], shown["values"]) == (pytest.approx(line.times), pytest.approx(line.values, rel=1e-8))
    assert [tuple(mark) for mark in game["marks"]] == [
        (mark.time, list(day.prices).index(mark.asset), mark.text) for mark in day.marks
    ]
    assert game["notes"] == list(day.notes)


def test_a_market_day_stays_small(tmp_path):
    market_page([play_market([ScriptedTrader(0.9, 0.2)], seed=0)], tmp_path / "day.html")
    assert (tmp_path / "day.html").stat().st_size < 600_000


def test_every_outcome_has_a_sign_of_its_own_and_words():
    assert set(OUTCOMES) == set(get_args(Outcome))
    assert max(Counter(sign for sign, _ in OUTCOMES.values()).values()) == 1


def nasty_day():
    """Whatever a file or a model may say, and numbers that JSON does not have."""
    decision = MarketDecision(NASTY, 1.0, 0.5, f"seen {NASTY}", NASTY, None, "invalid")
    prices = Prices((0.0, 1.0), (10.0, 11.0), (9.0, 10.0), (float("inf"), 1.0), (1.0, float("inf")))
    trade = Trade(NASTY, NASTY, 1, 2.0, 11.0, 1.5, "order", 0)
    return MarketPlay(
        mode="replay",
        rules=NASTY,
        cash=10.0,
        start=34_200.0,
        cutoff=2.0,
        prices={NASTY: prices},
        decisions=(decision,),
        trades=(trade,),
        equity={NASTY: Line((0.0, 2.0), (10.0, float("nan")))},
        notes=(NASTY,),
    )


def test_what_is_not_finite_is_left_out(tmp_path):
    (game,) = page_of(market_page, [nasty_day()], tmp_path).data["games"]
    assert game["assets"][0]["buySize"] == [None, 1]
    assert game["equity"][0]["values"] == [10, None]


def test_nothing_that_is_said_becomes_markup(fights, tmp_path):
    """The elements of a page are the same whatever is said in it; the words stand in its data, whole."""
    named = replace(fights[2], names=(NASTY, "b"))
    for write, nasty, plain in ((fight_page, [named], fights[:1]), (market_page, [nasty_day()], None)):
        page = page_of(write, nasty, tmp_path)
        tags = Counter(tag for tag, _ in page.elements)
        assert tags["script"] == 2
        assert tags["b"] == 0
        assert NASTY in {page.text(page_places) for page_places in said(page)}
        if plain:
            assert page.elements == page_of(write, plain, tmp_path).elements
        assert "<!--" not in page.scripts[0]
        title = "".join(text for tag, text in page.texts if tag == "title")
        assert "</script><b>bold" in title


def said(page):
    for game in page.data["games"]:
        groups = game["decisions"] if isinstance(game["decisions"][0], list) else [game["decisions"]]
        yield from (decision["said"] for group in groups for decision in group)


@pytest.fixture(scope="module", params=["fight", "market"])
def text(request, fights, day, tmp_path_factory):
    path = tmp_path_factory.mktemp("pages") / "page.html"
    if request.param == "fight":
        fight_page(fights, path)
        first = path.read_bytes()
        fight_page(fights, path)
    else:
        market_page([day, day], path)
        first = path.read_bytes()
        market_page([day, day], path)
    assert path.read_bytes() == first  # the same games, the same bytes
    return path.read_text(encoding="utf-8")


def test_a_page_needs_nothing_but_itself(text):
    page = Page(text)
    for tag, attributes in page.elements:
        assert not {"src", "href", "style", "onclick"} & set(attributes), tag
        assert tag not in {"link", "img", "iframe", "base"}
    assert set(re.findall(r"https?://[^\s\"'`]*", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"@import|url\(|\bimport\s|fetch\(|XMLHttpRequest|innerHTML|insertAdjacent|\beval\b", text)


def test_only_its_own_script_and_style_may_run(text):
    page = Page(text)
    policy = next(attributes["content"] for _, attributes in page.elements if "http-equiv" in attributes)
    style = "".join(part for tag, part in page.texts if tag == "style")
    for name, part in (("script-src", page.scripts[1]), ("style-src", style)):
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy


def test_a_page_is_whole_and_every_control_has_a_name(text):
    page = Page(text)
    assert text.startswith("<!doctype html>\n")
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    asked = set(re.findall(r'get\("(\w+)"\)', page.scripts[1]))
    assert len(asked) > 10
    assert asked <= set(ids)
    for tag, attributes in page.elements:
        if tag in ("select", "input", "svg") or (tag == "button" and attributes["id"] != "play"):
            assert attributes["aria-label"], attributes
    assert ("range", "0") in {(a.get("type"), a.get("min")) for tag, a in page.elements if tag == "input"}


def test_the_wheel_has_the_scripts():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["tenfold"]
    parts = [str(path.relative_to(ROOT / "tenfold")) for path in PAGES.iterdir()]
    assert len(parts) == 6
    assert [part for part in parts if not any(fnmatch(part, pattern) for pattern in patterns)] == []


def test_colours_are_those_of_the_report():
    ours, theirs = (
        re.findall(r"--[\w-]+: #[0-9a-f]{6};", path.read_text().partition("* {")[0])
        for path in (PAGES / "replay.css", ROOT / "tenfold/report/templates/report.css")
    )
    assert len(ours) > 30
    assert ours == theirs


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_stand_out(theme):
    """WCAG: 4.5 for texts, 3 for what is drawn."""
    style = (PAGES / "replay.css").read_text().partition("* {")[0]
    blocks = [dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6});", part)) for part in style.split("@media")]
    colours = blocks[theme]
    texts = [("--ink", "--paper"), ("--soft", "--paper"), ("--soft", "--ground"), ("--c4", "--paper")]
    texts += [(f"--{tone}", f"--{tone}-ground") for tone in ("good", "bad", "calm")] + [("--bad", "--paper")]
    drawings = [(f"--c{number}", "--paper") for number in range(1, 7)]
    for pairs, least in ((texts, 4.5), (drawings, 3.0)):
        for one, other in pairs:
            assert contrast(colours[one], colours[other]) >= least, (one, other)


def contrast(one, other):
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour):
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
