"""The arena: how fast the games are, what speed is worth in them, and what the published rules give away.

    python -m benchmarks.arena speed    # fights a second in Python and compiled, a day of the market; an idle machine
    python -m benchmarks.arena fights   # points over latency and over quality of scripted fighters, 600 fights a point
    python -m benchmarks.arena markets  # yield over latency of scripted traders beside the closed form, 40 days a point
    python -m benchmarks.arena paper    # a rule without a model under the published rules, and replayed (TENFOLD_DATA)
    python -m benchmarks.arena models   # how often models decide rightly, and how long they take; --agents NAME=WHO
    python -m benchmarks.arena table    # what docs/results/arena.md shows

All are resumable.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import done_in, keep_in, rows_in, section
from tenfold.arena.agents import Action, Agent, Turn
from tenfold.arena.curves import RewardCurve
from tenfold.arena.fighting.moves import INPUTS
from tenfold.arena.fighting.play import play_fight
from tenfold.arena.fighting.scripted import ScriptedFighter
from tenfold.arena.lineup import line_up
from tenfold.arena.reference import taught
from tenfold.arena.trading.agents import RuleTrader, ScriptedTrader
from tenfold.arena.trading.files import read_bars
from tenfold.arena.trading.market_day import ask_market, market_questions, play_market, sweep_market
from tenfold.arena.trading.paper import PaperRules, play_paper
from tenfold.arena.trading.replay import ReplayRules, play_replay
from tenfold.arena.trading.synthetic import MarketRules, draw_market
from tenfold.arena.trading.tapes import BarTape
from tenfold.config.arena import TradingConfig, parse_agent
from tenfold.core.statistics import wilson

RESULTS = Path(__file__).parent / "results" / "arena.jsonl"
DATA = Path(os.environ.get("TENFOLD_DATA", Path(__file__).parents[2] / "shared" / "data"))
PAIRS, DAYS = 300, 40
LATENCIES = (0, 6, 12, 18, 24, 36, 48, 72)
"""Frames, of a fighter against quality .8 at 12."""
QUALITIES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Against quality .6, both at 12 frames."""
SECONDS = (0.0, 0.1, 0.2, 0.4, 0.713, 1.0, 1.3, 2.0)
DELAYS = (0.0, 0.195, 0.386, 0.713, 0.801, 1.302, 1.4, 1.5)
MODELS = ("demo", "llama.cpp:demo", "reference")
FIGHTS, BATCH, FRAMES = 60, 1024, 4000

rows = partial(rows_in, RESULTS)
keep = partial(keep_in, RESULTS)
done = partial(done_in, RESULTS)


def speed(repeats: int = 5) -> None:
    """Processor time of fights in Python, frames of the compiled batch, and a market day without a model."""
    from tenfold.arena.fighting.batch import FightBatch

    if not done(part="speed", what="fights in Python"):
        agents = (ScriptedFighter(0.8), ScriptedFighter(0.6))
        seconds = [_taken(lambda: [play_fight(agents, seed) for seed in range(FIGHTS)]) for _ in range(repeats)]
        keep({"part": "speed", "what": "fights in Python", "of": FIGHTS, "seconds": seconds})
    if not done(part="speed", what="frames, compiled"):
        batch, draw = FightBatch(), np.random.default_rng(0)
        batch.reset(range(BATCH))
        pressed = draw.integers(len(INPUTS), size=(FRAMES, BATCH, 2), dtype=np.int32)  # a short list would go round
        ended = 0

        def frames() -> None:
            nonlocal ended
            for inputs in pressed:
                stepped = batch.step(inputs)
                ended += int(np.count_nonzero(stepped.knocked_out) + np.count_nonzero(stepped.timed_out))

        frames()  # compiles
        ended = 0
        seconds = [_taken(frames) for _ in range(repeats)]
        row = {"part": "speed", "what": "frames, compiled", "of": BATCH * FRAMES, "seconds": seconds}
        keep(row | {"fights": ended / repeats})
    if not done(part="speed", what="a market day"):
        traders = [ScriptedTrader(0.9, name="a"), ScriptedTrader(0.6, name="b")]
        seconds = [_taken(lambda seed=seed: play_market(traders, seed)) for seed in range(repeats)]
        keep({"part": "speed", "what": "a market day", "of": 1, "seconds": seconds})
    if not done(part="speed", what="calls in a sweep of ten latencies"):
        counted = _Counting(ScriptedTrader(0.9))
        sweep_market([counted], 0, [at / 10 for at in range(10)])
        asked = len(market_questions(draw_market(0)))
        keep({"part": "speed", "what": "calls in a sweep of ten latencies", "asked": counted.asked, "questions": asked})


