"""What a cache layer hands to the attention function in the place of keys and values: one object.

Control flows one way. Attention asks the handle for outputs, or for whole tensors, and tells it the mask of the call;
what is packed, dropped or taken back, and when, is the affair of the cache that made it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from tenfold.errors import ModelError
from tenfold.kernels.biased import KeyBias


@dataclass(frozen=True)
class CacheHandle(ABC):
    """Keys and values of one layer during one call: what the cache held, and the tokens of the call.

    It stays what it is whatever becomes of the cache, so that it may be read more than once (layers that share keys,
    biases that end at a query).

    Args:
        commit: of the cache: the handle calls it with the call's mask, which a cache learns from nobody else, once the
            mask is known. Calls after the first change nothing.
    """

    commit: Callable[[Tensor | None], None]

    remedy: ClassVar[str] = "call the model with its own cache"
    """What to do with a model that handles its keys itself."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Tokens of the text so far, those of this call among them."""

    @property
    def exact(self) -> bool:
        """Whether `dense` gives the very numbers that the model computed, of all tokens, at no cost.

        The model's own implementation then attends to them.
        """
        return False

    @abstractmethod
    def attend(
        self, module: nn.Module, query: Tensor, mask: Tensor | None, bias: tuple[KeyBias, ...] = (), **arguments: Any
    ) -> Tensor:
        """Attention on what is kept, without making whole tensors of it.

        Args:
            module: the attention module, as transformers hands it to attention functions.
            query: ``[batch, heads, queries, head_dim]``; the queries are the last tokens.
            mask: as the attention function got it.
            bias: of keys, none with ``until``.
            **arguments: what else transformers passes: ``scaling``, ``softcap``, ``s_aux``, ``position_ids``, ...

        Returns:
            ``[batch, queries, heads, head_dim]``.
        """

    @abstractmethod
    def dense(self, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values as tensors ``[batch, kv_heads, tokens, channels]``.

        Args:
            mask: as the attention function got it.

        Raises:
            ModelError: not all tokens are kept.
        """

    def __getattr__(self, name: str) -> Any:
        """What a model asks of keys and values that are not tensors."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._no_tensor(f"asks its keys for .{name}")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any function of torch that is given a handle."""
        raise cls._no_tensor(f"calls {getattr(function, '__name__', function)} on its keys")

    @classmethod
    def _no_tensor(cls, what: str) -> ModelError:
        return ModelError(
            f"this model {what} between cache and attention, and its cache hands over no tensors", remedy=cls.remedy
        )
