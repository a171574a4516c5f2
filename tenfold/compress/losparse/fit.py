"""The best low rank plus kept rows of one matrix for the inputs that it sees, and how far off its outputs then are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tenfold.compress.losparse.calibration import Moments
from tenfold.compress.losparse.factors import Factors
from tenfold.compress.losparse.mathematics import RIDGE
from tenfold.compress.losparse.plan import RankAndRows, diagonal, leading, weighed

STEADINESS = 0.3
"""Of a refit: what is added to the diagonal of the Gram matrix, as a share of its mean. Directions with fewer inputs
than that are hardly refitted, as what so few tokens say of them would not hold for others."""


@dataclass(frozen=True)
class Second:
    r"""Second moments per token: of what a matrix reads now, and of what it read before.

    Args:
        own: :math:`E[\tilde x\tilde x^\top]`, ``[in, in]``.
        cross: :math:`E[x\tilde x^\top]`.
        before: :math:`E[xx^\top]`.
    """

    own: Tensor
    cross: Tensor
    before: Tensor

    @classmethod
    def of(cls, sums: Moments) -> Second:
        """The means of sums over tokens."""
        return cls(*(part / max(1, sums.tokens) for part in (sums.own, sums.cross, sums.before)))

    @cached_property
    def half(self) -> Tensor:
        r""":math:`\tilde C` of :math:`\tilde G=\tilde C\tilde C^\top=E[\tilde x\tilde x^\top]`, float64."""
        return root(self.own.double())

    @cached_property
    def steady(self) -> Tensor:
        """The same with `STEADINESS` for a refit."""
        return root(self.own.double(), STEADINESS / len(self.own))

    def error(self, weight: Tensor, factors: Factors, outputs: Tensor) -> float:
        r"""How far off the outputs are, :math:`\sum_jB_{jj}E[(W_jx-\hat W_j\tilde x)^2]` over the same of them.

        Args:
            weight: :math:`W`, ``[out, in]``.
            factors: :math:`\hat W`.
            outputs: :math:`B`, ``[out, out]`` or ``[out]``.
        """
        weight, new, outputs = (part.to(self.own) for part in (weight, factors.dense(), diagonal(outputs)))
        before = ((weight @ self.before) * weight).sum(1)
        squares = before - 2 * ((weight @ self.cross) * new).sum(1) + ((new @ self.own) * new).sum(1)
        whole = float((outputs * before).sum())
        return max(0.0, float((outputs * squares).sum())) / whole if whole > 0 else 0.0


def fit_matrix(
    weight: Tensor,
    choice: RankAndRows,
    order: Tensor,
    seen: Second,
    costs: Tensor,
    *,
    refit: bool,
) -> Factors:
    r"""Factors of a matrix whose outputs come nearest to those before.

    The matrix that does so without any limit is :math:`W'=W+W(E[x\tilde x^\top]-\tilde G)\tilde G^{-1}` (with
    ``refit``; else :math:`W`). Of the rows that are not kept the low-rank part is
    :math:`B^{-1/2}UU^\top B^{1/2}W'` with the leading left singular vectors :math:`U` of
    :math:`B^{1/2}W'\tilde C`, :math:`\tilde G=\tilde C\tilde C^\top`: reduced-rank regression. Kept rows are those of
    :math:`W'`.

    Args:
        weight: :math:`W`, ``[out, in]``, float64.
        choice: rank and number of kept rows.
        order: ``[out]``, the rows in the order in which they are kept.
        seen: what the matrix reads.
        costs: :math:`B^{1/2}` among the rows that are not kept, in their order, float64, as
            `tenfold.compress.losparse.plan.half` makes it.
        refit: see above.

    Returns:
        Tensors in float64.
    """
    if refit:
        change = (seen.cross.double() - seen.own.double()).T @ weight.T
        weight = weight + torch.cholesky_solve(change, seen.steady).T
    kept, others = order[: choice.kept], order[choice.kept :]
    left = weight.new_zeros(len(weight), choice.rank)
    basis, right = nearest_low_rank(weighed(weight[others], costs), seen.half, choice.rank)
    left[others] = weighed(basis, costs, undo=True)
    return Factors(left, right, kept, weight[kept])


def nearest_low_rank(weight: Tensor, half: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two factors, ``[rows, rank]`` orthonormal and ``[rank, in]``, whose product errs least on its inputs.

    What the inputs never show is projected along with the rest, not dropped.

    Args:
        weight: ``[rows, in]``, float64.
        half: a square root of the Gram matrix of the inputs.
        rank: at most ``min(rows, in)``.
    """
    if rank == 0 or len(weight) == 0:
        return weight.new_zeros(len(weight), rank), weight.new_zeros(rank, weight.shape[1])
    seen = weight @ half
    basis = leading(seen, rank)
    if len(weight) > weight.shape[1]:
        basis = torch.linalg.qr(seen @ basis).Q
    return basis, basis.T @ weight


def root(gram: Tensor, ridge: float = RIDGE) -> Tensor:
    """A square root of a matrix of second moments, lower triangular, whatever its rank.

    Args:
        gram: ``[in, in]``, float64.
        ridge: share of the trace that is added to the diagonal, so that directions without inputs have a little.
    """
    trace = gram.diagonal().sum()
    level = torch.where(trace > 0, ridge * trace, 1.0)
    return torch.linalg.cholesky(gram + level * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
