"""The fight for PettingZoo: players ``p0`` and ``p1`` press an input in every frame.

Source: the specification of the latency arena, 7.3.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenfold.arena.fighting.fight import OBSERVED, Fight
from tenfold.arena.fighting.moves import INPUTS, MOVES
from tenfold.arena.fighting.picture import fight_as_image, fight_as_text
from tenfold.arena.fighting.question import NO_MOVE, state_in_words
from tenfold.arena.fighting.rules import ATTACKING, FRAMES, FULL, HEALTH, LARGEST, MODE, MOVE, TIME
from tenfold.errors import ConfigError, MissingDependencyError

try:
    from gymnasium.spaces import Box, Discrete
    from pettingzoo import ParallelEnv
except ImportError:
    raise MissingDependencyError(
        "the fight as an environment needs pettingzoo", 'pip install "tenfold[marl]"'
    ) from None

PLAYERS = ["p0", "p1"]


class FightingParallelEnv(ParallelEnv):
    """One fight, a frame a step, with the interface of ``pettingzoo.ParallelEnv``.

    Actions are places in `moves.INPUTS`, observations `Fight.seen_by`, int32 ``[OBSERVED]``. The reward is the change
    of own minus other's health / 1000, and 1 for winning or -1 for losing at the end; the two sum to 0. A knock-out
    terminates, the bell truncates. ``infos[player]["text"]`` tells the state in words.

    Args:
        render_mode: ``ansi`` gives text, ``rgb_array`` an image, None nothing.
        bell: frames after which a fight ends at the latest.

    Raises:
        ConfigError: another render mode, or a bell before the first frame.
    """

    metadata = {"name": "tenfold_fighting_v0", "render_modes": ["ansi", "rgb_array"], "render_fps": 60}

    def __init__(self, render_mode: str | None = None, bell: int = FRAMES) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):  # type: ignore[misc]
            raise ConfigError(f"render_mode: unknown mode {render_mode!r}", remedy="take ansi, rgb_array or None")
        self.render_mode = render_mode
        self.possible_agents = list(PLAYERS)
        self.agents: list[str] = []
        self.fight = Fight(bell)
        self._last = [NO_MOVE, NO_MOVE]
        self._actions = {player: Discrete(len(INPUTS)) for player in PLAYERS}
        self._observations = {player: Box(-LARGEST, LARGEST, (OBSERVED,), np.int32) for player in PLAYERS}

    def observation_space(self, agent: str) -> Box:
        """Of one player."""
        return self._observations[agent]

    def action_space(self, agent: str) -> Discrete:
        """Of one player."""
        return self._actions[agent]

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, NDArray[Any]], dict[str, dict[str, Any]]]:
        """Begin. Nothing is drawn by chance: all seeds give the same fight."""
        self.agents = list(PLAYERS)
        self.fight = Fight(self.fight.bell)
        self._last = [NO_MOVE, NO_MOVE]
        return self._seen(), self._infos()

    def step(
        self, actions: dict[str, int]
    ) -> tuple[dict[str, NDArray[Any]], dict[str, float], dict[str, bool], dict[str, bool], dict[str, dict[str, Any]]]:
        """One frame: observations, rewards, terminated, truncated and infos by player."""
        before = self._lead()
        self.fight.step(*(int(actions[player]) for player in PLAYERS))
        for side, fighter in enumerate(self.fight.fighters):
            if fighter[MODE] == ATTACKING and fighter[TIME] == 1:
                self._last[side] = list(MOVES)[fighter[MOVE]]
        lead, knocked_out = self._lead(), self.fight.knocked_out
        reward = (lead - before) / FULL
        if self.fight.over:
            self.agents = []
            reward += (lead > 0) - (lead < 0)
        rewards = {"p0": reward, "p1": -reward}
        terminated = dict.fromkeys(PLAYERS, knocked_out)
        truncated = dict.fromkeys(PLAYERS, self.fight.over and not knocked_out)
        return self._seen(), rewards, terminated, truncated, self._infos()

    def render(self) -> str | NDArray[Any] | None:
        """The fight as it stands: text, uint8 ``[128, 384, 3]``, or None without a render mode."""
        if self.render_mode is None:
            return None
        return fight_as_text(self.fight) if self.render_mode == "ansi" else fight_as_image(self.fight)

    def state_hash(self) -> str:
        """`Fight.state_hash`."""
        return self.fight.state_hash()

    def _lead(self) -> int:
        first, second = self.fight.fighters
        return first[HEALTH] - second[HEALTH]

    def _seen(self) -> dict[str, NDArray[Any]]:
        return {player: np.array(self.fight.seen_by(side), np.int32) for side, player in enumerate(PLAYERS)}

    def _infos(self) -> dict[str, dict[str, Any]]:
        last = (self._last[0], self._last[1])
        return {player: {"text": state_in_words(self.fight, side, last)} for side, player in enumerate(PLAYERS)}
