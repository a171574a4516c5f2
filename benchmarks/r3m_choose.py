"""R3M: the cap that `choose_lam` takes, with trusted pairs and without, beside the best one and fixed ones.

    python -m benchmarks.r3m embed     # hidden states of real pairs, kept outside the repository; needs TENFOLD_DATA
    python -m benchmarks.r3m_choose    # heads on them, and synthetic rewards; resumable, then prints its table

Heads are linear, on hidden states of real pairs, with the weight decay that serves Bradley-Terry best, or with hardly
any, so that they memorise labels. The synthetic reward is the linear one of oracle 15. 100 right labels are
trusted, others measure; doubtful judges are the training pairs themselves, each by a head that has not seen it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import section
from benchmarks.r3m import (
    FOLDS,
    MEMORISING,
    NOISES,
    TRUTHS,
    RealPairs,
    done,
    fit_linear,
    head_of,
    keep,
    paired,
    rows,
    turned,
)
from tenfold.align.r3m.choose import choose_lam
from tenfold.compat import quiet_upstream

LAMS = (1.0, 0.9, 0.75, 0.5, 0.25, 0.1)
TRUSTED = 100
"""Held-out pairs with right labels that choose; the others measure."""
LINEAR_NOISES = (("none", 0.0), ("uniform", 0.1), ("uniform", 0.2), ("uniform", 0.3), ("irrational", 0.0625),
                 ("irrational", 0.125))  # fmt: skip
SEEDS = range(5)

ByLam = Callable[[float], Tensor]


def linear(setting: str, noise: str, pairs: int, share: float, seed: int) -> None:
    """A linear reward of 10 features, its labels drawn by Bradley-Terry, a share of them flipped."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    truth = draw(10)
    truth *= 3 / truth.norm()
    x, fresh = draw(pairs, 10), draw(20_000 + TRUSTED, 10)

    def labelled(features: Tensor) -> Tensor:
        chance = torch.sigmoid(features @ truth)
        label = torch.rand(len(features), generator=generator, dtype=torch.float64) < chance
        return torch.where(label[:, None], features, -features)

    clearest = (x @ truth).abs().argsort(descending=True)
    wrong = torch.randperm(pairs, generator=generator) if noise.startswith("uniform") else clearest
    x = labelled(x)
    x[wrong[: round(share * pairs)]] *= -1
    right = (fresh @ truth).sign()[:, None] * fresh
    right[:TRUSTED] = labelled(fresh[:TRUSTED])
    fold = torch.arange(pairs) % FOLDS

    def fit(lam: float, part: Any = ...) -> Tensor:
        return fit_linear(x[part], "r3m", lam=lam, decay=1e-3)

    def crossed(lam: float) -> Tensor:
        found = torch.empty(pairs, dtype=torch.float64)
        for number in range(FOLDS):
            found[fold == number] = x[fold == number] @ fit(lam, fold != number)
        return found

    measure(setting, noise, seed, fit, crossed, right)


def real(setting: str, noise: str, pairs: RealPairs, by_heart: bool, seed: int) -> None:
    """Heads on hidden states of real pairs, labels flipped."""
    x, _ = turned(pairs, noise, seed)
    decay = MEMORISING if by_heart else pairs.decay(x, seed)
    measure(setting, noise, seed, lambda lam: head_of(x, "r3m", lam, decay),
            lambda lam: pairs.crossed(x, "r3m", lam, decay), pairs.dev)  # fmt: skip


def measure(setting: str, noise: str, seed: int, fit: ByLam, crossed: ByLam, right: Tensor) -> None:
    """What each cap brings, and which one is chosen; ``right`` has the trusted pairs first."""
    began = time.process_time()
    held = {lam: right @ fit(lam) for lam in LAMS}
    accuracy = {lam: float((held[lam][TRUSTED:] > 0).double().mean()) for lam in LAMS}
    judges = {"trusted": {lam: held[lam][:TRUSTED] for lam in LAMS}, "doubtful": {lam: crossed(lam) for lam in LAMS}}
    row: dict[str, Any] = {"accuracy": {f"{lam:g}": accuracy[lam] for lam in LAMS}}
    for name, margins in judges.items():
        choice = choose_lam(margins, trusted=name == "trusted")
        agreed = {lam: float((margins[lam] > 0).double().mean()) for lam in LAMS}
        row[name] = {"lam": choice.lam, "accuracy": accuracy[choice.lam],
                     "by count": accuracy[max(LAMS, key=agreed.__getitem__)],
                     "wrong": next(one.wrong for one in choice.candidates if one.lam == choice.lam)}  # fmt: skip
    keep({"part": "choose", "setting": setting, "noise": noise, "seed": seed, **row,
          "cpu": time.process_time() - began})  # fmt: skip


