"""Products with a compressed matrix, in three forms, and which of them is the fastest for a shape on this machine.

Some rows of the matrix are stored, the others are combinations of the first of these. ``stored`` reads the fewest
numbers, ``joined`` takes fewer steps and reads more, ``whole`` is the plain matrix. Little is computed for one token,
so that the steps count there, and on a GPU most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from tenfold.kernels.timing import copies_to_sweep, in_turns

Form = Literal["stored", "joined", "whole"]
FORMS: tuple[Form, ...] = ("stored", "joined", "whole")
FEW = 16
"""Up to so many tokens, a layer takes the form that is best for one token; above, the one that is best for many."""
MANY = 128


def product(x: Tensor, rows: Tensor, mix: Tensor, place: Tensor, bias: Tensor | None = None) -> Tensor:
    """What a compressed matrix makes of inputs, from its stored form.

    Args:
        x: ``[..., in]``.
        rows: ``[stored, in]``, rows of the matrix; the others are combinations of the first ``rank``.
        mix: ``[out - stored, rank]``, the factors of these combinations.
        place: ``[out]``, int32 or int64, where each row of the matrix stands among the stored ones and, after them, the
            combinations.
        bias: ``[out]``.

    Returns:
        ``[..., out]``.

    >>> x, rows, mix = torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.tensor([[3.0]])
    >>> product(x, rows, mix, torch.tensor([2, 0, 1])).tolist()
    [[3.0, 1.0, 2.0]]
    """
    stored = linear(x, rows)
    y = torch.cat((stored, linear(stored[..., : mix.shape[1]], mix)), -1).index_select(-1, place)
    return y if bias is None else y + bias.to(y.dtype)


def combinations(rows: int, mix: Tensor, place: Tensor) -> Tensor:
    """Every row of the matrix as a combination of the stored ones, ``[out, rows]``: the second factor of `joined`.

    >>> combinations(2, torch.tensor([[3.0]]), torch.tensor([2, 0, 1])).tolist()
    [[3.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    """
    unit = torch.eye(rows, dtype=mix.dtype, device=mix.device)
    others = torch.nn.functional.pad(mix, (0, rows - mix.shape[1]))
    return torch.cat((unit, others)).index_select(0, place)


def joined(x: Tensor, rows: Tensor, factors: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same from two factors: fewer steps, and more numbers.

    Args:
        x: ``[..., in]``.
        rows: ``[stored, in]``.
        factors: as `combinations` makes them.
        bias: ``[out]``.
    """
    return linear(linear(x, rows), factors, bias)


@torch.no_grad()
def seconds(
    shape: tuple[int, int], rank: int, kept: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> dict[Form, float]:
    """How long each form takes, as `tenfold.kernels.timing.in_turns` says it.

    Args:
        shape: out and in.
        rank: of the combinations.
        kept: further rows that are stored.
        tokens: rows of the input.
        dtype: of all numbers.
        device: where.
    """
    out, inner = shape
    x = torch.randn(1, tokens, inner, device=device).to(dtype)
    rows = torch.randn(rank + kept, inner, device=device).to(dtype)
    mix = torch.randn(out - rank - kept, rank, device=device).to(dtype)
    place = torch.randperm(out, device=device).int()
    weights: dict[Form, tuple[Tensor, ...]] = {
        "stored": (rows, mix, place),
        "joined": (rows, combinations(len(rows), mix, place)),
        "whole": (torch.randn(out, inner, device=device).to(dtype),),
    }
    calls: Mapping[Form, Callable[..., Tensor]] = {"stored": product, "joined": joined, "whole": linear}
    copies = {form: _copies(parts, tokens) for form, parts in weights.items()}
    return in_turns({form: [partial(calls[form], x, *parts) for parts in copies[form]] for form in FORMS}, device)


def _copies(parts: tuple[Tensor, ...], tokens: int) -> list[tuple[Tensor, ...]]:
    """With many tokens it is arithmetic that counts, and not where the weights come from."""
    size = sum(part.numel() * part.element_size() for part in parts)
    count = copies_to_sweep(size) if tokens < MANY else 3
    return [parts, *(tuple(part.clone() for part in parts) for _ in range(count - 1))]
