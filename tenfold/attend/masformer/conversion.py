"""MASFormer: full attention in a few layers, local attention in the rest (Zhang et al. 2023, arXiv 2310.12442).

Not in the paper: single KV heads may have spans of their own (specification, section 8.6).

>>> from tenfold.attend import masformer
>>> from tenfold.kernels.local import AttentionWindow
>>> from tenfold.models.tiny import tiny_model
>>> model = tiny_model("llama").model
>>> handle = masformer.convert(model, full_layers=[0], span=AttentionWindow("sliding", 16, sinks=4))
>>> handle.report()["full layers"]
[0]
>>> handle.revert()
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from tenfold.attend.attention import self_attentions, still_in_front
from tenfold.attend.layers import odd_layer
from tenfold.attend.reach import reach
from tenfold.attend.spans import FIELD, NAME, SAVED, by_span, note, spans_in
from tenfold.errors import ConfigError, ModelError
from tenfold.kernels.local import FULL, AttentionWindow
from tenfold.models.head_sizes import kv_heads
from tenfold.models.inference import input_device, text_loss

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
    span: AttentionWindow
    before: str
    heads: dict[int, dict[int, AttentionWindow | None]] = field(default_factory=dict)

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
        vars(config).pop(FIELD, None)
        for part in (config, self.model.config):
            vars(part).pop(SAVED, None)
        for module in self_attentions(self.model).values():
            _remove(module)
        tags = getattr(self.model, "model_tags", None) or []
        if NAME in tags:
            tags.remove(NAME)
        config._attn_implementation = still_in_front(config, self.before)

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
    span: AttentionWindow,
    heads: Mapping[int, Mapping[int, AttentionWindow | None]] | None = None,
) -> Converted:
    """Give every layer that is not listed a local span, or its KV heads spans of their own.

    No parameter changes; the spans lie in the model's configuration as ``tenfold_span`` and are saved with it. A folder
    that ``save_pretrained`` writes then names an attention function that plain transformers does not have, and it
    refuses to open it, where it would compute something else.

    Args:
        model: a decoder on transformers' attention interface, with full attention wherever it has attention: layers of
            convolutions or linear attention stay as they are.
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
    table = getattr(config, FIELD, None)
    if table is not None and config._attn_implementation == NAME:
        raise ModelError(
            "the model is converted already", remedy="take the model that it was made of, or revert it (native.restore)"
        )
    vars(config).pop(FIELD, None)  # what another implementation has made void (see `_keeps_its_spans`)
    try:
        _check_layers(config, layers)
    except ModelError:
        if table is not None:
            setattr(config, FIELD, table)
        raise
    handle = Converted(model, tuple(sorted(set(full_layers))), span, config._attn_implementation, own)
    setattr(config, FIELD, handle.table())
    put_on(model)
    return handle


def put_on(model: Any) -> None:
    """Let a model compute by the spans in its configuration, and say so in whatever is saved of it."""
    config = _decoder(model)
    config._attn_implementation = NAME
    note(config)
    whole = model.config
    if whole is not config:  # a composite configuration sets those of its parts when it is read
        setattr(whole, SAVED, {key: NAME for key in whole.sub_configs if getattr(whole, key, None) is config})
    for module in self_attentions(model).values():
        _remove(module)
        module.register_forward_pre_hook(_keeps_its_spans)
    if hasattr(model, "add_model_tags"):  # PEFT writes them into the card of an adapter
        model.add_model_tags([NAME])


def _remove(module: Any) -> None:
    hooks = module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _keeps_its_spans]:
        del hooks[key]


def _keeps_its_spans(module: Any, args: Any) -> None:
    """Before each attention: ``set_attn_implementation`` would leave the table of spans, and full attention."""
    config = module.config
    if getattr(config, FIELD, None) is not None and config._attn_implementation != NAME:
        raise ModelError(
            f"the model is converted, and its attention was set to {config._attn_implementation!r}, which knows no "
            "spans",
            remedy="tenfold.masformer.restore(model) brings the spans back, and .revert() of it full attention",
        )


@contextmanager
def full_attention(model: Any) -> Iterator[None]:
    """Full attention in all layers of a converted model, while the block runs."""
    config = _decoder(model)
    table, name = getattr(config, FIELD), config._attn_implementation
    delattr(config, FIELD)
    config._attn_implementation = stock_implementation(model)
    try:
        yield
    finally:
        setattr(config, FIELD, table)
        config._attn_implementation = name


def stock_implementation(model: Any) -> str:
    """What transformers would run a model on by itself: ``sdpa``, or ``eager`` where that lacks something.

    >>> from tenfold.models.tiny import tiny_model
    >>> stock_implementation(tiny_model("llama").model)
    'sdpa'
    """
    return str(model.get_correct_attn_implementation(None))


def _check_layers(config: Any, layers: Mapping[int, Any]) -> None:
    """Refuse attention that is not full, or not that of the whole layer."""
    if any(reach(module) is not None for module in layers.values()):
        raise ModelError(
            f"{config.model_type}: some of its layers have spans of their own", remedy="take a model of full attention"
        )
    odd = odd_layer(config, layers)
    if odd is not None:
        raise ModelError(f"{config.model_type}: {odd}", remedy="take a model of full attention, such as Llama or Qwen")


