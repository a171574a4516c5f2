"""Peers of one-shot LoSparse: each makes a smaller model from the same calibration tokens, within the same budget.

A peer is made ready once (`PEERS`: a function of a `Subject`) and is then asked for shares of the replaced matrices'
numbers. What it gives are dense weights, which compute what its small form would, with what that form stores.

- Low rank: plain SVD, and whitened by the inputs' second moments (SVD-LLM, arXiv 2403.07378), with one ratio for all
  matrices; in two factors as published, and as rows and combinations of them (PIFA, arXiv 2501.19090), which is
  lossless and affords more rank. ``sequential`` whitens by the inputs that the compressed layers before give, which is
  at least as good as SVD-LLM's update of one factor on those inputs: both factors are optimal for them.
- Neurons of the MLP and groups of heads: FLAP (arXiv 2312.11983; fluctuation, over all layers, with bias), and Wanda's
  metric (the same share in each layer), as FLAP's code has both. Query heads that share keys and values go together.
- Rows of each matrix: torch's ``ln_structured``, and Wanda's metric with the mean of the rows that are gone.
- Rounding of the dense weights. The embedded model's weights come from files of 4 to 8 bits, on whose grid rounding
  might lose nothing: so weights are rotated by a random orthogonal matrix before, and back after it.

Sizes are those of 16-bit numbers and 32-bit indices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from tenfold.compress.losparse.factors import stored
from tenfold.models.head_sizes import head_dim, kv_heads

GROUP = 32
"""Weights that share a scale when rounded to 4 bits."""


@dataclass(frozen=True)
class Made:
    """A compressed model, as the dense weights that compute the same.

    Args:
        weights: module name -> ``[out, in]``.
        biases: module name -> ``[out]``, of those that gain one.
        numbers: that its small form stores, with the biases.
        bytes: of that.
    """

    weights: dict[str, Tensor]
    biases: dict[str, Tensor]
    numbers: int
    bytes: int


At = Callable[[float], Made]
"""A share of the replaced matrices' numbers -> what a peer makes within it."""


@dataclass
class Moments:
    """Of the inputs of a matrix: running sums over tokens, in float64."""

    gram: Tensor
    total: Tensor
    tokens: int = 0

    def add(self, inputs: Tensor) -> None:
        """Look at ``[..., in]``."""
        rows = inputs.detach().flatten(0, -2).float()
        self.gram += rows.T @ rows
        self.total += rows.sum(0)
        self.tokens += len(rows)

    @property
    def mean(self) -> Tensor:
        """``[in]``."""
        return self.total / self.tokens

    @property
    def norm(self) -> Tensor:
        """``[in]``, the root of the summed squares."""
        return self.gram.diagonal().sqrt()

    @property
    def variance(self) -> Tensor:
        """``[in]``, over tokens."""
        return self.gram.diagonal() / self.tokens - self.mean.square()

    def root(self) -> Tensor:
        """``[in, in]``, lower triangular C with C C^T the mean of x x^T and of as small a ridge as does."""
        gram = self.gram / self.tokens
        ridge = 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        while True:
            root, failed = torch.linalg.cholesky_ex(gram + ridge)
            if not failed:
                return root
            ridge *= 10


READS = {"q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "o_proj": "o_proj", "gate_proj": "gate_proj",
         "up_proj": "gate_proj", "down_proj": "down_proj"}  # fmt: skip
"""Matrices of a Llama's block -> which of them stands for its input."""


