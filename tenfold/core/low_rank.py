"""The best low-rank approximation of small matrices, by power iteration or exactly."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def low_rank(x: Tensor, rank: int, loop: int | None = 3, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Factors whose product ``A @ B.mT`` is near the best rank-``rank`` approximation of each matrix.

    The product is a projection :math:`QQ^\top X`, so it never makes the residual larger, whatever the start. Both
    factors are orthonormalised in every round: with the official code, which does so in the last round only, columns
    align in float32 (GEAR specification, section 2.1 step 4 and oracle 5).

    Args:
        x: ``[..., n, d]``, float32 or float64.
        rank: at most ``min(n, d)`` is used.
        loop: rounds of the power iteration; None is the exact singular value decomposition.
        start: ``[d, rank]``; by default fixed Gaussian numbers, the same for every matrix, so that results repeat and
            a matrix gives the same alone and in a batch.

    Returns:
        ``A`` ``[..., n, r]`` and ``B`` ``[..., d, r]``.

    >>> x = torch.outer(torch.arange(4.0), torch.ones(3))
    >>> A, B = low_rank(x, 1)
    >>> bool((A @ B.mT - x).norm() < 1e-5)
    True
    """
    rank = min(rank, *x.shape[-2:])
    if loop is None:
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        return u[..., :rank], (s[..., :rank, None] * vh[..., :rank, :]).mT
    p = _start(x.shape[-1], rank) if start is None else start
    p = p.to(x).expand(*x.shape[:-2], -1, -1)
    q = x @ p
    for _ in range(loop):
        q = torch.linalg.qr(x @ torch.linalg.qr(p).Q).Q
        p = x.mT @ q
    return q, p


@lru_cache(maxsize=64)
def _start(channels: int, rank: int) -> Tensor:
    return torch.randn(channels, rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
