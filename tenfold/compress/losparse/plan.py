"""One budget for the ranks and the kept rows of all matrices: whatever saves most of the loss is bought first."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tenfold.compress.losparse.factors import stored
from tenfold.errors import ConfigError

KEPT_SHARES = (0.0, 0.03, 0.07, 0.12, 0.2, 0.3, 0.45, 0.65)
"""Shares of the rows of a matrix that may be kept; with each of them the low-rank part is made for the rest."""

DOUBT = 1.25
"""Which rows matter is chosen by the same tokens that say how much they do, so what keeping them saves is found too
large. They are kept where they save more than a fifth of what is lost without."""


class RankAndRows(NamedTuple):
    """What is stored of a matrix: it is left as it is where ``kept`` is all of its rows."""

    rank: int
    kept: int


class Curve(NamedTuple):
    """What a matrix costs the loss at some choices.

    Args:
        choices: the points; the last one is the matrix as it is, with a loss of 0.
        numbers: ``[points]``, float64, what is stored at each.
        loss: ``[points]``, float64, all matrices in one unit.
        order: ``[out]``, the rows in the order in which they are kept.
    """

    choices: tuple[RankAndRows, ...]
    numbers: Tensor
    loss: Tensor
    order: Tensor


def curve(
    matrix: Tensor,
    outputs: Tensor | None = None,
    shares: Sequence[float] = KEPT_SHARES,
    *,
    elastic: bool = False,
) -> Curve:
    r"""How much of a matrix is lost, by rank and rows that are kept.

    The loss of a choice is exact for its rows: the sum of the squared singular values beyond the rank, of those rows
    that are not kept. Kept is what the low-rank part of all rows, at a third of the full rank, would miss most of.

    Args:
        matrix: ``[out, in]``, float32 or float64: :math:`WC`, such that its squared Frobenius norm is that of outputs.
        outputs: :math:`B`, ``[out, out]``, or its diagonal, ``[out]``: what an error of outputs costs. Default: the
            same for all.
        shares: of rows that may be kept.
        elastic: as `tenfold.compress.losparse.factors.stored` counts.

    >>> found = curve(torch.eye(4, dtype=torch.float64), shares=[0, 0.5])
    >>> [(choice.rank, choice.kept, float(loss)) for choice, loss in zip(found.choices, found.loss)][-3:]
    [(0, 2, 2.0), (1, 2, 1.0), (0, 4, 0.0)]
    """
    out, inner = matrix.shape
    outputs = matrix.new_ones(out) if outputs is None else outputs.to(matrix)
    # So that products are neither too small nor too large for float32.
    size, price = float(matrix.norm()) or 1.0, float(outputs.max()) or 1.0
    matrix, outputs = matrix / size, outputs / price
    order = row_order(weighed(matrix, diagonal(outputs).sqrt()))
    spectra = spectra_without(matrix, outputs, order, _kept(out, shares))
    scaled = {kept: size**2 * price * values.double() for kept, values in spectra.items()}
    return points(out, inner, scaled, order, elastic=elastic)


def spectra_without(matrix: Tensor, outputs: Tensor, order: Tensor, kept: Sequence[int]) -> dict[int, Tensor]:
    r"""The squared singular values of :math:`B^{1/2}M` without the rows that are kept, for several numbers of these.

    The rows are taken in from the last to the first, so that each choice adds to what is there of the one before: to
    :math:`M^\top BM`, or where the matrix is wide to :math:`F^\top M`, as the leading part of one factor
    :math:`FF^\top=B` is that of each.

    Args:
        matrix: :math:`M`, ``[out, in]``.
        outputs: :math:`B`, ``[out, out]``, or its diagonal, ``[out]``; positive.
        order: ``[out]``, the rows, those that are kept first.
        kept: how many are.

    Returns:
        By how many are kept, ``[min(out - kept, in)]``, descending.
    """
    out, inner = matrix.shape
    turned = order.flip(0)
    rows = matrix[turned]
    price = among(outputs, turned) if outputs.ndim == 2 else None
    if price is None:
        rows = weighed(rows, outputs[turned].sqrt())
    tall = out > inner
    factor = half(price) if price is not None and not tall else None
    made = rows.new_zeros(inner, inner) if tall else rows.new_zeros(out, inner)
    found, done = {}, 0
    for left in sorted(out - count for count in kept):
        new = rows[done:left]
        if tall:
            costing = new if price is None else price[done:left, done:left] @ new
            made += new.T @ costing
            if price is not None and done:
                across = new.T @ (price[done:left, :done] @ rows[:done])
                made += across + across.T
        elif factor is None:
            made[done:left] = new
        else:
            made[:done] += factor[done:left, :done].T @ new
            made[done:left] = factor[done:left, done:left].T @ new
        products = made if tall else made[:left] @ made[:left].T
        found[out - left] = torch.linalg.eigvalsh(products).flip(0).clamp_min(0)[: min(left, inner)]
        done = left
    return {count: found[count] for count in kept}


def diagonal(outputs: Tensor) -> Tensor:
    """What an error of each output costs by itself, ``[out]``."""
    return outputs if outputs.ndim == 1 else outputs.diagonal()


def among(outputs: Tensor, rows: Tensor) -> Tensor:
    """What errors of some rows alone cost."""
    return outputs[rows] if outputs.ndim == 1 else outputs[rows][:, rows]


def half(outputs: Tensor) -> Tensor:
    r""":math:`B^{1/2}`: the lower triangular factor of :math:`B`, ``[out, out]``, or of its diagonal the root.

    Args:
        outputs: :math:`B`, ``[out, out]``, or its diagonal, ``[out]``; positive.
    """
    return outputs.sqrt() if outputs.ndim == 1 else torch.linalg.cholesky(outputs.double()).to(outputs)


def weighed(matrix: Tensor, root: Tensor, *, undo: bool = False) -> Tensor:
    r""":math:`B^{1/2}` times a matrix, such that its squared Frobenius norm is a loss.

    Args:
        matrix: ``[out, n]``.
        root: as `half` makes it, of :math:`B`.
        undo: take the square root off again.
    """
    if root.ndim == 1:
        return matrix / root[:, None] if undo else root[:, None] * matrix
    return torch.linalg.solve_triangular(root.T, matrix, upper=True) if undo else root.T @ matrix


def points(
    out_features: int, in_features: int, spectra: Mapping[int, Tensor], order: Tensor, *, elastic: bool = False
) -> Curve:
    """The curve of a matrix by the squared singular values of what is left when so many rows are kept.

    Args:
        out_features: its rows.
        in_features: its columns.
        spectra: by the number of kept rows, the squared singular values of the others, descending, float64.
        order: as in `Curve`.
        elastic: as `tenfold.compress.losparse.factors.stored` counts.
    """
    lost = {
        kept: torch.cat((values.flip(0).cumsum(0).flip(0), values.new_zeros(1))).tolist()
        for kept, values in spectra.items()
    }
    lost[out_features] = [0.0]
    choices = _choices(out_features, in_features, list(spectra), elastic)
    numbers = [stored(out_features, in_features, *choice, elastic=elastic) for choice in choices]
    losses = [lost[choice.kept][choice.rank] for choice in choices]
    return Curve(choices, torch.tensor(numbers, dtype=torch.float64), torch.tensor(losses, dtype=torch.float64), order)


def choices_of(out_features: int, in_features: int, *, elastic: bool = False) -> tuple[RankAndRows, ...]:
    """What may be stored of a matrix of this shape; the last choice is the matrix as it is.

    >>> choices_of(2, 3)
    (RankAndRows(rank=0, kept=0), RankAndRows(rank=1, kept=0), RankAndRows(rank=0, kept=1), RankAndRows(rank=0, kept=2))
    """
    return _choices(out_features, in_features, _kept(out_features, KEPT_SHARES), elastic)


def _choices(out: int, inner: int, kept: Sequence[int], elastic: bool) -> tuple[RankAndRows, ...]:
    """Those that hold fewer numbers than the matrix, and the matrix."""
    found = [
        RankAndRows(rank, count)
        for count in kept
        for rank in _ranks(min(out - count, inner))
        if stored(out, inner, rank, count, elastic=elastic) < out * inner
    ]
    return (*found, RankAndRows(0, out))


def _kept(out: int, shares: Sequence[float]) -> list[int]:
    return list(dict.fromkeys(int(share * out) for share in shares))


def row_order(matrix: Tensor) -> Tensor:
    """The rows, first those of which a low-rank part would miss most.

    Args:
        matrix: ``[out, in]``, float64.
    """
    missed = residual(matrix, min(matrix.shape) // 3)
    return missed.square().sum(1).argsort(descending=True, stable=True)


def residual(matrix: Tensor, rank: int) -> Tensor:
    """What the best approximation of this rank leaves of a matrix; by the eigenvectors of its smaller side."""
    return matrix - nearest(matrix, rank)


def nearest(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of this rank, ``[out, in]``."""
    basis = leading(matrix, rank)
    return basis @ (basis.T @ matrix) if len(basis) == matrix.shape[0] else matrix @ basis @ basis.T


