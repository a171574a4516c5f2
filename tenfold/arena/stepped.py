"""An environment that goes on step by step, such as one of PettingZoo's, as a game whose agents take time.

Steps are the clock. While an agent thinks, its player idles and the other one plays on, so that a result depends on
neither the speed of the machine nor that of the environment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from tenfold.arena.agents import Action, Agent, Turn
from tenfold.arena.tournament import Played


def _text(observation: Any, info: Mapping[str, Any]) -> str:
    return str(info["text"])


@dataclass(frozen=True)
class SteppedGame:
    """An environment of two with the interface of ``pettingzoo.ParallelEnv``, as a game for `play_tournament`.

    A player whose last move is over is asked, on the observation before a step; its answer of L seconds begins
    ⌈L · rate⌉ steps later. An answer that is none is a step of ``idle``. Who has more reward in all has won.

    Args:
        make: gives an environment that can be reset; it may be the same one again.
        rules: what every question begins with.
        moves: the answers, each with its actions, one for each step, one at least.
        idle: the action while there is nothing to do.
        rate: steps in a second.
        state: a player's state in words, from observation and info; by default ``info["text"]``.

    >>> class Race:  # to 3 steps of one's own
    ...     def reset(self, seed=None):
    ...         self.agents, self.run = ["a", "b"], {"a": 0, "b": 0}
    ...         return self.run, {name: {"text": f"You ran {self.run[name]}."} for name in "ab"}
    ...     def step(self, actions):
    ...         self.run = {name: self.run[name] + actions[name] for name in "ab"}
    ...         won = {name: float(self.run[name] >= 3) for name in "ab"}
    ...         self.agents = [] if any(won.values()) else self.agents
    ...         return self.run, won, {}, {}, {name: {"text": f"You ran {self.run[name]}."} for name in "ab"}
    >>> class Runner:
    ...     def __init__(self, name, seconds):
    ...         self.name, self.seconds = name, seconds
    ...     def answer(self, questions):
    ...         return [Action("run", "run", self.seconds) for question in questions]
    >>> game = SteppedGame(Race, "Run!", {"run": [1], "rest": [0]}, idle=0, rate=10)
    >>> game((Runner("late", 0.1), Runner("quick", 0.05)), seed=0).score  # both take one step
    0.5
    >>> game((Runner("late", 0.11), Runner("quick", 0.1)), seed=0).score
    0.0
    """

    make: Callable[[], Any]
    rules: str
    moves: Mapping[str, Sequence[Any]]
    idle: Any
    rate: float
    state: Callable[[Any, Mapping[str, Any]], str] = _text

    def __call__(self, agents: tuple[Agent, ...], seed: int) -> Played:
        """One game; its facts are steps, and invalid answers of the ``first`` and the ``second`` agent."""
        env = self.make()
        observations, infos = env.reset(seed=seed)
        seats = [
            _Seat(player, agent, side) for side, (player, agent) in enumerate(zip(env.agents, agents, strict=True))
        ]
        steps, total = 0, [0.0, 0.0]
        while env.agents:
            playing = [seat for seat in seats if seat.player in env.agents]
            for seat in playing:
                if seat.is_done(steps):
                    seat.ask(self, observations[seat.player], infos[seat.player], seed, steps)
            actions = {seat.player: seat.press(steps, self.idle) for seat in playing}
            observations, rewards, _, _, infos = env.step(actions)
            steps += 1
            for seat in seats:
                total[seat.side] += float(rewards.get(seat.player, 0.0))
        lead = total[0] - total[1]
        return Played(
            0.5 if abs(lead) < 1e-9 else float(lead > 0),  # rewards of many steps are rounded
            rated=all(seat.invalid < seat.answers for seat in seats),
            facts={
                "steps": float(steps),
                "first invalid": float(seats[0].invalid),
                "second invalid": float(seats[1].invalid),
            },
        )


class _Seat:
    """A player: what it does, and from which step on."""

    def __init__(self, player: str, agent: Agent, side: int) -> None:
        self.player, self.agent, self.side = player, agent, side
        self.plan: Sequence[Any] = ()
        self.begins = self.answers = self.invalid = 0

    def is_done(self, step: int) -> bool:
        return step >= self.begins + len(self.plan)

    def ask(self, game: SteppedGame, observation: Any, info: Mapping[str, Any], seed: int, step: int) -> None:
        turn = Turn(
            game.rules,
            game.state(observation, info),
            tuple(game.moves),
            view=deepcopy(observation),
            seed=((2 * seed + self.side) << 32) + self.answers,
            time=step / game.rate,
            game=f"game {seed}:{self.side}",
        )
        action: Action = self.agent.answer([turn])[0]
        self.answers += 1
        self.invalid += action.choice is None
        self.begins = step + math.ceil(round(action.seconds * game.rate, 6))  # rounded: 60 * (7 / 60) is above 7
        self.plan = (game.idle,) if action.choice is None else game.moves[action.choice]

    def press(self, step: int, idle: Any) -> Any:
        return self.plan[step - self.begins] if step >= self.begins else idle
