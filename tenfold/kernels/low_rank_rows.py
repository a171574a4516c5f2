"""Products with a compressed matrix: some rows are stored, the others are combinations of the first of these."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


def product(x: Tensor, rows: Tensor, mix: Tensor, place: Tensor) -> Tensor:
    """What a compressed matrix makes of inputs.

    Args:
        x: ``[..., in]``.
        rows: ``[stored, in]``, rows of the matrix; the others are combinations of the first ``rank``.
        mix: ``[out - stored, rank]``, the factors of these combinations.
        place: ``[out]``, int32 or int64, where each row of the matrix stands among the stored ones and, after them, the
            combinations.

    Returns:
        ``[..., out]``.

    >>> x, rows, mix = torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.tensor([[3.0]])
    >>> product(x, rows, mix, torch.tensor([2, 0, 1])).tolist()
    [[3.0, 1.0, 2.0]]
    """
    stored = linear(x, rows)
    return torch.cat((stored, linear(stored[..., : mix.shape[1]], mix)), -1).index_select(-1, place)
