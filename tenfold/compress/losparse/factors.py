"""What a compressed matrix is made of, and what it costs to store and to multiply with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Factors:
    r"""A matrix as low rank plus kept rows: :math:`\hat W = LR`, except that the kept rows are those of ``rows``.

    The paper writes a kept row as :math:`(LR)_i + S_i`; that is ``rows``, whatever way it is split.

    Args:
        left: ``[out, rank]``; its kept rows count for nothing.
        right: ``[rank, in]``.
        kept: ``[kept]``, int64, which output rows are kept, the most important one first.
        rows: ``[kept, in]``, the kept rows as a whole.
        bias: ``[out]`` or None.
    """

    left: Tensor
    right: Tensor
    kept: Tensor
    rows: Tensor
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """Of the low-rank part."""
        return self.right.shape[0]

    def dense(self) -> Tensor:
        """The matrix itself, ``[out, in]``.

        >>> import torch
        >>> factors = Factors(torch.ones(3, 1), torch.ones(1, 2), torch.tensor([1]), torch.tensor([[5.0, 6.0]]))
        >>> factors.dense().tolist()
        [[1.0, 1.0], [5.0, 6.0], [1.0, 1.0]]
        """
        weight = self.left @ self.right
        return weight.index_copy(0, self.kept, self.rows.to(weight.dtype))


def stored(out_features: int, in_features: int, rank: int, kept: int, *, elastic: bool = False) -> int:
    r"""Numbers that a compressed matrix holds, which without ``elastic`` are also its multiply-adds for each token.

    Of the rows that are not kept, ``rank`` are stored as they are and the others as combinations of these (PIFA,
    arXiv 2501.19090): :math:`(r + k)\,d_{in} + (d_{out} - r - k)\,r`, which is :math:`r(r+k)` less than the
    :math:`r(d_{in} + d_{out}) + k\,d_{in}` of the LoSparse paper and never more than the dense matrix.

    Args:
        out_features: rows of the matrix.
        in_features: columns.
        rank: of the low-rank part, at most ``min(out_features - kept, in_features)``.
        kept: rows that are kept.
        elastic: also store, for each kept row, the combination that it is without being kept.

    >>> stored(576, 576, 100, 30), stored(576, 576, 100, 30, elastic=True), stored(576, 576, 0, 576)
    (119480, 122480, 331776)
    """
    combined = out_features - rank - (0 if elastic else kept)
    return (rank + kept) * in_features + combined * rank
