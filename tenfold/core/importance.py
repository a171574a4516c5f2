"""Which units of a model its loss depends on, and how to spend a budget on them. AdaLoRA and LoSparse share it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from tenfold.errors import ConfigError, RunError


@dataclass(frozen=True)
class ScoredPart:
    """One tensor that contributes one number to each unit of its group.

    Args:
        tensor: read together with its ``.grad``; never written.
        unit_dim: the dimension that counts the units; all others are reduced.
        reduce: how the entries of a unit become one number.
    """

    tensor: Tensor
    unit_dim: int
    reduce: Literal["mean", "sum"] = "mean"

    def fold(self, entries: Tensor) -> Tensor:
        """Reduce ``entries``, of the tensor's shape, to ``[units]``."""
        rest = [dim for dim in range(entries.ndim) if dim != self.unit_dim % entries.ndim]
        if not rest:
            return entries
        return entries.mean(rest) if self.reduce == "mean" else entries.sum(rest)


class Importance:
    r"""Smoothed sensitivity times uncertainty, for every unit of every group.

    For an entry :math:`w` with gradient :math:`g`, at each observation

    .. math:: I = |w\,g|,\quad \bar I \leftarrow \beta_1\bar I + (1-\beta_1)I,\quad
              \bar U \leftarrow \beta_2\bar U + (1-\beta_2)|I - \bar I|,\quad s = \bar I\,\bar U,

    from zero and without bias correction, :math:`|I-\bar I|` with the new :math:`\bar I`; the score of a unit is the
    sum over the parts of its group of the reduced :math:`s` (AdaLoRA, arXiv 2303.10512, section 3.2).
    With ``beta2=None`` there is no uncertainty, :math:`s = \bar I` (LoSparse, arXiv 2306.11222). Note that with it the
    score of an entry whose sensitivity never changes tends to zero.

    A missing gradient, and every entry with a gradient that is not finite, is skipped: its averages stay as they are.
    Both are counted. Averages are kept in float32 (float64 for float64 tensors): products of smaller numbers
    underflow. On an accelerator nothing here waits for the device.

    Args:
        parts: of each group, in the order in which ties are later broken.
        beta1: of the sensitivity, in (0, 1).
        beta2: of the uncertainty, in (0, 1), or None for none.
        smoothing: ``step`` averages every observation; ``window`` averages the mean of each ``window`` steps once the
            next window begins, so that a decision at its first step uses the steps before it.
        window: steps in a window.
        resolution: ``unit`` keeps one average per unit instead of one per entry; exact, and only allowed, without
            uncertainty, because the reduction commutes with the averages.

    Raises:
        ConfigError: betas outside the open interval, or ``unit`` with an uncertainty.

    >>> weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    >>> importance = Importance({"w": [ScoredPart(weight, 0, "sum")]}, beta1=0.5, beta2=None)
    >>> weight.sum().backward()
    >>> importance.observe(0)
    >>> importance.scores()["w"].tolist()
    [1.5, 3.5]
    """

    def __init__(
        self,
        parts: Mapping[str, Sequence[ScoredPart]],
        beta1: float = 0.85,
        beta2: float | None = 0.85,
        smoothing: Literal["step", "window"] = "step",
        window: int = 1,
        resolution: Literal["entry", "unit"] = "entry",
    ) -> None:
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if beta is not None and not 0 < beta < 1:
                raise ConfigError(f"{name}: {beta:g} is outside (0, 1)", remedy="give 0.8 to 0.95")
        if resolution == "unit" and beta2 is not None:
            raise ConfigError("resolution: one average per unit is only exact without an uncertainty (beta2=None)")
        if window < 1:
            raise ConfigError(f"window: {window} is below 1 step")
        self._parts = {group: tuple(members) for group, members in parts.items()}
        self._weight1, self._weight2 = 1 - beta1, None if beta2 is None else 1 - beta2
        self._window = window if smoothing == "window" else None
        self._per_unit = resolution == "unit"
        self._blocks = _blocks([part for members in self._parts.values() for part in members], self._per_unit)
        for block in self._blocks:
            block.allocate(uncertainty=beta2 is not None, window=self._window is not None)
        self._in_window = 0
        self.missing = 0
        """Gradients that were None, summed over observations."""

    @property
    def non_finite(self) -> int:
        """Entries (or units) skipped for a gradient that was not finite. Reading it waits for the device."""
        return sum(int(block.non_finite) for block in self._blocks)

    @torch.no_grad()
    def observe(self, step: int) -> None:
        """Take in the tensors and the gradients that they hold now. Once per optimizer step.

        Args:
            step: zero-based index of the optimizer step; places the windows.
        """
        if self._window is not None:
            if step % self._window == 0:
                for block in self._blocks:
                    if block.mean is not None:
                        block.smooth(block.mean, self._weight1, self._weight2)
                self._in_window = 0
            self._in_window += 1
        for block in self._blocks:
            sensitivity, missing = block.sensitivity()
            self.missing += missing
            if missing == len(block.parts):
                continue
            if self._window is None:
                block.smooth(sensitivity, self._weight1, self._weight2)
            else:
                block.accumulate(sensitivity, self._in_window)

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor]:
        """The score of every unit.

        Returns:
            For each group a tensor ``[units]`` of the averages' dtype.

        Raises:
            RunError: after `release`.
        """
        if not self._blocks:
            raise RunError("the importance scores were released: what is kept was decided for good")
        values = {place: score for block in self._blocks for place, score in block.scores().items()}
        found, place = {}, 0
        for group, members in self._parts.items():
            total = values[place]
            for other in range(place + 1, place + len(members)):
                total = total + values[other]
            found[group] = total
            place += len(members)
        return found

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on as if nothing had happened: tensors and plain numbers."""
        state: dict[str, Any] = {"missing": self.missing, "in_window": self._in_window, "non_finite": self.non_finite}
        for place, part in (item for block in self._blocks for item in block.state().items()):
            state |= {f"{place}.{name}": tensor for name, tensor in part.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of an `Importance` of the same parts.

        Raises:
            RunError: when it belongs to other parts or another smoothing.
        """
        own = {key: value for key, value in self.state_dict().items() if isinstance(value, Tensor)}
        for key, tensor in own.items():
            given = state.get(key)
            if not isinstance(given, Tensor) or given.shape != tensor.shape:
                found = list(given.shape) if isinstance(given, Tensor) else "absent"
                raise RunError(
                    f"saved importance: {key} is {found}, expected {list(tensor.shape)}",
                    remedy="resume with the model, targets and ranks of the saved run, or start a fresh one",
                )
            tensor.copy_(given)
        self.missing, self._in_window = int(state["missing"]), int(state["in_window"])
        for index, block in enumerate(self._blocks):
            block.non_finite.fill_(int(state["non_finite"]) if index == 0 else 0)

    def release(self) -> None:
        """Free the averages; the scores are gone."""
        self._blocks = []