class _Counting:
    """An agent, and how many questions it was asked."""

    def __init__(self, agent: Agent) -> None:
        self.agent, self.name, self.asked = agent, agent.name, 0

    def answer(self, questions: Sequence[Turn]) -> list[Action]:
        self.asked += len(questions)
        return self.agent.answer(questions)


def _taken(work: Callable[[], object]) -> float:
    """Processor time, which other work on the machine prolongs little."""
    start = time.process_time()
    work()
    return time.process_time() - start


def fights() -> None:
    """Side-swapped, the same seeds at all points."""
    for kind, points in (("latency", LATENCIES), ("quality", QUALITIES)):
        for point in points:
            if done(part="fights", over=kind, at=point):
                continue
            one = ScriptedFighter(0.8, point / 60) if kind == "latency" else ScriptedFighter(float(point), 12 / 60)
            other = ScriptedFighter(0.8 if kind == "latency" else 0.6, 12 / 60)
            scores = [_points(one, other, seed) for seed in range(PAIRS)]
            keep({"part": "fights", "over": kind, "at": point, "scores": scores})


def _points(one: Agent, other: Agent, seed: int) -> float:
    """Of the first agent, from a fight on each side."""
    return (play_fight((one, other), seed).score + 1 - play_fight((other, one), seed).score) / 2


def markets() -> None:
    """Each trader alone; every day is asked once."""
    for accuracy in (0.9, 0.6, 0.5):
        if done(part="markets", accuracy=accuracy):
            continue
        trader = ScriptedTrader(accuracy)
        days = [sweep_market([trader], seed, SECONDS) for seed in range(DAYS)]
        found = [[day[at].yields[trader.name] for day in days] for at in range(len(SECONDS))]
        keep({"part": "markets", "accuracy": accuracy, "latencies": SECONDS, "yields": found})


def paper() -> None:
    """The rule of section 5 of the specification on one day of two tickers; only what it earns is kept."""
    if not DATA.exists():
        print(f"paper: {DATA} is not there: name the folder of the data in TENFOLD_DATA")
        return
    days = [
        read_bars(DATA / f"hft_ohlc_{ticker}_2024-08-05.csv.gz", ticker, zone="UTC", day="2024-08-05")
        for ticker in ("NVDA", "AMZN")
    ]
    tapes = [BarTape(day) for day in days]
    replayed = ReplayRules("UTC", opens=None, trigger=0.0, cooling=0.0)
    for seconds in DELAYS:
        if done(part="paper", latency=seconds):
            continue
        rule = RuleTrader(0.01, seconds=seconds)
        published = play_paper([rule], days, PaperRules(lookahead=True)).yields[rule.name]
        honest = play_replay([rule], tapes, replayed).yields[rule.name]
        keep({"part": "paper", "latency": seconds, "paper": published, "replay": honest})


def models(names: Iterable[str] = MODELS, questions: int = 40) -> None:
    """The first questions of a day, as numbers and in words; a reference agent has the form that it was taught."""
    for text in names:
        spec = parse_agent(text)
        forms = (taught("trading", spec.taught)[1].easy,) if spec.taught else (False, True)
        for easy in forms:
            if done(part="models", agent=spec.text, easy=easy):
                continue
            (agent,) = line_up("trading", TradingConfig(agents=(text,), latency="measured")).values()
            market = draw_market(0, MarketRules(events=questions, easy=easy))
            answers = ask_market([agent], market)[agent.name]
            right = [
                (one.choice == turn.answers[0]) == turn.view.reverts
                for one, turn in zip(answers, market_questions(market), strict=True)
            ]
            keep(
                {
                    "part": "models", "agent": spec.text, "easy": easy, "right": sum(right), "asked": len(right),
                    "trades": sum(one.choice != "pass" for one in answers),
                    "seconds": [one.seconds for one in answers],
                    "tokens": [one.prompt_tokens for one in answers],
                }
            )  # fmt: skip


# ---- tables ---------------------------------------------------------------------------------------------------------


def table() -> None:
    """Markdown for docs/results."""
    for part, show in (
        ("speed", _speed), ("fights", _fights), ("markets", _markets), ("paper", _paper), ("models", _models),
        ("agents", _agents),
    ):  # fmt: skip
        if found := [row for row in rows() if row["part"] == part]:
            show(found)