def check_spans(
    full_layers: Collection[int],
    span: AttentionWindow,
    heads: Mapping[int, Mapping[int, AttentionWindow | None]],
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
            whole = len(layers) == max(layers) - min(layers) + 1
            there = f"layers {min(layers)} to {max(layers)}" if whole else f"attention in layers {sorted(layers)}"
            raise ConfigError(f"{name}: {unknown[0]}; the model has {there}", remedy="correct the layer")
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


def _check_span(span: AttentionWindow, where: str) -> None:
    if span.pattern not in ("sliding", "block"):
        raise ConfigError(f"{where}: {span} has an unknown pattern", remedy="give 'sliding' or 'block'")
    numbers = (span.size, span.previous, span.sinks)
    if any(type(number) is not int for number in numbers):
        raise ConfigError(f"{where}: {span} has a number that is not whole", remedy="give whole numbers")
    if span.size < 1 or span.previous < 0 or span.sinks < 0:
        raise ConfigError(
            f"{where}: {span} has a number that is too small", remedy="give a size of 1 or more, others of 0 or more"
        )


def profile(model: Any, texts: Sequence[tuple[Tensor, Tensor]], span: AttentionWindow) -> dict[int, float]:
    r"""How much each layer loses by a local span: one backward pass over all of them (specification, section 8.1).

    Every layer gives :math:`\\alpha` full + :math:`(1 - \\alpha)` local attention with :math:`\\alpha = 1/2`, and its
    score is :math:`-\\partial L / \\partial\\alpha`. At :math:`\\alpha = 1`, the model as it is, the gradient finds
    little: what a layer is for shows where all of them are short of it.

    Args:
        model: a decoder, not converted.
        texts: token ids ``[tokens]`` and which of them are scored, bool ``[tokens]``; see
            `tenfold.evaluate.long_context.repeated`.
        span: what the local layers will see.

    Returns:
        A score for each layer of attention by its index, in nats a token; the largest should keep full attention.
    """
    return _scores(model, texts, span, ())


def profile_heads(model: Any, texts: Sequence[tuple[Tensor, Tensor]], span: AttentionWindow) -> dict[int, list[float]]:
    """The same for each KV head: one backward pass over all of them. The scores of a layer add up to its own.

    Args:
        model: a decoder, not converted.
        texts: as `profile` takes them.
        span: what the local heads will see.

    Returns:
        By layer of attention a score for each KV head, in nats a token; see `choose_heads`.

    >>> from tenfold.evaluate.long_context import repeated
    >>> from tenfold.models.tiny import tiny_model
    >>> texts, near = repeated(torch.arange(5, 45), 20, 20), AttentionWindow("sliding", 8)
    >>> scores = profile_heads(tiny_model("llama").model, texts, near)
    >>> {layer: len(heads) for layer, heads in scores.items()}
    {0: 2, 1: 2}
    """
    return _scores(model, texts, span, (kv_heads(_decoder(model)),))


def _scores(
    model: Any, texts: Sequence[tuple[Tensor, Tensor]], span: AttentionWindow, shape: tuple[int, ...]
) -> dict[int, Any]:
    """The slopes of gates of a shape in every layer, as numbers and lists."""
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
    return dict(zip(attentions, scores.tolist(), strict=True))


def _with_gate(
    gate: Tensor, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "gate": gate}


def place(placement: Placement, full: int, layers: Collection[int]) -> tuple[int, ...]:
    """Layers that keep full attention, by a fixed rule; the paper's is the bottom.

    Args:
        placement: the rule.
        full: how many.
        layers: indices of the layers that have attention, as `self_attentions` names them.

    Raises:
        ConfigError: more layers than there are, or fewer than none.

    >>> [place(rule, 2, range(8)) for rule in ("bottom", "top", "middle", "interleave")]
    [(0, 1), (6, 7), (3, 4), (0, 4)]
    >>> place("top", 1, [2, 5, 8])
    (8,)
    """
    count, indices = len(layers), sorted(layers)
    if not 0 <= full <= count:
        raise ConfigError(f"full layers: {full} of {count}", remedy=f"give 0 to {count}")
    starts = {"bottom": 0, "top": count - full, "middle": (count - full) // 2}
    if placement in starts:
        return tuple(indices[starts[placement] : starts[placement] + full])
    return tuple(indices[number * count // full] for number in range(full))


def choose_heads(
    scores: Mapping[int, Sequence[float]], count: int
) -> tuple[tuple[int, ...], dict[int, dict[int, AttentionWindow | None]]]:
    """The KV heads of largest score, as `convert` takes them: they keep full attention.

    Args:
        scores: by layer a score for each KV head, as from `profile_heads`.
        count: KV heads that keep full attention. Of equal scores the first win.

    Returns:
        Layers of which all heads are chosen, and for each other layer its chosen heads.

    Raises:
        ConfigError: more heads than there are, or fewer than none.

    >>> choose_heads({2: [0.1, 0.4], 5: [0.3, 0.2]}, 3)
    ((5,), {2: {1: None}})
    """
    places = [(layer, head) for layer in sorted(scores) for head in range(len(scores[layer]))]
    if not 0 <= count <= len(places):
        raise ConfigError(f"full heads: {count} of {len(places)}", remedy=f"give 0 to {len(places)}")
    best = sorted(places, key=lambda place: -scores[place[0]][place[1]])[:count]
    heads: dict[int, dict[int, AttentionWindow | None]] = {}
    for layer, head in sorted(best):
        heads.setdefault(layer, {})[head] = None
    full = tuple(layer for layer, own in heads.items() if len(own) == len(scores[layer]))
    return full, {layer: own for layer, own in heads.items() if layer not in full}


def _decoder(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)
