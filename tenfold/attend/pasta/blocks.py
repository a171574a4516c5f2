"""A steer block at work: whose forward passes it acts on, and the bias that each layer is handed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tenfold.attend.attention import check_installed
from tenfold.attend.text_marks import Marks
from tenfold.errors import ConfigError, ModelError
from tenfold.kernels.biased import KeyBias

FEW = 0.25
"""Up to this share of raised keys, correcting the plain result beats a dense mask (benchmarks/pasta.py)."""


class PromptBias:
    """The bias of every key of a batch of prompts, for whatever window of keys a layer has.

    Args:
        marks: the prompts.
        strength: log-strength of each prompt token, ``[batch, tokens]``, float32.
        grown: of each written token, by row, ``[batch]``, float32.
        target: share of attention to lift the marks to, instead of strengths.
        rows: those whose marks are seen, ``[batch]``, bool; in others nothing is biased.
    """

    def __init__(self, marks: Marks, strength: Tensor, grown: Tensor, target: float | None, rows: Tensor) -> None:
        self.prompt, self.target = marks.input_ids.shape[1], target
        self.values, self.grown = torch.where(rows[:, None], strength, 0.0), torch.where(rows, grown, 0.0)
        self.floor = self.values.amin(1)
        marked = marks.marked & rows[:, None]
        raised = marked if target is not None else self.values > self.floor[:, None]
        self.first = int(raised.any(0).int().argmax())
        most = int(raised.sum(1).max())
        self.raised: Tensor | None = None
        if target is not None or most <= FEW * self.prompt:
            order = raised.int().argsort(dim=1, descending=True, stable=True)[:, :most]
            self.raised = torch.where(raised.gather(1, order), order, -1)
        self._window: tuple[Any, tuple[Tensor, Tensor | None, Tensor]] | None = None

    def layer(
        self,
        heads: Tensor,
        gone: Sequence[int],
        batch: int,
        queries: int,
        keys: int,
        offset: int,
        seen: int | None,
    ) -> KeyBias:
        """For the keys ``offset .. offset + keys`` of the whole text.

        Args:
            heads: of the layer, on its device.
            gone: for each row of the prompts, the first query that sees no mark any more: from there on a bias would
                only favour the newest tokens.
            batch: rows of this call.
            queries: of this call.
            keys: of this call, those that are not written yet among them.
            offset: of the first key.
            seen: tokens before the first query; None for a single query behind ``keys - 1`` keys at most.
        """
        known = (batch, keys, offset, heads.device)
        # Every layer of a forward pass asks for the same window, except where windows differ.
        window = self._window
        if window is None or window[0] != known:
            window = self._window = (known, self._cut(batch, keys, offset, heads.device))
        values, raised, floor = window[1]
        first = offset + keys - 1 if seen is None else seen
        seen = self.prompt if seen is None else seen
        if self.target is None and offset + keys > self.prompt and (offset or seen + queries > self.prompt):
            raised = None  # written tokens are among the keys: they may be above the floor as well
        left = [place - first for place in gone]  # queries of this call that still see a mark
        until = None
        if self.target is None and min(left) < queries:
            each = torch.tensor(left).repeat_interleave(batch // len(left)).to(heads.device)
            values = torch.where((each > 0)[:, None], values, 0.0)
            until = each if any(0 < place < queries for place in left) else None
        return KeyBias(heads, values, raised, floor, self.target, first=max(0, self.first - seen), until=until)

    def _cut(self, batch: int, keys: int, offset: int, device: Any) -> tuple[Tensor, Tensor | None, Tensor]:
        rows = len(self.values)
        if batch % rows:
            raise ConfigError(
                f"marks of {rows} rows, but the model got a batch of {batch}",
                remedy="steer with the marks of this batch",
            )
        values = self.values[:, offset : offset + keys]
        if (missing := keys - values.shape[1]) > 0:
            values = torch.cat([values, self.grown[:, None].expand(-1, missing)], 1)
        raised = None if self.raised is None else torch.where(self.raised >= 0, self.raised - offset, -1)
        # Beams and several returned sequences repeat each row in place.
        parts = [
            None if part is None else part.repeat_interleave(batch // rows, 0).to(device)
            for part in (values, raised, self.floor)
        ]
        return parts[0], parts[1], parts[2]  # type: ignore[return-value]


class Block:
    """What all layers of a steer block share: the prompts, and the threads that it acts on.

    It acts on the thread that opened it, and on others that read exactly these prompts while they have no block of
    their own on the model, as a streamer's thread does. A thread that reads something else gets the plain model.

    Args:
        marks: the prompts.
    """

    def __init__(self, marks: Marks) -> None:
        self.ids, self.owner = marks.input_ids, get_ident()
        self.guests: set[int] = set()
        self.strangers: set[int] = set()

    def acts(self) -> bool:
        """Whether the running forward pass is one of this block.

        A thread that reads nothing itself, such as autograd's when it computes a layer again, is not a stranger.
        """
        return torch.compiler.is_compiling() or get_ident() not in self.strangers

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model reads: refuse another text than the marked one, or leave another thread alone."""
        if torch.compiler.is_compiling():
            return  # a graph has no place for it
        thread, cache = get_ident(), kwargs.get("past_key_values")
        ids = kwargs.get("input_ids", args[0] if args else None)
        if thread != self.owner:
            self._meet(thread, module, ids, cache)
        elif ids is None or ids.shape[1] == 1 < self.ids.shape[1]:
            return  # embeddings cannot be compared, and decoding shall not wait for a GPU
        elif self._same(ids, cache) is False:
            raise ConfigError(
                "the model reads other tokens than the marks were made for",
                remedy="pass marks.inputs to the model, or leave the steer block first",
            )

    def _meet(self, thread: int, module: nn.Module, ids: Tensor | None, cache: Any) -> None:
        """Decide whether a thread that did not open the block is a guest or a stranger."""
        same = None if ids is None else self._same(ids, cache)
        own = any(block.owner == thread for block in _OPEN.get(module, ()))
        if same is None and not own and thread in self.guests:
            return  # it goes on with what it has read
        known, other = (self.guests, self.strangers) if same and not own else (self.strangers, self.guests)
        known.add(thread)
        other.discard(thread)

    def _same(self, ids: Tensor, cache: Any) -> bool | None:
        """Whether these are the tokens of the prompts; None where none of the prompts are left to be read."""
        seen = 0 if cache is None else int(cache.get_seq_length())
        if seen >= self.ids.shape[1] or len(ids) % len(self.ids):
            return None  # a wrong batch is refused by the first layer
        expected = self.ids[:, seen : seen + ids.shape[1]].repeat_interleave(len(ids) // len(self.ids), 0)
        return torch.equal(ids[:, : expected.shape[1]], expected.to(ids.device))


_OPEN: WeakKeyDictionary[nn.Module, list[Block]] = WeakKeyDictionary()
"""The blocks that are open on a model, by the module that reads."""


@contextmanager
def reading(module: nn.Module, block: Block) -> Iterator[None]:
    """Let a block look at what the module is given to read."""
    handle = module.register_forward_pre_hook(block.read, with_kwargs=True)
    _OPEN.setdefault(module, []).append(block)
    try:
        yield
    finally:
        handle.remove()
        _OPEN[module].remove(block)


def given_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states ``[batch, tokens, channels]`` that a layer or its attention is called with."""
    hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return hidden


@dataclass(frozen=True)
class LayerHook:
    """Hands its layer the bias of the keys that this call sees."""

    block: Block
    bias: PromptBias
    heads: Tensor
    gone: tuple[int, ...]

    def __call__(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """As a forward pre-hook; None leaves the call as it is."""
        if not self.block.acts():
            return None
        check_installed(module)
        hidden = given_hidden(args, kwargs)
        if kwargs.get("cache") is not None:
            raise ModelError("continuous batching cannot be steered", remedy="use generate without a paged cache")
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))  # as GPT-NeoX calls it
        batch, queries = hidden.shape[:2]
        keys, offset, seen = queries, 0, 0  # type: int, int, int | None
        if cache is not None:
            keys, offset = map(int, cache.get_mask_sizes(queries, module.layer_idx))
            # Only a prefill asks for it, and on a static cache it is a tensor, for which a GPU would be waited for.
            # There a single query is the last of its keys only where they fill a window: elsewhere all is seen.
            seen = int(cache.get_seq_length(module.layer_idx)) if queries > 1 else None
        found = self.bias.layer(self.heads.to(hidden.device), self.gone, batch, queries, keys, offset, seen)
        return args, {**kwargs, "key_bias": (*kwargs.get("key_bias", ()), found)}