@contextmanager
def watched(block: nn.Module) -> Iterator[dict[str, Moments]]:
    """The moments of the inputs of a block's matrices, by their last names, of whatever passes meanwhile."""
    matrices = {name.rpartition(".")[2]: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    found, hooks = {}, []
    for name in dict.fromkeys(READS.values()):
        size, make = matrices[name].in_features, {"dtype": torch.float64, "device": matrices[name].weight.device}
        found[name] = Moments(torch.zeros(size, size, **make), torch.zeros(size, **make))
        hooks.append(matrices[name].register_forward_pre_hook(lambda _, args, into=found[name]: into.add(args[0])))
    try:
        yield {name: found[reads] for name, reads in READS.items()}
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Subject:
    """A Llama and the tokens that a peer may look at.

    Args:
        model: with the matrices of `READS` in each block.
        ids: ``[pieces, tokens]``.
        tokenizer: where the model is to write texts itself.
    """

    model: Any
    ids: Tensor
    tokenizer: Any = None
    matrices: dict[str, nn.Linear] = field(init=False)

    def __post_init__(self) -> None:
        named = self.model.named_modules()
        self.matrices = {name: m for name, m in named if name.rpartition(".")[2] in READS}

    @property
    def blocks(self) -> dict[str, Any]:
        """Name -> block."""
        return {f"model.layers.{index}": block for index, block in enumerate(self.model.model.layers)}

    @property
    def numbers(self) -> int:
        """Of the matrices that are replaced."""
        return sum(matrix.weight.numel() for matrix in self.matrices.values())

    @cached_property
    def moments(self) -> dict[str, Moments]:
        """Module name -> of its inputs, in the dense model."""
        found = {}
        states = self.hidden()
        for name, block in self.blocks.items():
            with watched(block) as seen:
                states.pass_through(block)
            found |= {module: seen[module.rpartition(".")[2]] for module in self.of(name)}
        return found

    def of(self, block: str) -> list[str]:
        """Names of the matrices in a block."""
        return [name for name in self.matrices if name.startswith(f"{block}.")]

    def hidden(self) -> States:
        """What the first block is given."""
        return States(self.model, self.ids)


class States:
    """The hidden states of all calibration tokens, on their way through the blocks."""

    def __init__(self, model: Any, ids: Tensor, batch: int = 2):
        self.batches: list[Tensor] = []
        self.options: list[dict[str, Any]] = []

        def catch(_: nn.Module, args: tuple[Tensor, ...], options: dict[str, Any]) -> None:
            self.batches.append(args[0])
            self.options.append({**options, "past_key_values": None, "use_cache": False})
            raise _Caught

        hook = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
        with torch.no_grad():
            for piece in ids.split(batch):
                try:
                    model(input_ids=piece, use_cache=False)
                except _Caught:
                    continue
        hook.remove()

    @torch.no_grad()
    def pass_through(self, block: nn.Module, keep: bool = True) -> None:
        """Read them by a block; ``keep``: and go on with what it gives."""
        for index, (batch, options) in enumerate(zip(self.batches, self.options, strict=True)):
            found = block(batch, **options)
            if keep:
                self.batches[index] = found


class _Caught(Exception):  # noqa: N818
    """What the first block is given is known."""


@contextmanager
def applied(model: nn.Module, made: Made) -> Iterator[None]:
    """The model computes with what was made."""
    before = {}
    for name, weight in made.weights.items():
        matrix = model.get_submodule(name)
        before[name] = (matrix.weight.data, matrix.bias)
        matrix.weight.data = weight.to(matrix.weight.dtype)
        if name in made.biases:
            matrix.bias = nn.Parameter(made.biases[name].to(matrix.weight.dtype), requires_grad=False)
    try:
        yield
    finally:
        for name, (weight, bias) in before.items():
            matrix = model.get_submodule(name)
            matrix.weight.data, matrix.bias = weight, bias


# ---- low rank -------------------------------------------------------------------------------------------------------


def affordable(out_features: int, in_features: int, keep: float, pivoted: bool) -> int:
    """The largest rank within a share of a matrix's numbers, in two factors or as rows and combinations.

    >>> affordable(1536, 576, 0.5, pivoted=False), affordable(1536, 576, 0.5, pivoted=True)
    (209, 235)
    """
    budget, least = keep * out_features * in_features, min(out_features, in_features)
    if not pivoted:
        return min(int(budget / (out_features + in_features)), least)
    # r (out + in) - r^2 = budget
    total = out_features + in_features
    rank = int((total - math.sqrt(max(total**2 - 4 * budget, 0))) / 2 + 1e-9)
    return min(rank, least)


def truncated(weight: Tensor, moments: Moments | None) -> tuple[Tensor, Tensor]:
    """Left factors and right factors of all ranks: ``left[:, :r] @ right[:r]`` is best for the inputs' moments."""
    if moments is None:
        left, values, right = torch.linalg.svd(weight.detach().float(), full_matrices=False)
        return left * values, right
    root = moments.root()
    left, values, right = torch.linalg.svd((weight.detach().double() @ root).float(), full_matrices=False)
    return left * values, torch.linalg.solve_triangular(root, right.double(), upper=False, left=False).float()


def low_rank(subject: Subject, whitened: bool, pivoted: bool) -> At:
    """One ratio for all matrices."""
    factors = {
        name: truncated(matrix.weight, subject.moments[name] if whitened else None)
        for name, matrix in subject.matrices.items()
    }

    def at(keep: float) -> Made:
        return _of_rank({name: (*pair, keep) for name, pair in factors.items()}, pivoted)

    return at


def _of_rank(factors: dict[str, tuple[Tensor, Tensor, float]], pivoted: bool) -> Made:
    weights, numbers, indices = {}, 0, 0
    for name, (left, right, keep) in factors.items():
        shape = left.shape[0], right.shape[1]
        rank = affordable(*shape, keep, pivoted)
        weights[name] = left[:, :rank] @ right[:rank]
        numbers += stored(*shape, rank, 0) if pivoted else rank * sum(shape)
        indices += shape[0] if pivoted else 0
    return Made(weights, {}, numbers, 2 * numbers + 4 * indices)


def sequential(subject: Subject, pivoted: bool = True) -> At:
    """Whitened block by block, by the inputs that the compressed blocks before give."""

    def at(keep: float) -> Made:
        states, parts = subject.hidden(), []
        for name, block in subject.blocks.items():
            with watched(block) as seen:
                states.pass_through(block, keep=False)
            factors = {
                module: (*truncated(subject.matrices[module].weight, seen[module.rpartition(".")[2]]), keep)
                for module in subject.of(name)
            }
            parts.append(_of_rank(factors, pivoted))
            with applied(subject.model, parts[-1]):
                states.pass_through(block)
        weights = {name: weight for part in parts for name, weight in part.weights.items()}
        return Made(weights, {}, sum(part.numbers for part in parts), sum(part.bytes for part in parts))

    return at


# ---- neurons and heads ----------------------------------------------------------------------------------------------


def neurons(subject: Subject, metric: str) -> At:
    """Intermediate neurons and groups of heads are removed: ``flap`` (with bias), or ``wanda``."""
    config = subject.model.config
    groups, hidden, size = kv_heads(config), config.hidden_size, head_dim(config)
    shared = config.num_attention_heads // groups
    prices = 2 * hidden * size * (shared + 1), 3 * hidden
    heads, cells = _scores(subject, metric, groups)

    def at(keep: float) -> Made:
        budget = int(keep * subject.numbers)
        if metric == "flap":
            chosen = _best(heads, cells, prices, budget - 2 * hidden * len(heads))
        else:
            chosen = _evenly(heads, cells, prices, keep)
        weights: dict[str, Tensor] = {}
        biases: dict[str, Tensor] = {}
        numbers = 0
        for index, block in enumerate(subject.blocks):
            kept = {"self_attn": chosen[0][index], "mlp": chosen[1][index]}
            numbers += sum(int(mask.sum()) * price for mask, price in zip(kept.values(), prices, strict=True))
            wide = kept["self_attn"].repeat_interleave(size), kept["self_attn"].repeat_interleave(shared * size)
            masks = {"q_proj": wide[1], "k_proj": wide[0], "v_proj": wide[0], "gate_proj": kept["mlp"],
                     "up_proj": kept["mlp"]}  # fmt: skip
            for name in subject.of(block):
                last, weight = name.rpartition(".")[2], subject.matrices[name].weight.detach()
                if last in masks:
                    weights[name] = weight * masks[last][:, None]
                    continue
                inputs = wide[1] if last == "o_proj" else kept["mlp"]
                weights[name] = weight * inputs
                if metric == "flap" and not bool(inputs.all()):
                    biases[name] = (weight.double() @ (subject.moments[name].mean * ~inputs)).float()
        numbers += sum(bias.numel() for bias in biases.values())
        return Made(weights, biases, numbers, 2 * numbers)

    return at


def _scores(subject: Subject, metric: str, groups: int) -> tuple[Tensor, Tensor]:
    """Of groups of heads and of neurons, ``[layers, ...]``, as FLAP's code has them."""
    found: dict[str, list[Tensor]] = {"o_proj": [], "down_proj": []}
    for name, matrix in subject.matrices.items():
        last, weight, moments = name.rpartition(".")[2], matrix.weight.detach().double(), subject.moments[name]
        if last in found and metric == "flap":
            score = moments.variance * weight.square().sum(0)
            found[last].append(score.square() if last == "o_proj" else score)
        elif last in found:
            found[last].append((weight.abs() * moments.norm).mean(0))
    heads, cells = (torch.stack(scores) for scores in found.values())
    if metric == "flap":
        heads, cells = ((s - s.mean(1, keepdim=True)) / s.std(1, keepdim=True) for s in (heads, cells))
    return heads.unflatten(1, (groups, -1)).mean(2), cells


def _best(heads: Tensor, cells: Tensor, prices: tuple[int, int], budget: int) -> tuple[Tensor, Tensor]:
    """The highest scores of the whole model, as many as the budget buys."""
    order = torch.cat([heads.flatten(), cells.flatten()]).argsort(descending=True)
    cost = torch.where(order < heads.numel(), prices[0], prices[1]).cumsum(0)
    mask = torch.zeros_like(order, dtype=torch.bool)
    mask[order[cost <= budget]] = True
    return mask[: heads.numel()].view_as(heads), mask[heads.numel() :].view_as(cells)


def _evenly(heads: Tensor, cells: Tensor, prices: tuple[int, int], keep: float) -> tuple[Tensor, Tensor]:
    """The highest scores of each layer; what is rounded up in heads is saved in neurons."""
    whole = heads.shape[1] * prices[0] + cells.shape[1] * prices[1]
    kept = heads.shape[1] - int((1 - keep) * heads.shape[1])
    counts = kept, int((keep * whole - kept * prices[0]) / prices[1])
    masks = []
    for scores, count in zip((heads, cells), counts, strict=True):
        best = scores.topk(count, dim=1).indices
        masks.append(torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True))
    return masks[0], masks[1]


