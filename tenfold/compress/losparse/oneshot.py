"""Compress a model without training: measure, buy ranks and rows within one budget, fit block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.compress.losparse.calibration import (
    Moments,
    Tell,
    equal_batches,
    moments,
    read,
    same_inputs,
    sensitivity,
    weight_of,
)
from tenfold.compress.losparse.checks import (
    check_budget,
    check_passages,
    matrices_of,
    matrix_bytes,
    price_of,
)
from tenfold.compress.losparse.factors import Factors, stored
from tenfold.compress.losparse.fit import Second, fit_matrix
from tenfold.compress.losparse.plan import DOUBT, Curve, RankAndRows, among, curve, diagonal, half, spend
from tenfold.compress.losparse.streams import Blocks, block_of
from tenfold.config.budget import Budget
from tenfold.errors import DataError, ModelError
from tenfold.models.inference import evaluating, input_device
from tenfold.models.quantised import parameter_count

HELD_OUT = 8
"""One passage of so many is not fitted to: it decides whether a refit helps."""
SENSITIVE_TOKENS = 4096
"""Tokens that go backward; the mean square of a gradient needs fewer than the directions of inputs do."""
COMPARED_TOKENS = 2048
"""Held-out tokens whose predictions say whether the model as a whole gains by a refit."""
FEWEST_TOKENS = 32
"""A matrix that fewer tokens reach (an expert) stays as it is."""


@dataclass(frozen=True)
class Replaced:
    """What became of one matrix.

    Args:
        name: of its module.
        shape: ``(out, in)``.
        choice: rank and kept rows; all rows where the matrix stays as it is.
        bytes: what is stored, biases and the places of rows included.
        error: squared error of its outputs on held-out texts relative to the outputs, without refit; None unmeasured.
        refitted: the same with it; None where it was not tried.
        refit: whether it was kept.
        elastic: whether what kept rows are without being kept is stored as well.
    """

    name: str
    shape: tuple[int, int]
    choice: RankAndRows
    bytes: int
    error: float | None = None
    refitted: float | None = None
    refit: bool = False
    elastic: bool = False

    @property
    def numbers(self) -> int:
        """Numbers stored, which without ``elastic`` is the multiply-adds for each token."""
        return stored(*self.shape, *self.choice, elastic=self.elastic)


@dataclass(frozen=True)
class OneShot:
    """A compressed model, as parts.

    Args:
        factors: of each matrix that is replaced, in model order, in the weight's type.
        matrices: what became of each matrix that was looked at, in model order.
        parameters: of the whole model before.
        parameter_bytes: theirs.
        notes: sentences a reader of the results must know: what was left out and why, what was not tried.
    """

    factors: dict[str, Factors]
    matrices: tuple[Replaced, ...]
    parameters: int
    parameter_bytes: int
    notes: tuple[str, ...]

    @property
    def numbers(self) -> int:
        """Numbers that the matrices hold now."""
        return sum(matrix.numbers for matrix in self.matrices)

    @property
    def dense(self) -> int:
        """Numbers that they held before."""
        return sum(matrix.shape[0] * matrix.shape[1] for matrix in self.matrices)

    @property
    def share(self) -> float:
        """What is kept of the matrices' numbers."""
        return self.numbers / self.dense

    @property
    def share_of_model(self) -> float:
        """What is kept of all numbers of the model, embeddings included."""
        return (self.parameters - self.dense + self.numbers) / self.parameters