def leading(matrix: Tensor, rank: int) -> Tensor:
    """The leading singular vectors of the shorter side of a matrix, ``[min(out, in), rank]``; the left of a square."""
    vectors = torch.linalg.eigh(_products(matrix)).eigenvectors
    return vectors[:, vectors.shape[1] - rank :].flip(1)


def _products(matrix: Tensor) -> Tensor:
    return matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix


def _ranks(full: int) -> list[int]:
    """Ranks from 0 to the full one: all where there are few, then multiples of 8, which devices multiply faster.

    >>> _ranks(20), len(_ranks(576))
    ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20], 80)
    """
    return list(range(full + 1)) if full < 64 else [*range(8), *range(8, full, 8), full]


def spend(
    curves: Mapping[str, Curve],
    budget: float,
    price: Callable[[str, RankAndRows], float] | None = None,
    doubt: float = 1.0,
) -> dict[str, RankAndRows]:
    """What to store of each matrix, such that all together lose the least within the budget.

    For a price of each number every matrix takes the choice of which price and loss together are least; the lowest
    price that keeps to the budget is found by bisection. What is left of it buys the best steps that still fit.

    Args:
        curves: of each matrix.
        budget: of all matrices together, never exceeded; in the unit of the price.
        price: what a choice costs. Default: the numbers that it stores.
        doubt: what the loss of choices with some rows kept is multiplied by, see `DOUBT`.

    Raises:
        ConfigError: a budget that buys nothing; names the smallest that does.

    >>> curves = {"a": curve(torch.eye(4).double()), "b": curve(10 * torch.eye(4).double())}
    >>> spend(curves, 24)
    {'a': RankAndRows(rank=0, kept=2), 'b': RankAndRows(rank=0, kept=4)}
    """
    costs = {
        name: found.numbers
        if price is None
        else torch.tensor([price(name, choice) for choice in found.choices], dtype=torch.float64)
        for name, found in curves.items()
    }
    check_buys(costs, budget)
    curves = {
        name: found._replace(loss=torch.where(_some_rows(found), doubt * found.loss, found.loss))
        for name, found in curves.items()
    }
    places = _at_price(curves, costs, budget)
    _fill(curves, costs, places, budget)
    return {name: found.choices[places[name]] for name, found in curves.items()}


