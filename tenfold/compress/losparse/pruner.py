"""Choose the rows that stay while the model trains in any loop: what LoSparse does around each optimizer step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tenfold.adapt.cutting import cut, uncuttable
from tenfold.adapt.running import LogCallback, check_same, find_total, in_steps, running_trainer
from tenfold.adapt.step_hooks import StepHooks, family
from tenfold.compress.losparse.masked import LoSparseLinear
from tenfold.config.losparse import LoSparsePaper
from tenfold.core.importance import Importance, ScoredPart, allocate
from tenfold.core.schedule import CubicSchedule
from tenfold.errors import ConfigError, RunError

STATE = "tenfold.losparse"
"""Key in the optimizer's state, which torch saves and loads with the moments whatever loop does it."""


def pruning_schedule(config: LoSparsePaper, share: float, total: int) -> CubicSchedule:
    """The share of the rest that may be kept at each step of a run.

    Args:
        config: the phases.
        share: what may be kept at the end, from 0 to 1.
        total: optimizer steps.

    Raises:
        ConfigError: phases that do not fit the run.

    >>> schedule = pruning_schedule(LoSparsePaper(), 0.5, total=200)
    >>> schedule.warmup, schedule.cooldown, schedule.every
    (10, 60, 1)
    """
    warmup = in_steps(config.tinit, total)
    cooldown, every = (max(in_steps(span, total), 1) for span in (config.tfinal, config.interval))
    if warmup + cooldown >= total:
        raise ConfigError(
            f"tinit ({warmup} steps) and tfinal ({cooldown} steps) leave none of the {total} steps of this run to "
            "prune in",
            remedy=f"train for more steps, or lower them to at most {max(total - 1, 0)} together",
        )
    if every > total - cooldown:
        raise ConfigError(
            f"interval: {every} steps, but the rows are chosen for good after {total - cooldown} of the {total} steps",
            remedy="lower interval, or leave it out",
        )
    return CubicSchedule(1.0, share, total, warmup, cooldown, every)