def _speed(found: Sequence[dict[str, Any]]) -> None:
    section("Speed", "arena speed", found)
    print("| what | a second of one core, at best | median |\n|---|---|---|")
    for row in found:
        if "asked" in row:
            print(f"| {row['what']} | {row['asked']} for {row['questions']} questions | |")
            continue
        cells = [row["of"] / of(row["seconds"]) for of in (min, statistics.median)]
        print(f"| {row['what']} | {cells[0]:,.0f} | {cells[1]:,.0f} |")
        if "fights" in row:
            cells = [row["fights"] / of(row["seconds"]) for of in (min, statistics.median)]
            print(f"| the same, in fights (random inputs) | {cells[0]:,.0f} | {cells[1]:,.0f} |")


def _fights(found: Sequence[dict[str, Any]]) -> None:
    section("What speed and quality are worth in a fight", "arena fights", found)
    for kind, words in (
        ("latency", "frames an answer takes (quality .8, against .8 at 12 frames)"),
        ("quality", "quality (at 12 frames, against .6 at 12)"),
    ):
        points = [row for row in found if row["over"] == kind]
        if not points:
            continue
        print(f"| {words} | {_cells([row['at'] for row in points], 'g')} |\n|---|{'---|' * len(points)}")
        means = [statistics.fmean(row["scores"]) for row in points]
        ends = [wilson(sum(row["scores"]), len(row["scores"])) for row in points]
        print(f"| share of points | {' | '.join(f'{mean:.2f}' for mean in means)} |")
        print(f"| 95 % | {' | '.join(f'{low:.2f} to {high:.2f}' for low, high in ends)} |\n")


def _markets(found: Sequence[dict[str, Any]]) -> None:
    section("What speed is worth in the market", "arena markets", found)
    rules = MarketRules()
    scale = rules.events * rules.notional / rules.cash
    print(f"| accuracy | | {' | '.join(f'{at:g} s' for at in SECONDS)} |\n|---|---|{'---|' * len(SECONDS)}")
    for row in found:
        curve = RewardCurve("trader", tuple(row["latencies"]), tuple(map(tuple, row["yields"])))
        ends = zip(curve.means, curve.intervals, strict=True)
        cells = [f"{mean:+.2%} ± {high - mean:.2%}" for mean, (_, high) in ends]
        print(f"| {row['accuracy']:g} | yield of a day | {' | '.join(cells)} |")
        expected = [f"{scale * rules.expected_yield(row['accuracy'], at):+.2%}" for at in row["latencies"]]
        print(f"| | expected | {' | '.join(expected)} |")


def _paper(found: Sequence[dict[str, Any]]) -> None:
    section("A rule without a model, under the published rules and replayed", "arena paper", found)
    print(f"| seconds | {_cells([row['latency'] for row in found], 'g')} |\n|---|{'---|' * len(found)}")
    print(f"| published rules | {_cells([row['paper'] for row in found], '+,.0%')} |")
    print(f"| replay | {_cells([row['replay'] for row in found], '+.1%')} |")


def _cells(values: Iterable[float], form: str) -> str:
    return " | ".join(format(value, form) for value in values)


def _models(found: Sequence[dict[str, Any]]) -> None:
    section("Models in the market", "arena models", found)
    print("| agent | question | right readings | trades | seconds, median | prompt tokens |\n|---|---|---|---|---|---|")
    for row in found:
        low, high = wilson(row["right"], row["asked"])
        print(
            f"| {row['agent']} | {'in words' if row['easy'] else 'numbers'} | {row['right'] / row['asked']:.2f} "
            f"[{low:.2f}, {high:.2f}] | {row['trades']} of {row['asked']} | {statistics.median(row['seconds']):.2g} | "
            f"{statistics.median(row['tokens']):.0f} |"
        )


def _agents(found: Sequence[dict[str, Any]]) -> None:
    section("Models, taught", "arena_agents train", found)
    print("| arena | layers | question | trained on | minutes | MiB | held-out answers that are good | at random |")
    print("|---|---|---|---|---|---|---|---|")
    for row in found:
        low, high = row["interval"]
        form = ("in words" if row["easy"] else "numbers") if row["arena"] == "trading" else ""
        print(
            f"| {row['arena']} | {row['layers']} of 30 | {form} | {row['trained on']:,} | "
            f"{row['training seconds'] / 60:.0f} | {row['bytes'] / 2**20:.2f} | {row['quality']:.3f} "
            f"[{low:.3f}, {high:.3f}] of {row['asked']} | {row['at random']:.2f} |"
        )


PARTS: dict[str, Callable[..., None]] = {
    "speed": speed, "fights": fights, "markets": markets, "paper": paper, "models": models, "table": table,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts that are asked for; all of them by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=list(PARTS))
    parser.add_argument("--agents", nargs="+", default=MODELS, help="of models, as in tenfold play")
    given = parser.parse_args(argv)
    for part in given.parts:
        PARTS[part](given.agents) if part == "models" else PARTS[part]()


if __name__ == "__main__":
    main()