def check_buys(costs: Mapping[str, Tensor], budget: float) -> None:
    """Refuse a budget that buys nothing.

    Args:
        costs: of each matrix, ``[choices]``, the last that of the matrix as it is.
        budget: of all together, in the same unit.

    Raises:
        ConfigError: naming the smallest budget that buys something.
    """
    least = sum(float(cost.min()) for cost in costs.values())
    steps = [
        float(cost[cost > cost.min()].min() - cost.min()) for cost in costs.values() if bool((cost > cost.min()).any())
    ]
    smallest = least + min(steps, default=0.0)
    if budget < smallest:
        everything = sum(float(cost[-1]) for cost in costs.values())
        raise ConfigError(
            f"budget: {budget:,.0f} buys neither a rank nor a row of any matrix",
            remedy=f"give {smallest:,.0f} or more ({100 * smallest / everything:.2g}%)",
        )


def _some_rows(found: Curve) -> Tensor:
    return torch.tensor([0 < choice.kept < found.choices[-1].kept for choice in found.choices])


def _at_price(curves: Mapping[str, Curve], costs: Mapping[str, Tensor], budget: float) -> dict[str, int]:
    """The best choices at the lowest price that keeps to the budget."""

    def taken(price: float) -> tuple[dict[str, int], float]:
        places = {name: int((found.loss + price * costs[name]).argmin()) for name, found in curves.items()}
        return places, sum(float(costs[name][place]) for name, place in places.items())

    places, spent = taken(0.0)
    if spent <= budget:
        return places
    low, high = 1e-40, 1e40
    cheapest = {name: int(cost.argmin()) for name, cost in costs.items()}
    best = cheapest
    for _ in range(120):
        middle = math.sqrt(low * high)
        places, spent = taken(middle)
        if spent <= budget:
            high, best = middle, places
        else:
            low = middle
    return best


def _fill(curves: Mapping[str, Curve], costs: Mapping[str, Tensor], places: dict[str, int], budget: float) -> None:
    """Spend what is left on the steps that save most for their cost, as long as one fits."""
    left = budget - sum(float(costs[name][place]) for name, place in places.items())
    while True:
        best, worth = None, 0.0
        for name, found in curves.items():
            extra = costs[name] - costs[name][places[name]]
            saved = found.loss[places[name]] - found.loss
            rate = torch.where((extra > 0) & (extra <= left), saved / extra.clamp_min(1e-12), 0)
            place = int(rate.argmax())
            if float(rate[place]) > worth:
                best, worth = (name, place, float(extra[place])), float(rate[place])
        if best is None:
            return
        places[best[0]] = best[1]
        left -= best[2]
