"""The weight of a compressed layer, for those who ask for it: it is made when it is read, and cannot be written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tenfold.errors import ModelError


class UnmadeWeight(Tensor):
    """A tensor with the shape, type and device of a weight, whose numbers are made whenever an operation reads them.

    Models ask for the type of a layer's weight (T5, in every call) and PEFT for its device, which costs nothing here.
    Writing is refused, as nothing would keep what is written.

    >>> weight = UnmadeWeight(lambda: torch.ones(2, 3), (2, 3), torch.float32, torch.device("cpu"))
    >>> tuple(weight.shape), weight.dtype, float(weight.sum())
    ((2, 3), torch.float32, 6.0)
    """

    _make: Callable[[], Tensor]
    _remedy: str
    _is_hf_initialized = True  # for transformers, which draws at random what no file held

    @staticmethod
    def __new__(
        cls,
        make: Callable[[], Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        remedy: str = "make the model dense first (losparse.to_dense, or tenfold export --form dense)",
    ) -> UnmadeWeight:
        """A tensor without numbers; ``remedy`` is told to those who would write it."""
        weight: UnmadeWeight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        weight._make, weight._remedy = make, remedy
        return weight

    @property
    def data(self) -> Tensor:
        """The numbers."""
        return self._make().detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise _refusal(self)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Type and shape, not the numbers."""
        return f"{type(self).__name__}({tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Any operation: on the numbers, made for it."""
        places = enumerate(func._schema.arguments)
        written = [at for at, one in places if one.alias_info is not None and one.alias_info.is_write]
        for at in written:
            if at < len(args) and isinstance(args[at], cls):
                raise _refusal(args[at])
        args, kwargs = tree_map_only(cls, lambda weight: weight.data, (args, kwargs or {}))
        return func(*args, **kwargs)


def _refusal(weight: UnmadeWeight) -> ModelError:
    return ModelError("this weight cannot be written: it is made from what its layer holds", weight._remedy)
