"""The handle of a packed layer: attention on first tokens, packed blocks and buffer, none of them expanded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tenfold.attend.handle import CacheHandle
from tenfold.kernels.biased import KeyBias, lift, sum_biases
from tenfold.kernels.view import View, attend


@dataclass(frozen=True)
class PackedHandle(CacheHandle):
    """Keys and values of a packed layer.

    Args:
        commit: as in `CacheHandle`.
        view: what the layer keeps, and the tokens of the call in its buffer.
    """

    view: View

    remedy: ClassVar[str] = "leave kv out, or use a bare GearCache of this very model, outside of attach"

    @property
    def tokens(self) -> int:
        """Number of keys."""
        return self.view.tokens

    @property
    def exact(self) -> bool:
        """Whether nothing is packed yet."""
        return not self.view.packed

    def attend(
        self, module: nn.Module, query: Tensor, mask: Tensor | None, bias: tuple[KeyBias, ...] = (), **arguments: Any
    ) -> Tensor:
        """As `CacheHandle.attend`; computed in float32 at least, autocast or not."""
        scale = arguments.get("scaling")
        with torch.autocast(query.device.type, enabled=False):
            added = sum_biases(bias, query.to(torch.promote_types(query.dtype, torch.float32))) if bias else None
            output = attend(
                query,
                self.view,
                _dense_mask(mask, query.shape[2], self.tokens),
                query.shape[-1] ** -0.5 if scale is None else scale,
                bias=added,
                lift=partial(lift, bias[0], query.shape[1]) if bias and bias[0].target is not None else None,
                softcap=arguments.get("softcap"),
                sinks=arguments.get("s_aux"),
            )
        self.commit(mask)
        return output.transpose(1, 2)

    def dense(self, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values, expanded where they are packed, with the stored error."""
        tensors = self.view.tensors()
        self.commit(mask)
        return tensors


def _dense_mask(mask: Tensor | None, queries: int, keys: int) -> Tensor | None:
    """A mask ``[batch or 1, heads or 1, queries, keys]``, also where the implementation takes one of padding."""
    if mask is None:
        return None
    if mask.ndim == 4:
        return mask[..., :keys]
    seen = mask[:, None, None, :keys].bool()
    if queries == 1:
        return seen
    return seen & seen.new_ones(queries, keys).tril(keys - queries)
