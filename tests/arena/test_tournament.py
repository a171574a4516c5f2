"""Tournaments: who plays whom on which seeds, when it ends, what is left out, and that a kill changes nothing."""

import math

import numpy as np
import pytest

from tenfold.arena.ratings import rate
from tenfold.arena.tournament import Played, play_tournament
from tenfold.errors import ConfigError
from tenfold.stage.store import Store

STRENGTHS = {"a": 1.2, "b": 0.6, "c": 0.0}


def play(first, second, seed):
    """A game by strengths, in which being first is worth something; chance is of the seed and the names."""
    lead = STRENGTHS[first] - STRENGTHS[second] + 0.5
    drawn = np.random.default_rng([seed, *map(ord, first), *map(ord, second)]).random()
    return Played(float(drawn < 1 / (1 + math.exp(-lead))), facts={"frames": 100.0 + seed})


def toss(first, second, seed):
    """A game of equals in which being first is worth a lot."""
    return Played(float(np.random.default_rng([seed, ord(first), ord(second)]).random() < 0.75))


class Noting:
    """Plays, and notes what was played; gives up after some games."""

    def __init__(self, most=10**9):
        self.seen, self.most = [], most

    def __call__(self, *game):
        if len(self.seen) == self.most:
            raise KeyboardInterrupt
        self.seen.append(game)
        return play(*game)


def test_every_two_play_the_same_seeds_from_both_sides():
    noting = Noting()
    found = play_tournament(["a", "b", "c"], noting, pairs=7, sequential=False, first_seed=100)
    right = {(*sides, seed) for two in ("ab", "ac", "bc") for sides in (two, two[::-1]) for seed in range(100, 107)}
    assert len(noting.seen) == len(right) == found.games == 42
    assert set(noting.seen) == right
    pair = found.matchups[0].pairs[2]
    both = play("a", "b", 102).score + 1 - play("b", "a", 102).score
    assert (pair.first, pair.second, pair.seed, pair.score) == ("a", "b", 102, both / 2)
    assert found.matchups[0].games[103][1].facts == {"frames": 203.0}


def test_those_who_are_separated_play_no_more_and_equals_play_to_the_end():
    strong = play_tournament(["a", "b", "c"], play, pairs=300)
    assert [matchup.verdict.better for matchup in strong.matchups] == [0, 0, 0]
    played = [len(matchup.games) for matchup in strong.matchups]
    assert played[1] < min(played[0], played[2]) < 300  # a and c are furthest apart
    assert all(count % 10 == 0 for count in played)
    assert rate(strong.pairs).names == ("a", "b", "c")
    assert strong.notes[0].startswith("3 of 3 series ended once somebody was better")
    equal = play_tournament(["a", "b"], toss, pairs=60)
    assert [(len(m.games), m.verdict.better, m.verdict.final) for m in equal.matchups] == [(60, None, True)]
    assert equal.table().rows[0][0].startswith("cannot separate a and b (60 pairs")


def test_no_two_of_many_equal_agents_are_separated_in_more_than_5_of_100_tournaments():
    """The chance of an error is shared by all pairs of agents."""

    def coin(first, second, seed):
        return Played(float(np.random.default_rng([seed, ord(first), ord(second)]).random() < 0.5))

    wrong = sum(
        any(m.verdict.better is not None for m in play_tournament("abcd", coin, pairs=20, first_seed=1000 * n).matchups)
        for n in range(40)
    )
    assert wrong <= 4  # 5 % of 40 and two standard deviations
    level = play_tournament(["a", "b", "c", "d"], coin, pairs=10, level=0.06).matchups[0].verdict.interval
    alone = play_tournament(["a", "b"], coin, pairs=10, level=0.01).matchups[0].verdict.interval
    assert level == pytest.approx(alone)


@pytest.mark.parametrize("sequential", [True, False])
def test_a_killed_tournament_goes_on_to_the_same_figures(tmp_path, sequential):
    how = {"pairs": 40, "sequential": sequential}
    whole, all_games = play_tournament(["a", "b", "c"], play, **how), 0
    for most in (5, 31, 80, 10**9):
        noting = Noting(most)
        try:
            found = play_tournament(["a", "b", "c"], noting, store=Store(tmp_path / "store.jsonl"), **how)
        except KeyboardInterrupt:
            assert most < 10**9
        all_games += len(noting.seen)
    assert found == whole
    assert all_games == whole.games  # none was played twice


def test_several_processes_give_the_same_tournament():
    alone = play_tournament(["a", "b"], play, pairs=6, sequential=False)
    assert play_tournament(["a", "b"], play, pairs=6, sequential=False, workers=2) == alone


def test_unrated_games_are_left_out_with_their_pairs_and_counted():
    def silent(first, second, seed):
        return Played(1.0, rated=not (second == "b" and seed % 4 == 0))

    found = play_tournament(["a", "b"], silent, pairs=8, sequential=False)
    matchup = found.matchups[0]
    assert [pair.seed for pair in matchup.pairs] == [1, 2, 3, 5, 6, 7]
    assert (matchup.unrated, matchup.verdict.pairs, found.games) == (2, 6, 16)
    assert found.notes == ("2 of 16 games were unrated; 4 are left out with them",)
    assert found.table().rows[0][1:] == (16, 2)
    nothing = play_tournament(["a", "b"], lambda *game: Played(0.0, rated=False), pairs=3)
    assert nothing.pairs == []
    assert nothing.table().rows[0][0] == "a and b: no games that count"
    assert play_tournament(["a", "b"], play, pairs=2).notes == ()


def test_progress_is_told_in_games():
    told = []
    play_tournament(["a", "b"], toss, pairs=15, tell=lambda *now: told.append(now))
    assert told[0] == (1, 30)
    assert told[-1] == (30, 30)
    assert [done for done, _ in told] == list(range(1, 31))


@pytest.mark.parametrize(
    ("names", "keys", "message"),
    [
        (["a"], {}, "agents: a"),
        (["a", "a"], {}, "agents: a, a"),
        ([], {}, "agents: none"),
        (["a", "b"], {"pairs": 0}, "pairs: 0"),
        (["a", "b"], {"batch": 0}, "batch: 0"),
        (["a", "b"], {"level": 0.0}, "level"),
    ],
)
def test_what_cannot_be_meant(names, keys, message):
    with pytest.raises(ConfigError, match=message):
        play_tournament(names, toss, **keys)
