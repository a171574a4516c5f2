r"""What each unit of a model loses by each format, in one unit for all: the numbers that a plan is chosen by.

With the outputs :math:`A` of a layer, :math:`\delta=A^p-A` what a format changes about them for the same inputs:

* `fisher`: :math:`\tfrac12E_t\sum_jg_{tj}^2\delta_{tj}^2`, nats a token, with g the gradient of the loss on labels that
  the model draws itself; one forward and one backward pass for all units and formats;
* `relative_l2`: :math:`\lVert\delta\rVert/\lVert A\rVert` over all tokens and channels, the paper's epsilon;
* `token_mean`: the same of each token, averaged, so that a token of huge outputs does not hide the others;
* `kl`: the exact divergence of the model's predictions with this unit alone in the format, nats a token; a forward pass
  for each unit and format, which is what the others are judged by.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tenfold.compress.fpx.epsilon import OutputError
from tenfold.compress.fpx.rounding import Rounding, holding, own_forms, rounded_weight, rounding_inputs, stored_forms
from tenfold.compress.fpx.units import Unit, UnitWeight
from tenfold.compress.losparse.calibration import Tell, equal_batches, frozen, own_loss, read
from tenfold.core.weight_formats import WeightFormat
from tenfold.errors import ConfigError, DataError, ModelError
from tenfold.models.inference import evaluating, input_device
from tenfold.models.layer_map import plain_modules

MetricName = Literal["fisher", "relative_l2", "token_mean", "kl"]
BATCH_TOKENS = 512
"""Read at once: what layers read is held until the backward pass has used it."""
ROUNDED_BYTES = 2**30
"""Of rounded weights that are kept from one batch to the next; others are rounded again."""
KL_ROWS = 64
"""Predictions whose logarithms are taken at once, in float64."""

Losses = dict[str, tuple[float, ...]]
"""By a unit's name, its loss in each format of the palette."""
_Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def unit_losses(
    model: Any,
    passages: Sequence[Tensor],
    units: Sequence[Unit],
    palette: Sequence[WeightFormat],
    metric: MetricName = "fisher",
    *,
    seed: int = 0,
    tell: Tell | None = None,
) -> Losses:
    """The loss of each unit in each format; the model stays as it is.

    Every unit is looked at by itself, with the inputs that it has in the model as it is. A weight that several layers
    read counts by what changes at each of them, and an embedding by its own outputs.

    Args:
        model: any model with logits, training or not.
        passages: token ids, ``[tokens]`` each, of texts like those that the model will see; no padding.
        units: of this model.
        palette: the formats.
        metric: see above.
        seed: of the labels, for ``fisher``.
        tell: hears of the batches.

    Raises:
        ConfigError: an unknown metric.
        DataError: no token.
        ModelError: a unit that no token reaches, on which the loss does not depend, or whose numbers are not finite;
            names it.

    >>> from tenfold.compress.fpx.units import units_of
    >>> from tenfold.core.weight_formats import weight_format
    >>> from tenfold.models.tiny import tiny_model
    >>> model = tiny_model("llama").model
    >>> ids = torch.randint(6, 262, (64,), generator=torch.Generator().manual_seed(0))
    >>> found = unit_losses(model, [ids], units_of(model), [weight_format("fp8_row"), weight_format("nvfp4")])
    >>> all(0 < eight < four for eight, four in found.values())
    True
    """
    if metric not in get_args(MetricName):
        raise ConfigError(f"metric: unknown metric {metric!r}", f"give one of {', '.join(get_args(MetricName))}")
    passages = [passage for passage in passages if len(passage)]
    if not passages:
        raise DataError("no token to calibrate on", remedy="give texts")
    batches = equal_batches(passages, input_device(model), BATCH_TOKENS)
    with evaluating(model), frozen(model):
        if metric == "kl":
            return _divergences(model, batches, units, palette, tell)
        sums = _Sums(metric, palette, {unit.name: _UnitSums(len(palette)) for unit in units})
        with ExitStack() as hooks:
            hooks.callback(own_forms, stored_forms(model.modules()))
            if metric == "fisher":
                embeddings = {
                    model.get_input_embeddings(),
                    *(m for m in model.modules() if isinstance(m, nn.Embedding)),
                }
                for module in embeddings:  # gradients begin here, as no parameter takes any
                    hooks.callback(module.register_forward_hook(_differentiable).remove)
            for site in _sites(model, units):
                watch = partial(_later if metric == "fisher" else _now, sums, site)
                hooks.callback(site.module.register_forward_hook(watch, with_kwargs=True).remove)
            _read_all(model, batches, sums, seed, tell)
    return sums.losses()


