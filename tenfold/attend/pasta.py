"""PASTA (Zhang et al. 2023, arXiv 2311.02262): a frozen model attends more to what the user marked.

For a few heads the attention to everything *unmarked* in the prompt is multiplied by ``alpha`` and renormalised. That
is a bias ``u`` per key before the softmax: 0 on marked tokens (the logarithm of their strength in general) and
``log alpha`` on the others. No weight changes, and leaving the block restores the model bit for bit.

    marks = pasta.encode(tokenizer, [pasta.from_tags("The sky is green. <mark>Answer in French.</mark> Why?")])
    with pasta.steer(model, marks, profile="default"):
        model.generate(**marks.inputs)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tenfold.attend.attention import base_implementation, installed, self_attentions
from tenfold.attend.marks import (
    Marked,
    Marks,
    MessageSpan,
    Span,
    encode,
    from_messages,
    from_spans,
    from_substrings,
    from_tags,
    in_chat,
)
from tenfold.attend.profiles import Profile, load_profile, save_profile
from tenfold.attend.spans import head_spans
from tenfold.errors import ConfigError, ModelError
from tenfold.kernels.biased import KeyBias
from tenfold.kernels.local import FULL

__all__ = [
    "Marked",
    "Marks",
    "MessageSpan",
    "Profile",
    "Span",
    "Steered",
    "encode",
    "from_messages",
    "from_spans",
    "from_substrings",
    "from_tags",
    "in_chat",
    "load_profile",
    "log_strength",
    "save_profile",
    "steer",
]

LIMIT = 30.0
"""Log-strengths are cut here: alpha = 0 is allowed, and a row that sees no marked key still has a softmax."""

FEW = 0.25
"""Up to this share of raised keys, correcting the plain result beats a dense mask (benchmarks/pasta.py)."""


@dataclass(frozen=True)
class Steered:
    """What a `steer` block touches.

    Args:
        heads: steered query heads by layer; empty when there is nothing to do, and then nothing was attached.
        marked: marked tokens of each row.
        tokens: length of the padded prompts.
    """

    heads: dict[int, tuple[int, ...]]
    marked: tuple[int, ...]
    tokens: int

    def report(self) -> dict[str, Any]:
        """Counts for reports: layers, heads, marked tokens, all tokens."""
        return {
            "layers": len(self.heads),
            "heads": sum(map(len, self.heads.values())),
            "marked tokens": sum(self.marked),
            "prompt tokens": self.tokens * len(self.marked),
        }


@contextmanager
def steer(
    model: Any,
    marks: Marks,
    *,
    profile: Profile | str | Path = "default",
    heads: Mapping[int, Sequence[int]] | Literal["all"] | None = None,
    alpha: float = 0.01,
    generated: Literal["keep", "scale"] = "keep",
    keep_sink: bool = False,
    target_mass: float | None = None,
) -> Iterator[Steered]:
    """Emphasise marked tokens while the block runs: forward passes and ``generate`` on the inputs of ``marks``.

    Works on every implementation (sdpa, flex, flash, eager), with grouped-query heads, left padding, beams and several
    returned sequences, dynamic, static and sliding caches, chunked prefill. Steered keys and values stay in the cache:
    do not reuse it under other marks, except in front of the first mark, where nothing differs. Nested blocks add up.

    Args:
        model: a causal language model whose attention goes through transformers' interface.
        marks: prompts with marks, as `encode` makes them. A row without marks is left alone.
        profile: which heads to steer: the name of a profile that comes with the package, a JSON file, or a `Profile`.
        heads: query heads by layer, instead of a profile; ``"all"`` steers every head, which the paper found harmful.
        alpha: factor of the attention to unmarked prompt tokens, 0 or more. Below 1 emphasises the marks; 1 leaves
            only the strengths of the marks themselves. Sensible: 0.001 to 0.3.
        generated: ``keep`` gives tokens written during generation full weight, as the paper does, so that they compete
            with the marks the longer the text gets; ``scale`` treats them as unmarked.
        keep_sink: keep the first token, where much idle attention goes, at full weight (not in the paper).
        target_mass: instead of ``alpha``, lift the marks to this share of the attention in every row and steered head
            that gives them less (not in the paper; strengths are ignored). Only on sdpa and eager.

    Yields:
        What is steered.

    Raises:
        ConfigError: a field out of its range, heads the model does not have, a mark that a steered sliding-window layer
            cannot see any more at the end of its prompt; within the block, inputs other than those of ``marks``.
        ModelError: a model outside the attention interface, or one with virtual tokens in front of the prompt.

    Source: section 2 of the paper; departures in docs/methods/pasta.md.

    >>> from tenfold.models.tiny import tiny_model
    >>> opened = tiny_model("llama")
    >>> marks = encode(opened.tokenizer, [from_tags("It was <mark>red</mark>, she said.")])
    >>> plain = opened.model(**marks.inputs).logits
    >>> with steer(opened.model, marks, heads={0: [1], 1: [0, 2]}) as steered:
    ...     changed = opened.model(**marks.inputs).logits
    >>> steered.report()
    {'layers': 2, 'heads': 3, 'marked tokens': 3, 'prompt tokens': 21}
    >>> [(changed - plain)[:, part].abs().max().item() > 1e-5 for part in (slice(7), slice(7, None))]
    [False, True]
    >>> torch.equal(opened.model(**marks.inputs).logits, plain)
    True
    """
    _check(alpha, generated, target_mass)
    attentions = self_attentions(model)
    adapters = getattr(model, "peft_config", {}).values()
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters):
        raise ModelError("virtual tokens of an adapter would shift the marks", remedy="steer without that adapter")
    if heads is None:
        found = profile if isinstance(profile, Profile) else load_profile(profile)
        found.check_model(model)
        heads = found.heads
    chosen = _heads(heads, attentions)
    strength = log_strength(marks, 1.0 if target_mass is not None else alpha, keep_sink=keep_sink)
    grown = torch.where(marks.marked.any(1), _log(alpha) if generated == "scale" and target_mass is None else 0.0, 0.0)
    idle = bool((strength == 0).all() and (grown == 0).all()) and (target_mass is None or marks.empty)
    if idle or not chosen:
        yield Steered({}, tuple(marks.marked.sum(1).tolist()), marks.marked.shape[1])
        return
    _check_reach(attentions, chosen, marks)
    bias = _PromptBias(marks, strength, grown, target_mass)
    if target_mass is not None:
        _check_target(attentions)
    with ExitStack() as stack:
        stack.enter_context(installed(model))
        stack.callback(_reader(model, attentions).register_forward_pre_hook(bias.check_ids, with_kwargs=True).remove)
        for layer, indices in chosen.items():
            hook = _LayerHook(bias, torch.tensor(indices))
            stack.callback(attentions[layer].register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield Steered(chosen, tuple(marks.marked.sum(1).tolist()), marks.marked.shape[1])


def log_strength(marks: Marks, alpha: float, *, keep_sink: bool = False) -> Tensor:
    """The log-strength ``u`` of each prompt token (PASTA specification, section 2.2).

    Args:
        marks: marked prompts.
        alpha: factor of unmarked tokens, 0 or more.
        keep_sink: give the first token of each row strength 1.

    Returns:
        ``[batch, tokens]``, float32, within [-30, 30]; all 0 in rows without marks.

    >>> from tenfold.models.tiny import tiny_model
    >>> marks = encode(tiny_model("llama").tokenizer, [from_spans("abcd", [(1, 2), (2, 3, 0.5)]), "abcd"])
    >>> log_strength(marks, 0.01)
    tensor([[-4.6052,  0.0000, -0.6931, -4.6052],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    marked = marks.marked
    values = torch.where(marked, marks.strength.log(), _log(alpha))
    if keep_sink:
        first = marks.attention_mask.argmax(1, keepdim=True)
        values = values.scatter(1, first, values.gather(1, first).where(marked.gather(1, first), 0.0))
    return torch.where(marked.any(1, keepdim=True), values, 0.0).clamp(-LIMIT, LIMIT)


class _PromptBias:
    """The bias of every key of a batch of prompts, for whatever window of keys a layer has."""

    def __init__(self, marks: Marks, strength: Tensor, grown: Tensor, target: float | None) -> None:
        self.ids, self.prompt = marks.input_ids, marks.input_ids.shape[1]
        self.values, self.grown, self.target = strength, grown, target
        self.floor = strength.amin(1)
        raised = marks.marked if target is not None else strength > self.floor[:, None]
        places = torch.arange(self.prompt, device=strength.device)
        self.last = torch.where(marks.marked, places, -1).amax(1)
        self.first = int(raised.any(0).int().argmax())
        most = int(raised.sum(1).max())
        self.raised: Tensor | None = None
        if target is not None or most <= FEW * self.prompt:
            order = raised.int().argsort(dim=1, descending=True, stable=True)[:, :most]
            self.raised = torch.where(raised.gather(1, order), order, -1)
        self._window: tuple[Any, tuple[Tensor, Tensor | None, Tensor]] | None = None

    def layer(self, heads: Tensor, batch: int, queries: int, keys: int, offset: int, seen: int) -> KeyBias:
        """For the keys ``offset .. offset + keys`` of the whole text, of which ``seen`` were there before this call."""
        known = (batch, keys, offset, heads.device)
        # Every layer of a forward pass asks for the same window, except where windows differ.
        if self._window is None or self._window[0] != known:
            self._window = (known, self._cut(batch, keys, offset, heads.device))
        values, raised, floor = self._window[1]
        if self.target is None and offset + keys > self.prompt and (offset or seen + queries > self.prompt):
            raised = None  # written tokens are among the keys: they may be above the floor as well
        return KeyBias(heads, values, raised, floor, self.target, first=max(0, self.first - seen))

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
        if offset:
            # A sliding window that has left the marks behind: the formula would only favour the newest tokens.
            values = torch.where((self.last >= offset)[:, None], values, 0.0)
        raised = None if self.raised is None else torch.where(self.raised >= 0, self.raised - offset, -1)
        # Beams and several returned sequences repeat each row in place.
        parts = [
            None if part is None else part.repeat_interleave(batch // rows, 0).to(device)
            for part in (values, raised, self.floor)
        ]
        return parts[0], parts[1], parts[2]  # type: ignore[return-value]

    def check_ids(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse to steer another text than the marked one."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None or torch.compiler.is_compiling() or ids.shape[1] == 1 < self.prompt:
            return  # embeddings cannot be compared, a graph has no place for it, and decoding shall not wait for a GPU
        cache = kwargs.get("past_key_values")
        seen = 0 if cache is None else int(cache.get_seq_length())
        if seen >= self.prompt or len(ids) % len(self.ids):
            return  # a wrong batch is refused by the first layer
        expected = (
            self.ids[:, seen : seen + ids.shape[1]].repeat_interleave(len(ids) // len(self.ids), 0).to(ids.device)
        )
        if not torch.equal(ids[:, : expected.shape[1]], expected):
            raise ConfigError(
                "the model reads other tokens than the marks were made for",
                remedy="pass marks.inputs to the model, or leave the steer block first",
            )


@dataclass(frozen=True)
class _LayerHook:
    """Hands its layer the bias of the keys that this call sees."""

    bias: _PromptBias
    heads: Tensor

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if kwargs.get("cache") is not None:
            raise ModelError("continuous batching cannot be steered", remedy="use generate without a paged cache")
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))  # as GPT-NeoX calls it
        batch, queries = hidden.shape[:2]
        keys, offset, seen = queries, 0, 0
        if cache is not None:
            keys, offset = cache.get_mask_sizes(queries, module.layer_idx)
            # Only a prefill asks for it, and on a static cache it is a tensor, for which a GPU would be waited for.
            seen = int(cache.get_seq_length(module.layer_idx)) if queries > 1 else self.bias.prompt
        found = self.bias.layer(self.heads.to(hidden.device), batch, queries, int(keys), int(offset), seen)
        return args, {**kwargs, "key_bias": (*kwargs.get("key_bias", ()), found)}


def _reader(model: Any, attentions: Mapping[int, Any]) -> Any:
    """The innermost model around the layers: the one that is given token ids and the cache."""
    layer = attentions[min(attentions)]
    around = [
        m for m in model.modules() if isinstance(m, PreTrainedModel) and any(part is layer for part in m.modules())
    ]
    return around[-1] if around else model


def _heads(
    heads: Mapping[int, Sequence[int]] | Literal["all"], attentions: Mapping[int, Any]
) -> dict[int, tuple[int, ...]]:
    counts = {layer: module.config.num_attention_heads for layer, module in attentions.items()}
    if heads == "all":
        return {layer: tuple(range(count)) for layer, count in counts.items()}
    if isinstance(heads, str):
        raise ConfigError(f"heads: {heads!r}", remedy="give a dictionary {layer: [heads]}, or 'all'")
    for layer, indices in heads.items():
        wrong = [head for head in indices if not 0 <= head < counts.get(layer, 0)]
        if layer not in counts:
            known = f"{min(counts)} to {max(counts)}"
            raise ConfigError(f"heads: layer {layer}; this model can be steered in layers {known}", "correct the layer")
        if wrong:
            raise ConfigError(
                f"heads: head {wrong[0]} of layer {layer}; a layer has query heads 0 to {counts[layer] - 1}",
                remedy="correct the head, or use a profile made for this model",
            )
    return {layer: tuple(sorted(set(heads[layer]))) for layer in sorted(heads) if heads[layer]}


def reach(module: Any, head: int | None = None) -> int | None:
    """How many keys, itself included, the last query of an attention module sees; None without a window.

    Args:
        module: the attention module.
        head: one of its query heads; None for that which sees least.
    """
    spans = head_spans(module.config, module.layer_idx)
    if head is not None:
        spans = (spans[head * len(spans) // module.config.num_attention_heads],)
    least = min(span.reach for span in spans)
    if least < FULL.reach:
        return least + 1
    kinds = getattr(module.config, "layer_types", None)
    if kinds is not None:
        fields = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
        name = fields.get(kinds[module.layer_idx])
        return getattr(module.config, name, None) if name else None
    return getattr(module, "sliding_window", None) or getattr(module.config, "sliding_window", None)


def _check_reach(attentions: Mapping[int, Any], chosen: Mapping[int, Sequence[int]], marks: Marks) -> None:
    last = marks.marked.shape[1] - 1
    pads = (1 - marks.attention_mask).sum(1).tolist()
    for row in range(len(marks.marked)):
        marked = min((end for _, end in marks.tokens(row)), default=last + 1) - 1
        for layer, heads in chosen.items():
            for head in heads:
                # Positions count real tokens: padding on the left shifts none.
                if not _reaches(attentions[layer], head, last - pads[row], marked - pads[row]):
                    raise ConfigError(
                        f"row {row}: head {head} of layer {layer} does not reach a mark that ends "
                        f"{last - marked} tokens before the prompt does",
                        remedy="steer heads with full attention only, or move the marked text towards the end",
                    )


def _reaches(module: Any, head: int, asked: int, marked: int) -> bool:
    """Whether a query head sees, from one position, another."""
    spans = head_spans(module.config, module.layer_idx)
    span = spans[head * len(spans) // module.config.num_attention_heads]
    if span != FULL:
        return bool(span.sees(torch.tensor(asked), torch.tensor(marked)))
    window = reach(module, head)
    return window is None or asked - marked < window


def _check(alpha: float, generated: str, target_mass: float | None) -> None:
    if not 0 <= alpha < math.inf:
        raise ConfigError(f"alpha: {alpha} is not a number from 0 on", remedy="0.01 is the paper's")
    if generated not in ("keep", "scale"):
        raise ConfigError(f"generated: {generated!r}", remedy="keep or scale")
    if target_mass is not None and not 0 < target_mass < 1:
        raise ConfigError(f"target_mass: {target_mass} is not between 0 and 1", remedy="0.3 gives the marks 30 %")


def _check_target(attentions: Mapping[int, Any]) -> None:
    base = base_implementation(next(iter(attentions.values())).config)
    if base not in ("sdpa", "eager"):
        raise ConfigError(
            f"target_mass on {base!r}, which returns no normaliser here",
            remedy="open the model with attn_implementation='sdpa', or use alpha",
        )


def _log(alpha: float) -> float:
    return min(max(math.log(alpha), -LIMIT), LIMIT) if alpha > 0 else -LIMIT
