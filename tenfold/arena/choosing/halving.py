"""The best of several agents, found in few episodes: successive halving on common seeds.

All candidates meet the same seeds, so that luck is common to all and differences are paired. After a round those stay
whose difference to the leader is bounded from below by the most, a third of them, and play three times as many
episodes; the last two play on until one is shown to be better or the episodes are used up. Earlier episodes count on.

Differences are judged by bets (`tenfold.arena.sequential`): what is separated is so at whatever time one looks, and for
any distribution of rewards, which the rounds' early ends would spoil for intervals of a fixed number of episodes.

Source: Karnin, Koren and Somekh, "Almost optimal exploration in multi-armed bandits" (ICML 2013), for the halving.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from tenfold.arena.sequential import Judgement, judge
from tenfold.errors import ConfigError, RunError
from tenfold.stage.store import Store, Tell


@dataclass(frozen=True)
class ChosenAgent:
    """What the episodes say.

    Args:
        winner: the best of those that were left.
        tied: the others that are not shown to be worse, best first.
        rewards: of each candidate, within [0, 1]: one for each of the first seeds.
        rounds: who played in each round.
        verdicts: of the winner against each other one, on the seeds that both met.
    """

    winner: str
    tied: tuple[str, ...]
    rewards: dict[str, tuple[float, ...]]
    rounds: tuple[tuple[str, ...], ...]
    verdicts: dict[str, Judgement]

    @property
    def episodes(self) -> int:
        """That were played."""
        return sum(map(len, self.rewards.values()))

    @property
    def grid(self) -> int:
        """That a full grid would have played: as many for everybody as the winner had."""
        return len(self.rewards) * len(self.rewards[self.winner])


def choose_agent(
    names: Sequence[str],
    play: Callable[[str, int], float],
    *,
    first: int = 16,
    most: int | None = None,
    first_seed: int = 0,
    level: float = 0.05,
    store: Store | None = None,
    tell: Tell = lambda done, total: None,
) -> ChosenAgent:
    """Find the best of some candidates.

    Args:
        names: of the candidates, each once.
        play: the reward of one of them in an episode, by its seed; within [0, 1].
        first: episodes of each in the first round.
        most: of all together. Default: ``first`` times the candidates, once for each round and once more.
        first_seed: the seeds count up from here.
        level: chance, at most, of separating anyone where all are equal.
        store: where finished episodes are kept; by default in memory.
        tell: called with episodes done, and how many there may be.

    Raises:
        ConfigError: no candidates, two of one name, or fewer episodes than one round takes.
        RunError: a reward outside [0, 1].

    >>> found = choose_agent(["a", "b", "c", "d"], lambda name, seed: {"c": 0.8}.get(name, 0.2) + (seed % 2) / 10)
    >>> found.winner, found.tied, found.episodes
    ('c', (), 64)
    """
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            f"candidates: {', '.join(names) or 'none'}", remedy="give one or more, each with its own name"
        )
    cap = first * len(names) * (math.ceil(math.log(len(names), 3)) + 1) if most is None else most
    if first < 1 or cap < first * len(names):
        raise ConfigError(
            f"most: {cap} episodes do not give each of {len(names)} candidates {first}",
            remedy=f"raise it to {max(1, first) * len(names)}, or name fewer candidates",
        )
    store = Store(None) if store is None else store
    rewards: dict[str, tuple[float, ...]] = dict.fromkeys(names, ())
    playing, each, rounds = list(names), first, list[tuple[str, ...]]()
    while True:
        rounds.append(tuple(playing))
        for name in playing:
            before = sum(map(len, rewards.values())) - len(rewards[name])
            items = {_key(name, seed): seed for seed in range(first_seed, first_seed + each)}
            found = store.map(
                items,
                lambda seed, name=name: play(name, seed),  # type: ignore[misc]
                of=float,
                tell=lambda done, _, before=before: tell(before + done, cap),  # type: ignore[misc]
            )
            rewards[name] = tuple(found.values())
            if not all(0 <= reward <= 1 for reward in rewards[name]):
                raise RunError(f"{name}: a reward of {max(rewards[name], key=abs):g}", "scale rewards to 0 to 1")
        leader = max(playing, key=lambda name: statistics.fmean(rewards[name]))
        verdicts = {
            name: _judged(rewards[leader], rewards[name], level / math.comb(len(names), 2))
            for name in names
            if name != leader
        }
        others = sorted((name for name in playing if name != leader), key=lambda name: verdicts[name].interval[1])
        left = cap - sum(map(len, rewards.values()))
        stay = [leader, *others[: max(2, math.ceil(len(playing) / 3)) - 1]]
        further = min(2 * each, left // len(stay))
        if further < 1 or all(verdicts[name].better == 0 for name in others):
            break
        playing, each = [name for name in names if name in stay], each + further
    by_mean = sorted(names, key=lambda name: -statistics.fmean(rewards[name]))
    tied = tuple(name for name in by_mean if name != leader and verdicts[name].better != 0)
    return ChosenAgent(leader, tied, rewards, tuple(rounds), verdicts)


def _key(name: str, seed: int) -> str:
    return f"episode {json.dumps([name, seed])}"


def _judged(one: Sequence[float], other: Sequence[float], level: float) -> Judgement:
    """On common seeds."""
    scores = [(1 + first - second) / 2 for first, second in zip(one, other, strict=False)]
    return judge(scores, most=max(1, len(scores)), level=level)


@dataclass(frozen=True)
class Probed:
    """What a candidate's answers to questions with known answers say of it, with 95 % intervals.

    Args:
        seconds: of an answer, its mean and what it is within.
        quality: share of good answers.
        asked: questions.
    """

    seconds: tuple[float, float, float]
    quality: tuple[float, float, float]
    asked: int


def dominated(probes: Mapping[str, Probed]) -> dict[str, str]:
    """Candidates for which another one is both faster and better, by more than all four intervals allow for.

    Returns:
        Of each such candidate, who is.

    >>> fast, slow = Probed((0.1, 0.1, 0.1), (0.9, 0.8, 0.95), 40), Probed((0.3, 0.2, 0.4), (0.6, 0.5, 0.7), 40)
    >>> dominated({"fast": fast, "slow": slow, "slow and good": Probed((0.3, 0.2, 0.4), (0.9, 0.8, 0.95), 40)})
    {'slow': 'fast'}
    """
    return {
        name: other
        for other, name in ((a, b) for pair in combinations(probes, 2) for a, b in (pair, pair[::-1]))
        if probes[other].seconds[2] < probes[name].seconds[1] and probes[other].quality[1] > probes[name].quality[2]
    }