@dataclass(frozen=True)
class _Site:
    """One module of a unit, and its planned weights by the names that it has for them."""

    unit: str
    module: nn.Module
    weights: Mapping[str, UnitWeight]

    @property
    def stacked(self) -> bool:
        return any(weight.count > 1 for weight in self.weights.values())


def _sites(model: Any, units: Sequence[Unit]) -> Iterator[_Site]:
    modules = dict(plain_modules(model))
    for unit in units:
        for name in unit.modules:
            own = {each.name.rpartition(".")[2]: each for each in unit.weights if name in each.modules}
            yield _Site(unit.name, modules[name], own)


@dataclass
class _UnitSums:
    """Of one unit, over tokens.

    Args:
        formats: of the palette.
    """

    formats: int
    tokens: int = 0
    gradients: float = 0.0
    """Of the squares of all gradients."""
    changes: list[float] = field(init=False)
    """Of each format, of the squares of what it changes times the gradients."""
    errors: list[OutputError] = field(init=False)
    """Of each format."""

    def __post_init__(self) -> None:
        self.changes = [0.0] * self.formats
        self.errors = [OutputError() for _ in range(self.formats)]


@dataclass
class _Sums:
    """Of all units; and weights rounded already."""

    metric: MetricName
    palette: Sequence[WeightFormat]
    units: dict[str, _UnitSums]
    predictions: int = 0
    held: int = 0
    rounded: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def round(self, form: WeightFormat, weight: UnitWeight, tensor: Tensor) -> Tensor:
        key = (form.name_for(weight.inner), weight.name)
        if key in self.rounded:
            return self.rounded[key]
        made = rounded_weight(form, weight, tensor)
        size = made.numel() * made.element_size()
        if self.held + size <= ROUNDED_BYTES:
            self.held += size
            self.rounded[key] = made
        return made

    def losses(self) -> Losses:
        return {
            name: tuple(self._loss(name, one, place) for place in range(one.formats))
            for name, one in self.units.items()
        }

    def _loss(self, name: str, one: _UnitSums, place: int) -> float:
        if not one.tokens:
            raise ModelError(
                f"{name}: none of the calibration tokens reaches it",
                remedy="give more texts; or plan before an adapter that replaces the layer is attached",
            )
        if self.metric == "fisher":
            if one.gradients == 0 or not math.isfinite(one.gradients):
                raise ModelError(
                    f"{name}: the squares of its gradients add up to {one.gradients:g}",
                    remedy="open the model in float32; a layer on which no prediction depends cannot be planned",
                )
            loss = one.changes[place] / (2 * self.predictions)
        else:
            error = one.errors[place]
            loss = error.epsilon if self.metric == "relative_l2" else error.token_mean
        return finite(loss, name, self.palette[place].name)


def finite(loss: float, unit: str, form: str) -> float:
    """A loss that is a number.

    Raises:
        ModelError: it is not; names unit and format.

    >>> finite(0.5, "lm_head", "nvfp4")
    0.5
    """
    if not math.isfinite(loss):
        raise ModelError(f"{unit}: its loss in {form} is {loss}", remedy="open the model in float32")
    return loss


def _read_all(model: Any, batches: Sequence[Tensor], sums: _Sums, seed: int, tell: Tell | None) -> None:
    """Forward through all batches, and backward where the metric asks for gradients."""
    generator = torch.Generator().manual_seed(seed)
    for done, ids in enumerate(batches, 1):
        if sums.metric == "fisher":
            with torch.enable_grad():
                logits = read(model, ids).logits
                own_loss(logits, generator).backward()
            sums.predictions += logits[..., 0].numel()
        else:
            read(model, ids)
        if tell is not None:
            tell(sums.metric, done, len(batches))


def _differentiable(module: Any, inputs: Any, output: Tensor) -> Tensor:
    return output.detach().requires_grad_()