# ---- rows -----------------------------------------------------------------------------------------------------------


def rows(subject: Subject, metric: str) -> At:
    """The same share of each matrix's rows: ``ln`` (torch's ln_structured), or ``wanda`` with the others' mean."""

    def at(keep: float) -> Made:
        weights: dict[str, Tensor] = {}
        biases: dict[str, Tensor] = {}
        numbers = indices = 0
        for name, matrix in subject.matrices.items():
            out, size = matrix.weight.shape
            if metric == "ln":
                kept = int(keep * out)
                clone = nn.Linear(size, out, bias=False, device=matrix.weight.device)
                clone.weight.data = matrix.weight.detach().clone()
                prune.ln_structured(clone, "weight", amount=out - kept, n=2, dim=0)
                weights[name] = clone.weight.detach()
            else:
                kept = int((keep * size - 1) * out / size)  # a bias costs one number a row
                moments, weight = subject.moments[name], matrix.weight.detach()
                mask = torch.ones(out, dtype=torch.bool, device=weight.device)
                mask[(weight.double().abs() @ moments.norm).topk(kept).indices] = False
                weights[name] = weight * ~mask[:, None]
                biases[name] = (weight.double() @ moments.mean).float() * mask
                numbers += out
            numbers, indices = numbers + kept * size, indices + kept
        return Made(weights, biases, numbers, 2 * numbers + 4 * indices)

    return at


