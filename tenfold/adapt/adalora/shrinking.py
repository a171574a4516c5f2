"""Really remove dropped triplets: from the matrices, and from what the optimizer remembers of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tenfold.adapt import cutting
from tenfold.adapt.adalora.attaching import Matrix
from tenfold.adapt.adalora.layer import ADAPTER


@torch.no_grad()
def cut_triplets(
    matrices: Mapping[str, Matrix], keep: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, tuple[Tensor, Tensor]]:
    """Remove the triplets that are not kept, with their gradients and the optimizer's moments.

    The parameters stay the same objects, so that optimizers, schedulers and lists that a loop made hold on.

    Args:
        matrices: by name.
        keep: for each matrix ``int64[rank left]``, indices of what stays.
        optimizer: that trains them.

    Returns:
        The columns of P ``[out, dropped]`` and rows of Q ``[dropped, in]`` that went, of the matrices that lost any.
    """
    dropped = {}
    for name, matrix in matrices.items():
        index = keep[name]
        gone = torch.ones(matrix.rank, dtype=torch.bool, device=index.device).index_fill_(0, index, False)
        if bool(gone.any()):
            dropped[name] = (matrix.P.detach()[:, gone].clone(), matrix.Q.detach()[gone].clone())
        for parameter, dim in ((matrix.Q, 0), (matrix.singular, 0), (matrix.P, 1)):
            cutting.cut(parameter, dim, index, optimizer)
        matrix.layer.set_rank(ADAPTER, len(index))
    return dropped