def _later(sums: _Sums, site: _Site, module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
    """Look at a layer's outputs when their gradient is there."""
    if not output.requires_grad:
        return
    inputs = _detached((args, kwargs))
    versions = [tensor._version for tensor in _tensors(inputs)]

    def on_gradient(gradient: Tensor) -> None:
        if [tensor._version for tensor in _tensors(inputs)] != versions:
            raise ModelError(
                f"{site.unit}: the model overwrites what the layer read", remedy="take metric='token_mean'"
            )
        with torch.no_grad():
            rows = gradient.reshape(-1, gradient.shape[-1])
            rows = rows.to(_wide(rows.dtype))
            one = sums.units[site.unit]
            one.tokens += len(rows)
            one.gradients += _total(rows)
            for place, (_, change) in enumerate(_changes(sums, site, inputs)):
                one.changes[place] += _total(change * rows)

    output.register_hook(on_gradient)


def _now(sums: _Sums, site: _Site, module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
    one = sums.units[site.unit]
    one.tokens += output.shape[:-1].numel()
    for error, (exact, change) in zip(one.errors, _changes(sums, site, (args, kwargs)), strict=True):
        error.add(exact, exact + change)


def _changes(sums: _Sums, site: _Site, inputs: _Inputs) -> Iterator[tuple[Tensor, Tensor]]:
    """What a layer gives, ``[tokens, out]`` in float32, and what each format changes about it."""
    # A stack of experts runs by kernels that may know no float32.
    own = {
        name: value.detach() if site.stacked else value.detach().to(_wide(value.dtype))
        for name, value in site.module._parameters.items()
        if value is not None
    }
    exact = _run(site, own, inputs)
    made: dict[tuple[str, ...], Tensor] = {}
    for form in sums.palette:
        # Types that rows do not divide into become another one, which often is in the palette as well.
        names = tuple(form.name_for(weight.inner) for weight in site.weights.values())
        if names not in made:
            changed = {name: sums.round(form, weight, own[name]) for name, weight in site.weights.items()}
            looked_up = isinstance(site.module, nn.Embedding)
            read_by_it = inputs if looked_up else rounding_inputs(form)(site.module, *_widened(site, inputs))
            made[names] = _run(site, {**own, **changed}, read_by_it).sub_(exact)
        yield exact, made[names]


def _run(site: _Site, parameters: Mapping[str, Any], inputs: _Inputs) -> Tensor:
    args, kwargs = _widened(site, inputs)
    with holding(site.module, parameters):
        output = site.module.forward(*args, **kwargs)  # not called: hooks are not for this
    return output.reshape(-1, output.shape[-1]).to(_wide(output.dtype))


def _widened(site: _Site, inputs: _Inputs) -> _Inputs:
    if site.stacked:
        return inputs
    return _mapped(inputs, lambda tensor: tensor.to(_wide(tensor.dtype)) if tensor.is_floating_point() else tensor)


def _detached(inputs: _Inputs) -> _Inputs:
    return _mapped(inputs, Tensor.detach)


def _mapped(inputs: _Inputs, change: Any) -> _Inputs:
    args, kwargs = inputs
    return (
        tuple(change(one) if isinstance(one, Tensor) else one for one in args),
        {name: change(one) if isinstance(one, Tensor) else one for name, one in kwargs.items()},
    )


def _tensors(inputs: _Inputs) -> list[Tensor]:
    return [one for one in (*inputs[0], *inputs[1].values()) if isinstance(one, Tensor)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _total(rows: Tensor) -> float:
    """Of the squares, added up in float64."""
    return float(rows.square().sum(dtype=torch.float64))


def _divergences(
    model: Any, batches: Sequence[Tensor], units: Sequence[Unit], palette: Sequence[WeightFormat], tell: Tell | None
) -> Losses:
    """The divergence of each unit's predictions in each format, one forward pass each."""
    sums = {unit.name: [0.0] * len(palette) for unit in units}
    predictions, done, steps = 0, 0, len(batches) * len(units)
    for ids in batches:
        exact = read(model, ids).logits
        predictions += exact[..., 0].numel()
        for unit in units:
            for place, form in enumerate(palette):
                rounding = Rounding(model, [(unit, form)])
                try:
                    sums[unit.name][place] += summed_divergence(exact, read(model, ids).logits)
                finally:
                    rounding.undo()
            done += 1
            if tell is not None:
                tell("kl", done, steps)
    return {
        name: tuple(finite(total / predictions, name, form.name) for total, form in zip(totals, palette, strict=True))
        for name, totals in sums.items()
    }


def summed_divergence(exact: Tensor, changed: Tensor) -> float:
    r""":math:`KL(p\Vert q)` of predictions, summed over all of them, in nats.

    A single score is the mean of a variance of 1.

    Args:
        exact: logits of p, ``[..., choices]``.
        changed: of q.

    >>> round(summed_divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3)]])), 6)
    0.143841
    """
    pairs = zip(exact.flatten(0, -2).split(KL_ROWS), changed.flatten(0, -2).split(KL_ROWS), strict=True)
    if exact.shape[-1] == 1:
        return sum(_total(q.double() - p.double()) / 2 for p, q in pairs)
    total = 0.0
    for p, q in pairs:
        likely = p.double().log_softmax(-1)
        total += float((likely.exp() * (likely - q.double().log_softmax(-1))).sum())
    return total