def table() -> None:
    """Markdown for docs/results: accuracy on right labels, and points more than without a cap, interval over seeds."""
    heads = ("setting", "noise", "lam 1", "lam 0.75", "chosen", "chosen, trusted", "by count", "by count, trusted",
             "best", "lams", "wrong, estimated")  # fmt: skip
    measured = [row for row in rows() if row["part"] == "choose"]
    section("The choice of `lam`: accuracy on right labels", "r3m_choose", measured)
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for setting, noise in dict.fromkeys((row["setting"], row["noise"]) for row in measured):
        found = [row for row in measured if (row["setting"], row["noise"]) == (setting, noise)]
        plain = [row["accuracy"]["1"] for row in found]
        columns = [[row["accuracy"]["0.75"] for row in found]]
        columns += [[row[judge][key] for row in found] for key in ("accuracy", "by count")
                    for judge in ("doubtful", "trusted")]  # fmt: skip
        columns.append([max(row["accuracy"].values()) for row in found])
        cells = " | ".join(f"{100 * statistics.mean(values):.1f} {paired(values, plain)}" for values in columns)
        lams = " ".join(f"{row['doubtful']['lam']:g}" for row in found)
        wrong = statistics.mean(row["doubtful"]["wrong"] for row in found)
        print(f"| {setting} | {noise} | {100 * statistics.mean(plain):.1f} | {cells} | {lams} | {wrong:.2f} |")


def lost() -> None:
    """Markdown: points of accuracy lost to the best cap, mean over noise models and seeds."""
    ways: dict[str, Callable[[dict[str, Any]], float]] = {f"always {lam}": (lambda row, lam=lam: row["accuracy"][lam])
                                                          for lam in ("1", "0.75", "0.25")}  # fmt: skip
    for key, said in (("accuracy", "chosen"), ("by count", "by counting")):
        for judge in ("doubtful", "trusted"):
            ways[f"{said}, {judge}"] = lambda row, key=key, judge=judge: row[judge][key]
    measured = [row for row in rows() if row["part"] == "choose"]
    section("The choice of `lam`: points lost to the best", "r3m_choose", measured)
    print(f"| setting | {' | '.join(ways)} |\n|---|{'---|' * len(ways)}")
    for setting in dict.fromkeys(row["setting"] for row in measured):
        found = [row for row in measured if row["setting"] == setting]
        means = (statistics.mean(max(row["accuracy"].values()) - way(row) for row in found) for way in ways.values())
        print(f"| {setting} | {' | '.join(f'{100 * mean:.1f}' for mean in means)} |")


def main() -> None:
    """Everything that is not there yet, then the table."""
    quiet_upstream()
    for pairs in (500, 2000):
        for kind, share in LINEAR_NOISES:
            for seed in SEEDS:
                keys = {"setting": f"linear, {pairs} pairs", "noise": f"{kind} {share:g}"}
                if not done(part="choose", **keys, seed=seed):
                    linear(**keys, pairs=pairs, share=share, seed=seed)
    for truth in TRUTHS:
        embedded = RealPairs(truth)
        for by_heart in (False, True):
            for noise in (noise for noise in NOISES if truth == "judge" or "model" not in noise):
                for seed in SEEDS:
                    keys = {"setting": f"{'by heart' if by_heart else 'heads'}, {truth}", "noise": noise}
                    if not done(part="choose", **keys, seed=seed):
                        real(**keys, pairs=embedded, by_heart=by_heart, seed=seed)
    table()
    lost()


if __name__ == "__main__":
    main()
