"""Really remove dropped triplets: from the matrices, and from what the optimizer remembers of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tenfold.adapt.adalora.attaching import Matrix
from tenfold.adapt.adalora.layer import ADAPTER, replace_data


def can_cut(optimizer: torch.optim.Optimizer, tensors: list[Tensor]) -> bool:
    """Whether the optimizer's memory of these tensors can be sliced along with them.

    It can where each entry is a scalar or has the tensor's shape (Adam, AdamW, SGD, Adagrad, RMSprop, Lion); not where
    it is factored (Adafactor) or quantised in blocks (8-bit optimizers).
    """
    for tensor in tensors:
        for value in optimizer.state.get(tensor, {}).values():
            if not isinstance(value, Tensor) or value.numel() <= 1:
                continue
            if value.shape != tensor.shape or not value.is_floating_point():
                return False
    return True


@torch.no_grad()
def cut(
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
            _slice(parameter, dim, index, optimizer)
        matrix.layer.set_rank(ADAPTER, len(index))
    return dropped


def _slice(parameter: nn.Parameter, dim: int, index: Tensor, optimizer: torch.optim.Optimizer) -> None:
    gradient, shape = parameter.grad, parameter.shape
    state = optimizer.state.get(parameter, {})
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == shape:
            state[key] = value.index_select(dim, index)
    replace_data(parameter, parameter.data.index_select(dim, index))
    if gradient is not None:
        parameter.grad = gradient.index_select(dim, index)
