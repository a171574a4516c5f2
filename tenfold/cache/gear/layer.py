"""One layer of a compressed cache: exact first tokens, packed blocks, an exact buffer.

Blocks are appended and never packed again. GEAR specification, sections 2.2 and 6.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from tenfold.cache.gear.handle import PackedHandle
from tenfold.cache.gear.recipe import Format, compress
from tenfold.cache.gear.settings import KEYS, VALUES, LayerFormats, layer_formats, rotates
from tenfold.cache.layer import CacheLayer, Change
from tenfold.config.gear import CacheConfig
from tenfold.core.formats import half_or_float
from tenfold.errors import ModelError
from tenfold.kernels.compressed import choose
from tenfold.kernels.packed_blocks import RAW, Functions, PackedBlocks
from tenfold.kernels.view import View

Packed = tuple[tuple[PackedBlocks, PackedBlocks], ...]
"""Keys and values of packed blocks, in order of tokens; blocks of equal form are one item."""
PIECE = 1024
"""Tokens whose blocks are packed at once: it bounds the float32 copies."""


class GearLayer(CacheLayer):
    """Keys and values of one attention layer.

    Args:
        config: how they are stored.
        index: of the layer, for its bits and for errors.
        reads: whether the attention function of the model reads handles now; else whole tensors are handed over.
    """

    is_initialized: bool
    functions: Functions

    def __init__(self, config: CacheConfig, index: int, reads: Callable[[], bool]) -> None:
        super().__init__(index)
        self.config, self.reads = config, reads
        self.formats: LayerFormats = layer_formats(config, index)
        self.uncropped = 0
        """Tokens that came since `crop` last said what stays, while the past is recorded."""
        self.visible: Tensor | None = None
        """Which of the first tokens are not padding, ``[rows, tokens]``, bool, where it is known before packing."""
        self.first: Any = ()
        self.buffer: Any = ()
        self.opening = 0
        """Tokens of the first call: the prompt, or its first piece."""
        self.lead = False
        """Whether the first packed block is the prompt's."""
        self.packed: Packed = ()
        self.packed_tokens = 0
        """Tokens that went through the quantiser so far."""

    def __getstate__(self) -> dict[str, Any]:
        """Without the kernel: what runs here need not be there where a copy is loaded."""
        return {name: value for name, value in vars(self).items() if name != "functions"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.is_initialized:
            self.device = self.buffer[0].device
            self.functions = choose(self.config.kernel, self.device)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device and shapes from the first keys and values; they may have no tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        empty = (key_states[:, :, :0].clone(), value_states[:, :, :0].clone())
        self.first, self.buffer, self.packed = empty, empty, ()
        self.functions = choose(self.config.kernel, self.device)
        self.rotation = None
        if rotates(self.config) and any(form.bits != RAW for form in self.formats.prompt):
            if key_states.shape[-1] != value_states.shape[-1]:
                raise ModelError(
                    f"layer {self.index}: keys have {key_states.shape[-1]} channels, values {value_states.shape[-1]}: "
                    "they cannot share a rotation",
                    remedy="give rotate: false",
                )
            self.rotation = hadamard(key_states.shape[-1]).to(self.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Append keys and values; hand over what this call attends to.

        Args:
            key_states: ``[batch, kv_heads, tokens, channels]``.
            value_states: as ``key_states``.
            *args: what else transformers passes.
            **kwargs: likewise.

        Returns:
            Twice a handle where the attention function reads it, else two tensors of all tokens.

        Raises:
            ModelError: another batch size, dtype or shape than before; numbers that are not finite, in a block that is
                to be packed. The layer then is as it was before the call.
        """
        before = self.mark()
        with self._or_else(before):
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self._check_like(key_states, value_states)
            if self.get_seq_length() == 0:
                self.opening = key_states.shape[2]
            if self.record_past:
                if self.uncropped >= self.config.buffer:  # nobody crops any more: what came before this call stays
                    self._pack(None)
                self.uncropped += key_states.shape[2]
            self.buffer = (torch.cat([self.buffer[0], key_states], 2), torch.cat([self.buffer[1], value_states], 2))
        view = View(self.first, self.packed, self.buffer, self.rotation, self.functions)
        handle = PackedHandle(partial(self._commit_call, before), view)
        return (handle, handle) if self.reads() else handle.dense()

    def _check_like(self, key_states: Tensor, value_states: Tensor) -> None:
        for name, new, old in zip(("keys", "values"), (key_states, value_states), self.buffer, strict=True):
            if (new.shape[:2], new.shape[3], new.dtype) != (old.shape[:2], old.shape[3], old.dtype):
                raise ModelError(
                    f"layer {self.index}: {name} {tuple(new.shape)} {new.dtype} after {tuple(old.shape)} {old.dtype}",
                    remedy="one cache is for one batch: call cache.reset(), or make another",
                )

    def mark(self) -> Mapping[str, Any]:
        """What `take_back` needs to undo the next call. Of packed blocks only the count: a call appends to them."""
        return {name: getattr(self, name) for name in _OF_A_CALL} | {"packed": _tokens(self.packed)}

    def take_back(self, before: Mapping[str, Any]) -> None:
        """Be as at `mark`: exactly so, for blocks are appended and never changed."""
        packed = (
            _first_tokens(self.packed, before["packed"]) if _tokens(self.packed) > before["packed"] else self.packed
        )
        for name, value in {**before, "packed": packed}.items():
            setattr(self, name, value)

    @contextmanager
    def _or_else(self, before: Mapping[str, Any]) -> Iterator[None]:
        """Take the call back where it fails."""
        try:
            yield
        except BaseException:
            self.take_back(before)
            raise

    def _commit_call(self, before: Mapping[str, Any], mask: Tensor | None) -> None:
        with self._or_else(before):
            self.commit(mask)

    def commit(self, mask: Tensor | None = None) -> None:
        """Pack what the buffer has too much of.

        Args:
            mask: of this call, as attention got it, from which it is seen what is padding; None for none.
        """
        if not self.record_past:
            self._pack(mask)
        elif (keep := seen_keys(mask, self.get_seq_length())) is not None:  # whoever packs later does not know the mask
            self.visible = keep

    def _pack(self, mask: Tensor | None) -> None:
        """All that the buffer has too much of; the mask is read only if that is something."""
        sinks = self._missing_sinks()
        plan = self._plan(self.buffer[0].shape[2] - sinks)
        if not plan:
            return
        kept = self._kept(seen_keys(mask, self.get_seq_length()))
        stop = sinks + sum(tokens for tokens, _, _ in plan)
        self._check_finite(
            [side[:, :, sinks:stop] for side in self.buffer], None if kept is None else kept[:, sinks:stop]
        )
        packed, place = self.packed, sinks
        # Packing is arithmetic in float32, without a graph, whatever the model's forward pass is wrapped in.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            for tokens, blocks, forms in plan:
                part = slice(place, place + tokens)
                sides = [
                    self._pack_side(side[:, :, part], form, lines, None if kept is None else kept[:, part], blocks)
                    for side, form, lines in zip(self.buffer, forms, (KEYS, VALUES), strict=True)
                ]
                packed, place = _appended(packed, (sides[0], sides[1])), place + tokens
        self.lead = plan[0][2] is self.formats.prompt if not self.packed else self.lead
        self.packed = packed
        if sinks:
            self.first = (self._joined(0, sinks), self._joined(1, sinks))
        self.buffer = (self.buffer[0][:, :, stop:].clone(), self.buffer[1][:, :, stop:].clone())  # frees the rest
        self.packed_tokens += stop - sinks

    def _kept(self, seen: Tensor | None) -> Tensor | None:
        """Which tokens of the buffer are not padding: ``[batch, tokens]``, or None for all."""
        seen = self.visible if seen is None else seen
        if seen is None:
            return None
        batch, _, length, _ = self.buffer[0].shape
        flags = _rows(seen, batch)[:, self.get_seq_length() - length : self.get_seq_length()]
        return torch.nn.functional.pad(flags, (0, length - flags.shape[1]), value=True)

    def _missing_sinks(self) -> int:
        """First tokens that are to stay exact and lie in the buffer yet."""
        return 0 if self.packed else max(0, self.config.exact_tokens - self.first[0].shape[2])

    def _plan(self, tokens: int) -> list[tuple[int, int, tuple[Format, Format]]]:
        """What of so many tokens is packed: tokens, number of blocks, formats.

        It follows from the length of the first call and from the tokens since, not from when it is asked: a cache that
        packs late, because it records its past, packs the same blocks.
        """
        size = self.config.buffer
        plan: list[tuple[int, int, tuple[Format, Format]]] = []
        if self.config.prefill != "blocks" and not self.packed and self.opening > 1:
            lead = max(0, min(self.opening - self.first[0].shape[2] - self._missing_sinks(), tokens))
            lead = lead if self.config.prefill == "compress" else lead // size * size
            if lead:
                plan.append((lead, 1, self.formats.prompt))
                tokens -= lead
        step = max(1, PIECE // size)
        blocks = tokens // size
        for start in range(0, blocks, step):
            count = min(step, blocks - start)
            plan.append((count * size, count, self.formats.block))
        return plan

    def _joined(self, side: int, tokens: int) -> Tensor:
        return torch.cat([self.first[side], self.buffer[side][:, :, :tokens]], 2)

    def _pack_side(self, x: Tensor, form: Format, lines: int, keep: Tensor | None, blocks: int) -> PackedBlocks:
        """Blocks of equal length are packed at once, as if they were rows of a batch."""
        batch = x.shape[0]
        x = x.unflatten(2, (blocks, -1)).permute(2, 0, 1, 3, 4).flatten(0, 1)
        if keep is not None:
            keep = keep.unflatten(1, (blocks, -1)).transpose(0, 1).flatten(0, 1)
        if self.rotation is not None:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            x = x @ self.rotation.to(x)
        side = compress(x, form, lines=lines, keep=keep)
        if self.config.mode == "simulate":
            dense = side.dense(torch.promote_types(x.dtype, torch.float32))
            # Rotated numbers of a float16 model may lie beyond float16.
            kind = half_or_float(dense) if self.dtype == torch.float16 else self.dtype
            side = PackedBlocks(RAW, x.shape[-1], form.axis, 1, lines, dense.unsqueeze(0).to(kind))
        return side.map(lambda tensor: tensor[0].unflatten(0, (blocks, batch)))

    def _check_finite(self, sides: list[Tensor], keep: Tensor | None) -> None:
        """Before anything changes: one NaN would spoil its whole group."""
        for name, side in zip(("keys", "values"), sides, strict=True):
            bad = ~side.isfinite().all(-1).all(1)
            if bool((bad if keep is None else bad & keep).any()):
                raise ModelError(
                    f"layer {self.index}: {name} are not finite and cannot be packed",
                    remedy="look at the model's dtype and weights: the exact cache would hide the same NaN or infinity",
                )

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        if not self.is_initialized:
            return 0
        return self.first[0].shape[2] + _tokens(self.packed) + self.buffer[0].shape[2]

    def activate_past_recording(self) -> None:
        """From now on nothing is packed before `crop` has said which tokens stay.

        transformers never says when that ends: after assisted decoding the same cache may go to plain decoding, which
        does not crop. So once ``buffer`` tokens came without a crop, each call packs what came before it.
        """
        self.record_past, self.uncropped = True, 0

    def keep(self, tokens: int) -> None:
        """Forget all but the first so many tokens; nothing of these is packed again."""
        first = self.first[0].shape[2]
        inside = tokens - first - _tokens(self.packed)
        if inside < 0:
            self.packed = _first_tokens(self.packed, max(0, tokens - first))
        self.opening, self.uncropped = min(self.opening, tokens), 0
        self.visible = None if self.visible is None else self.visible[:, :tokens]
        self.first = (self.first[0][:, :, :tokens].clone(), self.first[1][:, :, :tokens].clone())
        self.buffer = tuple(side[:, :, : max(0, inside)].clone() for side in self.buffer)
        if self.record_past:
            self._pack(None)

    def change(self, change: Change) -> None:
        """Replace every tensor; those of packed blocks have their batch behind the blocks."""
        if self.visible is not None:
            self.visible = change(_rows(self.visible, self.buffer[0].shape[0]), 0)
        self.first = (change(self.first[0], 0), change(self.first[1], 0))
        self.buffer = (change(self.buffer[0], 0), change(self.buffer[1], 0))
        self.packed = tuple(
            (keys.map(lambda tensor: change(tensor, 1)), values.map(lambda tensor: change(tensor, 1)))
            for keys, values in self.packed
        )

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized, self.packed, self.packed_tokens = False, (), 0
        self.record_past, self.uncropped, self.visible = False, 0, None
        self.first = self.buffer = ()

    def stored_bytes(self) -> dict[str, int]:
        """Bytes by part: ``codes``, ``scales``, ``low rank``, ``outliers``, and ``exact`` first tokens and buffer."""
        parts = dict.fromkeys(("codes", "scales", "low rank", "outliers", "exact"), 0)
        if not self.is_initialized:
            return parts
        for side in (side for pair in self.packed for side in pair):
            for name, tensor in side.tensors().items():
                parts[_PARTS[name]] += tensor.nbytes
        parts["exact"] = sum(tensor.nbytes for tensor in (*self.first, *self.buffer))
        return parts


_OF_A_CALL = ("is_initialized", "first", "buffer", "opening", "lead", "packed_tokens", "uncropped", "visible")
"""What a call may change, but for the packed blocks."""
_PARTS = {
    "codes": "codes",
    "scale": "scales",
    "zero": "scales",
    "left": "low rank",
    "right": "low rank",
    "delta": "outliers",
    "place": "outliers",
}


def _appended(packed: Packed, pair: tuple[PackedBlocks, PackedBlocks]) -> Packed:
    """With further blocks: in the last stack where they are like it, else in one of their own."""
    if packed and all(old.like(new) for old, new in zip(packed[-1], pair, strict=True)):
        last = packed[-1]
        return (*packed[:-1], (last[0].append(pair[0]), last[1].append(pair[1])))
    return (*packed, pair)


def _rows(flags: Tensor, batch: int) -> Tensor:
    """Flags ``[rows, tokens]`` for each row of the batch: one row is for all, and beams stand side by side."""
    if batch % len(flags):
        raise ModelError(
            f"a mask of {len(flags)} rows for a cache of {batch}", remedy="give the attention mask of this batch"
        )
    return flags.repeat_interleave(batch // len(flags), 0)


def seen_keys(mask: Tensor | None, keys: int) -> Tensor | None:
    """Keys that some query of some head sees: ``[batch or 1, keys]``, None for all; padding is not among them."""
    if mask is None:
        return None
    mask = mask[..., :keys]
    if mask.dtype.is_floating_point:
        mask = mask > torch.finfo(mask.dtype).min / 2
    if mask.ndim == 2:
        return mask.bool()
    # Most often the last query sees all, and the rest of a large mask need not be read.
    return None if bool(mask[:, :, -1].any(1).all()) else mask.bool().any(2).any(1)


def _tokens(packed: Packed) -> int:
    return sum(keys.blocks * keys.length for keys, _ in packed)


def _first_tokens(packed: Packed, tokens: int) -> Packed:
    """Whole blocks, and the one that is cut."""
    kept: list[tuple[PackedBlocks, PackedBlocks]] = []
    for pair in packed:
        blocks, rest = divmod(min(tokens, pair[0].blocks * pair[0].length), pair[0].length)
        keys, values = pair
        if blocks:
            kept.append((keys.some_blocks(0, blocks).copied(), values.some_blocks(0, blocks).copied()))
        if rest:
            cut = [side.some_blocks(blocks, blocks + 1).first_tokens(rest) for side in pair]
            kept.append((cut[0], cut[1]))
        tokens -= blocks * pair[0].length + rest
    return tuple(kept)


@lru_cache
def hadamard(channels: int) -> Tensor:
    """An orthogonal, symmetric matrix of equal magnitudes; block-diagonal where ``channels`` is not a power of two.

    >>> H = hadamard(24)
    >>> torch.allclose(H @ H, torch.eye(24), atol=1e-6), int((H != 0).sum(0)[0])
    (True, 8)
    """
    size = channels & -channels  # the largest power of two that divides it
    block = torch.ones(1, 1)
    while block.shape[0] < size:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    return torch.block_diag(*[block / math.sqrt(size)] * (channels // size))
