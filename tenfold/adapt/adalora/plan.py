"""How large the adapter is, at first and at last: what the configuration means for the matrices of one model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tenfold.adapt.running import in_steps
from tenfold.config.adalora import AdaLoraConfig
from tenfold.config.budget import trainable_parameters
from tenfold.core.schedule import CubicSchedule
from tenfold.errors import ConfigError
from tenfold.models.layer_map import Slot

DEFAULT_RANK = 8.0


@dataclass(frozen=True)
class RankPlan:
    """The sizes of an adapter.

    Args:
        ranks: of each matrix at the start; ``initial_rank``, or the matrix's smaller side.
        costs: parameters of one triplet of each matrix, ``in_features + out_features``.
        scale: of the update, ``alpha / initial_rank``; the same for all matrices, and constant.
        by: what ``start`` and ``end`` count.
        start: what the ranks at the start amount to.
        end: what may be left at the end.
        floor: triplets that each matrix keeps at least.
        cap: triplets that each matrix keeps at most once shrinking begins.
    """

    ranks: dict[str, int]
    costs: dict[str, int]
    scale: float
    by: Literal["count", "parameters"]
    start: int
    end: int
    floor: dict[str, int]
    cap: dict[str, int]

    @property
    def unit_costs(self) -> dict[str, int]:
        """Of one triplet, in the unit of the budget."""
        return dict.fromkeys(self.costs, 1) if self.by == "count" else self.costs


def make_plan(config: AdaLoraConfig, slots: Sequence[Slot], parameters: int) -> RankPlan:
    """The sizes that the configuration means.

    Args:
        config: budget or rank, initial rank, floors, caps, scale.
        slots: the targeted matrices.
        parameters: of the whole model; what a share is a share of.

    Raises:
        ConfigError: a budget that buys no triplet or is above what the matrices can hold, or floors and caps that do
            not fit it.

    >>> slots = [Slot(name, "q", 0, 100, 60, "linear", "decoder") for name in "ab"]
    >>> plan = make_plan(AdaLoraConfig(rank=4), slots, parameters=10**6)
    >>> plan.ranks, plan.start, plan.end
    ({'a': 6, 'b': 6}, 12, 8)
    """
    costs = {slot.name: slot.in_features + slot.out_features for slot in slots}
    affordable = _affordable(config, parameters)
    mean = affordable / sum(costs.values()) if affordable is not None else config.rank or DEFAULT_RANK
    initial = config.initial_rank or max(math.ceil(1.5 * mean), 1)
    ranks = {slot.name: min(initial, slot.in_features, slot.out_features) for slot in slots}
    alpha = config.alpha if config.alpha is not None else 2.0 * initial
    return size_plan(config, ranks, costs, alpha / initial, parameters)


def size_plan(
    config: AdaLoraConfig, ranks: Mapping[str, int], costs: Mapping[str, int], scale: float, parameters: int
) -> RankPlan:
    """The plan for given ranks at the start.

    Raises:
        ConfigError: as `make_plan`.
    """
    affordable = _affordable(config, parameters)
    by = config.allocate_by or ("parameters" if affordable is not None else "count")
    mean = config.rank or DEFAULT_RANK
    if by == "count":
        start, end = sum(ranks.values()), math.floor(mean * len(ranks) + 1e-9)
        unit = dict.fromkeys(ranks, 1)
    else:
        end = math.floor(affordable if affordable is not None else mean * sum(costs.values()))
        start, unit = sum(rank * costs[name] for name, rank in ranks.items()), dict(costs)
    floor = {name: min(config.min_rank, rank) for name, rank in ranks.items()}
    cap = {name: min(config.max_rank or rank, rank) for name, rank in ranks.items()}
    _check(config, RankPlan(dict(ranks), dict(costs), scale, by, start, end, floor, cap), unit, parameters)
    return RankPlan(dict(ranks), dict(costs), scale, by, start, end, floor, cap)


def _affordable(config: AdaLoraConfig, parameters: int) -> float | None:
    """The budget in parameters, or None where a rank is given."""
    return None if config.budget is None else trainable_parameters(config.budget, parameters)


def _check(config: AdaLoraConfig, plan: RankPlan, unit: Mapping[str, int], parameters: int) -> None:
    what = "triplets" if plan.by == "count" else "parameters"
    asked = f"budget: {config.budget!r}" if config.budget is not None else f"rank: {config.rank or DEFAULT_RANK:g}"
    cheapest = min(unit.values())
    if plan.end < cheapest:
        least = min(plan.costs.values())
        raise ConfigError(
            f"{asked} is {plan.end:,} {what} for {len(plan.ranks)} matrices, less than one triplet ({cheapest:,})",
            remedy=f"give at least {least / parameters:.4%} of the model, or rank {1 / len(plan.ranks):.2g}",
        )
    if plan.end > plan.start:
        raise ConfigError(
            f"{asked} is {plan.end:,} {what}, above the {plan.start:,} that {len(plan.ranks)} matrices of rank "
            f"{max(plan.ranks.values())} hold at the start",
            remedy="raise initial_rank, add targets, or lower the budget",
        )
    least = sum(unit[name] * count for name, count in plan.floor.items())
    if least > plan.end:
        raise ConfigError(
            f"min_rank: {config.min_rank} for {len(plan.ranks)} matrices is {least:,} {what}, above the {plan.end:,} "
            f"of {asked}",
            remedy="lower min_rank or raise the budget",
        )
    most = sum(unit[name] * count for name, count in plan.cap.items())
    if most < plan.end:
        raise ConfigError(
            f"max_rank: {config.max_rank} for {len(plan.ranks)} matrices is {most:,} {what}, below the {plan.end:,} of "
            f"{asked}",
            remedy="raise max_rank or lower the budget",
        )


def make_schedule(config: AdaLoraConfig, plan: RankPlan, total: int) -> CubicSchedule:
    """The budget at each step of a run of ``total`` optimizer steps.

    Raises:
        ConfigError: phases that do not fit the run.

    >>> slots = [Slot("a", "q", 0, 100, 60, "linear", "decoder")]
    >>> schedule = make_schedule(AdaLoraConfig(rank=2), make_plan(AdaLoraConfig(rank=2), slots, 10**6), total=1000)
    >>> schedule.warmup, schedule.cooldown, schedule.every
    (100, 500, 5)
    """
    steps = {name: in_steps(getattr(config, name), total) for name in ("tinit", "tfinal", "interval")}
    steps["tfinal"], steps["interval"] = max(steps["tfinal"], 1), max(steps["interval"], 1)
    if total == 1 and isinstance(config.tinit, float) and isinstance(config.tfinal, float):
        # Nothing to shrink in: the export keeps the best triplets, as after any run that ended early.
        steps["tinit"] = steps["tfinal"] = 0
    if steps["tinit"] + steps["tfinal"] >= total:
        raise ConfigError(
            f"tinit ({steps['tinit']} steps) and tfinal ({steps['tfinal']} steps) leave none of the {total} steps of "
            "this run to shrink in",
            remedy=f"lower them to at most {max(total - 1, 0)} together, or give shares such as 0.1 and 0.5",
        )
    return CubicSchedule(plan.start, plan.end, total, steps["tinit"], steps["tfinal"], steps["interval"])


def too_short(config: AdaLoraConfig, schedule: CubicSchedule) -> str | None:
    """A note where the ranks are decided before the averages have forgotten that they began at zero.

    An average with a beta has taken in 95 % of what it should after ``3 / (1 - beta)`` steps, 20 at the default.
    Whoever gives ``tfinal`` as a number of steps has chosen when to decide, and is told nothing.
    """
    decided, settled = (
        schedule.total - schedule.cooldown,
        math.ceil(3 / (1 - max(config.beta1, config.beta2 or 0)) - 1e-9),
    )
    if decided >= settled or not isinstance(config.tfinal, float):
        return None
    enough = math.ceil(settled / (1 - config.tfinal) - 1e-9)
    steps = "1 optimizer step is" if schedule.total == 1 else f"{schedule.total} optimizer steps are"
    return (
        f"{steps} few for AdaLoRA: the ranks are decided after {decided} of them, before the scores settle (about "
        f"{settled} steps); train for {enough} steps or more (steps, or epochs: {math.ceil(enough / schedule.total)} "
        "times as many), or use lora"
    )


def settings(config: AdaLoraConfig, plan: RankPlan, schedule: CubicSchedule) -> dict[str, Any]:
    """What a resumed run must share with the saved one, as plain values."""
    names = ("beta1", "beta2", "gamma", "importance", "shrink", "dropout")
    return {name: getattr(config, name) for name in names} | {
        "orthogonality": config.paper.orthogonality,
        "sensitivity_at": config.paper.sensitivity_at,
        "scale": plan.scale,
        "allocate_by": plan.by,
        "start": plan.start,
        "end": plan.end,
        "steps": schedule.total,
        "tinit": schedule.warmup,
        "tfinal": schedule.cooldown,
        "interval": schedule.every,
        "min_rank": config.min_rank,
        "max_rank": config.max_rank,
        "matrices": sorted(plan.ranks),
    }