@torch.no_grad()
def compress_once(
    model: nn.Module,
    passages: Sequence[Tensor],
    *,
    budget: Budget,
    targets: Sequence[str] = ("all-linear",),
    refit: bool = True,
    weigh: bool = True,
    elastic: bool = False,
    progress: Tell | None = None,
) -> OneShot:
    r"""Find a model's compressed matrices; the model itself stays as it is.

    1. A backward pass says how much the loss depends on each output (`calibration.sensitivity`).
    2. A forward pass says which inputs each matrix sees; with both, what each rank and row is worth (`plan.curve`).
    3. One budget is spent where it saves most of the loss (`plan.spend`).
    4. Block by block, each matrix is fitted to what the compressed ones before it really give it (`fit.fit_matrix`).

    Args:
        model: any ``transformers`` model with linear layers in blocks.
        passages: token ids, ``[tokens]`` each, of texts like those that the model will see; every eighth is held out.
        budget: of the replaced matrices: a share of their numbers, a count, or bytes (all that is stored for them).
        targets: as `tenfold.models.layer_map.LayerMap.select` takes them.
        refit: whether step 4 is tried; a matrix keeps it only where its outputs on held-out passages come nearer, and
            the model where its predictions there do. Else each is fitted to what it reads in the model as it is.
        weigh: whether step 1 is done; without it all outputs of all matrices count alike.
        elastic: count what layers store beside the rest that `tenfold.compress.losparse.layer.install` is told to make
            elastic: ``rank`` numbers for each kept row.
        progress: called with what is done, how many steps of it, and of how many.

    Returns:
        Factors of each replaced matrix, and the report.

    Raises:
        ConfigError: targets that match nothing, no budget of weights, or one that buys nothing.
        ModelError: quantised weights, adapters, or layers that are compressed already.
        DataError: no passage, or one that is not a tensor of token ids of this model.

    >>> from tenfold.models.tiny import tiny_model
    >>> ids = [torch.randint(6, 262, (64,), generator=torch.Generator().manual_seed(seed)) for seed in range(16)]
    >>> found = compress_once(tiny_model("llama").model, ids, budget=Budget(0.5, "share"))
    >>> len(found.factors), 0.49 < found.share <= 0.5
    (12, True)
    """
    names, notes = matrices_of(model, targets)
    check_budget(model, names, budget, elastic=elastic)
    check_passages(model, passages)
    fitted, held = _divide(passages)
    if not held:
        notes.append("one passage only: none is held out, so nothing is refitted")
    outputs = sensitivity(model, _first(fitted, SENSITIVE_TOKENS), names, tell=progress) if weigh else {}
    texts = Texts.of(fitted, held, input_device(model))
    curves, outputs = _curves(model, texts, names, outputs, elastic, notes, progress)
    allowed = check_budget(model, list(curves), budget, elastic=elastic)
    choices = spend(curves, allowed, price_of(model, budget, elastic=elastic), DOUBT)
    orders = {name: found.order for name, found in curves.items()}
    work = _Work(model, choices, orders, outputs, elastic)
    work.at_once(texts, progress)
    blocks = Blocks.of(model, list(curves), texts.batches) if refit and held else None
    if refit and held and blocks is None:
        notes.append("not refitted: the blocks of this model cannot be called one by one")
    if blocks is not None:
        other = _Work(model, choices, orders, outputs, elastic)
        other.by_blocks(blocks, texts, progress)
        work = _nearer(model, texts, work, other, notes)
    return OneShot(
        {name: work.factors[name] for name in curves if name in work.factors},
        tuple(work.replaced[name] for name in curves),
        parameter_count(model),
        sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        tuple(notes),
    )


