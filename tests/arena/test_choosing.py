"""The choice among candidates: who is found, how often wrongly, and after how many episodes."""

import json
import math

import numpy as np
import pytest

from tenfold import cli
from tenfold.arena.choosing.halving import Probed, choose_agent, dominated
from tenfold.arena.fighting.scripted import ScriptedFighter
from tenfold.arena.labelled import labelled_questions
from tenfold.arena.trading.agents import ScriptedTrader
from tenfold.arena.trading.synthetic import MarketRules
from tenfold.config.arena import FightingConfig, parse_agent
from tenfold.config.choose import ChooseConfig
from tenfold.errors import ConfigError, RunError
from tenfold.stage.store import Store

from ..runs import execute


def arm(share, run=0):
    """Wins with a probability; the luck of a seed is common to all."""
    return lambda seed: float(np.random.default_rng((run, seed)).random() < share)


def played(shares, run=0, **options):
    arms = {name: arm(share, run) for name, share in shares.items()}
    return choose_agent(list(shares), lambda name, seed: arms[name](seed), **options)


def test_the_best_is_found_with_fewer_episodes_than_the_grid_takes():
    shares = {f"c{n}": 0.3 + 0.05 * n for n in range(9)}
    found = [played(shares, run) for run in range(12)]
    assert min(shares[one.winner] for one in found) >= 0.65
    cap = 16 * 9 * (math.ceil(math.log(9, 3)) + 1)
    assert all(one.episodes <= cap and one.episodes < one.grid for one in found)
    assert [len(names) for names in found[0].rounds][:3] == [9, 3, 2]


def test_equals_are_not_separated():
    """Independent luck, so that pairing hides nothing: one of twenty runs may name a better one."""

    def play(run):
        return lambda name, seed: float(np.random.default_rng((run, seed, ord(name))).random() < 0.5)

    wrong = sum(len(choose_agent("abcd", play(run)).tied) < 3 for run in range(40))
    assert wrong <= 5


def test_two_play_on_until_they_are_separated_or_the_episodes_are_used_up():
    early = played({"a": 0.9, "b": 0.2}, first=4, most=400)
    assert early.winner == "a"
    assert not early.tied
    assert early.episodes < 400
    late = choose_agent("ab", lambda name, seed: 0.5, first=4, most=41)
    assert late.tied == ("b",)
    assert late.episodes == 40


def test_differences_are_paired_by_seed():
    """A small constant lead under large common luck, which no interval of a mean would show."""
    found = choose_agent("ab", lambda name, seed: 0.9 * (seed % 7) / 7 + 0.1 * (name == "a"), most=200)
    assert found.winner == "a"
    assert not found.tied


def test_what_was_played_is_kept(tmp_path):
    calls = []

    def play(name, seed):
        calls.append((name, seed))
        if len(calls) == 20:
            raise KeyboardInterrupt
        return arm({"a": 0.7, "b": 0.5, "c": 0.2}[name])(seed)

    with pytest.raises(KeyboardInterrupt):
        choose_agent("abc", play, first=8, store=Store(tmp_path / "store.jsonl"))
    resumed = choose_agent("abc", play, first=8, store=Store(tmp_path / "store.jsonl"))
    assert resumed == choose_agent("abc", play, first=8)
    assert len(set(calls[:19])) == 19
    assert not set(calls[:19]) & set(calls[20 : 20 + resumed.episodes - 19])


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        ([], {}, "candidates: none"),
        (["a", "a"], {}, "a, a"),
        (["a", "b"], {"most": 20}, "20 episodes do not give each of 2 candidates 16"),
    ],
)
def test_what_cannot_be_chosen(names, options, said):
    with pytest.raises(ConfigError, match=said):
        choose_agent(names, lambda name, seed: 0.5, **options)


def test_rewards_are_within_bounds():
    with pytest.raises(RunError, match=r"b: a reward of 1\.5"):
        choose_agent("ab", lambda name, seed: 1.5 * (name == "b"))


def test_only_who_is_slower_and_worse_is_dominated():
    def probe(seconds, quality):
        return Probed((seconds, seconds - 0.05, seconds + 0.05), (quality, quality - 0.1, quality + 0.1), 50)

    base = {"base": probe(0.5, 0.5)}
    assert dominated(base | {"x": probe(0.7, 0.2)}) == {"x": "base"}
    for seconds, quality in ((0.7, 0.8), (0.2, 0.2), (0.55, 0.2), (0.7, 0.4)):
        assert dominated(base | {"x": probe(seconds, quality)}) == {}