class _Block:
    """Parts whose averages lie one behind the other, so that a device needs few kernels for all of them.

    Args:
        parts: with their places among all parts; of one type, on one device.
        per_unit: keep one average per unit instead of one per entry.
    """

    def __init__(self, parts: Mapping[int, ScoredPart], per_unit: bool) -> None:
        self.places, self.parts = tuple(parts), tuple(parts.values())
        self._per_unit = per_unit
        first = self.parts[0].tensor
        self._dtype, self._device = torch.promote_types(first.dtype, torch.float32), first.device
        # On a CPU looking at a number costs nothing; elsewhere it would wait for the device.
        self._may_look = first.device.type == "cpu"
        shapes = [part.tensor.shape for part in self.parts]
        self._shapes = [
            (shape[part.unit_dim],) if per_unit else tuple(shape)
            for part, shape in zip(self.parts, shapes, strict=True)
        ]
        self._sizes = [math.prod(shape) for shape in self._shapes]

    def allocate(self, uncertainty: bool, window: bool) -> None:
        zeros = partial(torch.zeros, sum(self._sizes), dtype=self._dtype, device=self._device)
        self.average, self.uncertainty = zeros(), zeros() if uncertainty else None
        self.mean = zeros() if window else None
        self.non_finite = torch.zeros((), dtype=torch.int64, device=self._device)

    def sensitivity(self) -> tuple[Tensor, int]:
        """:math:`|w g|` of all parts in a row; NaN, which is skipped, where a gradient is missing; how many are."""
        gradients = [part.tensor.grad for part in self.parts]
        missing = sum(gradient is None for gradient in gradients)
        if missing == len(gradients):
            return self.average, missing
        if missing:  # what follows counts them among the non-finite
            self.non_finite -= sum(size for size, g in zip(self._sizes, gradients, strict=True) if g is None)
        product = _in_a_row([part.tensor for part in self.parts], self._dtype) * _in_a_row(
            [
                torch.full_like(part.tensor, math.nan) if gradient is None else gradient
                for part, gradient in zip(self.parts, gradients, strict=True)
            ],
            self._dtype,
        )
        product.abs_()
        if self._per_unit:
            pieces = torch.split(product, [part.tensor.numel() for part in self.parts])
            product = torch.cat(
                [part.fold(piece.view(part.tensor.shape)) for part, piece in zip(self.parts, pieces, strict=True)]
            )
        return product, missing

    def smooth(self, value: Tensor, weight1: float, weight2: float | None) -> None:
        """One step of the averages towards `value`, except where it is not finite."""
        if self._may_look and math.isfinite(value.sum().item()):
            self.average.lerp_(value, weight1)
            if weight2 is not None and self.uncertainty is not None:
                self.uncertainty.lerp_((value - self.average).abs_(), weight2)
            return
        usable = value.isfinite()
        self.non_finite += (~usable).sum()
        torch.where(usable, torch.lerp(self.average, value, weight1), self.average, out=self.average)
        if weight2 is not None and self.uncertainty is not None:
            moved = torch.lerp(self.uncertainty, (value - self.average).abs_(), weight2)
            torch.where(usable, moved, self.uncertainty, out=self.uncertainty)

    def accumulate(self, value: Tensor, count: int) -> None:
        """The running mean of a window, which restarts at its first step."""
        if self.mean is None:
            return
        if count == 1:
            self.mean.zero_()
        usable = value.isfinite()
        self.non_finite += (~usable).sum()
        torch.where(usable, torch.lerp(self.mean, value, 1 / count), self.mean, out=self.mean)

    def scores(self) -> dict[int, Tensor]:
        """``[units]`` of each part, by its place; never a view of the averages."""
        product = self.average.clone() if self.uncertainty is None else self.average * self.uncertainty
        pieces = torch.split(product, self._sizes) if len(self.parts) > 1 else (product,)
        each = zip(self.places, self.parts, pieces, self._shapes, strict=True)
        return {
            place: piece if shape[part.unit_dim % len(shape)] == piece.numel() else part.fold(piece.view(shape))
            for place, part, piece, shape in each
        }

    def state(self) -> dict[int, dict[str, Tensor]]:
        """The averages of each part, as views: how parts share blocks depends on the device and is not saved."""
        averages = {"average": self.average, "uncertainty": self.uncertainty, "mean": self.mean}
        split = {name: torch.split(t, self._sizes) for name, t in averages.items() if t is not None}
        return {
            place: {name: pieces[index] for name, pieces in split.items()} for index, place in enumerate(self.places)
        }


