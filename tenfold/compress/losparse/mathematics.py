"""The algebra of LoSparse: what rank a share buys, and the best low-rank part of a matrix for its inputs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tenfold.errors import ConfigError

RIDGE = 1e-6
"""Added to the diagonal of a Gram matrix, as a share of its trace."""


class Split(NamedTuple):
    r"""A matrix as :math:`W = LR + S`.

    Args:
        left: :math:`L`, ``[out, rank]``.
        right: :math:`R`, ``[rank, in]``.
        rest: :math:`S`, ``[out, in]``.
    """

    left: Tensor
    right: Tensor
    rest: Tensor


def rank_for(share: float, out_features: int, in_features: int) -> int:
    r"""The rank whose two thin matrices hold this share of the numbers of the dense matrix, rounded up.

    :math:`\lceil\rho\,d_{out}d_{in}/(d_{out}+d_{in})\rceil` of the paper, but never beyond the break-even, where the
    two hold as many numbers as the matrix; and evaluated so that a quotient that is whole stays it.

    Args:
        share: :math:`\rho`, in [0, 1].
        out_features: rows of the matrix.
        in_features: columns.

    Raises:
        ConfigError: a share outside of [0, 1].

    >>> rank_for(0.05, 768, 768), rank_for(0.05, 192, 960), rank_for(1.0, 2, 3), rank_for(0.0, 2, 3)
    (20, 8, 1, 0)
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"share of the low-rank part: must be in [0, 1], got {share:g}")
    even = out_features * in_features / (out_features + in_features)
    return min(math.ceil(share * even - 1e-9), math.floor(even + 1e-9))


@torch.no_grad()
def split_off(weight: Tensor, rank: int, gram: Tensor | None = None, ridge: float = RIDGE) -> Split:
    r"""Take the best low-rank part out of a matrix; what it leaves is exact.

    Without a Gram matrix :math:`LR` is the truncated singular value decomposition of :math:`W`. With
    :math:`G = XX^\top = CC^\top` of the inputs it is :math:`\mathrm{trunc}_r(WC)\,C^{-1}`, which of all matrices of
    this rank has the smallest error of the *output*, :math:`\lVert(W-LR)X\rVert_F`. Either way the factors are
    balanced, :math:`L^\top L = RR^\top`, so that one learning rate suits both.

    Args:
        weight: ``[out, in]``, of any float type.
        rank: at most ``min(out, in)``.
        gram: ``[in, in]``, sums or means of products of inputs; may be singular.
        ridge: see `RIDGE`; 0 for none.

    Returns:
        Three tensors of the weight's type and device. The rest is computed from the rounded factors, in float32 (or
        float64) and rounded once: it takes up their rounding.

    Raises:
        ConfigError: a rank that the matrix cannot have.

    >>> left, right, rest = split_off(torch.outer(torch.arange(4.0), torch.ones(3)), 1)
    >>> left.shape, right.shape, bool(rest.abs().max() < 1e-6)
    (torch.Size([4, 1]), torch.Size([1, 3]), True)
    """
    if not 0 <= rank <= min(weight.shape):
        raise ConfigError(f"rank: must be in [0, {min(weight.shape)}] for {list(weight.shape)}, got {rank}")
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32 if gram is None else torch.float64))
    if gram is None:
        left, right = balanced(*truncated(exact, rank))
    else:
        root, inverse = whitening(gram.to(exact), ridge)
        u, kernel = truncated(exact @ root, rank)
        left, right = rebalanced(u, kernel @ inverse)
    left, right = left.to(weight.dtype), right.to(weight.dtype)
    return Split(left, right, (exact - left.to(exact) @ right.to(exact)).to(weight.dtype))


@torch.no_grad()
def rest_of(weight: Tensor, left: Tensor, right: Tensor) -> Split:
    """What a low-rank part that was found some other way leaves of a matrix; balanced first, as in `split_off`.

    Args:
        weight: ``[out, in]``.
        left: ``[out, rank]``.
        right: ``[rank, in]``.

    >>> left, right, rest = rest_of(torch.eye(2), torch.tensor([[100.0], [0.0]]), torch.tensor([[0.01, 0.0]]))
    >>> left.abs().flatten().tolist(), rest.tolist()
    ([1.0, 0.0], [[0.0, 0.0], [0.0, 1.0]])
    """
    exact = weight.double()
    u, kernel = torch.linalg.qr(left.to(exact))
    left, right = (factor.to(weight.dtype) for factor in rebalanced(u, kernel @ right.to(exact)))
    return Split(left, right, (exact - left.to(exact) @ right.to(exact)).to(weight.dtype))


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of this rank as ``U`` (orthonormal columns) and ``S V^T``.

    Args:
        matrix: ``[out, in]``, float32 or float64.
        rank: at most ``min(out, in)``.
    """
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank, None] * vh[:rank]


def balanced(u: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Half of the singular values, which are the norms of the rows of ``kernel``, for each side."""
    half = kernel.norm(dim=1).sqrt()
    return u * half, kernel / half.clamp_min(torch.finfo(half.dtype).tiny)[:, None]


def rebalanced(u: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """As `balanced`, for a ``right`` whose rows are not orthogonal; the product stays what it is.

    Args:
        u: ``[out, rank]``, orthonormal columns.
        right: ``[rank, in]``.
    """
    turn, s, vh = torch.linalg.svd(right, full_matrices=False)
    half = s.sqrt()
    return (u @ turn) * half, half[:, None] * vh


def whitening(gram: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    r"""A square root :math:`C` of :math:`G` and its (pseudo-)inverse, by eigenvalues.

    Args:
        gram: ``[n, n]``, symmetric, no negative eigenvalue beyond rounding; float32 or float64.
        ridge: see `RIDGE`.

    Returns:
        ``C`` and ``C^+``, both ``[n, n]``. Directions without any input are zero in both.

    >>> root, inverse = whitening(torch.diag(torch.tensor([4.0, 0.0])), ridge=0)
    >>> bool(torch.allclose(root @ root.T, torch.diag(torch.tensor([4.0, 0.0])))), inverse.abs().max().item()
    (True, 0.5)
    """
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0) + ridge * values.clamp_min(0).sum()
    least = values[-1] * len(values) * torch.finfo(values.dtype).eps
    root = torch.where(values > least, values, 0).sqrt()
    inverse = torch.where(root > 0, 1 / root.clamp_min(torch.finfo(root.dtype).tiny), 0)
    return vectors * root, inverse[:, None] * vectors.T
