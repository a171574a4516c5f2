"""MASFormer: full attention in a few layers, local attention in the rest (Zhang et al. 2023, arXiv 2310.12442).

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

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from tenfold.attend.attention import self_attentions
from tenfold.attend.pasta import reach
from tenfold.attend.spans import FIELD, NAME
from tenfold.errors import ConfigError, ModelError
from tenfold.evaluate.inference import input_device
from tenfold.kernels.local import Span

Placement = Literal["bottom", "top", "middle", "interleave"]


@dataclass(frozen=True)
class Converted:
    """A converted model, until it is reverted.

    Args:
        model: the same object that was given.
        full_layers: with full attention, ascending.
        span: of all others.
        before: the implementation that the model had.
    """

    model: Any
    full_layers: tuple[int, ...]
    span: Span
    before: str

    def revert(self) -> None:
        """Put the model back as it was: bit-identical outputs."""
        config = _decoder(self.model)
        delattr(config, FIELD)
        config._attn_implementation = self.before

    def report(self, tokens: int = 8192) -> dict[str, Any]:
        """What was converted, and the share of visible pairs that is left at a length (specification, item 6)."""
        layers = len(self_attentions(self.model))
        ratio = self.span.pairs(tokens) / (tokens * (tokens + 1) // 2)
        full = len(self.full_layers)
        return {
            "full layers": list(self.full_layers),
            "local layers": layers - full,
            "span": asdict(self.span),
            "tokens": tokens,
            "pairs": (full + (layers - full) * ratio) / layers,
        }


def convert(model: Any, *, full_layers: Sequence[int], span: Span) -> Converted:
    """Give every layer that is not listed a local span.

    No parameter changes; the spans lie in the model's configuration as ``tenfold_span`` and are saved with it.

    Args:
        model: a decoder on transformers' attention interface, with full attention in all layers.
        full_layers: layers that keep full attention.
        span: of the others.

    Returns:
        A handle that reverts it.

    Raises:
        ConfigError: a layer that the model does not have; a span below 1.
        ModelError: a model that is converted already, has spans of its own, or is not on the attention interface.
    """
    layers = self_attentions(model)
    unknown = sorted(set(full_layers) - set(layers))
    if unknown:
        raise ConfigError(
            f"full_layers: {unknown[0]}; the model has layers {min(layers)} to {max(layers)}",
            remedy="correct the layer",
        )
    if span.size < 1 or span.previous < 0 or span.sinks < 0:
        raise ConfigError(
            f"span: {span} has a number that is too small", remedy="give a size of 1 or more, others of 0 or more"
        )
    config = _decoder(model)
    if getattr(config, FIELD, None) is not None:
        raise ModelError("the model is converted already", remedy="revert it first")
    if any(reach(module) is not None for module in layers.values()):
        raise ModelError(
            f"{config.model_type}: some of its layers have spans of their own", remedy="take a model of full attention"
        )
    handle = Converted(model, tuple(sorted(set(full_layers))), span, config._attn_implementation)
    setattr(config, FIELD, {"full_layers": list(handle.full_layers), **asdict(span)})
    config._attn_implementation = NAME
    return handle


def profile(model: Any, texts: Sequence[tuple[Tensor, Tensor]], span: Span) -> list[float]:
    r"""How much each layer loses by a local span: one backward pass over all of them (specification, section 8.1).

    Every layer gives :math:`\\alpha` full + :math:`(1 - \\alpha)` local attention with :math:`\\alpha = 1/2`, and its
    score is :math:`-\\partial L / \\partial\\alpha`. At :math:`\\alpha = 1`, the model as it is, the gradient finds
    little: what a layer is for shows where all of them are short of it.

    Args:
        model: a decoder, not converted.
        texts: token ids ``[tokens]`` and which of them are scored, bool ``[tokens]``; see `repeated`.
        span: what the local layers will see.

    Returns:
        A score for each layer, in nats a token; the largest should keep full attention.
    """
    handle = convert(model, full_layers=(), span=span)
    attentions = self_attentions(model)
    gates = {layer: torch.full((), 0.5, device=input_device(model), requires_grad=True) for layer in attentions}
    hooks = [
        module.register_forward_pre_hook(partial(_with_gate, gates[layer]), with_kwargs=True)
        for layer, module in attentions.items()
    ]
    scores = [0.0] * len(gates)
    try:
        for ids, scored in texts:
            loss = text_loss(model, ids, scored)
            found = torch.autograd.grad(loss, list(gates.values()))
            scores = [score - float(slope) / len(texts) for score, slope in zip(scores, found, strict=True)]
    finally:
        for hook in hooks:
            hook.remove()
        handle.revert()
    return scores


def _with_gate(
    gate: Tensor, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "gate": gate}


def text_loss(model: Any, ids: Tensor, scored: Tensor) -> Tensor:
    """Mean negative log-likelihood of the scored tokens of a text, in nats; with a gradient where one is wanted.

    Args:
        model: a causal language model.
        ids: ``[tokens]``.
        scored: ``[tokens]``, bool; the first token has no prediction and counts never.
    """
    ids, scored = ids.to(input_device(model)), scored.to(input_device(model))
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1][scored[1:]]
    return torch.nn.functional.cross_entropy(logits.float(), ids[1:][scored[1:]])


def repeated(ids: Tensor, passage: int, between: int) -> list[tuple[Tensor, Tensor]]:
    """Passages that come twice with other text between; the second copies are scored: they need long-range copying.

    Args:
        ids: a long text, ``[tokens]``.
        passage: tokens of a passage.
        between: tokens between its two copies.

    Returns:
        One text for each ``passage + between`` tokens of ``ids``, for `profile` and `text_loss`.

    >>> [(ids.tolist(), scored.int().tolist()) for ids, scored in repeated(torch.arange(5), 2, 1)]
    [([0, 1, 2, 0, 1], [0, 0, 0, 0, 1])]
    """
    length = passage + between
    texts = []
    for start in range(0, len(ids) - length + 1, length):
        part = ids[start : start + length]
        whole = torch.cat([part, part[:passage]])
        # Which passage begins again can be known only after its first token.
        texts.append((whole, torch.arange(len(whole)) > length))
    return texts


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


def _decoder(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)