def _in_a_row(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    if len(tensors) == 1:
        return tensors[0].reshape(-1).to(dtype)
    return torch.cat([tensor.reshape(-1) for tensor in tensors]).to(dtype)


_SMALL = 2**12
"""Entries below which a part shares its block on a CPU; what is larger is fastest alone, while it is in the cache."""
_BLOCK = 2**24
"""Entries in a block on an accelerator: few kernels, and temporaries of at most 64 MiB each."""


def _blocks(parts: Sequence[ScoredPart], per_unit: bool) -> list[_Block]:
    """Few large blocks on an accelerator; on a CPU large parts one by one, and the small ones together."""
    groups: dict[object, list[dict[int, ScoredPart]]] = {}
    for place, part in enumerate(parts):
        tensor = part.tensor
        if tensor.device.type == "cpu" and tensor.numel() >= _SMALL:
            groups[place] = [{place: part}]
            continue
        alike = groups.setdefault((tensor.dtype, tensor.device), [{}])
        if sum(other.tensor.numel() for other in alike[-1].values()) + tensor.numel() > _BLOCK:
            alike.append({})
        alike[-1][place] = part
    return [_Block(group, per_unit) for alike in groups.values() for group in alike if group]


@dataclass(frozen=True)
class Allocation:
    """What a budget buys. The three numbers are 0-dimensional tensors: reading one (``int(units)``) is the only wait.

    Args:
        masks: for each group ``bool[units]``, True where kept.
        spent: cost of what is kept.
        units: how many units are kept.
        not_numbers: how many scores were NaN; they rank below all others.
    """

    masks: dict[str, Tensor]
    spent: Tensor
    units: Tensor
    not_numbers: Tensor


@torch.no_grad()
def allocate(
    scores: Mapping[str, Tensor],
    budget: float,
    cost: float | Mapping[str, float] = 1,
    floor: Mapping[str, int] | None = None,
    cap: Mapping[str, int] | None = None,
    previous: Mapping[str, Tensor] | None = None,
) -> Allocation:
    """Keep the units of the highest score per cost, as many as the budget pays for.

    All units of all groups are sorted together (ties by the order of the groups, then by index) and the longest prefix
    whose cost fits is kept. It ends at the first unit that does not fit, even if a cheaper one would further down: so
    what a budget keeps is always kept by a larger one, and the budget is never exceeded. With a cost of 1 exactly
    ``min(budget, units)`` are kept, whatever the scores.

    Args:
        scores: for each group ``[units]``, all on one device.
        budget: in the unit of `cost`; compared with a relative slack of 1e-9.
        cost: of one unit, above 0; one number or one for each group.
        floor: units that a group keeps at least; paid for first, and kept even beyond the budget.
        cap: units that a group keeps at most.
        previous: masks; where given, a unit that they drop stays dropped (a floor outweighs it).

    Raises:
        ConfigError: a budget below 0, a cost that is not positive, or a floor above the cap.

    >>> found = allocate({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0, 2.0])}, budget=2)
    >>> {group: mask.tolist() for group, mask in found.masks.items()}
    {'a': [True, False], 'b': [True, False]}
    """
    if not budget >= 0:  # NaN as well
        raise ConfigError(
            f"budget: {budget:g} is not 0 or more", remedy="give what may be kept, in the unit of the cost"
        )
    groups = list(scores)
    costs = {group: cost[group] if isinstance(cost, Mapping) else cost for group in groups}
    floor, cap = floor or {}, cap or {}
    for group in groups:
        if not costs[group] > 0:
            raise ConfigError(f"cost of {group}: {costs[group]:g} is not above 0")
        if floor.get(group, 0) > cap.get(group, math.inf):
            raise ConfigError(f"{group}: the floor {floor[group]} is above the cap {cap[group]}")
    sizes = [len(scores[group]) for group in groups]
    score = torch.cat([scores[group] for group in groups])
    score = score.to(torch.promote_types(score.dtype, torch.float32))  # a quotient in half precision makes ties
    nan = score.isnan()
    price = _per_unit(groups, sizes, costs, score.device)
    worth = torch.where(nan, -math.inf, score) / price.to(score.dtype)
    order = worth.sort(descending=True, stable=True).indices
    must, may = torch.zeros_like(nan), torch.ones_like(nan)
    if floor or cap:
        place = torch.cat([_places(part) for part in torch.split(worth, sizes)])
        must = place < _per_unit(groups, sizes, {group: floor.get(group, 0) for group in groups}, score.device)
        may = place < _per_unit(groups, sizes, {group: cap.get(group, math.inf) for group in groups}, score.device)
    if previous is not None:
        may &= torch.cat([previous[group] for group in groups])
    if floor or cap or previous is not None:
        # What must be kept comes first and what may not comes last; both sorts are stable: nothing else changes.
        rank = must.to(torch.int8) - (~may & ~must).to(torch.int8)
        order = order[rank[order].sort(descending=True, stable=True).indices]
    fits = price[order].cumsum(0) <= budget * (1 + 1e-9)
    keep = torch.zeros_like(nan)
    keep[order] = (fits & may[order]) | must[order]
    masks = dict(zip(groups, torch.split(keep, sizes), strict=True))
    return Allocation(masks, (price * keep).sum(), keep.sum(), nan.sum())


def _places(worth: Tensor) -> Tensor:
    """The place of each unit within its group, 0 for the best."""
    places = torch.empty_like(worth, dtype=torch.int64)
    places[worth.sort(descending=True, stable=True).indices] = torch.arange(len(worth), device=worth.device)
    return places


def _per_unit(groups: Sequence[str], sizes: Sequence[int], values: Mapping[str, float], device: torch.device) -> Tensor:
    """A number of each group, repeated for each of its units; made on the device, without a copy to wait for."""
    filled = partial(torch.full, dtype=torch.float64, device=device)
    if len(set(values.values())) == 1:
        return filled((sum(sizes),), values[groups[0]])
    return torch.cat([filled((size,), values[group]) for group, size in zip(groups, sizes, strict=True)])
