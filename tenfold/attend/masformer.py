"""MASFormer: full attention in a few layers, local attention in the rest (Zhang et al. 2023, arXiv 2310.12442).

Not in the paper: single KV heads may have spans of their own (specification, section 8.6).

>>> from tenfold.attend import masformer
>>> from tenfold.kernels.local import Span
>>> from tenfold.models.tiny import tiny_model
>>> model = tiny_model("llama").model
>>> handle = masformer.convert(model, full_layers=[0], span=Span("sliding", 16, sinks=4))
>>> handle.report()["full layers"]
[0]
>>> handle.revert()
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from tenfold.attend.attention import self_attentions
from tenfold.attend.pasta import reach
from tenfold.attend.spans import FIELD, NAME, by_span, kv_heads, spans_in
from tenfold.errors import ConfigError, ModelError
from tenfold.evaluate.far import text_loss
from tenfold.evaluate.inference import input_device
from tenfold.kernels.local import FULL, Span

Placement = Literal["bottom", "top", "middle", "interleave"]


@dataclass(frozen=True)
class Converted:
    """A converted model, until it is reverted.

    Args:
        model: the same object that was given.
        full_layers: with full attention, ascending.
        span: of all others.
        before: the implementation that the model had.
        heads: layer, KV head, and what that sees instead of ``span``; None is everything.
    """

    model: Any
    full_layers: tuple[int, ...]
    span: Span
    before: str
    heads: dict[int, dict[int, Span | None]] = field(default_factory=dict)

    def table(self) -> dict[str, Any]:
        """The entry of the configuration, ``tenfold_span``: plain numbers, texts, lists and dictionaries."""
        table = {"full_layers": list(self.full_layers), **asdict(self.span)}
        if self.heads:
            table["heads"] = {
                str(layer): {str(head): span and asdict(span) for head, span in own.items()}
                for layer, own in self.heads.items()
            }
        return table

    def revert(self) -> None:
        """Put the model back as it was: bit-identical outputs. Once more changes nothing."""
        config = _decoder(self.model)
        if getattr(config, FIELD, None) is None:
            return
        delattr(config, FIELD)
        config._attn_implementation = self.before

    def report(self, tokens: int = 8192) -> dict[str, Any]:
        """What was converted, and the share of visible pairs that is left at a length (specification, item 6)."""
        layers, count, table = self_attentions(self.model), kv_heads(_decoder(self.model)), self.table()
        groups = by_span([span for layer in layers for span in spans_in(table, layer, count)])
        pairs = sum(len(heads) * span.pairs(tokens) for span, heads in groups.items())
        return {
            "full layers": list(self.full_layers),
            "local layers": len(layers) - len(self.full_layers),
            "span": asdict(self.span),
            "heads": table.get("heads", {}),
            "tokens": tokens,
            "pairs": pairs / (len(layers) * count * FULL.pairs(tokens)),
        }


def convert(
    model: Any,
    *,
    full_layers: Sequence[int],
    span: Span,
    heads: Mapping[int, Mapping[int, Span | None]] | None = None,
) -> Converted:
    """Give every layer that is not listed a local span, or its KV heads spans of their own.

    No parameter changes; the spans lie in the model's configuration as ``tenfold_span`` and are saved with it.

    Args:
        model: a decoder on transformers' attention interface, with full attention in all layers.
        full_layers: layers that keep full attention.
        span: of the others.
        heads: layer, KV head, and what that sees instead of ``span``; None is full attention. A KV head stands for all
            query heads that share it.

    Returns:
        A handle that reverts it.

    Raises:
        ConfigError: a layer or KV head that the model does not have; a layer in both ``full_layers`` and ``heads``; a
            span below 1.
        ModelError: a model that is converted already, has spans of its own, or is not on the attention interface.
    """
    layers, config = self_attentions(model), _decoder(model)
    own = {layer: dict(sorted(spans.items())) for layer, spans in sorted((heads or {}).items()) if spans}
    check_spans(full_layers, span, own, layers, kv_heads(config))
    if getattr(config, FIELD, None) is not None:
        raise ModelError(
            "the model is converted already", remedy="take the model that it was made of, or revert it (native.restore)"
        )
    if any(reach(module) is not None for module in layers.values()):
        raise ModelError(
            f"{config.model_type}: some of its layers have spans of their own", remedy="take a model of full attention"
        )
    handle = Converted(model, tuple(sorted(set(full_layers))), span, config._attn_implementation, own)
    setattr(config, FIELD, handle.table())
    config._attn_implementation = NAME
    return handle


def check_spans(
    full_layers: Collection[int],
    span: Span,
    heads: Mapping[int, Mapping[int, Span | None]],
    layers: Collection[int],
    count: int,
) -> None:
    """Refuse what cannot be meant.

    Args:
        full_layers: as `convert` takes it.
        span: likewise.
        heads: likewise.
        layers: those of the model.
        count: KV heads of each.

    Raises:
        ConfigError: naming the field, the value and the remedy.
    """
    for name, chosen in (("full_layers", full_layers), ("heads", heads)):
        if unknown := sorted(set(chosen) - set(layers)):
            raise ConfigError(
                f"{name}: {unknown[0]}; the model has layers {min(layers)} to {max(layers)}", remedy="correct the layer"
            )
    if twice := sorted(set(full_layers) & set(heads)):
        raise ConfigError(f"heads: layer {twice[0]} is one of full_layers too", remedy="name it in one of the two")
    _check_span(span, "span")
    for layer, own in heads.items():
        for head, its in own.items():
            if not 0 <= head < count:
                raise ConfigError(
                    f"heads: KV head {head} of layer {layer}; a layer has KV heads 0 to {count - 1}",
                    remedy="correct the head: query heads that share keys count once",
                )
            if its is not None:
                _check_span(its, f"heads: KV head {head} of layer {layer}")


def _check_span(span: Span, where: str) -> None:
    if span.pattern not in ("sliding", "block"):
        raise ConfigError(f"{where}: {span} has an unknown pattern", remedy="give 'sliding' or 'block'")
    numbers = (span.size, span.previous, span.sinks)
    if any(type(number) is not int for number in numbers):
        raise ConfigError(f"{where}: {span} has a number that is not whole", remedy="give whole numbers")
    if span.size < 1 or span.previous < 0 or span.sinks < 0:
        raise ConfigError(
            f"{where}: {span} has a number that is too small", remedy="give a size of 1 or more, others of 0 or more"
        )


def profile(model: Any, texts: Sequence[tuple[Tensor, Tensor]], span: Span) -> list[float]:
    r"""How much each layer loses by a local span: one backward pass over all of them (specification, section 8.1).

    Every layer gives :math:`\\alpha` full + :math:`(1 - \\alpha)` local attention with :math:`\\alpha = 1/2`, and its
    score is :math:`-\\partial L / \\partial\\alpha`. At :math:`\\alpha = 1`, the model as it is, the gradient finds
    little: what a layer is for shows where all of them are short of it.

    Args:
        model: a decoder, not converted.
        texts: token ids ``[tokens]`` and which of them are scored, bool ``[tokens]``; see
            `tenfold.evaluate.far.repeated`.
        span: what the local layers will see.

    Returns:
        A score for each layer, in nats a token; the largest should keep full attention.
    """
    return _scores(model, texts, span, ()).tolist()


def profile_heads(model: Any, texts: Sequence[tuple[Tensor, Tensor]], span: Span) -> list[list[float]]:
    """The same for each KV head: one backward pass over all of them. The scores of a layer add up to its own.

    Args:
        model: a decoder, not converted.
        texts: as `profile` takes them.
        span: what the local heads will see.

    Returns:
        For each layer a score for each KV head, in nats a token; see `choose_heads`.

    >>> from tenfold.evaluate.far import repeated
    >>> from tenfold.models.tiny import tiny_model
    >>> scores = profile_heads(tiny_model("llama").model, repeated(torch.arange(5, 45), 20, 20), Span("sliding", 8))
    >>> [len(layer) for layer in scores]
    [2, 2]
    """
    return _scores(model, texts, span, (kv_heads(_decoder(model)),)).tolist()


def _scores(model: Any, texts: Sequence[tuple[Tensor, Tensor]], span: Span, shape: tuple[int, ...]) -> Tensor:
    """The slopes of gates of a shape in every layer, ``[layers, *shape]``, float64."""
    if not texts:
        raise ConfigError("texts: none to profile on", remedy="give one text or more")
    training = [module for module in model.modules() if module.training]
    model.eval()  # dropout would score the layers by chance
    handle = convert(model, full_layers=(), span=span)
    attentions = self_attentions(model)
    gates = [torch.full(shape, 0.5, device=input_device(model), requires_grad=True) for _ in attentions]
    hooks = [
        module.register_forward_pre_hook(partial(_with_gate, gate), with_kwargs=True)
        for gate, module in zip(gates, attentions.values(), strict=True)
    ]
    scores = torch.zeros(len(gates), *shape, dtype=torch.float64)
    try:
        for ids, scored in texts:
            found = torch.autograd.grad(text_loss(model, ids, scored), gates)
            scores -= torch.stack(found).cpu().double() / len(texts)
    finally:
        for hook in hooks:
            hook.remove()
        handle.revert()
        for module in training:
            module.training = True
    return scores


def _with_gate(
    gate: Tensor, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "gate": gate}


def place(placement: Placement, full: int, layers: int) -> tuple[int, ...]:
    """Layers that keep full attention, by a fixed rule; the paper's is the bottom.

    >>> place("bottom", 2, 8), place("top", 2, 8), place("middle", 2, 8), place("interleave", 2, 8)
    ((0, 1), (6, 7), (3, 4), (0, 4))
    """
    if not 0 <= full <= layers:
        raise ConfigError(f"full layers: {full} of {layers}", remedy=f"give 0 to {layers}")
    starts = {"bottom": 0, "top": layers - full, "middle": (layers - full) // 2}
    if placement in starts:
        return tuple(range(starts[placement], starts[placement] + full))
    return tuple(number * layers // full for number in range(full))


def choose_heads(
    scores: Sequence[Sequence[float]], count: int
) -> tuple[tuple[int, ...], dict[int, dict[int, Span | None]]]:
    """The KV heads of largest score, as `convert` takes them: they keep full attention.

    Args:
        scores: for each layer a score for each KV head, as from `profile_heads`.
        count: KV heads that keep full attention. Of equal scores the first win.

    Returns:
        Layers of which all heads are chosen, and for each other layer its chosen heads.

    Raises:
        ConfigError: more heads than there are, or fewer than none.

    >>> choose_heads([[0.1, 0.4], [0.3, 0.2]], 3)
    ((1,), {0: {1: None}})
    """
    places = [(layer, head) for layer, row in enumerate(scores) for head in range(len(row))]
    if not 0 <= count <= len(places):
        raise ConfigError(f"full heads: {count} of {len(places)}", remedy=f"give 0 to {len(places)}")
    best = sorted(places, key=lambda place: -scores[place[0]][place[1]])[:count]
    heads: dict[int, dict[int, Span | None]] = {}
    for layer, head in sorted(best):
        heads.setdefault(layer, {})[head] = None
    full = tuple(layer for layer, own in heads.items() if len(own) == len(scores[layer]))
    return full, {layer: own for layer, own in heads.items() if layer not in full}


def _decoder(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)
