"""Which pairs to doubt first: ranked by R3M's margins, by Bradley-Terry's loss, and by length, which needs no model.

    python -m benchmarks.r3m ranking   # the pairs and flips of `heads`, ranked by length; needs TENFOLD_DATA

The loss of a Bradley-Terry model falls with its margin, so that ranking by either is the same. Ranking by length
doubts first the pair whose chosen answer is the shorter one by the most tokens. The rows of `heads` are its rivals: the
same pairs and flips, so that differences are paired by seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks import section
from benchmarks.pasta import read
from benchmarks.r3m import NOISES, PAIRS, done, keep, paired, real_pairs, rows
from tenfold.align.margins import pair_tokens
from tenfold.align.preferences import StepRewards, irrational, uniform
from tenfold.data.rows import Preference
from tenfold.evaluate.ranking import precision_at, roc_auc
from tenfold.models.open import open_model

SETS = {"alpacaeval": "AlpacaEval, a judge's labels", "hh": "HH-RLHF harmless, people's labels"}
RANKED = tuple(noise for noise in NOISES if noise != "none" and "model" not in noise and not noise.startswith("stoch"))
"""Flips that need no model of the right labels."""
RIVALS = {"loss, in-sample": ("bt", "seen"), "loss, cross-fitted": ("bt", "crossed"),
          "R3M, in-sample": ("r3m .75", "seen"), "R3M, cross-fitted": ("r3m .75", "crossed")}  # fmt: skip
SEEDS = range(5)


def ranking() -> None:
    """Length on the pairs that `heads` learned from, and on HH-RLHF, whose labels are people's."""
    todo = {data: [(noise, seed) for noise in RANKED for seed in SEEDS
                   if not done(part="ranking", data=data, noise=noise, seed=seed)] for data in SETS}  # fmt: skip
    if not any(todo.values()):
        return
    tokenizer = open_model("demo", device="cpu").tokenizer
    for data, trials in todo.items():
        if not trials:
            continue
        pairs = real_pairs(tokenizer, "train", PAIRS["train"]) if data == "alpacaeval" else _harmless()
        ids, sure = [pair.id for pair, _ in pairs], [sure for _, sure in pairs]
        longer = []
        for pair, _ in pairs:
            chosen, rejected = map(len, pair_tokens(pair, tokenizer))
            longer.append(chosen - rejected)
        for noise, seed in trials:
            if data == "alpacaeval" or noise.startswith("uniform"):
                mask = _flips(ids, sure, noise, seed)
                doubts = [length if flip else -length for length, flip in zip(longer, mask, strict=True)]
                keep({"part": "ranking", "data": data, "noise": noise, "seed": seed, "pairs": len(ids),
                      "wrong": sum(mask), "longer": statistics.mean(length > 0 for length in longer),
                      "auc": roc_auc(doubts, mask), "precision": precision_at(doubts, mask, sum(mask))})  # fmt: skip


def _harmless() -> list[tuple[Preference, float]]:
    """People's preferences; how sure they were is not known."""
    lines = read("pref_hh_harmless")
    return [(Preference(line["id"], line["prompt"], line["chosen"], line["rejected"]), 1.0) for line in lines]


def _flips(ids: Sequence[str], sure: Sequence[float], noise: str, seed: int) -> list[bool]:
    """Those of `benchmarks.r3m.RealPairs` where the judge is right."""
    kind, strength = noise.split()
    if kind == "uniform":
        return uniform(ids, float(strength.rstrip("%")) / 100, seed=seed)
    above, _, below = strength.partition("/")
    rewards = [StepRewards((one,), (0.0,)) for one in sure]
    return irrational(ids, rewards, float(above) / float(below), seed=seed)


def table() -> None:
    """AUC and precision of each ranking, and by how much R3M's cross-fitted margins differ from length."""
    kept = rows()
    measured = [row for row in kept if row["part"] == "ranking"]
    for name in ("auc", "precision"):
        shown = "AUC" if name == "auc" else "precision among as many as are wrong"
        section(f"Which labels to doubt first: {shown}, {SETS['alpacaeval']}", "r3m ranking", measured)
        print(f"| noise | wrong | length | {' | '.join(RIVALS)} | R3M, cross-fitted, minus length (x 100) |")
        print("|---|---|---|" + "---|" * (len(RIVALS) + 1))
        for noise in RANKED:
            ours = [row for row in measured if row["data"] == "alpacaeval" and row["noise"] == noise]
            theirs = {}
            for rival, (loss, how) in RIVALS.items():
                heads = {row["seed"]: row[how][f"margin {name}"] for row in kept if row["part"] == "heads"
                         and row["truth"] == "judge" and row["noise"] == noise and row["loss"] == loss}  # fmt: skip
                theirs[rival] = [heads[row["seed"]] for row in ours]
            length = [row[name] for row in ours]
            cells = [f"{statistics.mean(values):.3f}" for values in (length, *theirs.values())]
            cells.append(paired(theirs["R3M, cross-fitted"], length))
            print(f"| {noise} | {statistics.mean(row['wrong'] for row in ours):.0f} | {' | '.join(cells)} |")
    section(f"Which labels to doubt first: length, {SETS['hh']}", "r3m ranking", measured)
    print("| noise | pairs | wrong | AUC | precision |\n|---|---|---|---|---|")
    for noise in RANKED:
        found = [row for row in measured if row["data"] == "hh" and row["noise"] == noise]
        if found:
            means = [statistics.mean(row[key] for row in found) for key in ("pairs", "wrong", "auc", "precision")]
            print(f"| {noise} | {means[0]:.0f} | {means[1]:.0f} | {means[2]:.3f} | {means[3]:.3f} |")
