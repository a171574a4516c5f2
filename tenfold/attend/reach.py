"""How far a query head looks back: which heads still see a mark, and when a mark is out of sight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tenfold.attend.spans import head_spans
from tenfold.attend.text_marks import Marks
from tenfold.kernels.local import FULL, AttentionWindow

Heads = dict[int, tuple[int, ...]]
"""Query heads by layer."""
NEVER = 2**62
"""A position that no text has: what is seen from everywhere leaves the window there."""


def head_span(module: Any, head: int) -> AttentionWindow:
    """What a query head sees, `FULL` where that is everything.

    A window of transformers is a sliding span, a chunk of its chunked attention a block that sees no other.

    Args:
        module: an attention module, converted or not.
        head: one of its query heads.
    """
    config = module.config
    spans = head_spans(config, module.layer_idx)
    span = spans[head * len(spans) // config.num_attention_heads]
    if span != FULL:
        return span
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        size = getattr(module, "sliding_window", None) or getattr(config, "sliding_window", None)
        return AttentionWindow("sliding", size) if size else FULL
    if kinds[module.layer_idx] == "chunked_attention":
        size = getattr(config, "attention_chunk_size", None)
        return AttentionWindow("block", size, previous=0) if size else FULL
    size = getattr(config, "sliding_window", None) if kinds[module.layer_idx] == "sliding_attention" else None
    return AttentionWindow("sliding", size) if size else FULL


def reach(module: Any) -> int | None:
    """How many keys, itself included, the last query sees in the head that sees least; None without a window.

    Args:
        module: the attention module.
    """
    least = min(head_span(module, head).reach for head in range(module.config.num_attention_heads))
    return None if least >= FULL.reach else least + 1


def leaves(span: AttentionWindow, marked: Sequence[int]) -> int:
    """The first position behind some marked ones from which none of them is seen; `NEVER` where there is none.

    Args:
        span: what a head sees.
        marked: positions of marked tokens, ascending, counted without padding; one or more.

    >>> leaves(AttentionWindow("sliding", 4), [1, 2]), leaves(AttentionWindow("block", 4), [2])
    (6, 8)
    """
    if span == FULL or marked[0] < span.sinks:
        return NEVER
    if span.pattern == "sliding":
        return marked[-1] + span.size
    return (marked[-1] // span.size + span.previous + 1) * span.size


def out_of_sight(span: AttentionWindow, marks: Marks) -> list[int]:
    """`leaves` for each row of a batch, counted with its padding; `NEVER` for rows without marks."""
    pads = marks.attention_mask.argmax(1).tolist()  # in front of the row; what fills it behind is never reached
    found = []
    for marked, pad in zip(marks.marked, pads, strict=True):
        places = [place - pad for place in marked.nonzero()[:, 0].tolist()]
        gone = leaves(span, places) if places else NEVER
        found.append(gone if gone == NEVER else gone + pad)
    return found


Groups = dict[tuple[int, AttentionWindow], tuple[tuple[int, ...], tuple[int, ...]]]
"""By layer and span: the heads of that span, and from where on they see no mark, by row."""


def sights(attentions: Mapping[int, Any], heads: Mapping[int, Sequence[int]], marks: Marks) -> Groups:
    """What some heads see of the marks.

    Args:
        attentions: attention modules by layer.
        heads: query heads by layer.
        marks: marked prompts.
    """
    gone: dict[AttentionWindow, tuple[int, ...]] = {}
    found: Groups = {}
    for layer, indices in heads.items():
        spans: dict[AttentionWindow, list[int]] = {}
        for head in indices:
            spans.setdefault(head_span(attentions[layer], head), []).append(head)
        for span, group in spans.items():
            if span not in gone:
                gone[span] = tuple(out_of_sight(span, marks))
            found[layer, span] = tuple(group), gone[span]
    return found


def split(groups: Groups, marks: Marks) -> tuple[Groups, Heads, list[int]]:
    """Groups that see marks from the end of a prompt, the heads of the others, and the rows whose marks none sees."""
    ends, rows = marks.ends, marks.marked.any(1).nonzero()[:, 0].tolist()
    seeing = {key: group for key, group in groups.items() if any(group[1][row] >= ends[row] for row in rows)}
    unseen = [row for row in rows if all(gone[row] < ends[row] for _, gone in seeing.values())]
    return seeing, heads_by_layer({key: group for key, group in groups.items() if key not in seeing}), unseen


def heads_by_layer(groups: Groups) -> Heads:
    """The heads of some groups, in order."""
    found: dict[int, list[int]] = {}
    for (layer, _), (heads, _) in groups.items():
        found.setdefault(layer, []).extend(heads)
    return {layer: tuple(sorted(found[layer])) for layer in sorted(found)}
