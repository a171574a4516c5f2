"""Give parameters other shapes while they are trained, and the optimizer's memory of them as well."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tenfold.adapt.step_hooks import family


def uncuttable(optimizer: Optimizer, tensors: Sequence[Tensor]) -> str | None:
    """Why parameters that this optimizer trains have to keep their shapes; None where they can be cut."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "other processes hold the same shapes"
    if len(family(optimizer)) > 1 or not _can_slice(optimizer, tensors):
        return f"what {type(optimizer).__name__} keeps cannot be cut"
    return None


def _can_slice(optimizer: Optimizer, tensors: Sequence[Tensor]) -> bool:
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


def cut(parameter: nn.Parameter, dim: int, index: Tensor, optimizer: Optimizer) -> None:
    """Keep slices of a parameter, of its gradient and of the optimizer's moments, in the order of `index`.

    The parameter stays the same object, so that optimizers, schedulers and lists that a loop made hold on.

    Args:
        parameter: to cut.
        dim: along which.
        index: int64, what stays.
        optimizer: that trains it; see `uncuttable`.
    """
    gradient, shape = parameter.grad, parameter.shape
    state = optimizer.state.get(parameter, {})
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == shape:
            state[key] = value.index_select(dim, index)
    replace_data(parameter, parameter.data.index_select(dim, index))
    if gradient is not None:
        parameter.grad = gradient.index_select(dim, index)


def replace_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Give a parameter data of another shape, so that it stays the same object for everyone who holds it.

    A graph that is still alive (a loop's last loss) keeps autograd's accumulator of the old shape; torch drops it when
    the type changes, hence the detour.
    """
    parameter.grad = None
    other = torch.float32 if data.dtype == torch.float16 else torch.float16
    parameter.data = torch.empty(0, dtype=other, device=data.device)
    parameter.data = data
