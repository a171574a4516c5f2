"""The arena from recipes and the command line: who plays, what is refused, and that workers change nothing."""

import html
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from tenfold import cli
from tenfold.arena.fighting.play import play_fight
from tenfold.arena.fighting.scripted import ScriptedFighter
from tenfold.arena.lineup import line_up_notes
from tenfold.config.arena import FightingConfig, TradingConfig, parse_agent
from tenfold.errors import ConfigError
from tenfold.models.reference import ModelRef

from ..runs import execute


def games(out, stage="fighting"):
    return [json.loads(line) for line in (out / f"01-{stage}/games.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("text", "kind", "number", "engine", "source", "latency"),
    [
        ("scripted:0.6@fixed:0.2", "scripted", 0.6, "transformers", "", "fixed:0.2"),
        ("random", "random", None, "transformers", "", None),
        ("rule:0.01", "rule", 0.01, "transformers", "", None),
        ("tiny:llama@tokens:300,30", "model", None, "transformers", "tiny:llama", "tokens:300,30"),
        ("llama.cpp:a b.gguf", "model", None, "llama.cpp", "a b.gguf", None),
        ("http://me:8000/v1#some/model@measured", "model", None, "openai", "http://me:8000/v1", "measured"),
        ("runs/my@home/model", "model", None, "transformers", "runs/my@home/model", None),
        ("scripted:0.8@0.2", "scripted", 0.8, "transformers", "", "0.2"),
        ("random@.1", "random", None, "transformers", "", ".1"),
        ("demo@1e-1", "model", None, "transformers", "demo", "1e-1"),
    ],
)
def test_agents_are_read(text, kind, number, engine, source, latency):
    spec = parse_agent(text)
    assert (spec.kind, spec.number, spec.engine, spec.source) == (kind, number, engine, source)
    assert (spec.text, spec.latency) == (text, latency)


def test_a_fast_and_a_slow_model():
    spec = parse_agent("tiny:gpt2@fixed:0.1+tiny:llama@fixed:2")
    assert (spec.source, spec.latency, spec.planner.source, spec.planner.latency) == (
        "tiny:gpt2", "fixed:0.1", "tiny:llama", "fixed:2")  # fmt: skip
    config = FightingConfig(agents=("tiny:gpt2+tiny:llama", "random"))
    assert set(config.models().values()) == {"tiny:gpt2", "tiny:llama"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"agents": ("scripted:0.5", "scripted:0.5")}, "named twice"),
        ({"agents": ("scripted:", "random")}, "scripted takes a number"),
        ({"agents": ("http://me/v1", "random")}, "which model of the server"),
        ({"agents": ("", "random")}, "names nobody"),
        ({"agents": ("human", "human")}, "named twice"),
        ({"agents": ("human", "random", "scripted:1")}, "a person fights one other agent"),
        ({"agents": ("human", "random"), "latencies": (0.1,)}, "takes the time that it takes"),
        ({"agents": ("scripted:0.5+random", "random")}, "takes two models"),
        ({"agents": ("rule:0.1", "random")}, "rule:MARGIN trades"),
        ({"agents": ("scripted:1@tokens:30,3", "random")}, "runs no model .* as in scripted:1@0.2"),
        ({"agents": ("random@measured", "scripted:1")}, "runs no model"),
        ({"latencies": (0.1, 0, 0.1)}, "latencies: 0.1 is given twice"),
        ({"agents": ("my/one,my/other", "random")}, "put spaces between agents"),
        ({"agents": ("scripted:1,my/other", "random")}, "put spaces between agents"),
        ({"agents": ("tiny:llama", "random"), "workers": 2}, "workers: models play in one process"),
    ],
)
def test_who_cannot_fight(values, said):
    with pytest.raises(ConfigError, match=said):
        FightingConfig.parse(values, "fighting")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"market": "replay", "agents": ("rule:0.1",)}, r"recorded\.bars: missing"),
        ({"market": "replay", "agents": ("rule:0.1",), "recorded": {"bars": {"A": "a.csv"}}}, r"recorded\.zone"),
        ({"market": "replay", "recorded": {"bars": {"A": "a.csv"}, "zone": "UTC"}}, "reads synthetic jumps"),
        ({"agents": ("random",), "recorded": {"bars": {"A": "a.csv"}}}, "market is synthetic"),
        ({"agents": ("rule:0.1",)}, "reads recorded markets"),
    ],
)
def test_what_cannot_be_traded(values, said):
    with pytest.raises(ConfigError, match=said):
        TradingConfig.parse(values, "trading")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"agents": ["scripted:1.5", "random"]}, "agents: scripted:1.5: quality"),
        ({"agents": ["scripted:nan", "random"]}, "agents: scripted:nan: quality"),
        ({"agents": ["scripted:1@fixed:-1", "random"]}, "agents: scripted:1@fixed:-1: latency"),
        ({"agents": ["scripted:1@-1", "random"]}, "agents: scripted:1@-1: latency"),
        ({"agents": ["random", "tiny:llama@tokens:0,0"]}, "agents: tiny:llama@tokens:0,0: latency: PREFILL"),
        ({"agents": ["random", "tiny:llama+tiny:gpt2@fixed:inf"]}, "agents: tiny:gpt2@fixed:inf: latency"),
        ({"agents": ["random", "tiny:nothing"]}, "tiny:nothing"),
        ({"agents": ["random", "llama.cpp:tiny:llama"]}, "not a GGUF file"),
        ({"agents": ["random", "scripted:1"], "latency": -1}, "01-fighting: latency: fixed:-1"),
        ({"use": "trading", "agents": ["scripted:2"]}, "agents: scripted:2: accuracy"),
        ({"use": "trading", "synthetic": {"events": 1_000_000}}, "synthetic.events: "),
        ({"use": "trading", "synthetic": {"amplitude": 0.9}}, "synthetic.amplitude: "),
        ({"use": "trading", "agents": ["rule:-1"], "recorded": {}}, "agents: rule:-1: margin"),
        ({"use": "trading", "recorded": {"zone": "Mars/Base"}}, "recorded.zone: unknown"),
        ({"use": "trading", "recorded": {"exchange": "Mars/Base"}}, "recorded.exchange: unknown"),
        ({"use": "trading", "recorded": {"day": "5.8.2024"}}, "recorded.day: "),
        ({"use": "trading", "recorded": {"cutoff": "25:00:00"}}, "recorded.cutoff: "),
        ({"use": "trading", "recorded": {"cutoff": "09:00:00"}}, "recorded.cutoff: 09:00:00 is not after opens"),
        ({"use": "trading", "recorded": {"opens": "09:00Z"}}, "recorded.opens: "),
    ],
)
def test_a_recipe_is_valid_only_if_it_can_be_played(values, said, tmp_path, capsys):
    (tmp_path / "bars.csv").write_text("time,open,high,low,close\n")
    stage = {"use": "fighting", **values}
    if "recorded" in stage:
        stage |= {"market": "replay", "recorded": {"bars": {"X": str(tmp_path / "bars.csv")}, "zone": "UTC"}
                  | stage["recorded"], "agents": stage.get("agents", ["rule:0.1"])}  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"stages": [stage]}))
    for command in ("validate", "run"):
        assert cli.main([command, str(recipe), *(["--out", str(tmp_path / "out")] if command == "run" else [])]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_agents_with_commas_between_them():
    for texts, agents in (
        (["human,scripted:0.6"], ("human", "scripted:0.6")),
        (["human,", "scripted:0.6"], ("human", "scripted:0.6")),
        (["demo@tokens:300,30,random, scripted:1@0.1"], ("demo@tokens:300,30", "random", "scripted:1@0.1")),
        (["llama.cpp:a.gguf,http://me/v1#m"], ("llama.cpp:a.gguf", "http://me/v1#m")),
        (["./a,b", "random"], ("./a,b", "random")),
        (["my/random,random"], ("my/random", "random")),
    ):
        assert FightingConfig.parse({"agents": texts}, "fighting").agents == agents


def test_a_latency_for_models_leaves_others_their_seconds(tmp_path):
    """Scripted agents read and write no tokens, and nothing measures them: neither makes them instant."""
    for latency in ("tokens:30,3", "measured"):
        for stage, agents in (("fighting", ["scripted:1", "random@0.1"]), ("trading", ["scripted:1", "random@0.1"])):
            short = (
                {"pairs": 1, "seconds": 5, "replays": 0}
                if stage == "fighting"
                else {"days": 1, "synthetic": {"events": 2}}
            )
            out = tmp_path / latency[:6] / stage
            execute({"stages": [{"use": stage, "agents": agents, "latency": latency, **short}]}, out)
            summary = json.loads((out / f"01-{stage}/summary.json").read_text())
            assert f"Latency {latency} is for models; an answer of scripted:1 takes 0.2 s." in summary["notes"]
            if stage == "fighting":
                assert {game["first latency"] for game in games(out) if game["first"] == "scripted:1"} == {0.2}
            else:
                assert [set(day["seconds"]) for day in games(out, "trading")] == [{0.2}, {0.1}]


def test_a_plain_number_is_seconds(tmp_path):
    stage = {"use": "trading", "agents": ["scripted:1", "random@0.5"], "latency": 0.3, "days": 1}
    execute({"stages": [{**stage, "synthetic": {"events": 2}}]}, tmp_path)
    assert [set(day["seconds"]) for day in games(tmp_path, "trading")] == [{0.3}, {0.5}]


def test_how_a_recipe_opens_models_reaches_those_that_play(tmp_path, monkeypatch):
    opened, plain = [], ModelRef.open
    monkeypatch.setattr(ModelRef, "open", lambda self, **more: opened.append(self) or plain(self, **more))
    fight = {"use": "fighting", "agents": ["tiny:llama@3", "random@3"], "pairs": 1, "seconds": 5}
    trade = {"use": "trading", "agents": ["tiny:qwen2"], "days": 1, "synthetic": {"events": 1}}
    execute({"dtype": "bfloat16", "device": "cpu", "stages": [fight, trade]}, tmp_path)
    assert [(ref.source, ref.dtype, ref.device) for ref in opened] == [
        (source, "bfloat16", "cpu") for source in ("tiny:llama", "tiny:qwen2")
    ]


def test_a_gguf_file_keeps_its_number_format():
    agents = ("llama.cpp:demo", "tiny:llama", "random")
    every, others = TradingConfig(agents=agents), TradingConfig(agents=agents[1:])
    (note,) = line_up_notes(every, {"dtype": "bfloat16", "device": "cpu", "load": None})
    assert note == "A GGUF file has a number format of its own: dtype not used by llama.cpp:demo."
    assert line_up_notes(every, {"device": "cpu"}) == line_up_notes(others, {"dtype": "float16"}) == []


def test_games_are_those_of_the_seed(tmp_path):
    """What a tournament keeps is what a fight by hand gives, whoever sits where, also from several processes."""
    stage = {"use": "fighting", "agents": ["scripted:0.9@fixed:0.1", "random"], "pairs": 2, "seconds": 8}
    execute({"seed": 7, "stages": [stage]}, tmp_path / "one")
    execute({"seed": 7, "stages": [{**stage, "workers": 2}]}, tmp_path / "two")
    found = games(tmp_path / "one")
    assert found == games(tmp_path / "two")
    assert [(game["first"], game["seed"]) for game in found] == [
        (name, seed) for seed in (7, 8) for name in ("scripted:0.9@fixed:0.1", "random")
    ]
    good, bad = ScriptedFighter(0.9, 0.1), ScriptedFighter(0.0, 0.2)
    for game in found:
        pair = (good, bad) if game["first"] == "scripted:0.9@fixed:0.1" else (bad, good)
        record = play_fight(pair, game["seed"], bell=480)
        assert (game["first health"], game["second health"]) == record.health
        assert game["frames"] == record.frames <= 480
    assert (tmp_path / "one/01-fighting/replays.html").stat().st_size > 20_000


def test_a_planner_and_other_latencies(tmp_path):
    """Only the fast model's answers are charged, at whatever they are said to take."""
    agent = "tiny:qwen2@fixed:0.1+tiny:llama@fixed:2"
    days = {"use": "trading", "agents": [agent], "days": 2, "synthetic": {"events": 3}, "latencies": [0, 0.5]}
    execute({"stages": [days]}, tmp_path / "trading")
    assert {one for day in games(tmp_path / "trading", "trading") for one in day["seconds"]} == {0.1}
    fights = {"use": "fighting", "agents": [agent, "random"], "pairs": 1, "seconds": 5, "latencies": [0.3]}
    execute({"stages": [fights]}, tmp_path / "fighting")
    assert {game["first latency"] for game in games(tmp_path / "fighting") if game["first"] == agent} == {0.1}


def test_measured_latencies_repeat(tmp_path):
    """What was measured is written down, and charged as written."""
    stage = {"use": "trading", "agents": ["tiny:llama@measured"], "days": 1, "synthetic": {"events": 3}}
    execute({"stages": [stage]}, tmp_path / "first")
    trace = tmp_path / "first/01-trading/trace-1.jsonl"
    known = [json.loads(line)["seconds"] for line in trace.read_text().splitlines()]
    assert games(tmp_path / "first", "trading")[0]["seconds"] == known
    execute({"stages": [{**stage, "agents": [f"tiny:llama@trace:{trace}"]}]}, tmp_path / "again")
    assert games(tmp_path / "again", "trading")[0]["seconds"] == known


def test_a_recording_is_replayed(tmp_path, capsys):
    """A price that rises all day: who buys at once earns more than who buys later."""
    bars = tmp_path / "bars.csv"
    price = 100 * np.exp(np.arange(3000) * 1e-6)
    lines = [f"{9 + (1800 + n) // 3600:02}:{(30 + n // 60) % 60:02}:{n % 60:02},{p},{p * 1.004},{p * 0.996},{p}"
             for n, p in enumerate(price)]  # fmt: skip
    bars.write_text("time,open,high,low,close\n" + "\n".join(lines) + "\n")
    command = ["play", "trading", "--market", "replay", "--recorded.bars", "UP", str(bars), "--recorded.zone", "UTC",
               "--recorded.day", "2024-01-02", "--recorded.trigger", "0", "--agents", "rule:0.007"]  # fmt: skip
    assert cli.main([*command, "--latencies", "0", "600", "--out", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run/01-trading/summary.json").read_text())
    curve = next(figure for figure in summary["figures"] if figure["title"] == "Yield of a day")
    at_once, later = curve["series"][0]["y"]
    assert at_once > later > 0
    bars.write_text("\n".join(["time,open,high,low,close", *lines[:9], lines[3]]) + "\n")
    assert cli.main([*command, "--out", str(tmp_path / "bad")]) == 2
    assert f"{bars}, line 11" in capsys.readouterr().err


def test_a_recording_that_rests_at_noon(tmp_path, capsys):
    bars = tmp_path / "bars.csv"
    minutes = [f"{hour:02}:{minute:02}:00,10,10,10,10" for hour in (10, 13) for minute in range(30)]
    bars.write_text("time,open,high,low,close\n" + "\n".join(minutes) + "\n")
    command = ["play", "trading", "--market", "replay", "--recorded.bars", "X", str(bars), "--recorded.zone", "UTC",
               "--recorded.day", "2024-01-02", "--agents", "rule:0.01", "--out", str(tmp_path / "out")]  # fmt: skip
    assert cli.main(command) == 2
    assert "raise recorded.longest_gap" in capsys.readouterr().err
    assert cli.main([*command, "--recorded.longest-gap", "10000"]) == 0


def test_a_single_recorded_day_has_no_intervals(tmp_path):
    bars = tmp_path / "bars.csv"
    minutes = [f"10:{minute:02}:00,10,{10 + minute / 100},10,10" for minute in range(30)]
    bars.write_text("time,open,high,low,close\n" + "\n".join(minutes) + "\n")
    recorded = {"bars": {"X": str(bars)}, "zone": "UTC", "day": "2024-01-02", "trigger": 0}
    for market in ("replay", "paper"):
        stage = {"use": "trading", "market": market, "agents": ["rule:0.01"], "latencies": [0, 1], "recorded": recorded}
        execute({"stages": [stage]}, tmp_path / market)
        page = (tmp_path / market / "report.html").read_text()
        assert "Yield of a day" in page
        assert "inf]" not in page.replace("∞", "inf")
        assert "is best at" not in page


def test_expected_yields_are_drawn_where_they_are_known(tmp_path):
    stage = {"use": "trading", "agents": ["scripted:0.9"], "days": 2, "latencies": [0, 1, 9]}
    execute({"stages": [{**stage, "synthetic": {"events": 3}}]}, tmp_path)
    summary = json.loads((tmp_path / "01-trading/summary.json").read_text())
    figure = next(figure for figure in summary["figures"] if figure["title"] == "Yield of a day")
    assert [series["x"] for series in figure["series"]] == [[0, 1, 9], [0, 1]]
    assert "hold up to 4 s (8 half-lives)" in figure["caption"]


def test_replays_are_named_and_linked(tmp_path, capsys):
    out = tmp_path / "out"
    command = ["play", "fighting", "--agents", "scripted:1", "random", "--pairs", "1", "--seconds", "5"]
    assert cli.main([*command, "--out", str(out)]) == 0
    assert f"replays: {out}/01-fighting/replays.html" in capsys.readouterr().out
    page = (out / "report.html").read_text()
    link = re.search(r'Replays: <a href="([^"]+)"', page)[1]
    assert (out / link).read_text().startswith("<!doctype html>")
    for target in re.findall(r'href="([^"#]+)"', page):
        assert (out / target).exists()
    assert "<span>None</span>" not in page
    summary = json.loads((out / "01-fighting/summary.json").read_text())
    assert [page.count(html.escape(note)) for note in summary["notes"]] == [1] * len(summary["notes"]) != []
    assert cli.main([*command, "--replays", "0", "--out", str(tmp_path / "none")]) == 0
    assert "replays:" not in capsys.readouterr().out


def test_the_terminal_breaks_no_word(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    command = ["play", "trading", "--agents", "scripted:0.85@fixed:0.35", "random", "--days", "2"]
    assert cli.main([*command, "--synthetic.events", "3", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    for word in ("right", "readings", "invalid", "answers", "latency", "p50,", "p95,"):
        assert word in shown.split()


def test_examples_stand_once():
    shown = cli.examples("play")
    assert len(set(shown)) == len(shown)


def test_a_person_plays_from_the_command_line(tmp_path):
    """Through a terminal: some keys, then giving up."""
    leader, follower = pty.openpty()
    code = "import sys; from tenfold import cli; sys.exit(cli.main(sys.argv[1:]))"
    words = ["play", "fighting", "--agents", "human", "scripted:0.2", "--seconds", "60", "--out", str(tmp_path / "run")]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30",
                   "PYTHONPATH": str(Path(__file__).parents[2])}  # fmt: skip
    child = subprocess.Popen(
        [sys.executable, "-c", code, *words], stdin=follower, stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    seen = b""
    try:
        while b"quit" not in seen and b"gives up" not in seen:  # the legend is there: the fight runs
            seen += os.read(leader, 4096)
        os.write(leader, b"q")
        while True:
            try:
                if not os.read(leader, 4096):
                    break
            except OSError:  # the child closed its end
                break
        assert child.wait(timeout=20) == 0
    finally:
        child.kill()
        os.close(leader)
    game = games(tmp_path / "run")[0]
    assert (game["first"], game["score"]) == ("human", 0.0)
    assert (tmp_path / "run/01-fighting/replays.html").exists()


def test_a_person_needs_a_terminal(tmp_path, capsys):
    assert cli.main(["play", "fighting", "--agents", "human", "random", "--out", str(tmp_path / "out")]) == 2
    assert "terminal" in capsys.readouterr().err


def test_latency_is_the_mean_over_decisions(tmp_path):
    """Of two fighters with latencies of their own: each is told as it is, over fights of any length."""
    agents = ["scripted:0.9@fixed:0.1", "random@fixed:0.5"]
    execute({"stages": [{"use": "fighting", "agents": agents, "pairs": 2, "seconds": 8}]}, tmp_path)
    summary = json.loads((tmp_path / "01-fighting/summary.json").read_text())
    found = {one["subject"]: {metric["name"]: metric for metric in one["metrics"]} for one in summary["results"]}
    for agent, seconds in zip(agents, (0.1, 0.5), strict=True):
        assert found[agent]["latency"]["value"] == pytest.approx(seconds)
        asked = sum(game[f"{side} decisions"] for game in games(tmp_path) for side in ("first", "second")
                    if game[side] == agent)  # fmt: skip
        assert found[agent]["latency"]["count"] == asked
