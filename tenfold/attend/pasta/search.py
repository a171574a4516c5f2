"""AutoPASTA's search for heads: whole layers first, then the heads of the best layers (arXiv 2409.10790)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

from tenfold.errors import ConfigError

Head = tuple[int, int]
"""Layer and query head."""
HeadSet = tuple[Head, ...]
"""A configuration: the heads that are steered together, in order."""


@dataclass(frozen=True)
class Search:
    """What a search found.

    Args:
        heads: the chosen candidate.
        score: its score.
        layers: the kept layers, best first.
        ranking: the heads of the kept layers, best first.
        coarse: the score of every layer with all its heads; a good head of a layer that scored badly was never tried.
        fine: the score of every head of the kept layers alone.
        candidates: the sets that were compared, and their scores.
        evaluations: how often the score was computed; what was known already does not count.
    """

    heads: HeadSet
    score: float
    layers: tuple[int, ...]
    ranking: HeadSet
    coarse: dict[int, float]
    fine: dict[Head, float]
    candidates: dict[HeadSet, float]
    evaluations: int


def coarse_to_fine(
    score: Callable[[HeadSet], float],
    counts: Mapping[int, int],
    keep: int,
    *,
    per_layer: Sequence[int] = (4, 6, 8),
    pooled: Sequence[int] = (16, 24, 32, 64),
    known: MutableMapping[HeadSet, float] | None = None,
) -> Search:
    """Find heads with about ``layers + keep * heads`` evaluations instead of ``layers * heads``.

    Coarse: every layer with all its heads; the best ``keep`` layers stay. Fine: each head of those alone. Candidates:
    the best few of each kept layer, and the best few of all kept layers; the one with the best score wins, of equal
    ones that with fewer heads. Ties of layers and heads go to the lower (layer, head), so the outcome depends on the
    scores alone.

    Args:
        score: how good it is to steer these heads, higher is better; asked exactly once for each set of heads. One that
            is not a number ranks last.
        counts: query heads of each layer that may be steered, as `tenfold.attend.pasta.heads.steerable` gives them.
        keep: how many layers to keep, 1 or more; the paper's 3 to 6 of 32 lose little, all of them is exhaustive.
        per_layer: sizes of candidates that take as many heads from each kept layer, each 1 or more.
        pooled: sizes of candidates that take the best heads of all kept layers together, each 1 or more.
        known: scores from an interrupted search; filled as the search goes on, so that the same dictionary resumes it.

    Returns:
        The chosen heads and everything that was measured.

    Raises:
        ConfigError: a field out of its range; a score that raises, with the heads it was asked for; no candidate whose
            score is a number.

    Source: section 3.3 of the paper; the candidates are those of the AutoPASTA specification, section 2.

    >>> worth = {(0, 0): 3.0, (0, 1): 1.0, (1, 0): -2.0, (1, 1): 2.5}
    >>> found = coarse_to_fine(lambda heads: sum(map(worth.get, heads)), {0: 2, 1: 2}, 1, per_layer=[1], pooled=[2])
    >>> found.layers, found.ranking, found.heads, found.evaluations
    ((0,), ((0, 0), (0, 1)), ((0, 0), (0, 1)), 4)
    """
    sizes = [*per_layer, *pooled]
    if not counts or any(count < 1 for count in counts.values()):
        raise ConfigError(f"counts: {dict(counts)}", remedy="give the heads of each layer, at least one")
    if not 1 <= keep <= len(counts):
        raise ConfigError(f"keep: {keep} of {len(counts)} layers", remedy="keep 10 to 20 % of the layers")
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"per_layer, pooled: {sizes}", remedy="give at least one size, each 1 or more")
    scores: MutableMapping[HeadSet, float] = {} if known is None else known
    before = len(scores)

    def of(heads: HeadSet) -> float:
        if heads not in scores:
            try:
                scores[heads] = float(score(heads))
            except Exception as error:
                raise ConfigError(
                    f"score of {_named(heads)}: {type(error).__name__}: {error}",
                    remedy="mend the score; with the same dictionary as known the search goes on from here",
                ) from error
        return scores[heads]

    coarse = {layer: of(tuple((layer, head) for head in range(counts[layer]))) for layer in sorted(counts)}
    layers = tuple(sorted(coarse, key=lambda layer: (_worse(coarse[layer]), layer))[:keep])
    fine = {(layer, head): of(((layer, head),)) for layer in sorted(layers) for head in range(counts[layer])}
    ranking = tuple(sorted(fine, key=lambda head: (_worse(fine[head]), head)))
    sets = [[head for layer in layers for head in _of_layer(ranking, layer)[:size]] for size in per_layer]
    sets += [list(ranking[:size]) for size in pooled]
    candidates = {heads: of(heads) for heads in (tuple(sorted(chosen)) for chosen in sets)}
    best = min(candidates, key=lambda heads: (_worse(candidates[heads]), len(heads), heads))
    if math.isnan(candidates[best]):
        raise ConfigError(
            f"score: not a number for any of {len(candidates)} candidates, {_named(best)} the first of them",
            remedy="return a number; see why it is not one there",
        )
    return Search(best, candidates[best], layers, ranking, coarse, fine, candidates, len(scores) - before)


def _worse(score: float) -> tuple[bool, float]:
    """What scores are sorted by, the best first; what is not a number comes last."""
    return math.isnan(score), -score


def _named(heads: HeadSet) -> str:
    """Heads for a message: ``layer 1 head 0``, or the layers and how many they are."""
    if len(heads) == 1:
        return f"layer {heads[0][0]} head {heads[0][1]}"
    layers = list(dict.fromkeys(layer for layer, _ in heads))
    many = "layer" if len(layers) == 1 else "layers"
    return f"{len(heads)} heads of {many} {', '.join(map(str, layers))}"


def _of_layer(ranking: HeadSet, layer: int) -> list[Head]:
    return [head for head in ranking if head[0] == layer]
