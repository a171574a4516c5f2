"""The few entries of each line that lie farthest out."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def outlier_count(share: float, line: int) -> int:
    """Largest, and as many smallest, entries of a line that count as outliers: ``ceil(share / 2 * line)``.

    >>> outlier_count(0.02, 1024), outlier_count(0.07, 200), outlier_count(0.0, 64)
    (11, 7, 0)
    """
    return min(math.ceil(share / 2 * line - 1e-9), line // 2)


def outliers(x: Tensor, count: int, dim: int, keep: Tensor | None = None) -> Tensor:
    """Where the ``count`` largest and the ``count`` smallest entries of each line are; the two sets are disjoint.

    Args:
        x: ``[..., tokens, channels]``.
        count: at most half of the line.
        dim: along which a line runs.
        keep: ``[..., tokens, 1]``, bool: tokens that may hold an outlier; others are taken only where too few remain.

    Returns:
        Indices along ``dim``, int64: as ``x`` with ``2 * count`` entries in ``dim``.

    >>> outliers(torch.tensor([[3.0, -1.0, 0.0, 9.0, 3.0]]), 1, -1).tolist()
    [[3, 1]]
    """
    high = x if keep is None else x.masked_fill(~keep, -torch.inf)
    largest = _extreme(high, count, dim, largest=True)
    low = x if keep is None else x.masked_fill(~keep, torch.finfo(x.dtype).max)
    smallest = _extreme(low.scatter(dim, largest, torch.inf), count, dim, largest=False)
    return torch.cat([largest, smallest], dim)


def _extreme(x: Tensor, count: int, dim: int, largest: bool) -> Tensor:
    if count == 1:  # many times faster than a selection
        return x.argmax(dim, keepdim=True) if largest else x.argmin(dim, keepdim=True)
    return x.topk(count, dim, largest=largest, sorted=False).indices
