"""Rows that span the others: what makes the form without loss."""

from __future__ import annotations

import torch
from scipy.linalg import qr, solve_triangular
from torch import Tensor


def spanning_rows(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a product of two factors that span it, and all its rows as combinations of these.

    Args:
        left: ``[rows, rank]``, float64.
        right: ``[rank, columns]``, float64.

    Returns:
        Which rows, ``[true rank]``; the combinations, ``[rows, true rank]``, of which those of the chosen rows are unit
        vectors.

    >>> left, right = torch.tensor([[1.0], [3.0], [2.0]]).double(), torch.ones(1, 4).double()
    >>> chosen, mix = spanning_rows(left, right)
    >>> chosen.tolist(), [round(float(value), 3) for value in mix]
    ([1], [0.333, 1.0, 0.667])
    """
    if 0 in left.shape or right.shape[1] == 0:
        return torch.empty(0, dtype=torch.int64), left.new_empty(left.shape[0], 0)
    small = left @ torch.linalg.qr(right.mT).R.mT  # the same products of rows with one another, in fewer columns
    upper, order = qr(small.mT.numpy(), mode="r", pivoting=True, check_finite=True)
    sizes = abs(upper.diagonal())
    rank = int((sizes > sizes[0] * max(small.shape) * torch.finfo(torch.float64).eps).sum())
    mix = torch.empty(left.shape[0], rank, dtype=torch.float64)
    mix[order[:rank]] = torch.eye(rank, dtype=torch.float64)
    mix[order[rank:]] = torch.from_numpy(solve_triangular(upper[:rank, :rank], upper[:rank, rank:])).mT
    return torch.from_numpy(order[:rank].astype("int64")), mix
