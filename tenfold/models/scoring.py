"""The negative log-likelihood of chosen tokens of many sequences: what perplexity and multiple choice are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from tenfold.models.inference import evaluating, input_device, takes_logits_to_keep

Tell = Callable[[int, int], None]
"""Called with how many parts are done and how many there are."""

_CHUNK_ELEMENTS = 2**24
"""Logits that are widened to float32 at once: 64 MiB, whatever the vocabulary."""


class Window(NamedTuple):
    """One forward pass over ``ids``, of which those from index ``start`` (1 or more) on are scored."""

    ids: Sequence[int]
    start: int


Around = Callable[[Sequence[int], torch.Tensor, torch.Tensor], AbstractContextManager[object]]
"""What is entered while a batch is read, by the indices of its windows, its token ids and its mask."""

STEP = 64
"""Tokens that are read at once through a cache."""


def score(
    model: Any,
    windows: Sequence[Window],
    *,
    pad_id: int,
    batch_size: int = 1,
    progress: Tell | None = None,
    make_cache: Callable[[], Any] | None = None,
    around: Around = lambda indices, ids, mask: nullcontext(),
) -> list[torch.Tensor]:
    """Negative log-likelihoods of the scored tokens of each window.

    Windows are batched by length, longest first, so that padding is little and a lack of memory shows at once. Padding
    is on the right, where a causal model cannot see it.

    Args:
        model: a causal language model.
        windows: what to score.
        pad_id: the token to fill batches with.
        batch_size: windows per forward pass.
        progress: called after each batch with windows done and windows in all.
        make_cache: makes the cache that the windows of a batch are read through, `STEP` tokens at a time; by default
            they are read at once, without a cache.
        around: what is entered while a batch is read, such as a steering of its tokens.

    Returns:
        For each window, in the given order, ``[len(ids) - start]``, nats, float64, on the CPU.
    """
    order = sorted(range(len(windows)), key=lambda index: -len(windows[index].ids))
    scores: dict[int, torch.Tensor] = {}
    with evaluating(model):
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            part = [windows[index] for index in batch]
            ids, mask = _padded(model, part, pad_id)
            with around(batch, ids, mask):
                if make_cache is None:
                    found = _batch(model, part, ids, mask)
                else:
                    found = _stepwise(model, part, ids, mask, make_cache())
            scores.update(zip(batch, found, strict=True))
            if progress is not None:
                progress(len(scores), len(windows))
    return [scores[index] for index in range(len(windows))]


def _padded(model: Any, windows: list[Window], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their mask, each ``[windows, tokens]``, filled on the right."""
    device = input_device(model)
    length = max(len(window.ids) for window in windows)
    ids = torch.tensor([[*window.ids, *[pad_id] * (length - len(window.ids))] for window in windows], device=device)
    mask = torch.tensor([[1] * len(window.ids) + [0] * (length - len(window.ids)) for window in windows], device=device)
    return ids, mask


def _stepwise(
    model: Any, windows: list[Window], ids: torch.Tensor, mask: torch.Tensor, cache: Any
) -> list[torch.Tensor]:
    """The scores of a batch that is read through a cache."""
    parts: list[list[torch.Tensor]] = [[] for _ in windows]
    for begin in range(0, ids.shape[1], STEP):
        end = min(begin + STEP, ids.shape[1])
        # The logits at position i predict token i + 1.
        places = [(max(window.start - 1, begin), min(len(window.ids) - 1, end)) for window in windows]
        wanted = any(first < last for first, last in places)
        keep = {} if wanted or not takes_logits_to_keep(model) else {"logits_to_keep": 1}
        given = {"attention_mask": mask[:, :end], "past_key_values": cache, "use_cache": True, **keep}
        logits = model(input_ids=ids[:, begin:end], **given).logits
        for row, (first, last) in enumerate(places):
            if first < last:
                parts[row].append(
                    chunked_nll(logits[row, first - begin : last - begin], ids[row, first + 1 : last + 1])
                )
    return [torch.cat(part) for part in parts]


def _batch(model: Any, windows: list[Window], ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    length = ids.shape[1]
    # The logits at position i predict token i + 1: context that no row scores needs none.
    offset = min(window.start for window in windows) - 1
    keep = {"logits_to_keep": length - offset} if offset and takes_logits_to_keep(model) else {}
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **keep).logits
    offset = offset if keep else 0
    return [
        chunked_nll(
            logits[row, window.start - 1 - offset : len(window.ids) - 1 - offset],
            ids[row, window.start : len(window.ids)],
        )
        for row, window in enumerate(windows)
    ]


def chunked_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each target, widening few logits at a time.

    Args:
        logits: ``[tokens, vocabulary]``, any float type.
        targets: ``[tokens]``, int64.

    Returns:
        ``[tokens]``, nats, float64, on the CPU.

    >>> chunked_nll(torch.zeros(1, 4), torch.tensor([2])).exp()
    tensor([4.0000], dtype=torch.float64)
    """
    rows = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    parts = []
    for part, wanted in zip(torch.split(logits, rows), torch.split(targets.to(logits.device), rows), strict=True):
        wide = part if part.dtype == torch.float64 else part.float()
        parts.append(torch.nn.functional.cross_entropy(wide, wanted, reduction="none").double().cpu())
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
