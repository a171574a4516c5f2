"""Train the adapter within any loop: what AdaLoRA does around each optimizer step, hung on torch's own hooks."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer

from tenfold.adapt.adalora.attaching import Matrix, set_patterns, trainable
from tenfold.adapt.adalora.layer import ADAPTER
from tenfold.adapt.adalora.mathematics import penalty
from tenfold.adapt.adalora.plan import RankPlan, make_schedule, settings, too_short
from tenfold.adapt.adalora.shrinking import cut_triplets
from tenfold.adapt.cutting import uncuttable
from tenfold.adapt.running import LogCallback, check_same, find_total, running_trainer
from tenfold.adapt.step_hooks import Replaced, StepHooks, replace_closure, skips
from tenfold.config.adalora import AdaLoraConfig
from tenfold.core.importance import Importance, ScoredPart, allocate
from tenfold.core.schedule import CubicSchedule
from tenfold.errors import RunError

STATE = "tenfold.adalora"
"""Key in the optimizer's state, which torch saves and loads with the moments whatever loop does it."""


class Controller:
    """AdaLoRA's steps 5 to 10 (section 3.3 and algorithm 1), made by whichever optimizer holds the adapter.

    Before each optimizer step the penalty's gradient is added, once, so that it is right under gradient accumulation,
    in trainers that compute their own loss, and never part of an evaluation. (Loops clip before that; the penalty's
    share is not clipped.) An optimizer that evaluates the loss by itself (LBFGS) gets it at every evaluation; of
    optimizers that wrap others (Lookahead, SAM) the outermost counts. After the step the sensitivities are taken and,
    when it is time, lambdas are zeroed. A step that a gradient scaler skips changes nothing. The state travels in the
    optimizer's own ``state_dict``.

    Args:
        model: PEFT's model; only weakly held.
        matrices: the adapted matrices by name.
        plan: sizes.
        config: everything else.
        total_steps: optimizer steps of the run; None to take them from the Trainer or ``config.steps``.
        trained: whether the adapter came with trained values.
    """

    def __init__(
        self,
        model: PeftModel,
        matrices: Mapping[str, Matrix],
        plan: RankPlan,
        config: AdaLoraConfig,
        total_steps: int | None,
        trained: bool,
    ) -> None:
        self.matrices, self.plan, self.config = dict(matrices), plan, config
        self.trained = trained
        self.step = 0
        """Optimizer steps made; also the zero-based index of the next one."""
        self.schedule: CubicSchedule | None = None
        self.masks = {name: torch.ones(m.rank, dtype=torch.bool) for name, m in self.matrices.items()}
        """What the last allocation kept, for each matrix ``bool[rank]``."""
        self.scores: dict[str, Tensor] = {}
        """The scores of the last allocation, for each matrix ``[rank]``."""
        self.not_numbers: Tensor | None = None
        """How many scores of the last allocation were NaN."""
        self.history: list[tuple[int, int, Tensor | int]] = []
        """Step, budget and triplets kept, of each allocation."""
        self.notes: list[str] = []
        """Sentences that the reader of a report must know."""
        self._fixed = False
        self._partial: dict[str, Tensor] = {}  # fixed masks that drop something
        self._dropped: dict[str, tuple[Tensor, Tensor]] = {}  # columns of P and rows of Q that were removed
        self._still: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # where, and what, of those that were only masked
        self._singular: dict[str, Tensor] = {}
        self._importance: Importance | None = None
        self._penalty: Tensor | None = None
        self._total_steps = total_steps
        self._model = weakref.ref(model)
        self._steps = StepHooks(
            STATE,
            tensors=lambda: trainable(self.matrices),
            before=self._before_step,
            after=self._after_step,
            bind=self._bind,
            save=self.state_dict,
            load=self.load_state_dict,
        )
        self._hooks = self._steps.handles
        self._hooks.append(model.register_state_dict_pre_hook(lambda *_: self.check_stepped()))
        self._finalizer = weakref.finalize(model, _remove, self._hooks)

    def close(self) -> None:
        """Take all hooks off."""
        self._finalizer()

    # ------------------------------------------------------------------ around a step

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Replaced:
        # A scaler hands fused optimizers gradients that it has not unscaled yet.
        scale = getattr(optimizer, "grad_scale", None)
        found = replace_closure(args, kwargs, lambda closure: self._evaluating(closure, optimizer, scale))
        if found is None:
            self._finish_gradients(optimizer, scale)
        return found

    def _evaluating(self, closure: Callable[[], Any], optimizer: Optimizer, scale: Tensor | None) -> Callable[[], Any]:
        """The closure of an optimizer that evaluates by itself (LBFGS, SAM): of the loss with the penalty, and its
        gradients are those of both at every evaluation.
        """  # noqa: D205
        observe = True

        def evaluate() -> Any:
            nonlocal observe
            loss = closure()
            self._finish_gradients(optimizer, scale, observe)
            observe = False
            if loss is None or self._penalty is None:
                return loss
            return loss + self.config.gamma * self._penalty.item()

        return evaluate

    def _finish_gradients(self, optimizer: Optimizer, scale: Tensor | None, observe: bool = True) -> None:
        if self.config.gamma > 0:
            self._add_penalty(scale)
        if observe and self.config.paper.sensitivity_at == "before" and not skips(optimizer):
            self._observe(scale)

    @torch.no_grad()
    def _add_penalty(self, scale: Tensor | None) -> None:
        P, Q = self._factors()
        self._penalty, EP, EQ = penalty(P, Q, self.config.paper.orthogonality)
        if scale is not None:
            EP, EQ = [[E * scale.to(E.device) for E in Es] for Es in (EP, EQ)]
        # Where a gradient is missing the loss did not reach the factor, and the optimizer will not move it.
        for matrix, p, q, Ep, Eq in zip(self.matrices.values(), P, Q, EP, EQ, strict=True):
            if matrix.P.grad is not None:
                matrix.P.grad.addmm_(p, Ep[:, : matrix.rank], alpha=self.config.gamma)
            if matrix.Q.grad is not None:
                matrix.Q.grad.addmm_(Eq[: matrix.rank], q, alpha=self.config.gamma)

    def _factors(self) -> tuple[list[Tensor], list[Tensor]]:
        """P and Q of each matrix as the penalty sees them: what was removed still takes part, behind the rest."""
        P, Q = [], []
        for name, matrix in self.matrices.items():
            p, q = matrix.P.detach(), matrix.Q.detach()
            if name in self._dropped:
                p, q = torch.cat([p, self._dropped[name][0]], 1), torch.cat([q, self._dropped[name][1]])
            P.append(p)
            Q.append(q)
        return P, Q

    def _after_step(self) -> None:
        if self.config.paper.sensitivity_at == "after":  # fused optimizers have unscaled the gradients by now
            self._observe(None)
        self._allocate()
        self.step += 1

    @property
    def _final(self) -> bool:
        """Whether the mask is, or must now be, fixed. Entered at the last decision, however the loop counts."""
        return self._fixed or self.step >= self._running.total - self._running.cooldown

    @property
    def _running(self) -> CubicSchedule:
        if self.schedule is None:
            raise RunError("no optimizer has stepped the adapter yet", remedy="train first")
        return self.schedule

    def _observe(self, scale: Tensor | None) -> None:
        if self._final or self._importance is None:
            return
        if scale is not None:
            gradients = [t.grad for t in trainable(self.matrices) if t.grad is not None]
            for gradient in gradients:
                gradient.div_(scale.to(gradient.device))  # a power of two: exact both ways
            self._importance.observe(self.step)
            for gradient in gradients:
                gradient.mul_(scale.to(gradient.device))
        else:
            self._importance.observe(self.step)

    @torch.no_grad()
    def _allocate(self) -> None:
        schedule, final = self._running, self._final
        if not self._fixed and self._importance is not None and (final or schedule.due(self.step)):
            budget = int(self.plan.end if final else schedule.value(self.step))
            self.scores = self._importance.scores()
            floor = self.plan.floor if self.config.min_rank else None
            cap = self.plan.cap if self.config.max_rank else None
            found = allocate(self.scores, budget, self.plan.unit_costs, floor, cap)
            self.masks, self.not_numbers = found.masks, found.not_numbers
            self.history.append((self.step, budget, found.units))
            self._zero(self.masks)
            if final:
                self._fix()
        elif self._fixed:
            self._zero(self._partial)
            for name, (index, p, q) in self._still.items():
                self.matrices[name].P.index_copy_(1, index, p)
                self.matrices[name].Q.index_copy_(0, index, q)

    def _zero(self, masks: Mapping[str, Tensor]) -> None:
        """Set the lambdas to 0 that the masks drop."""
        if masks:
            drop = torch.cat(list(masks.values())).logical_not()[:, None]
            pieces = torch.split(drop, [len(mask) for mask in masks.values()])
            for name, piece in zip(masks, pieces, strict=True):
                self._singular[name].masked_fill_(piece, 0)

    def _fix(self) -> None:
        """Decide for good: forget the averages, and remove what was dropped."""
        self._fixed = True
        if self._importance is not None:
            if self._importance.missing or self._importance.non_finite:
                self.notes.append(
                    f"{self._importance.missing} gradients were missing and {self._importance.non_finite} entries of "
                    "others were not finite; these were not scored"
                )
            self._importance.release()
            self._importance = None
        if self.not_numbers is not None and int(self.not_numbers):
            self.notes.append(f"{int(self.not_numbers)} triplets had no score (NaN) and ranked last")
        self._shrink()
        self._hold()

    def _hold(self) -> None:
        """From now on dropped triplets that were not removed stand still, as the removed ones do."""
        self._partial = {name: mask for name, mask in self.masks.items() if not bool(mask.all())}
        self._still = {}
        for name, mask in self._partial.items():
            matrix, index = self.matrices[name], mask.logical_not().nonzero().flatten()
            self._still[name] = (index, matrix.P.detach()[:, index].clone(), matrix.Q.detach()[index].clone())

    def _shrink(self) -> None:
        optimizer = self._steps.optimizer
        if not self.config.shrink or optimizer is None:
            return
        if reason := uncuttable(optimizer, trainable(self.matrices)):
            self.notes.append(f"dropped triplets were masked, not removed: {reason}")
            return
        keep = {}
        for name, mask in self.masks.items():
            index = mask.nonzero().flatten()
            # A matrix that keeps nothing keeps one masked triplet, because PEFT knows no rank 0.
            keep[name] = index if len(index) else self.scores[name].argmax()[None]
        self._dropped = cut_triplets(self.matrices, keep, optimizer)
        self.masks = {name: mask[keep[name]] for name, mask in self.masks.items()}
        self.scores = {name: score[keep[name]] for name, score in self.scores.items()}
        self._tell_peft()

    def _tell_peft(self) -> None:
        """Keep PEFT's configuration true to the shapes, so that what it saves can be opened."""
        model = self._model()
        if model is not None:
            # A copy: TRL gives its frozen reference adapter, whose ranks stay, the same configuration object.
            config = copy.copy(model.peft_config[ADAPTER])
            set_patterns(config, {name: matrix.rank for name, matrix in self.matrices.items()}, self.plan.scale)
            model.peft_config[ADAPTER] = config

    # ------------------------------------------------------------------ binding to an optimizer

    def _bind(self, optimizer: Optimizer) -> None:
        trainer = running_trainer(self._model())
        if self.schedule is None:
            total = find_total(trainer, self._total_steps, self.config.steps, "AdaLoRA")
            self.schedule = make_schedule(self.config, self.plan, total)
            self._importance = self._make_importance()
            if note := too_short(self.config, self.schedule):
                self.notes.append(note)
        if trainer is not None:
            trainer.remove_callback(LogCallback)
            trainer.add_callback(LogCallback(self.numbers))
        self._singular = {name: matrix.singular for name, matrix in self.matrices.items()}
        self._note_decay(optimizer)

    def _note_decay(self, optimizer: Optimizer) -> None:
        ours = {id(tensor) for tensor in trainable(self.matrices)}
        for group in optimizer.param_groups:
            decay = group.get("weight_decay") or 0
            if decay > 0 and any(id(parameter) in ours for parameter in group["params"]):
                note = f"weight decay of {decay:g} acts on the adapter, against the orthogonality penalty: set it to 0"
                self.notes += [note] if note not in self.notes else []

    def _make_importance(self) -> Importance:
        parts = {}
        for name, matrix in self.matrices.items():
            light = self.config.importance == "light"
            members = ((matrix.singular, 0),) if light else ((matrix.Q, 0), (matrix.singular, 0), (matrix.P, 1))
            parts[name] = [ScoredPart(tensor, dim) for tensor, dim in members]
        return Importance(parts, self.config.beta1, self.config.beta2)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Everything beyond the weights that a resumed run needs: tensors and plain values."""
        return {
            "settings": settings(self.config, self.plan, self._running),
            "step": self.step,
            "fixed": self._fixed,
            "masks": dict(self.masks),
            "scores": dict(self.scores),
            "history": [[step, budget, int(kept)] for step, budget, kept in self.history],
            "notes": list(self.notes),
            "dropped": {name: list(pair) for name, pair in self._dropped.items()},
            "importance": self._importance.state_dict() if self._importance is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a saved run stopped.

        Raises:
            RunError: when the saved run had another configuration.
        """
        check_same(settings(self.config, self.plan, self._running), state["settings"])
        device = next(iter(self.matrices.values())).singular.device
        self.step, self._fixed = state["step"], state["fixed"]
        self.masks = {name: mask.to(device) for name, mask in state["masks"].items()}
        self.scores = {name: score.to(device) for name, score in state["scores"].items()}
        self.history = [(step, budget, kept) for step, budget, kept in state["history"]]
        self.notes = list(state["notes"])
        if self._fixed:
            self._importance = None
            removed = state.get("dropped", {}).items()
            self._dropped = {name: (p.to(device), q.to(device)) for name, (p, q) in removed}
            self._hold()
            self._tell_peft()
        else:
            self._importance = self._make_importance()
            self._importance.load_state_dict(state["importance"])

    # ------------------------------------------------------------------ what is known

    def kept(self) -> dict[str, Tensor]:
        """For each matrix ``bool[rank]``: what the last allocation kept, or, after other weights were loaded over the
        adapter (a best checkpoint), what they use.
        """  # noqa: D205
        return {
            name: mask if len(mask) == self.matrices[name].rank else (self.matrices[name].singular != 0).flatten()
            for name, mask in self.masks.items()
        }

    def latest_scores(self) -> dict[str, Tensor]:
        """The newest score of each triplet, ``[rank]`` for each matrix; empty where nothing was scored, or where other
        weights were loaded over the adapter since.
        """  # noqa: D205
        scores = self._importance.scores() if self._importance is not None and self.step else self.scores
        return scores if all(len(score) == self.matrices[name].rank for name, score in scores.items()) else {}

    def check_stepped(self) -> None:
        """Refuse to go on as if all was well when the adapter was trained and no step was seen.

        Raises:
            RunError: the update is no longer zero although no optimizer with torch's step hooks has stepped.
        """
        if self.step > 0 or self.trained or any(m.layer.lora_B[ADAPTER].loaded for m in self.matrices.values()):
            return
        # Whatever the start, P or lambda is zero until something has trained them.
        if any(bool((m.P.detach() * m.singular.detach().T).any()) for m in self.matrices.values()):
            raise RunError(
                "the adapter was trained, but AdaLoRA saw no optimizer step: nothing was allocated",
                remedy="train with a torch.optim optimizer that holds the model's own parameters (no flattened copies)",
            )

    def numbers(self) -> dict[str, float]:
        """What to log: ``adalora/penalty`` (before gamma), ``adalora/budget``, ``adalora/triplets`` kept, and counts of
        skipped gradients. Waits for the device.
        """  # noqa: D205
        found = {"adalora/triplets": float(sum(int(mask.sum()) for mask in self.masks.values()))}
        if self._penalty is not None:
            found["adalora/penalty"] = self._penalty.item()
        if self.schedule is not None:
            found["adalora/budget"] = float(int(self.schedule.value(max(self.step - 1, 0))))
        if self._importance is not None and (self._importance.missing or self._importance.non_finite):
            found["adalora/missing_gradients"] = float(self._importance.missing)
            found["adalora/non_finite_entries"] = float(self._importance.non_finite)
        return found


def _remove(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()