def _divide(passages: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Passages to fit to, and those that are held out."""
    held = [passage for index, passage in enumerate(passages) if index % HELD_OUT == HELD_OUT - 1]
    if not held and len(passages) > 1:
        held = [passages[-1]]
        return list(passages[:-1]), held
    return [passage for index, passage in enumerate(passages) if index % HELD_OUT != HELD_OUT - 1], held


def _first(passages: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """Passages evenly from all of them, that hold about so many tokens."""
    share = min(1.0, tokens / max(1, sum(map(len, passages))))
    return [passage for index, passage in enumerate(passages) if int((index + 1) * share) > int(index * share)] or list(
        passages[:1]
    )


def _curves(
    model: nn.Module,
    texts: Texts,
    names: Sequence[str],
    outputs: Mapping[str, Tensor],
    elastic: bool,
    notes: list[str],
    tell: Tell | None,
) -> tuple[dict[str, Curve], dict[str, Tensor]]:
    """What each choice costs of each matrix that enough tokens reach; and :math:`B` of these, or its diagonal."""
    found: dict[str, Curve] = {}
    used: dict[str, Tensor] = {}
    total = sum(ids.numel() for ids in texts.fitted)
    for name, sums, second in _seconds(moments(model, texts.fitted, names, tell=tell)):
        weight = weight_of(model.get_submodule(name)).double()
        price = outputs.get(name, torch.ones(len(weight)) if not outputs else None)
        if sums.tokens < FEWEST_TOKENS or price is None:
            continue
        if not (sums.own.isfinite().all() and price.isfinite().all()):
            raise ModelError(f"{name}: reads numbers or has gradients that are not finite", "open the model in float32")
        # An expert counts by the tokens that reach it.
        seen = (weight @ second.half) * (sums.tokens / total) ** 0.5
        used[name] = _positive(price.to(weight.device))
        found[name] = curve(seen.float(), used[name], elastic=elastic)
    if few := [name for name in names if name not in found]:
        notes.append(f"fewer than {FEWEST_TOKENS} of the calibration tokens reach {', '.join(few)}: left as they are")
    if not found:
        raise DataError("no matrix is reached by enough tokens", f"give texts of {FEWEST_TOKENS} tokens or more")
    return {name: found[name] for name in names if name in found}, used


def _seconds(found: Iterable[tuple[str, Moments]]) -> Iterator[tuple[str, Moments, Second]]:
    """Sums of matrices and their means; matrices that read the same, one after the other, share the means as well."""
    last: tuple[Moments, Second] | None = None
    for name, sums in found:
        last = last if last is not None and last[0] is sums else (sums, Second.of(sums))
        yield name, *last


def _positive(price: Tensor) -> Tensor:
    """With a little for outputs that nothing depends on."""
    mean = diagonal(price).mean()
    if price.ndim == 1:
        return price + 1e-6 * mean + 1e-30
    price.diagonal().add_(1e-3 * mean + 1e-30)
    return price


@dataclass(frozen=True)
class Texts:
    """Batches to fit to, and held-out ones."""

    fitted: list[Tensor]
    held: list[Tensor]

    @classmethod
    def of(cls, fitted: Sequence[Tensor], held: Sequence[Tensor], device: torch.device) -> Texts:
        """Of passages."""
        return cls(equal_batches(fitted, device), equal_batches(held, device))

    @property
    def batches(self) -> list[Tensor]:
        """All of them, held-out ones last."""
        return [*self.fitted, *self.held]


class _Work:
    """The replacing of a model's matrices, one after the other.

    Args:
        choices: of each matrix.
        orders: of the rows of each.
        outputs: :math:`B` of each, or its diagonal.
        elastic: whether what kept rows are without being kept is stored as well.
    """

    def __init__(
        self,
        model: nn.Module,
        choices: Mapping[str, RankAndRows],
        orders: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        elastic: bool,
    ) -> None:
        self._model, self._orders, self._outputs = model, orders, outputs
        self._changed = [
            name for name, choice in choices.items() if choice.kept < weight_of(model.get_submodule(name)).shape[0]
        ]
        self.factors: dict[str, Factors] = {}
        self.replaced: dict[str, Replaced] = {}
        for name, choice in choices.items():
            module = model.get_submodule(name)
            out, inner = weight_of(module).shape
            size = matrix_bytes(module, choice, elastic=elastic)
            self.replaced[name] = Replaced(name, (out, inner), choice, size, elastic=elastic)

    def at_once(self, texts: Texts, tell: Tell | None) -> None:
        """Fit all to what they read in the model as it is."""
        fitted = moments(self._model, texts.fitted, self._changed, tell=tell)
        held = moments(self._model, texts.held, self._changed)
        for done, (name, _, seen) in enumerate(_seconds(fitted), 1):
            self._replace(name, seen, None)
            if tell is not None:
                tell("fit", done, len(self._changed))
        for name, _, seen in _seconds(held):
            weight, outputs = self._weight(name), self._outputs[name]
            error = seen.error(weight, self.factors[name], outputs)
            self.replaced[name] = replace(self.replaced[name], error=error)

    def by_blocks(self, blocks: Blocks, texts: Texts, tell: Tell | None) -> None:
        """Fit each to what it reads once all before it are replaced, beside what it read before."""
        batches = texts.batches
        before = [blocks.begin(ids) for ids in batches]
        now = list(before)
        for index, block in enumerate(blocks.names):
            inside = [name for name in self._changed if block_of(name) == block]
            seen = []
            for at, ids in enumerate(batches):
                inputs, before[at] = blocks.inputs(index, inside, before[at], ids)
                seen.append(inputs)
            groups = {leader: [leader, *others] for leader, others in same_inputs(seen[0]).items()}
            grouped = {name for group in groups.values() for name in group}
            groups |= {name: [name] for name in inside if name not in grouped}
            with restored(self._model, inside):
                for leader, group in groups.items():
                    pairs = [inputs.pop(leader, []) for inputs in seen]
                    fitted, held = self._pair(blocks, index, leader, now, pairs, texts)
                    for name in group:
                        self._replace(name, fitted, held)
                        _put(self._model.get_submodule(name), self.factors[name])
                now = [blocks.run(index, hidden, ids) for hidden, ids in zip(now, batches, strict=True)]
            if tell is not None:
                tell("refit", index + 1, len(blocks.names))

    def _pair(
        self, blocks: Blocks, index: int, name: str, now: Sequence[Tensor], before: Sequence[list[Tensor]], texts: Texts
    ) -> list[Second]:
        """What a matrix reads now and read before, on texts to fit to and on held-out ones."""
        found: list[Second] = []
        for part in (range(len(texts.fitted)), range(len(texts.fitted), len(now))):
            sums: Moments | None = None
            for at in part:
                own = blocks.until(index, name, now[at], texts.batches[at])
                if own is None or len(before[at]) != 1 or before[at][0].shape != own.shape:
                    return self._unpaired(blocks, index, name, now, texts)
                sums = sums or Moments(own, paired=True, measured=bool(found))
                sums.add(own, before[at][0])
            assert sums is not None
            found.append(Second.of(sums))
        return found

    def _unpaired(self, blocks: Blocks, index: int, name: str, now: Sequence[Tensor], texts: Texts) -> list[Second]:
        """The same of a matrix that is called several times, or for other tokens than before, as experts are."""
        found = []
        for part in (range(len(texts.fitted)), range(len(texts.fitted), len(now))):
            sums = Moments(torch.zeros(1, weight_of(self._model.get_submodule(name)).shape[1], device=now[0].device))
            for at in part:
                for own in blocks.inputs(index, [name], now[at], texts.batches[at])[0].get(name, []):
                    sums.add(own)
            found.append(Second.of(sums))
        return found

    def _weight(self, name: str) -> Tensor:
        return weight_of(self._model.get_submodule(name)).double()

    def _replace(self, name: str, seen: Second, held: Second | None) -> None:
        """Fit one matrix, with a refit where held-out texts say so."""
        module, row = self._model.get_submodule(name), self.replaced[name]
        weight, outputs, order = self._weight(name), self._outputs[name], self._orders[name]
        costs = half(among(outputs.to(weight), order[row.choice.kept :]))
        chosen = fit_matrix(weight, row.choice, order, seen, costs, refit=False)
        if held is not None:
            other = fit_matrix(weight, row.choice, order, seen, costs, refit=True)
            error, refitted = (held.error(weight, one, outputs) for one in (chosen, other))
            row = replace(row, error=error, refitted=refitted, refit=refitted < error)
            chosen = other if row.refit else chosen
        self.replaced[name], self.factors[name] = row, _as_stored(chosen, module)


def _nearer(model: nn.Module, texts: Texts, plain: _Work, refitted: _Work, notes: list[str]) -> _Work:
    """The one of two with which the predictions on held-out texts are nearer to the model's."""
    away = {"plain": 0.0, "refitted": 0.0}
    count = 0
    for ids in texts.held:
        with evaluating(model):
            wanted = read(model, ids).logits.float()
        for name, work in (("plain", plain), ("refitted", refitted)):
            with restored(model, list(work.factors)), evaluating(model):
                for matrix, factors in work.factors.items():
                    _put(model.get_submodule(matrix), factors)
                away[name] += _divergence(wanted, read(model, ids).logits.float())
        count += wanted[..., 0].numel()
        if count >= COMPARED_TOKENS:
            break
    keep = away["refitted"] < away["plain"]
    notes.append(
        f"refit {'kept' if keep else 'left out'}: with it the predictions on {count} held-out tokens are "
        f"{_told(away['refitted'] / count)} nats from those of the model before, without it "
        f"{_told(away['plain'] / count)}"
    )
    return refitted if keep else plain


def _told(nats: float) -> str:
    """With digits that tell two apart; rounding takes none at all below zero."""
    return f"{max(0.0, nats):.4g}"


def _divergence(wanted: Tensor, found: Tensor) -> float:
    """Summed over tokens; of models with a single score, half of the squared difference."""
    if wanted.shape[-1] == 1:
        return float((wanted - found).square().sum() / 2)
    before, after = wanted.log_softmax(-1), found.log_softmax(-1)
    return float((before.exp() * (before - after)).sum())


@contextmanager
def restored(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Give matrices the values back that they have now."""
    modules: list[Any] = [model.get_submodule(name) for name in names]
    values = [module.weight.detach().clone() for module in modules]
    try:
        yield
    finally:
        for module, weight in zip(modules, values, strict=True):
            module.weight.copy_(weight)


def _put(module: Any, factors: Factors) -> None:
    """Let a layer compute what its factors say."""
    weight_of(module).copy_(factors.dense())


def _as_stored(factors: Factors, module: Any) -> Factors:
    """In the type of the layer's weight."""
    parts = (factors.left, factors.right, factors.rows)
    left, right, rows = (part.to(module.weight.dtype) for part in parts)
    return Factors(left, right, factors.kept, rows)
