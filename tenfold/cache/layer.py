"""What the layers of every cache of ours have in common, and the layer that keeps its keys as they are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

Change = Callable[[Tensor, int], Tensor]
"""From a tensor and the dimension of its batch to another."""


class CacheLayer(CacheLayerMixin):
    """A layer that holds tokens of all rows of a batch, and grows without an end.

    Args:
        index: of the layer, for errors.
    """

    is_sliding = False
    """Not to transformers: it would make a mask of its own for the layer, and nothing reads one."""
    is_compileable = False
    is_croppable = True
    record_past = False
    """Whether nothing is given up before `crop` has said which tokens stay; transformers reads and sets it."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    @abstractmethod
    def commit(self, mask: Tensor | None = None) -> None:
        """The step of the model is over in this layer: pack or drop what is due.

        The handle of a call says so once it knows the mask; a second time nothing is due.

        Args:
            mask: of the call, from which padding is known, in the form that the layer's handle gives it; None for none.
        """

    @abstractmethod
    def mark(self) -> Mapping[str, Any]:
        """What `take_back` needs to undo the next call."""

    @abstractmethod
    def take_back(self, before: Mapping[str, Any]) -> None:
        """Be as at `mark`."""

    @abstractmethod
    def change(self, change: Change) -> None:
        """Replace every tensor of an initialised layer."""

    @abstractmethod
    def keep(self, tokens: int) -> None:
        """Forget all but the first so many tokens of an initialised layer."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys of the next call and the offset of the first: of the whole text, so that masks arrive uncut."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens: exactly those, and nothing that stays changes.

        Args:
            tokens_to_remove: 0 or negative, as transformers gives it.

        Raises:
            ValueError: a positive number, or more tokens than there are.
        """
        if not self.is_initialized:  # a layer that shares another's keys
            return
        held = self.get_seq_length()
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of tokens to remove as a negative number")
        if held + tokens_to_remove < 0:
            raise ValueError(f"crop({tokens_to_remove}): the cache has {held} tokens")
        self.keep(held + tokens_to_remove)

    def _change(self, change: Change) -> None:
        if self.is_initialized:
            self.change(change)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch by index, for beams."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        self._change(lambda tensor, rows: tensor[(slice(None),) * rows + (indices.to(tensor.device),)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self._change(lambda tensor, rows: tensor.repeat_interleave(repeats, rows))

    def offload(self) -> None:
        """To the CPU."""
        self._change(lambda tensor, rows: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Back to the layer's device."""
        self._change(lambda tensor, rows: tensor.to(self.device, non_blocking=True))


class ExactLayer(CacheLayer):
    """All keys and values as they are; attention gets the tensors themselves.

    >>> layer = ExactLayer(0)
    >>> keys, values = layer.update(*torch.randn(2, 1, 2, 5, 8))
    >>> layer.crop(-2)
    >>> keys.shape[2], layer.get_seq_length()
    (5, 3)
    """

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device and shapes from the first keys and values; they may have no tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values ``[batch, kv_heads, tokens, channels]``; hand over those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)
        return self.keys, self.values

    def commit(self, mask: Tensor | None = None) -> None:
        """Nothing is ever due."""

    def mark(self) -> Mapping[str, Any]:
        """The number of tokens: a call appends to them, so they need not be held twice."""
        return {"is_initialized": self.is_initialized, "tokens": self.get_seq_length()}

    def take_back(self, before: Mapping[str, Any]) -> None:
        """Be as at `mark`."""
        if before["is_initialized"]:
            self.keep(before["tokens"])
        else:
            self.reset()

    def change(self, change: Change) -> None:
        """Replace keys and values."""
        self.keys, self.values = change(self.keys, 0), change(self.values, 0)

    def keep(self, tokens: int) -> None:
        """Copies, never views: one would keep the rest alive."""
        self.keys, self.values = (x[:, :, :tokens].clone() for x in (self.keys, self.values))

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return int(self.keys.shape[2]) if self.is_initialized else 0

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized = False
        self.keys = self.values = None  # type: ignore[assignment]
