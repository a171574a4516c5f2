"""A matrix while it is being compressed: low rank plus all rows of the rest, of which a mask says what is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import linear

from tenfold.adapt.cutting import replace_data
from tenfold.compress.losparse.factors import Factors


class LoSparseLinear(nn.Module):
    r""":math:`y = L(Rx) + Sx + c`, with all rows of :math:`S` at first and the kept ones at last.

    Rows that the mask drops are zero in :math:`S`, or, where the rest is frozen, are left out of the product, so that
    their values are still there when they return.

    Args:
        left: :math:`L`, ``[out, rank]``.
        right: :math:`R`, ``[rank, in]``.
        rest: :math:`S`, ``[out, in]``.
        bias: ``[out]`` or None. A parameter is taken as it is, so that it stays the model's own.
        frozen: whether the rest stays as it is; then ``gate`` collects what the loss would feel of each row.
    """

    takes_no_adapter = "its rows are still being chosen; finish the compression first"
    """Why `tenfold.models.layer_map` gives it to no adapter."""
    bias: nn.Parameter | None
    mask: Tensor
    kept: Tensor
    score: Tensor

    def __init__(
        self, left: Tensor, right: Tensor, rest: Tensor, bias: Tensor | None = None, *, frozen: bool = False
    ) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(left), nn.Parameter(right)
        self.rest = nn.Parameter(rest, requires_grad=not frozen)
        """All rows, or after `cut` the kept ones, in the order of ``kept``."""
        self.register_parameter("bias", bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias))
        rows = len(rest)
        self.register_buffer("mask", torch.ones(rows, dtype=torch.bool, device=rest.device))
        self.register_buffer("kept", torch.arange(rows, device=rest.device))
        self.register_buffer("score", torch.zeros(rows, device=rest.device))
        self.frozen = frozen
        self.gate: Tensor | None = None
        """Its gradient is :math:`\\sum_{tokens}\\partial_{y_i}\\mathcal L\\,(Sx)_i` for each row."""

    @property
    def in_features(self) -> int:
        """Size of the input."""
        return self.right.shape[1]

    @property
    def out_features(self) -> int:
        """Size of the output."""
        return self.left.shape[0]

    @property
    def is_cut(self) -> bool:
        """Whether only kept rows are left."""
        return len(self.rest) < self.out_features

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{self.in_features}, {self.out_features}, rank={len(self.right)}, rows={int(self.mask.sum())}"

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        y = linear(linear(x, self.right), self.left, self.bias)
        rows = self._frozen(x) if self.frozen else linear(x, self.rest)
        if not self.is_cut:
            return y + rows
        return y.index_add_(-1, self.kept, rows.to(y.dtype)) if len(self.rest) else y

    def _frozen(self, x: Tensor) -> Tensor:
        mask = self.mask[self.kept]
        if self.is_cut or not (self.training and torch.is_grad_enabled()):
            return _FrozenRows.apply(x, self.rest, mask, None)
        if self.gate is None or self.gate.device != x.device:
            kind = torch.promote_types(x.dtype, torch.float32)
            self.gate = torch.ones(self.out_features, dtype=kind, device=x.device, requires_grad=True)
        return _FrozenRows.apply(x, self.rest, mask, self.gate)

    def drop(self, mask: Tensor) -> None:
        """Keep the rows of a mask ``bool[out]`` only; trained rows that it drops become zero."""
        self.mask.copy_(mask)
        if not self.frozen:
            self.rest.data.masked_fill_(~self.mask[self.kept][:, None], 0)

    def order(self) -> Tensor:
        """The kept rows, the most important one first."""
        kept = self.mask.nonzero().flatten()
        return kept[self.score[kept].argsort(descending=True, stable=True)]

    @torch.no_grad()
    def factors(self) -> Factors:
        """What the layer has come to: kept rows as a whole, and the low-rank part of the others."""
        kept = self.order()
        place = torch.full_like(self.mask, -1, dtype=torch.int64)
        place[self.kept] = torch.arange(len(self.kept), device=place.device)
        rows = self.left[kept].double() @ self.right.double() + self.rest[place[kept]].double()
        left, right = self.left.detach().clone(), self.right.detach().clone()
        others = (~self.mask).nonzero().flatten()
        if len(others) < len(right):  # fewer rows than their rank: they are their own best basis
            right = left[others] @ right
            left = torch.zeros(self.out_features, len(others), dtype=left.dtype, device=left.device)
            left[others, torch.arange(len(others), device=left.device)] = 1
        bias = None if self.bias is None else self.bias.detach().clone()
        return Factors(left, right, kept, rows.to(right.dtype), bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A checkpoint from the final phase holds only the rows that are left.
        saved = state_dict.get(f"{prefix}rest")
        if saved is not None and saved.shape[0] != len(self.rest):
            replace_data(self.rest, self.rest.data.new_empty(saved.shape[0], self.in_features))
            self.kept = self.kept.new_empty(saved.shape[0])
        super()._load_from_state_dict(state_dict, prefix, *args)


class _FrozenRows(Function):
    """``Sx`` of kept rows with a gradient for x and for a gate of each row, and none for S.

    The weight may be of another type than x: it is converted for one product at a time and never kept converted.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rest: Tensor, mask: Tensor, gate: Tensor | None) -> Tensor:
        rows = linear(x, rest.to(x.dtype))
        ctx.kind = x.dtype
        ctx.save_for_backward(rest, mask, rows if gate is not None else None)
        return rows * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
        rest, mask, rows = ctx.saved_tensors
        (g,) = gradients
        kind = torch.promote_types(g.dtype, torch.float32)
        gate = None if rows is None else (g * rows).reshape(-1, len(mask)).sum(0, dtype=kind)
        return ((g * mask) @ rest.to(g.dtype)).to(ctx.kind), None, None, gate
