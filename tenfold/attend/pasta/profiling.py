"""A profile from tasks: rank the heads of each task, intersect, and choose how many by what they do on other items."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import transformers

from tenfold.attend.pasta.heads import Batch, TellWhat, batches_of, candidates, effects, gradients, margins, rank
from tenfold.attend.pasta.profiles import Profile, by_layer, describe_model
from tenfold.attend.pasta.search import Head
from tenfold.attend.pasta.steering import steer
from tenfold.attend.pasta.tasks import Item
from tenfold.attend.text_marks import encode
from tenfold.data.text_checks import fluency
from tenfold.errors import ConfigError
from tenfold.models.generation import continue_inputs
from tenfold.models.inference import input_device
from tenfold.stage.store import Store

SIZES = (4, 8, 16, 24, 32, 48, 64)
"""Numbers of heads that are tried."""
FLUENCY_PROMPTS = 8
FLUENCY_TOKENS = 32


def find_profile(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, tuple[Sequence[Item], Sequence[Item]]],
    *,
    alpha: float = 0.01,
    shortlist: float = 0.25,
    sizes: Sequence[int] = SIZES,
    min_fluency: float = 0.9,
    batch_size: int = 16,
    provenance: Mapping[str, Any] | None = None,
    store: Store | None = None,
    tell: TellWhat | None = None,
) -> Profile:
    """Find the heads of a model (PASTA, section 3.2, by the shorter way of `tenfold.attend.pasta.heads`).

    One backward pass for each task ranks all heads, and the best of all tasks are shortlisted. Each of those is then
    steered alone, and every task ranks them by what that does to the margin. For each size the best heads of all tasks
    are intersected, and the set is scored on the second half of the items: the probability of the target against its
    strongest foil, mean over tasks. Of the sets whose texts stay fluent the smallest within one
    standard error of the best score is taken: every further head disturbs something else.

    Args:
        model: a causal language model on sdpa or eager.
        tokenizer: its tokenizer.
        tasks: name -> (items to rank heads on, other items to choose their number on).
        alpha: factor of the attention to unmarked tokens.
        shortlist: share of all heads that are measured exactly, at least; 1 is the exhaustive search.
        sizes: numbers of heads to try.
        min_fluency: least n-gram entropy of steered texts, as a share of that of plain ones.
        batch_size: prompts of one forward pass.
        provenance: what else the profile should say about where it comes from.
        store: keeps finished parts, so that an interrupted search goes on.
        tell: called with the work done, all work, and a text.

    Returns:
        The profile, with one entry of ``curve`` for each size.

    Raises:
        ConfigError: no task, or no size that is reached.

    >>> from tenfold.attend.pasta.tasks import conflict_items
    >>> from tenfold.models.tiny import tiny_model
    >>> opened = tiny_model("llama")
    >>> tasks = {"conflict": (conflict_items(4), conflict_items(4, seed=1))}
    >>> found = find_profile(opened.model, opened.tokenizer, tasks, sizes=[2, 4], shortlist=0.5, min_fluency=0)
    >>> found.size in (2, 4), [point["heads"] for point in found.curve]
    (True, [0, 2, 4])
    """
    if not tasks:
        raise ConfigError("tasks: none", remedy="give at least one")
    began = time.perf_counter()
    items = {name: list(map(list, parts)) for name, parts in tasks.items()}
    given = [alpha, shortlist, batch_size, describe_model(model), items]
    store, search = store or Store(None), hashlib.sha256(repr(given).encode()).hexdigest()[:12]

    def keep(name: str, compute: Callable[[], Any]) -> Any:
        return store.get(f"{search} {name}", compute)

    prepared = {name: batches_of(model, tokenizer, train, batch_size) for name, (train, _) in tasks.items()}
    slopes = {
        name: _heads(keep(f"gradient {name}", partial(_slopes, model, batches, alpha)))
        for name, batches in prepared.items()
    }
    count = max(1, round(shortlist * len(next(iter(slopes.values())))))
    (short,) = candidates({name: rank(values) for name, values in slopes.items()}, [count]).values()
    rankings = {
        name: rank(_heads(keep(f"exact {name}", partial(_exact, model, batches, short, alpha, name, tell))))
        for name, batches in prepared.items()
    }
    checks = {name: batches_of(model, tokenizer, other, batch_size) for name, (_, other) in tasks.items()}
    prompts = [item.prompt for _, other in tasks.values() for item in other[:FLUENCY_PROMPTS]]
    marks = encode(tokenizer, prompts, device=input_device(model))
    sets = {0: (), **candidates(rankings, sizes)}
    if len(sets) == 1:
        raise ConfigError(
            f"sizes: none of {list(sizes)} can be reached", remedy=f"give sizes up to {len(short)}, or raise shortlist"
        )
    curve = []
    for number, (k, heads) in enumerate(sets.items()):
        if tell is not None:
            tell(number, len(sets), f"{len(heads)} heads")
        curve.append(keep(f"size {k}", partial(_point, model, tokenizer, checks, marks, k, heads, alpha)))
    best = choose_size(curve, min_fluency)
    seconds = round(time.perf_counter() - began, 1)
    return Profile(
        heads=by_layer(sets[best["k"]]),
        model=describe_model(model),
        tasks=tuple(tasks),
        curve=tuple(curve),
        provenance={
            "method": "shortlist by gradient, then each head exactly, then the intersection over tasks",
            "metric": "mean probability of the target against its strongest foil, next token",
            "alpha": alpha,
            "shortlist": shortlist,
            "items": {name: [len(train), len(other)] for name, (train, other) in tasks.items()},
            "k": best["k"],
            "heads measured exactly": len(short),
            "seconds": seconds,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **(provenance or {}),
        },
    )


def choose_size(curve: Sequence[Mapping[str, Any]], min_fluency: float) -> Mapping[str, Any]:
    """The smallest set within one standard error of the best score, among those fluent enough; the plain model is none.

    Raises:
        ConfigError: every size ruins the texts, or has a score that is not a number.

    >>> points = [{"heads": n, "score": score, "stderr": 0.03, "fluency": fluency}
    ...           for n, score, fluency in [(0, 0.5, 4.0), (4, 0.7, 3.9), (8, 0.88, 3.9), (16, 0.9, 3.9), (32, 1, 1)]]
    >>> choose_size(points, 0.9)["heads"]
    8
    """
    least = min_fluency * curve[0]["fluency"]
    known = [point for point in curve[1:] if not math.isnan(point["score"])]
    if not known:
        raise ConfigError(
            "score: not a number at any size, as if the model gave none", remedy="look at its logits on these prompts"
        )
    fluent = [point for point in known if point["fluency"] >= least]
    if not fluent:
        raise ConfigError(
            f"min_fluency: steered texts have less than {min_fluency:.0%} of the plain model's entropy at every size",
            remedy="raise alpha, try smaller sizes, or lower min_fluency",
        )
    best = max(fluent, key=lambda point: point["score"])
    near = [point for point in fluent if point["score"] >= best["score"] - best["stderr"]]
    return min(near, key=lambda point: point["heads"])


def _slopes(model: Any, batches: Sequence[Batch], alpha: float) -> list[tuple[int, int, float]]:
    return _listed(gradients(model, batches, alpha=alpha))


def _exact(
    model: Any, batches: Sequence[Batch], heads: Sequence[Head], alpha: float, name: str, tell: TellWhat | None
) -> list[tuple[int, int, float]]:
    def show(done: int, total: int, what: str) -> None:
        if tell is not None:
            tell(done, total, f"{name}, {what}")

    return _listed(effects(model, batches, heads, alpha=alpha, tell=show))


def _listed(values: Mapping[Head, float]) -> list[tuple[int, int, float]]:
    """As JSON can hold it."""
    return [(*head, value) for head, value in values.items()]


def _heads(listed: Sequence[tuple[int, int, float]]) -> dict[Head, float]:
    return {(int(layer), int(head)): float(value) for layer, head, value in listed}


def _point(
    model: Any,
    tokenizer: Any,
    checks: Mapping[str, Sequence[Batch]],
    marks: Any,
    k: int,
    heads: tuple[Head, ...],
    alpha: float,
) -> dict[str, Any]:
    """What one set of heads does on the items that were kept for it."""
    chosen = by_layer(heads)
    found = {name: margins(model, batches, chosen, alpha=alpha) for name, batches in checks.items()}
    with steer(model, marks, heads=chosen, alpha=alpha):
        texts = continue_inputs(model, tokenizer, marks.inputs, max_new_tokens=FLUENCY_TOKENS)
    scores = {name: round(float(values.sigmoid().mean()), 4) for name, values in found.items()}
    errors = [float(values.sigmoid().var() / len(values)) for values in found.values()]
    return {
        "heads": len(heads),
        "k": k,
        "score": round(sum(scores.values()) / len(scores), 4),
        "stderr": round(sum(errors) ** 0.5 / len(errors), 4),
        "fluency": round(fluency(texts), 3),
        "scores": scores,
        "accuracy": {name: round(float((values > 0).float().mean()), 4) for name, values in found.items()},
        "margin": {name: round(float(values.mean()), 3) for name, values in found.items()},
    }