class Pruner:
    r"""Steps 4 to 6 of LoSparse, made by whichever optimizer holds the layers.

    After each optimizer step the sensitivity of every row is taken (the mean of :math:`|S\,\partial S|` over the
    windows of the schedule; of a frozen rest :math:`|\sum\partial_{y_i}\mathcal L\,(Sx)_i|`), and when it is time the
    rows of all matrices are ranked together and the lowest dropped, so that those kept are never above the budget.
    Dropped rows train on and may return until the final phase. There the set is fixed, and the rest is cut to its kept
    rows, with what the optimizer remembers of them. A step that a gradient scaler skips changes nothing.

    Args:
        model: that holds the layers; only weakly held.
        layers: by name.
        rows: what may be kept of the rest at the end, in the unit of ``costs``.
        costs: of one row of each layer.
        config: phases and smoothing.
        total_steps: optimizer steps of the run; None to take them from the Trainer.
        started: called before the first step.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, LoSparseLinear],
        rows: int,
        costs: Mapping[str, int],
        config: LoSparsePaper,
        total_steps: int | None,
        started: Callable[[], None] = lambda: None,
    ) -> None:
        self.layers, self.costs, self.config = dict(layers), dict(costs), config
        self.all_rows = sum(layer.out_features * costs[name] for name, layer in layers.items())
        """What the rest holds at first, in the unit of the costs."""
        self.rows = min(rows, self.all_rows)
        """What it may hold at last."""
        self.step = 0
        """Optimizer steps made; also the zero-based index of the next one."""
        self.schedule: CubicSchedule | None = None
        self.history: list[tuple[int, int, Tensor | float]] = []
        """Step, budget, and what was kept, of each choice."""
        self.notes: list[str] = []
        """Sentences that the reader of a report must know."""
        self._fixed = False
        self._importance: Importance | None = None
        self._probes: dict[str, Tensor] = {}
        self._total_steps, self._started = total_steps, started
        self._model = weakref.ref(model)
        self._steps = StepHooks(
            STATE,
            tensors=self.trained,
            before=lambda *_: None,
            after=self._after_step,
            bind=self._bind,
            save=self.state_dict,
            load=self.load_state_dict,
        )
        self._finalizer = weakref.finalize(model, _remove, self._steps.handles)

    def trained(self) -> list[Tensor]:
        """The tensors of the layers that an optimizer has to hold."""
        return [t for layer in self.layers.values() for t in (layer.left, layer.right, layer.rest) if t.requires_grad]

    def close(self) -> None:
        """Take all hooks off."""
        self._finalizer()

    # ------------------------------------------------------------------ around a step

    @torch.no_grad()
    def _after_step(self) -> None:
        schedule = self._running
        if not self._fixed:
            final = self.step >= schedule.total - schedule.cooldown
            self._observe()
            if final or schedule.due(self.step):
                self._choose(self.rows if final else int(schedule.value(self.step) * self.all_rows * (1 + 1e-12)))
            if final:
                self._fix()
        else:
            self._hold()
        self.step += 1

    @property
    def _running(self) -> CubicSchedule:
        if self.schedule is None:
            raise RunError("no optimizer has stepped the compressed layers yet", remedy="train first")
        return self.schedule

    def _observe(self) -> None:
        if self._importance is None:
            return
        for name, probe in self._probes.items():
            gate = self.layers[name].gate
            probe.grad = None if gate is None or gate.grad is None else gate.grad.to(probe)
            if gate is not None:
                gate.grad = None
        self._importance.observe(self.step)

    def _choose(self, budget: int) -> None:
        if self._importance is None:
            return
        found = allocate(self._importance.scores(), budget, self.costs)
        for name, score in self._importance.scores().items():
            self.layers[name].score.copy_(score)
        for name, mask in found.masks.items():
            self.layers[name].drop(mask)
        self._forget()
        self.history.append((self.step, budget, found.spent))

    def _hold(self) -> None:
        """Keep the rows at zero that were dropped for good and could not be cut off."""
        whole = [layer for layer in self.layers.values() if not layer.is_cut and not layer.frozen]
        for layer in whole:
            layer.drop(layer.mask)
        if whole:
            self._forget()

    def _hold_gradients(self) -> None:
        """Rows that were dropped for good, and are still there, take no part in the norm that gradients are cut to."""
        for layer in self.layers.values():
            if layer.rest.requires_grad and not layer.is_cut:
                dropped = ~layer.mask[:, None]
                self._steps.handles.append(
                    layer.rest.register_hook(lambda gradient, dropped=dropped: gradient.masked_fill(dropped, 0))
                )

    def _forget(self) -> None:
        """Clear the optimizer's moments of dropped rows: they would move them again."""
        optimizer = self._steps.optimizer
        for member in family(optimizer) if optimizer is not None else ():
            for layer in self.layers.values():
                if not (moments := _moments(member, layer.rest)):
                    continue
                dropped = ~layer.mask[layer.kept][:, None]
                for moment in moments:
                    moment.masked_fill_(dropped, 0)

    def _fix(self) -> None:
        """Choose for good: forget the averages, and cut off what was dropped."""
        self._fixed = True
        if self._importance is not None:
            if self._importance.missing or self._importance.non_finite:
                self.notes.append(
                    f"{self._importance.missing} gradients were missing and {self._importance.non_finite} numbers of "
                    "others were not finite; these were not scored"
                )
            self._importance, self._probes = None, {}
        optimizer = self._steps.optimizer
        if optimizer is None:
            return
        if reason := uncuttable(optimizer, [layer.rest for layer in self.layers.values()]):
            self.notes.append(f"dropped rows were masked, not removed: {reason}")
            self._hold_gradients()
            return
        for layer in self.layers.values():
            layer.gate = None
            if not bool(layer.mask.all()):
                order = layer.order()
                cut(layer.rest, 0, order, optimizer)
                layer.kept = order

    # ------------------------------------------------------------------ binding to an optimizer

    def _bind(self, optimizer: Optimizer) -> None:
        trainer = running_trainer(self._model())
        if any(layer.frozen for layer in self.layers.values()) and _processes() > 1:
            raise RunError(
                f"rows of a frozen rest are ranked by what one process sees, and there are {_processes()}",
                remedy="train in one process, or without frozen",
            )
        if self.schedule is None:
            total = find_total(trainer, self._total_steps, None, "LoSparse")
            self.schedule = pruning_schedule(self.config, self.rows / self.all_rows, total)
            self._importance = self._make_importance()
            self._started()
        if trainer is not None:
            trainer.remove_callback(LogCallback)
            trainer.add_callback(LogCallback(self.numbers))

    def _make_importance(self) -> Importance:
        self._probes = {name: torch.ones_like(layer.score) for name, layer in self.layers.items() if layer.frozen}
        parts = {
            name: [ScoredPart(self._probes.get(name, layer.rest), 0, "sum")] for name, layer in self.layers.items()
        }
        every = self._running.every
        return Importance(parts, self.config.beta, None, smoothing="window", window=every, resolution="unit")

    # ------------------------------------------------------------------ state

    def _settings(self) -> dict[str, Any]:
        """What a resumed run must share with the saved one, as plain values."""
        schedule = self._running
        return {
            "rows": self.rows,
            "costs": self.costs,
            "ranks": {name: len(layer.right) for name, layer in self.layers.items()},
            "frozen": [name for name, layer in self.layers.items() if layer.frozen],
            "beta": self.config.beta,
            "steps": schedule.total,
            "tinit": schedule.warmup,
            "tfinal": schedule.cooldown,
            "interval": schedule.every,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything beyond the model (which holds the masks) that a resumed run needs: tensors and plain values."""
        return {
            "settings": self._settings(),
            "step": self.step,
            "fixed": self._fixed,
            "history": [[step, budget, float(kept)] for step, budget, kept in self.history],
            "notes": list(self.notes),
            "importance": self._importance.state_dict() if self._importance is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a saved run stopped.

        Raises:
            RunError: when the saved run had another configuration.
        """
        check_same(self._settings(), state["settings"])
        self.step, self._fixed = state["step"], state["fixed"]
        self.history = [(step, budget, kept) for step, budget, kept in state["history"]]
        self.notes = list(state["notes"])
        if self._fixed:
            self._importance, self._probes = None, {}
            self._hold_gradients()
        else:
            self._importance = self._make_importance()
            self._importance.load_state_dict(state["importance"])

    # ------------------------------------------------------------------ what is known

    def kept(self) -> int:
        """What the rows that are kept now cost. Waits for the device."""
        return sum(int(layer.mask.sum()) * self.costs[name] for name, layer in self.layers.items())

    @torch.no_grad()
    def finish(self) -> None:
        """Come down to the budget where the training ended early, or an earlier checkpoint was loaded back.

        Raises:
            RunError: when nothing was trained, so that there is nothing to choose by.
        """
        if self.step == 0 and not any(bool(layer.score.any()) for layer in self.layers.values()):
            raise RunError(
                "the compressed layers were never trained: no optimizer has stepped them, so no rows were chosen",
                remedy="train with a torch.optim optimizer that holds the model's own parameters",
            )
        if (held := self.kept()) <= self.rows:
            return
        self.notes.append(
            f"the layers hold rows of {held:,} numbers after step {self.step}, before the final phase, and the budget "
            f"is {self.rows:,}: the best were kept, and not trained further"
        )
        scores = self._importance.scores() if self._importance is not None else {}
        if not any(bool(score.any()) for score in scores.values()):
            scores = {name: layer.score for name, layer in self.layers.items()}
        if not any(bool(score.any()) for score in scores.values()):  # no window has ended
            scores = {name: layer.rest.square().sum(1) for name, layer in self.layers.items()}
        previous = {name: layer.mask for name, layer in self.layers.items()}
        for name, mask in allocate(scores, self.rows, self.costs, previous=previous).masks.items():
            self.layers[name].score.copy_(scores[name])
            self.layers[name].drop(mask)

    def numbers(self) -> dict[str, float]:
        """What to log: ``losparse/rows`` kept, as a share of all, and ``losparse/budget``. Waits for the device."""
        found = {"losparse/rows": self.kept() / self.all_rows}
        if self.schedule is not None:
            found["losparse/budget"] = self.schedule.value(max(self.step - 1, 0))
        return found


def _processes() -> int:
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return int(torch.distributed.get_world_size()) if there else 1


def _moments(optimizer: Optimizer, parameter: Tensor) -> list[Tensor]:
    state = optimizer.state.get(parameter, {})
    return [
        value
        for value in state.values()
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point()
    ]


def _remove(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()
