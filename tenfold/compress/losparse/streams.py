"""A model block by block: hidden states of all texts go through one block, then through the next.

So a block can be changed, and the next one be fitted to what it really gets, at the cost of one forward pass for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tenfold.compress.losparse.calibration import inputs_of, read
from tenfold.models.inference import evaluating


class _ReachedError(Exception):
    """A forward pass came to where it was to stop."""


class _Call(NamedTuple):
    """What a block was given besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Blocks:
    """The blocks of one stack, called as the model calls them.

    What a block is given besides the hidden states (masks, positions) is taken from the model's own forward pass, once
    for each shape of a batch. Whether that is all that a block depends on is tried when the object is made: see `of`.

    Args:
        names: of the blocks, in order.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._model = model
        self._modules = [model.get_submodule(name) for name in names]
        self._calls: dict[torch.Size, list[_Call]] = {}

    @classmethod
    def of(cls, model: nn.Module, matrices: Sequence[str], batches: Sequence[Tensor]) -> Blocks | None:
        """The blocks that hold these matrices, or None where they cannot be called one by one.

        That is so for encoder-decoders, for blocks that are used twice, and for blocks that hand each other more than
        hidden states: with what was recorded of one batch, each block must turn the inputs of another batch of this
        shape into the very inputs of the next block.
        """
        names = list(dict.fromkeys(block_of(name) for name in matrices))
        if None in names or len({str(name).rpartition(".")[0] for name in names}) != 1:
            return None
        stack = model.get_submodule(str(names[0]).rpartition(".")[0])
        blocks = cls(model, [f"{str(names[0]).rpartition('.')[0]}.{child}" for child, _ in stack.named_children()])
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for ids in batches:
            by_shape.setdefault(ids.shape, []).append(ids)
        same = all(blocks._record(batch[0]) and blocks._repeats(batch[-1]) for batch in by_shape.values())
        return blocks if same else None

    def begin(self, ids: Tensor) -> Tensor:
        """The hidden states that the first block gets, ``[batch, tokens, channels]``."""

        def stop(module: Any, args: Any, kwargs: Any) -> None:
            found.append(_hidden(args, kwargs))
            raise _ReachedError

        found: list[Tensor] = []
        hook = self._modules[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with evaluating(self._model):
                read(self._model, ids)
        except _ReachedError:
            pass
        finally:
            hook.remove()
        return found[0]

    def run(self, index: int, hidden: Tensor, ids: Tensor) -> Tensor:
        """What a block makes of hidden states.

        Args:
            index: of the block.
            hidden: ``[batch, tokens, channels]``.
            ids: the batch, for its shape.
        """
        call = self._calls[ids.shape][index]
        args, kwargs = call.args, call.kwargs
        if "hidden_states" in kwargs:
            kwargs = {**kwargs, "hidden_states": hidden}
        else:
            args = (hidden, *args[1:])
        block = self._modules[index]
        with evaluating(block):
            out = block(*args, **kwargs)
        return out if isinstance(out, Tensor) else out[0]

    def until(self, index: int, matrix: str, hidden: Tensor, ids: Tensor) -> Tensor | None:
        """What a matrix of a block reads when the block is given these hidden states; None where it is not called."""

        def stop(module: Any, inputs: tuple[Tensor, ...]) -> None:
            found.append(inputs[0])
            raise _ReachedError

        found: list[Tensor] = []
        hook = self._model.get_submodule(matrix).register_forward_pre_hook(stop)
        try:
            self.run(index, hidden, ids)
        except _ReachedError:
            pass
        finally:
            hook.remove()
        return found[0] if found else None

    def inputs(
        self, index: int, matrices: Sequence[str], hidden: Tensor, ids: Tensor
    ) -> tuple[dict[str, list[Tensor]], Tensor]:
        """What all matrices of a block read, call by call, and what the block makes of the hidden states."""
        with inputs_of(self._model, matrices) as seen:
            out = self.run(index, hidden, ids)
            return dict(seen), out

    def _record(self, ids: Tensor) -> bool:
        """Keep what each block is given; False where one is called twice, not at all, or in another order."""
        calls: list[tuple[int, _Call]] = []
        for index, call, _ in self._watch(ids):
            calls.append((index, call))
        self._calls[ids.shape] = [call for _, call in calls]
        return [index for index, _ in calls] == list(range(len(self._modules)))

    def _repeats(self, ids: Tensor) -> bool:
        """Whether each block, called by itself, gives what the next block gets from the model."""
        hidden = [hidden for _, _, hidden in self._watch(ids)]
        for index, (given, wanted) in enumerate(pairwise(hidden)):
            made = self.run(index, given, ids)
            near = 1e-5 * float(wanted.abs().max())
            if made.shape != wanted.shape or not torch.allclose(made, wanted, rtol=1e-3, atol=near):
                return False
        return True

    def _watch(self, ids: Tensor) -> Iterator[tuple[int, _Call, Tensor]]:
        seen: list[tuple[int, _Call, Tensor]] = []

        def watch(index: int) -> Any:
            def on_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                # The hidden states themselves are not kept with the call: they would be those of all layers.
                hidden = _hidden(args, kwargs)
                rest = {name: value for name, value in kwargs.items() if value is not hidden}
                rest |= {"hidden_states": None} if "hidden_states" in kwargs else {}
                seen.append((index, _Call((None, *args[1:]) if args else (), rest), hidden.clone()))

            return on_call

        hooks = [
            module.register_forward_pre_hook(watch(index), with_kwargs=True)
            for index, module in enumerate(self._modules)
        ]
        try:
            with evaluating(self._model):
                read(self._model, ids)
        finally:
            for hook in hooks:
                hook.remove()
        yield from seen


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def block_of(name: str) -> str | None:
    """The block that a module stands in; None outside of the blocks.

    >>> block_of("model.layers.3.self_attn.q_proj"), block_of("lm_head")
    ('model.layers.3', None)
    """
    parts = name.split(".")
    number = next((at for at, part in enumerate(parts) if part.isdigit()), None)
    return None if number is None else ".".join(parts[: number + 1])
