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
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tenfold.attend.attention import base_implementation, installed, self_attentions
from tenfold.attend.pasta.blocks import Block, LayerHook, PromptBias, reading
from tenfold.attend.pasta.profiles import Profile, load_profile
from tenfold.attend.reach import Heads, heads_by_layer, sights, split
from tenfold.attend.text_marks import Marks
from tenfold.errors import ConfigError, ModelError

LIMIT = 30.0
"""Log-strengths are cut here: alpha = 0 is allowed, and a row that sees no marked key still has a softmax."""


@dataclass(frozen=True)
class Steered:
    """What a `steer` block touches.

    Args:
        heads: steered query heads by layer; empty when there is nothing to do, and then nothing was attached.
        marked: marked tokens of each row.
        tokens: length of the padded prompts.
        blind: query heads by layer that were to be steered and see no mark from the end of any prompt: left alone.
    """

    heads: dict[int, tuple[int, ...]]
    marked: tuple[int, ...]
    tokens: int
    blind: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def report(self) -> dict[str, Any]:
        """Counts for reports: layers, heads, marked tokens, all tokens."""
        return {
            "layers": len(self.heads),
            "heads": sum(map(len, self.heads.values())),
            "marked tokens": sum(self.marked),
            "prompt tokens": self.tokens * len(self.marked),
        }


def _warn(note: str) -> None:
    warnings.warn(note, stacklevel=4)  # the caller of the block


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
    tell: Callable[[str], None] = _warn,
) -> Iterator[Steered]:
    """Emphasise marked tokens while the block runs: forward passes and ``generate`` on the inputs of ``marks``.

    Works on every implementation (sdpa, flex, flash, eager), with grouped-query heads, left padding, beams and several
    returned sequences, dynamic, static and sliding caches, chunked prefill. Steered keys and values stay in the cache:
    do not reuse it under other marks, except in front of the first mark, where nothing differs. Nested blocks add up.
    A thread steers itself: others get the plain model, or what their own block says; a thread without a block that
    reads exactly these prompts, as a streamer's does, is steered too.

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
        tell: called with a note that names heads which see no mark from the end of the prompt, as those of a sliding
            window may; by default it is a warning. Such heads are left alone.

    Yields:
        What is steered.

    Raises:
        ConfigError: a field out of its range, heads the model does not have, a prompt from whose end none of the heads
            sees a mark any more; within the block, inputs other than those of ``marks``.
        ModelError: a model outside the attention interface, or one with virtual tokens in front of the prompt.

    Source: section 2 of the paper; departures in docs/papers.md.

    >>> from tenfold.attend.text_marks import encode, from_tags
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
    if target_mass is not None:
        _check_target(attentions)
    groups, blind, unseen = split(sights(attentions, chosen, marks), marks)
    if unseen:
        raise _out_of_reach(unseen[0], chosen, marks)
    steered = Steered(heads_by_layer(groups), tuple(marks.marked.sum(1).tolist()), marks.marked.shape[1], blind)
    if blind:
        tell(note_of(steered))
    ends = marks.ends
    block, biases = Block(marks), {}  # type: Block, dict[tuple[bool, ...], PromptBias]
    with ExitStack() as stack:
        stack.enter_context(installed(model))
        stack.enter_context(reading(_reader(model, attentions), block))
        for (layer, _), (indices, gone) in groups.items():
            rows = tuple(place >= end for place, end in zip(gone, ends, strict=True))
            if rows not in biases:
                biases[rows] = PromptBias(marks, strength, grown, target_mass, marks.marked.new_tensor(rows))
            hook = LayerHook(block, biases[rows], torch.tensor(indices), gone)
            stack.callback(attentions[layer].register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield steered


def log_strength(marks: Marks, alpha: float, *, keep_sink: bool = False) -> Tensor:
    """The log-strength ``u`` of each prompt token (PASTA specification, section 2.2).

    Args:
        marks: marked prompts.
        alpha: factor of unmarked tokens, 0 or more.
        keep_sink: give the first token of each row strength 1.

    Returns:
        ``[batch, tokens]``, float32, within [-30, 30]; all 0 in rows without marks.

    >>> from tenfold.attend.text_marks import encode, from_spans
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


def note_of(steered: Steered) -> str:
    """What to tell the user about heads that see no mark.

    >>> note_of(Steered({1: (0, 3)}, (2,), 40, {3: (0, 2)}))
    '2 heads are steered; 2 see no mark from the end of the prompt and are left alone: layer 3 heads 0, 2'
    """
    count, blind = (sum(map(len, heads.values())) for heads in (steered.heads, steered.blind))
    named = "; ".join(f"layer {layer} heads {', '.join(map(str, heads))}" for layer, heads in steered.blind.items())
    return f"{count} heads are steered; {blind} see no mark from the end of the prompt and are left alone: {named}"


def _out_of_reach(row: int, heads: Heads, marks: Marks) -> ConfigError:
    layer, last = min(heads), int(marks.marked[row].nonzero()[-1])
    return ConfigError(
        f"{marks.name(row)}: head {heads[layer][0]} of layer {layer} does not reach a mark that ends "
        f"{marks.ends[row] - 1 - last} tokens before the prompt does, nor does any other steered head",
        remedy="steer heads with full attention, or move the marked text towards the end",
    )


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


def _check(alpha: float, generated: str, target_mass: float | None) -> None:
    if not 0 <= alpha < math.inf:
        raise ConfigError(f"alpha: {alpha} is not a number from 0 on", remedy="0.01 is the paper's")
    if generated not in ("keep", "scale"):
        raise ConfigError(f"generated: {generated!r}", remedy="keep or scale")
    if target_mass is not None and not 0 < target_mass < 1:
        raise ConfigError(f"target_mass: {target_mass} is not between 0 and 1", remedy="0.3 gives the marks 30 %")


def lifts(model: Any) -> bool:
    """Whether a model takes a target mass.

    It does on sdpa and eager, without capped scores, sinks or the spans of a conversion.

    >>> from tenfold.models.tiny import tiny_model
    >>> lifts(tiny_model("llama").model)
    True
    """
    attentions = self_attentions(model).values()
    if base_implementation(next(iter(attentions)).config) not in ("sdpa", "eager"):
        return False
    return all(
        getattr(module, "attn_logit_softcapping", None) is None and getattr(module, "sinks", None) is None
        for module in attentions
    )


def _check_target(attentions: Mapping[int, Any]) -> None:
    base = base_implementation(next(iter(attentions.values())).config)
    if base not in ("sdpa", "eager"):
        raise ConfigError(
            f"target_mass on {base!r}, which returns no normaliser here",
            remedy="open the model with attn_implementation='sdpa', or use alpha",
        )


def _log(alpha: float) -> float:
    return min(max(math.log(alpha), -LIMIT), LIMIT) if alpha > 0 else -LIMIT
