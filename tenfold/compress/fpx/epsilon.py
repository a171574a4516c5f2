"""How far a layer's outputs in a low format are from those in 16 bits, relative to their size."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass
class OutputError:
    r"""Sums over the tokens read so far; activations are not kept.

    >>> import torch
    >>> read = OutputError()
    >>> read.add(torch.tensor([[3.0, 4.0], [300.0, 400.0]]), torch.tensor([[3.0, 0.0], [300.0, 400.0]]))
    >>> round(read.epsilon, 6), read.token_mean
    (0.008, 0.4)
    """

    _error: float = 0.0
    _size: float = 0.0
    _ratios: float = 0.0
    _tokens: int = 0

    def add(self, wanted: Tensor, found: Tensor) -> None:
        """Read on.

        Args:
            wanted: ``[..., out]``, the outputs in 16 bits; no padding tokens.
            found: the same shape, in the low format.
        """
        error = (found.float() - wanted.float()).norm(dim=-1).double()
        size = wanted.float().norm(dim=-1).double()
        self._error += float(error.square().sum())
        self._size += float(size.square().sum())
        self._ratios += float((error / size).masked_fill((error == 0) & (size == 0), 0).sum())
        self._tokens += size.numel()

    @property
    def epsilon(self) -> float:
        r""":math:`\|A^{16} - A^{low}\| / \|A^{16}\|` of all tokens together (FPX, section 4); 0/0 is 0."""
        if self._error == 0:
            return 0.0
        return math.sqrt(self._error / self._size) if self._size else math.inf

    @property
    def token_mean(self) -> float:
        """The mean of each token's own: a token with huge outputs does not hide what happens to all others."""
        return self._ratios / self._tokens if self._tokens else 0.0