# ---- rounding -------------------------------------------------------------------------------------------------------


def rounded(subject: Subject, bits: int) -> Made:
    """To the nearest of ``bits`` bits: 8 with a scale a row, 4 with one for 32 weights; symmetric, after a rotation."""
    weights, size, turned = {}, 0, {}
    for name, matrix in subject.matrices.items():
        out, width = matrix.weight.shape
        if width not in turned:
            noise = torch.randn(width, width, generator=torch.Generator().manual_seed(width))
            turned[width] = torch.linalg.qr(noise)[0].to(matrix.weight.device)
        weight = matrix.weight.detach() @ turned[width]
        weights[name] = round_to(weight, bits, width if bits == 8 else GROUP) @ turned[width].T
        size += weight.numel() * bits // 8 + 2 * (out if bits == 8 else weight.numel() // GROUP)
    return Made(weights, {}, subject.numbers, size)


def round_to(weight: Tensor, bits: int, group: int) -> Tensor:
    """Each group of a row to whole multiples of its largest magnitude / (2^(bits - 1) - 1).

    >>> round_to(torch.tensor([[7.0, 3.4, -1.2, 0.2]]), 4, 4).tolist()
    [[7.0, 3.0, -1.0, 0.0]]
    """
    parts = weight.unflatten(1, (-1, group))
    scale = parts.abs().amax(-1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
    return ((parts / scale).round() * scale).flatten(1)


PEERS: dict[str, Callable[[Subject], At]] = {
    "low rank, whitened, PIFA": partial(low_rank, whitened=True, pivoted=True),
    "neurons and heads, FLAP": partial(neurons, metric="flap"),
    "low rank, whitened, sequential, PIFA": sequential,
    "neurons and heads, Wanda": partial(neurons, metric="wanda"),
    "low rank, whitened (SVD-LLM)": partial(low_rank, whitened=True, pivoted=False),
    "low rank, SVD, PIFA": partial(low_rank, whitened=False, pivoted=True),
    "rows, Wanda, with their mean": partial(rows, metric="wanda"),
    "rows, ln_structured": partial(rows, metric="ln"),
}
"""Those that are asked for shares."""

ROUNDED = {"int8, a scale a row": 8, f"int4, a scale for {GROUP}": 4}
"""Name -> bits."""
