"""Many fights at once for TorchRL, which trains policies in them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tenfold.arena.fighting.batch import FightBatch, Numbers
from tenfold.arena.fighting.fight import OBSERVED
from tenfold.arena.fighting.moves import INPUTS
from tenfold.arena.fighting.rules import FRAMES, LARGEST
from tenfold.errors import ConfigError, MissingDependencyError

try:
    from tensordict import TensorDict, TensorDictBase
    from torchrl.data import Bounded, Categorical, Composite, Unbounded
    from torchrl.envs import EnvBase
except ImportError:
    raise MissingDependencyError("fights for TorchRL need torchrl", 'pip install "tenfold[marl]"') from None

GROUP = "players"


class FightingTorchEnv(EnvBase):
    """N fights of two players, a frame a step, on the CPU.

    Under ``players``: ``observation`` int32 ``[N, 2, OBSERVED]`` (`Fight.seen_by`, so that one policy can play both
    sides), ``action`` int64 ``[N, 2]`` (places in `moves.INPUTS`), ``reward`` float32 ``[N, 2, 1]`` as of
    `batch.Stepped`. ``done``, ``terminated`` (knock-out) and ``truncated`` (the bell) are ``[N, 1]``. A fight that is
    over stays so until TorchRL resets it.

    Args:
        games: N, 1 or more.
        bell: frames after which a fight ends at the latest, 1 or more.

    Raises:
        ConfigError: fewer.
    """

    def __init__(self, games: int, bell: int = FRAMES) -> None:
        if games < 1:
            raise ConfigError(f"games: must be 1 or more, got {games}", remedy="give how many fights run side by side")
        super().__init__(batch_size=[games], device="cpu")
        self.batch = FightBatch(automatic_reset=False, bell=bell)
        two = (games, 2)
        seen = Bounded(-LARGEST, LARGEST, (*two, OBSERVED), dtype=torch.int32)
        pressed = Categorical(len(INPUTS), two, dtype=torch.int64)
        self.observation_spec = Composite({GROUP: Composite(observation=seen, shape=two)}, shape=(games,))
        self.action_spec = Composite({GROUP: Composite(action=pressed, shape=two)}, shape=(games,))
        paid = Composite(reward=Unbounded((*two, 1)), shape=two)
        self.reward_spec = Composite({GROUP: paid}, shape=(games,))
        flags = {name: Categorical(2, (games, 1), dtype=torch.bool) for name in ("done", "terminated", "truncated")}
        self.done_spec = Composite(flags, shape=(games,))

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        chosen = None if tensordict is None else tensordict.get("_reset", None)
        if chosen is None or len(self.batch.frames) == 0:
            seen = self.batch.reset(range(self.batch_size[0]))
        else:
            seen = self.batch.restart(chosen.reshape(-1).numpy())
        return self._told(seen, np.zeros(self.batch_size[0], np.bool_), np.zeros(self.batch_size[0], np.bool_))

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        stepped = self.batch.step(tensordict[GROUP, "action"].numpy())
        told = self._told(stepped.observations, stepped.knocked_out, stepped.timed_out)
        told[GROUP, "reward"] = torch.from_numpy(stepped.rewards.copy()).unsqueeze(-1)
        return told

    def _set_seed(self, seed: int | None) -> None:
        """Nothing is drawn by chance."""

    def _told(self, seen: Numbers, knocked_out: Any, timed_out: Any) -> TensorDictBase:
        terminated = torch.from_numpy(knocked_out.copy()).unsqueeze(-1)
        truncated = torch.from_numpy(timed_out.copy()).unsqueeze(-1)
        players = TensorDict({"observation": torch.from_numpy(seen.copy())}, [*self.batch_size, 2])
        return TensorDict(
            {GROUP: players, "terminated": terminated, "truncated": truncated, "done": terminated | truncated},
            self.batch_size,
        )