@pytest.mark.parametrize("arena", ["fighting", "trading"])
def test_who_plays_by_the_rules_gives_good_answers(arena):
    asked = labelled_questions(arena, 20_000_000, 80)
    assert len({question.turn.state for question in asked}) == 80
    best = ScriptedFighter(1.0) if arena == "fighting" else ScriptedTrader(1.0)
    actions = best.answer([question.turn for question in asked])
    assert all(action.choice in question.good for action, question in zip(actions, asked, strict=True))
    assert all(set(question.good) < set(question.turn.answers) for question in asked)


def test_questions_are_of_the_market_that_is_played():
    easy = labelled_questions("trading", 0, 3, MarketRules(easy=True))
    assert all("The other asset" in question.turn.state for question in easy)


# ---- the stage ------------------------------------------------------------------------------------------------------


def test_a_choice_in_both_arenas_repeats(tmp_path, capsys):
    for arena in ("fighting", "trading"):
        choices = []
        for name in ("one", "two"):
            out = tmp_path / arena / name
            agents = ["scripted:0.9@0.2", "scripted:0.2@0.2", "random@0.9"]
            code = cli.main(["choose", "--arena", arena, "--agents", *agents, "--first", "4", "--probe", "40",
                             "--seconds", "10", "--out", str(out)])  # fmt: skip
            assert code == 0, capsys.readouterr().err
            choices.append(json.loads((out / "01-choose" / "choice.json").read_text()))
        assert choices[0] == choices[1]
        assert choices[0]["chosen"] == "scripted:0.9@0.2"
        assert choices[0]["slower and worse"] == {"random@0.9": "scripted:0.9@0.2"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"agents": ["random"]}, "give two or more"),
        ({"agents": ["random", "human"]}, "people are not chosen"),
        ({"agents": ["random", "rule:0.1"]}, "synthetic"),
        ({"arena": "fighting", "agents": ["random", "scripted:0.6@0.2"]}, "opponent: scripted:0.6@0.2 is among"),
        ({"most": 10}, "10 episodes do not give 2 candidates 16 each"),
        ({"arena": "chess"}, "fighting"),
        ({"agents": ["random", "llama.cpp:demo[gear:4]"]}, "packs the cache of a model in transformers"),
        ({"agents": ["random", "demo[gears:4]"]}, "unknown cache"),
        ({"agents": ["random", "reference:third"]}, "reference:half"),
    ],
)
def test_bad_choices_are_refused(fields, said):
    with pytest.raises(ConfigError, match=said.replace("[", r"\[")):
        ChooseConfig.parse(fields, "choose")


def test_a_packed_cache_stands_in_brackets():
    spec = parse_agent("demo[gear:4,backbone=kcvt]@tokens:300,30")
    assert (spec.source, spec.kv, spec.latency) == ("demo", "gear:4,backbone=kcvt", "tokens:300,30")


# ---- names, and what earlier stages made ---------------------------------------------------------------------------


def test_agents_may_be_named():
    assert FightingConfig.parse({"agents": ["a=random, b=scripted:1@0.2", "my lr=1e-3.d=demo"]}, "x").names() == (
        "a",
        "b",
        "my lr",
    )
    with pytest.raises(ConfigError, match="'a' is named twice"):
        FightingConfig.parse({"agents": ["a=random", "a=scripted:1"]}, "x")


def test_an_earlier_stage_makes_a_candidate(tmp_path, capsys):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"line {n} of text"}) + "\n" for n in range(80)))
    candidates = {"small": "${small.model}", "whole": "${models.whole}", "random": "random@0.1"}
    agents = [f"{name}={who}" for name, who in candidates.items()]
    recipe = {
        "model": "tiny:llama",
        "models": {"whole": "tiny:llama"},
        "stages": [
            {"use": "fpx", "id": "small", "data": str(tmp_path / "text.jsonl"), "budget": "9bits", "calibration": 128,
             "max_length": 64, "holdout": 0.2},
            {"use": "choose", "agents": agents, "first": 2, "most": 6, "probe": 3, "synthetic": {"events": 2},
             "latency": "tokens"},
        ],
    }  # fmt: skip
    execute(recipe, tmp_path / "out")
    choice = json.loads((tmp_path / "out/02-choose/choice.json").read_text())
    assert set(choice["rewards, 0 to 1"]) | set(choice["slower and worse"]) == set(candidates)
    (tmp_path / "bad.yaml").write_text(json.dumps(recipe | {"stages": recipe["stages"][::-1]}))
    assert cli.main(["validate", str(tmp_path / "bad.yaml")]) == 2
    assert "${small.model}" in capsys.readouterr().err
