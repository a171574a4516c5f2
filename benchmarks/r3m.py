"""R3M: what it costs beside TRL's loss, and where it beats Bradley-Terry and its rivals on wrong labels, and where not.

    python -m benchmarks.r3m audit     # 20,000 cached margins: reading, judging, writing
    python -m benchmarks.r3m overhead  # a training step beside TRL's, taking turns
    python -m benchmarks.r3m bandit    # recovery of true rewards against pairs and wrong labels
    python -m benchmarks.r3m embed     # hidden states of real pairs, kept outside the repository; needs TENFOLD_DATA
    python -m benchmarks.r3m heads     # reward heads on them, labels flipped; needs `embed`
    python -m benchmarks.r3m ranking   # which labels to doubt first: length beside the rows of `heads`
    python -m benchmarks.r3m dpo       # a tiny policy on StepAudit
    python -m benchmarks.r3m adapter   # the embedded model with an adapter on real pairs; slow
    python -m benchmarks.r3m table     # what docs/results/r3m.md shows

`ranking` stands in `benchmarks.r3m_ranking`. `python -m benchmarks.r3m_choose` is a part of its own: the choice of the
cap, on the same heads. All of it is resumable row by row. Times are of the CPU (one thread, ``process_time``), since
the machine was shared.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from benchmarks import done_in, keep_in, rows_in, section
from benchmarks.pasta import DATA, read
from tenfold.adapt import lora
from tenfold.align.audit.judging import Action, cleaned_rows, write_csv
from tenfold.align.audit.judging import audit as judge
from tenfold.align.margins import Scored, cross_fit, pair_tokens, score_pairs, score_policy_pairs
from tenfold.align.preferences import StepRewards, corrupt, irrational, stochastic, uniform
from tenfold.align.r3m.losses import PairLoss, pair_loss, perturbation, r3m_loss
from tenfold.compat import quiet_upstream
from tenfold.config.lora import LoraConfig
from tenfold.config.r3m import AUDIT_LAM, R3MPaper, RobustFields
from tenfold.core.statistics import t_quantile
from tenfold.data.groups import hash_share
from tenfold.data.read import read_rows
from tenfold.data.rows import Preference
from tenfold.data.step_audit import preference_values, step_audit
from tenfold.evaluate.ranking import precision_at, roc_auc
from tenfold.models.inference import evaluating
from tenfold.models.memory import peak_growth
from tenfold.models.open import open_model
from tenfold.models.tiny import tiny_model

RESULTS = Path(__file__).parent / "results" / "r3m.jsonl"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tenfold-bench" / "r3m"
PAIRS = {"train": 2000, "dev": 500}
LONGEST = 160
"""Tokens of prompt and answer; pairs with a longer answer are left out."""

rows = partial(rows_in, RESULTS)
keep = partial(keep_in, RESULTS)
done = partial(done_in, RESULTS)


# ---- audit ----------------------------------------------------------------------------------------------------------


class _Stand(torch.nn.Module):
    """In place of a reward model: the mean of a number per token, so that the cache of margins is full in a minute."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.values = torch.nn.Embedding(vocabulary, 1)
        self.config: Any = tiny_model("llama", task="reward").model.config

    def get_input_embeddings(self) -> torch.nn.Module:
        """As of a transformers model."""
        return self.values

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        worth = 4 * (self.values(input_ids)[..., 0] * attention_mask).sum(1) / attention_mask.sum(1).sqrt()
        return type("Output", (), {"logits": worth[:, None]})()


def audit(repeats: int = 5) -> None:
    """Rows and cached margins to `audit.csv`, step by step; the texts are real ones. The peak is of a fresh process."""
    if done(part="audit"):
        return
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "margins.jsonl", Path(folder) / "audit.csv"
        cached, table = _cached(files[0]), files[1]
        cached(_load())  # fills the cache
        seconds: dict[str, list[float]] = {name: [] for name in ("rows", "margins", "audit", "csv")}
        for _ in range(repeats):
            pairs, seconds["rows"] = _timed(_load, seconds["rows"])
            scored, seconds["margins"] = _timed(partial(cached, pairs), seconds["margins"])
            found, seconds["audit"] = _timed(partial(judge, scored.margins, scored.ids, AUDIT_LAM), seconds["audit"])
            _, seconds["csv"] = _timed(partial(write_csv, table, found), seconds["csv"])
        with get_context("spawn").Pool(1) as fresh:
            peak = fresh.apply(_whole, files)
        keep({"part": "audit", "pairs": len(found.verdicts), "flags": found.flags, "seconds": seconds, "peak": peak,
              "cache": files[0].stat().st_size, "csv": table.stat().st_size})  # fmt: skip


def _load() -> list[Preference]:
    found = read_rows(str(DATA / "pref_alpacaeval_train.jsonl.gz"), rows="preference")
    return [row for row in found if isinstance(row, Preference)]


def _cached(cache: Path) -> Callable[[list[Preference]], Scored]:
    tokenizer = open_model("demo", device="cpu").tokenizer
    torch.manual_seed(0)
    model = _Stand(len(tokenizer))
    return lambda pairs: score_pairs(model, tokenizer, pairs, batch_size=32, max_length=4096, cache=cache)


def _whole(cache: Path, table: Path) -> int:
    """Peak growth of it all, in bytes."""
    cached = _cached(cache)

    def work() -> None:
        scored = cached(_load())
        write_csv(table, judge(scored.margins, scored.ids, AUDIT_LAM))

    return peak_growth(work).growth


def _timed(work: Callable[[], Any], before: list[float]) -> tuple[Any, list[float]]:
    began = time.process_time()
    result = work()
    return result, [*before, time.process_time() - began]


# ---- overhead -------------------------------------------------------------------------------------------------------


def overhead() -> None:
    """CPU seconds of a step beside TRL's own, and of the loss alone, the two taking turns.

    A step is `training_step` (forward, loss, backward, and what is logged) and the optimizer's. Both trainers get the
    same pairs and weights.
    """
    for size in (8, 1024):
        if done(part="loss", size=size):
            continue
        margin = torch.randn(size, requires_grad=True)
        ways = {
            "r3m": lambda margin=margin: r3m_loss(margin, 0.75).mean().backward(),
            "bt": lambda margin=margin: (-logsigmoid(margin)).mean().backward(),
        }
        many = {name: partial(_many, way, 500) for name, way in ways.items()}
        keep({"part": "loss", "size": size, "seconds": {name: [value / 500 for value in values]
                                                        for name, values in _turns(many, 21).items()}})  # fmt: skip
    for name, pairs, words, repeats in (("tiny", 8, 8, 400), ("demo, lora rank 8", 2, 24, 30)):
        if done(part="step", model=name):
            continue
        steps = {kind: _step(kind, name, pairs, words) for kind in ("r3m", "trl")}
        keep({"part": "step", "model": name, "pairs": pairs, "words": words, "seconds": _turns(steps, repeats)})


def _many(work: Callable[[], object], times: int) -> None:
    for _ in range(times):
        work()


def _turns(work: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each piece of work, taking turns, after two warm-up rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(repeats + 2):
        for name in work if turn % 2 else reversed(work):
            began = time.process_time()
            work[name]()
            if turn > 1:
                seconds[name].append(time.process_time() - began)
    return seconds


def _step(kind: str, name: str, pairs: int, words: int) -> Callable[[], None]:
    from datasets import Dataset, disable_progress_bars
    from trl import RewardTrainer

    from tenfold.align.trainers import R3MRewardTrainer

    disable_progress_bars()
    torch.manual_seed(0)
    if name == "tiny":
        opened = tiny_model("llama", task="reward")
        model: Any = opened.model
    else:
        opened = open_model("demo", "reward", device="cpu")
        model = lora.attach(opened.model, LoraConfig(rank=8), task="reward")
    texts = {"prompt": "Say it. ", "chosen": "yes " * words, "rejected": "never " * words}
    data = Dataset.from_list([{"id": str(index), **texts} for index in range(pairs)])
    keys = {"model": model, "args": _arguments("reward", per_device_train_batch_size=pairs, max_steps=10),
            "train_dataset": data, "processing_class": opened.tokenizer}  # fmt: skip
    trainer: Any = RewardTrainer(**keys) if kind == "trl" else R3MRewardTrainer(**keys, robust=RobustFields(lam=0.75))
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    batch = next(iter(trainer.get_train_dataloader()))

    def step() -> None:
        trainer.training_step(trainer.model, dict(batch))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return step


def _arguments(target: str, **more: Any) -> Any:
    from trl import DPOConfig, RewardConfig

    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "bf16": False,
             "dataloader_pin_memory": False, "gradient_checkpointing": False, "logging_steps": 10**6,
             "output_dir": tempfile.gettempdir()}  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (RewardConfig if target == "reward" else DPOConfig)(**{**quiet, **more})


# ---- bandit ---------------------------------------------------------------------------------------------------------

LAMS = (1.0, 0.75, 0.5, 0.25)
SIZES = (250, 1000, 4000, 16000)
WRONG = ((0, "none"), (20, "random"), (0.05, "random"), (0.1, "random"), (0.2, "random"), (0.05, "clearest"),
         (0.1, "clearest"))  # fmt: skip
"""Wrong labels, as a number (s) or as a share of the pairs, and which."""
PUSH = 6.0
"""How far a corrupted margin is moved towards the wrong answer, |delta*|."""


def bandit(seeds: int = 10) -> None:
    """Recovery of true rewards in a table of 5 states and 4 actions, and of 10 weights (|w| = 3, oracle 15).

    Labels are drawn from ``sigma(m* + delta*)``; delta* is 0 but for s pairs, random ones or those of largest |m*|.
    Error: the mean of ``(m - m*)**2`` over fresh pairs, which is the theorem's norm; of which the second figure is what
    is left when the estimate may be rescaled, as a share of the mean of ``m***2``, since a small lam inflates (section
    2.3).

    Beware of the theorem (section 2.8): its lambda, 1 / n, is lam = 1 of every pair, plain Bradley-Terry. It proves
    nothing of lam < 1, nor that delta finds the wrong labels, and here is no test of it.
    """
    for setting in ("table", "linear"):
        for n in SIZES:
            for wrong, kind in WRONG:
                keys = {"part": "bandit", "setting": setting, "n": n, "wrong": wrong, "kind": kind}
                if not done(**keys):
                    keep({**keys, "lams": {lam: _recovered(setting, n, wrong, kind, lam, seeds) for lam in LAMS}})


def _recovered(setting: str, n: int, wrong: float, kind: str, lam: float, seeds: int) -> dict[str, list[float]]:
    found = [_recovery(setting, n, wrong, kind, lam, seed) for seed in range(seeds)]
    return dict(
        zip(("error", "scaled", "accuracy"), (list(values) for values in zip(*found, strict=True)), strict=True)
    )


def _recovery(setting: str, n: int, wrong: float, kind: str, lam: float, seed: int) -> tuple[float, float, float]:
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    if setting == "table":
        states, actions = 5, 4
        rewards = draw(states, actions)
        truth = 1.5 * (rewards - rewards.mean(1, keepdim=True)).flatten()
    else:
        truth = draw(10)
        truth *= 3 / truth.norm()

    def pairs(count: int) -> Tensor:
        if setting == "linear":
            return draw(count, 10)
        state = torch.randint(states, (count,), generator=generator)
        first = torch.randint(actions, (count,), generator=generator)
        second = (first + torch.randint(1, actions, (count,), generator=generator)) % actions
        found = torch.zeros(count, states * actions, dtype=torch.float64)
        index = torch.arange(count)
        found[index, state * actions + first] += 1
        found[index, state * actions + second] -= 1
        return found

    x, fresh = pairs(n), pairs(20_000)
    margin = x @ truth
    count = round(wrong * n) if isinstance(wrong, float) else wrong
    chosen = torch.randperm(n, generator=generator)[:count]
    if kind == "clearest":
        chosen = margin.abs().argsort(descending=True)[:count]
    pushed = margin.clone()
    pushed[chosen] -= PUSH * margin[chosen].sign()
    label = torch.where(torch.rand(n, generator=generator, dtype=torch.float64) < pushed.sigmoid(), 1.0, -1.0)
    found = fresh @ fit_linear(x * label[:, None], "r3m", lam=lam, decay=1e-3)
    wanted = fresh @ truth
    scale = float((found * wanted).sum() / found.square().sum().clamp(min=1e-12))
    scaled = float((scale * found - wanted).square().mean() / wanted.square().mean())
    return float((found - wanted).square().mean()), scaled, float(((found > 0) == (wanted > 0)).double().mean())


def fit_linear(
    x: Tensor, loss: PairLoss, *, lam: float = 1.0, smoothing: float = 0.0, decay: float, start: Tensor | None = None
) -> Tensor:
    """Weights of a linear reward: the mean loss and ``decay / 2 * |w|**2``, by L-BFGS from 0 or from a start."""
    weights = (torch.zeros(x.shape[1], dtype=x.dtype) if start is None else start.clone()).requires_grad_()
    steps = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-6,
                              tolerance_change=1e-9)  # fmt: skip

    def objective() -> Tensor:
        steps.zero_grad()
        value = pair_loss(x @ weights, loss, lam=lam, smoothing=smoothing).mean() + decay / 2 * weights.square().sum()
        value.backward()
        return value

    steps.step(objective)
    return weights.detach()


# ---- real pairs -----------------------------------------------------------------------------------------------------


def real_pairs(tokenizer: Any, split: str, count: int) -> list[tuple[Preference, float]]:
    """Short pairs with the judge's confidence, in an order that a seed drew; fewer where there are fewer."""
    raw = read(f"pref_alpacaeval_{split}")
    random.Random(0).shuffle(raw)
    found: list[tuple[Preference, float]] = []
    for row in raw:
        pair = Preference(row["id"], row["prompt"], row["chosen"], row["rejected"])
        if len(found) < count and max(map(len, pair_tokens(pair, tokenizer))) <= LONGEST:
            found.append((pair, row["margin"]))
        if len(found) == count:
            break
    return found


def embed(chunk: int = 50) -> None:
    """The last hidden state of the last token of each answer with its prompt, in files of 50 pairs."""
    opened = open_model("demo", device="cpu")
    for split, count in PAIRS.items():
        pairs = real_pairs(opened.tokenizer, split, count)
        folder = CACHE / split
        folder.mkdir(parents=True, exist_ok=True)
        for first in range(0, len(pairs), chunk):
            path = folder / f"{first:05}.pt"
            if path.exists():
                continue
            began, cpu = time.perf_counter(), time.process_time()
            part = [pair for pair, _ in pairs[first : first + chunk]]
            texts = [ids for pair in part for ids in pair_tokens(pair, opened.tokenizer)]
            hidden = _hidden(opened.model, texts).view(len(part), 2, -1)
            torch.save({"ids": [pair.id for pair in part], "hidden": hidden, "tokens": sum(map(len, texts)),
                        "seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}, path)  # fmt: skip
            print(split, first, round(time.perf_counter() - began, 1), flush=True)
        if not done(part="embed", split=split):
            saved = [torch.load(path) for path in sorted(folder.glob("*.pt"))]
            sums = {key: sum(part[key] for part in saved) for key in ("tokens", "seconds", "cpu")}
            keep({"part": "embed", "split": split, "pairs": len(pairs), "asked": count, "longest": LONGEST,
                  "prompts": len({pair.prompt for pair, _ in pairs}), **sums})  # fmt: skip


def _hidden(model: Any, texts: Sequence[list[int]], batch: int = 10) -> Tensor:
    """``[texts, channels]``, after the final norm."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    found: dict[int, Tensor] = {}
    with evaluating(model):
        for first in range(0, len(order), batch):
            chosen = order[first : first + batch]
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(texts[index]) for index in chosen], batch_first=True)
            ends = torch.tensor([len(texts[index]) for index in chosen])
            # Padding comes behind and attention looks back, so it needs no mask.
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            found.update(zip(chosen, hidden[torch.arange(len(chosen)), ends - 1], strict=True))
    return torch.stack([found[index] for index in range(len(texts))])


# ---- heads ----------------------------------------------------------------------------------------------------------

METHODS = ("bt", "cdpo", "rdpo", "trimmed", "r3m", "r3m .75")
"""The last one is R3M as it comes, with nothing tuned."""
CAPS = (0.1, 0.25, 0.5, 0.65, 0.75, 0.85, 0.95)
KNOBS: dict[str, Sequence[float]] = {"bt": (0.0,), "cdpo": (0.05, 0.1, 0.2, 0.3), "rdpo": (0.05, 0.1, 0.2, 0.3),
                                     "trimmed": CAPS, "r3m": CAPS, "r3m .75": (0.75,)}  # fmt: skip
DECAYS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
PARTS, FOLDS = 4, 5
NOISES = ("none", "uniform 10%", "uniform 20%", "uniform 30%", "uniform 40%", "irrational 1/3", "irrational 1/2",
          "irrational 2/3", "irrational 1/2 model", "stochastic 1", "stochastic 0.5")  # fmt: skip
TRUTHS = ("judge", "teacher")
MEMORISING = 1e-5
"""A weight decay at which a head memorises its training labels."""


class RealPairs:
    """Embedded pairs: of each the difference of its hidden states, in units of the answers' spread, and its row.

    Args:
        truth: whose labels are right: those of the data's ``judge``, or of a ``teacher``, a linear head that was fitted
            to all labels of training and held-out pairs. What the judge wants is hardly to be read from these states;
            what the teacher wants can be learned, and its true gaps are known.
    """

    def __init__(self, truth: str) -> None:
        tokenizer = open_model("demo", device="cpu").tokenizer
        hidden: dict[str, Tensor] = {}
        self.rows: dict[str, list[Preference]] = {}
        self.sure: list[float] = []
        for split, count in PAIRS.items():
            pairs = real_pairs(tokenizer, split, count)
            saved = [torch.load(path) for path in sorted((CACHE / split).glob("*.pt"))]
            ids = [id for part in saved for id in part["ids"]]
            if ids != [pair.id for pair, _ in pairs]:
                raise SystemExit("the hidden states are not all there: run `embed` first")
            hidden[split] = torch.cat([part["hidden"] for part in saved]).double()
            self.rows[split] = [pair for pair, _ in pairs]
            if split == "train":
                self.sure = [sure for _, sure in pairs]
        channels = hidden["train"].shape[-1]
        spread = hidden["train"].flatten(0, 1).std(0) * math.sqrt(channels)
        self.train, self.dev = ((hidden[split][:, 0] - hidden[split][:, 1]) / spread for split in ("train", "dev"))
        self.ids = [row.id for row in self.rows["train"]]
        self.place = {id: index for index, id in enumerate(self.ids)}
        if truth == "teacher":
            teacher = fit_linear(torch.cat([self.train, self.dev]), "bt", decay=DECAYS[0])
            margins = self.train @ teacher
            self.train, self.dev = margins.sign()[:, None] * self.train, (self.dev @ teacher).sign()[:, None] * self.dev
            self.gap = self.sure = margins.abs().tolist()
        else:
            # What a model of the right labels thinks of pairs that it has not seen.
            self.gap = self.crossed(self.train, "bt", 0.0, self.decay(self.train, 0)).abs().tolist()

    def flips(self, noise: str, seed: int) -> list[bool]:
        """Which labels turn over.

        Where the judge is right, the true gap is its confidence for `irrational`, mostly near 1, so that chance decides
        among many; for `stochastic`, and for `irrational` with "model", it is the size of the margin that a model of
        the right labels gives. Where the teacher is right, it is the size of the teacher's margin.
        """
        kind, *rest = noise.split()
        if kind == "none":
            return [False] * len(self.ids)
        if kind == "uniform":
            return uniform(self.ids, float(rest[0].rstrip("%")) / 100, seed=seed)
        gaps = self.gap if kind == "stochastic" or "model" in rest else self.sure
        rewards = [StepRewards((gap,), (0.0,)) for gap in gaps]
        above, _, below = rest[0].partition("/")
        if kind == "stochastic":
            return stochastic(self.ids, rewards, float(above), seed=seed)
        return irrational(self.ids, rewards, float(above) / float(below), seed=seed)

    def held(self, seed: int) -> list[Tensor]:
        """Masks of the pairs that are held out in turn, by prompt, to choose knobs with."""
        share = [hash_share(f"part|{seed}|{row.prompt}") for row in self.rows["train"]]
        part = torch.tensor([int(value * PARTS) for value in share])
        return [part == number for number in range(PARTS)]

    def decay(self, x: Tensor, seed: int) -> float:
        """The weight decay that serves Bradley-Terry best; all losses get it."""
        return max(DECAYS, key=lambda decay: self.validated(x, "bt", 0.0, decay, seed))

    def validated(self, x: Tensor, method: str, knob: float, decay: float, seed: int) -> float:
        """Share of held-out training labels, wrong ones among them, that a head agrees with."""
        agreed = [((x[held] @ head_of(x[~held], method, knob, decay)) > 0).double().sum() for held in self.held(seed)]
        return float(sum(agreed)) / len(x)

    def crossed(self, x: Tensor, method: str, knob: float, decay: float) -> Tensor:
        """Margins by heads that have not seen the pair."""

        def fit(rows: list[Preference], fold: int) -> Tensor:
            return head_of(x[[self.place[row.id] for row in rows]], method, knob, decay)

        def score(head: Tensor, rows: list[Preference]) -> Scored:
            ids = tuple(row.id for row in rows)
            return Scored(ids, (x[[self.place[id] for id in ids]] @ head).float())

        found = cross_fit(self.rows["train"], FOLDS, fit, score)
        assert list(found.ids) == self.ids
        return found.margins.double()


def head_of(x: Tensor, method: str, knob: float, decay: float) -> Tensor:
    """A linear head. `trimmed` starts from R3M at lam .1, as it is not convex (section 8.1)."""
    loss = cast(PairLoss, method.split()[0])
    keys = {"lam": knob} if loss in ("r3m", "trimmed") else {"smoothing": knob}
    start = fit_linear(x, "r3m", lam=0.1, decay=decay) if loss == "trimmed" else None
    return fit_linear(x, loss, decay=decay, start=start, **keys)


def heads(seeds: int = 5) -> None:
    """Linear heads on standardised hidden states; knobs by four-fold agreement with held-out (wrong) training labels.

    Weight decay is chosen the same way, for Bradley-Terry, and then used for every loss. `memorise` is the same with
    next to no weight decay, where a head memorises most labels.
    """
    for truth in TRUTHS:
        real = RealPairs(truth)
        trials = [("heads", noise) for noise in NOISES if truth == "judge" or "model" not in noise]
        for part, noise in (*trials, ("memorise", "uniform 20%")):
            for seed in range(seeds):
                keys = {"part": part, "truth": truth, "noise": noise, "seed": seed}
                todo = [method for method in METHODS if not done(**keys, loss=method)]
                if todo:
                    x, mask = turned(real, noise, seed)
                    decay = real.decay(x, seed) if part == "heads" else MEMORISING
                    for method in todo:
                        _measure(real, x, mask, method, decay, keys)


def turned(real: RealPairs, noise: str, seed: int) -> tuple[Tensor, list[bool]]:
    mask = real.flips(noise, seed)
    return torch.where(torch.tensor(mask)[:, None], -real.train, real.train), mask


def _measure(real: RealPairs, x: Tensor, mask: list[bool], method: str, decay: float, keys: dict[str, Any]) -> None:
    began = time.process_time()
    # Among equals the knob nearest to Bradley-Terry.
    grid = sorted(KNOBS[method], reverse=method in ("trimmed", "r3m"))
    seed = keys["seed"]
    knob = max(grid, key=lambda value: real.validated(x, method, value, decay, seed)) if len(grid) > 1 else grid[0]
    head = head_of(x, method, knob, decay)
    row = {**keys, "loss": method, "knob": knob, "decay": decay, "wrong": sum(mask), **_clean(real.dev @ head)}
    row["fitted"] = float(((x @ head) > 0).double().mean())
    for name, margins in (("seen", x @ head), ("crossed", real.crossed(x, method, knob, decay))):
        row[name] = _found(margins, mask, method, knob)
    keep({**row, "cpu": time.process_time() - began})


def _clean(margins: Tensor) -> dict[str, float]:
    """Accuracy, calibration (mean loss, and expected calibration error in 10 bins) on right labels."""
    sure, right = torch.sigmoid(margins.abs()), (margins > 0).double()
    bins = ((sure - 0.5) * 20).long().clamp(max=9)
    gaps = [float((right[bins == number] - sure[bins == number]).sum().abs()) for number in range(10)]
    return {"accuracy": float(right.mean()), "nll": float(-logsigmoid(margins).mean()), "ece": sum(gaps) / len(margins)}


def _found(margins: Tensor, mask: list[bool], method: str, knob: float) -> dict[str, float]:
    """How well margins find the labels that were flipped, and how many an audit takes for wrong."""
    ids = [str(index) for index in range(len(mask))]
    found = judge(margins, ids, AUDIT_LAM)
    result = {"flags": found.flags, "excess": found.excess, "low": found.interval[0], "high": found.interval[1]}
    suspects = [verdict.suspect for verdict in found.verdicts]
    hits = sum(flip and suspect for flip, suspect in zip(mask, suspects, strict=True))
    result |= {"share": found.share_wrong, "suspects": sum(suspects), "hits": hits}
    wrong = sum(mask)
    if not wrong:
        return result
    loss = cast(PairLoss, method.split()[0])
    capped = loss in ("r3m", "trimmed")
    keys = {"lam": knob, "smoothing": 0.1} if capped else {"lam": 1.0, "smoothing": knob}
    scores = {
        "margin": -margins,
        "delta": perturbation(margins, knob if capped else AUDIT_LAM),
        "loss": pair_loss(margins, loss, **keys),
    }
    for name, score in scores.items():
        result[f"{name} auc"] = roc_auc(score.tolist(), mask)
        result[f"{name} precision"] = precision_at(score.tolist(), mask, wrong)
    return result


# ---- dpo ------------------------------------------------------------------------------------------------------------

TUNED = (("bt", RobustFields(loss="bt")), ("r3m .75", RobustFields(lam=0.75)), ("r3m .5", RobustFields(lam=0.5)),
         ("r3m .25", RobustFields(lam=0.25)),
         ("trimmed .9", RobustFields(loss="trimmed", lam=0.9, paper=R3MPaper(lam_warmup=0.5))),
         ("cdpo .2", RobustFields(loss="cdpo", paper=R3MPaper(smoothing=0.2))),
         ("rdpo .2", RobustFields(loss="rdpo", paper=R3MPaper(smoothing=0.2))))  # fmt: skip
STEPS, SHARE, BETA = 3, 0.2, 0.5
"""Operations of a problem, share of flipped labels, DPO's beta; at 0.1 nothing would ever be flagged."""


def dpo(seeds: int = 3) -> None:
    """A tiny policy, all weights trained, that first read right solutions: labels flipped, five losses.

    cDPO and rDPO are told the true share of wrong labels.
    """
    items = list(step_audit(8000, 0, steps=STEPS))
    raw = [preference_values(item) for item in items]
    pairs = [Preference(row["id"], row["prompt"], row["chosen"], row["rejected"]) for row in raw]
    right = [Preference(row["id"], row["prompt"], row["solution"], "") for row in raw[:5000]]
    learnt, held = pairs[5000:7500], pairs[7500:]
    start: Any = None
    for seed in range(seeds):
        for noise in (0.0, SHARE):
            for name, robust in TUNED if noise else TUNED[:1]:
                if done(part="dpo", noise=noise, loss=name, seed=seed):
                    continue
                if start is None:
                    start = _read(right)
                mask = uniform([row.id for row in learnt], noise, seed=seed)
                keep({"part": "dpo", "noise": noise, "loss": name, "seed": seed, "read": start[1],
                      **_preferring(start[0], corrupt(learnt, mask), mask, held, robust, seed)})  # fmt: skip
            for action in ("drop", "flip"):
                if done(part="cleaning", noise=noise, action=action, seed=seed):
                    continue
                start = start or _read(right)
                mask = uniform([row.id for row in learnt], noise, seed=seed)
                keep({"part": "cleaning", "noise": noise, "action": action, "seed": seed,
                      **_cleaning(start[0], corrupt(learnt, mask), mask, held, action, seed)})  # fmt: skip


def _read(solved: Sequence[Preference], steps: int = 2500, batch: int = 16) -> tuple[Any, dict[str, float]]:
    """A tiny model that has read right solutions."""
    opened = tiny_model("llama")
    began = time.process_time()
    texts = [torch.tensor(pair_tokens(row, opened.tokenizer, chat=False)[0]) for row in solved]
    opened.model.train()
    optimizer = torch.optim.AdamW(opened.model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = [texts[index] for index in torch.randint(len(texts), (batch,), generator=generator)]
        ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=-100)
        loss = opened.model(input_ids=ids.clamp(min=0), labels=ids).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return opened, {"steps": steps, "loss": float(loss.detach()), "cpu": time.process_time() - began}


def _preferring(
    start: Any, pairs: list[Preference], mask: list[bool], held: list[Preference], robust: RobustFields, seed: int
) -> dict[str, Any]:
    began = time.process_time()
    policy, trainer = _policy(start, pairs, robust, seed)
    trained = time.process_time() - began
    clean = _judged(start, policy, held)
    row = {"steps": trainer.state.global_step, "trained": trained, **_clean(clean)}
    if any(mask):
        online = trainer.margins()
        for name, margins in (("seen", _judged(start, policy, pairs).tolist()),
                              ("online", [online[row.id] for row in pairs])):  # fmt: skip
            row[f"auc {name}"] = roc_auc([-margin for margin in margins], mask)
            row[f"precision {name}"] = precision_at([-margin for margin in margins], mask, sum(mask))
    return {**row, "cpu": time.process_time() - began}


def _cleaning(
    start: Any, pairs: list[Preference], mask: list[bool], held: list[Preference], action: Action, seed: int
) -> dict[str, Any]:
    """Plain DPO, its audit, and plain DPO once more on what the audit leaves: twice the cost."""
    began = time.process_time()
    first, _ = _policy(start, pairs, RobustFields(loss="bt"), seed)
    found = judge(_judged(start, first, pairs), [row.id for row in pairs], AUDIT_LAM)
    kept = [Preference(**row) for row in cleaned_rows(pairs, found, action)]
    suspects = [verdict.suspect for verdict in found.verdicts]
    hits = sum(flip and suspect for flip, suspect in zip(mask, suspects, strict=True))
    second, trainer = _policy(start, kept, RobustFields(loss="bt"), seed)
    return {"steps": trainer.state.global_step, "kept": len(kept), "suspects": sum(suspects), "hits": hits,
            "share": found.share_wrong, **_clean(_judged(start, second, held)),
            "cpu": time.process_time() - began}  # fmt: skip


def _policy(start: Any, pairs: list[Preference], robust: RobustFields, seed: int) -> tuple[Any, Any]:
    from datasets import Dataset, disable_progress_bars

    from tenfold.align.trainers import R3MDPOTrainer

    disable_progress_bars()
    policy = copy.deepcopy(start.model)
    data = [{"id": row.id, "prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} for row in pairs]
    args = _arguments("dpo", per_device_train_batch_size=16, num_train_epochs=1, learning_rate=2e-4, beta=BETA,
                      max_length=512, seed=seed)  # fmt: skip
    trainer = R3MDPOTrainer(policy, ref_model=copy.deepcopy(start.model), args=args,
                            train_dataset=Dataset.from_list(data), processing_class=start.tokenizer,
                            robust=robust)  # fmt: skip
    trainer.train()
    return policy, trainer


def _judged(start: Any, policy: Any, pairs: list[Preference]) -> Tensor:
    keys = {"beta": BETA, "reference": start.model, "batch_size": 50, "chat": False}
    return score_policy_pairs(policy, start.tokenizer, pairs, **keys).margins.double()


# ---- adapter --------------------------------------------------------------------------------------------------------


def adapter(pairs: int = 500, held: int = 300) -> None:
    """The embedded model as a reward model, LoRA of rank 8, one epoch, 20 % of the labels flipped, one seed.

    Wrong labels are looked for by the margins of the training itself, each from before its own step.
    """
    from datasets import Dataset, disable_progress_bars

    from tenfold.align.trainers import R3MRewardTrainer

    disable_progress_bars()
    for name, robust in TUNED[:3]:
        if done(part="adapter", loss=name, pairs=pairs):
            continue
        torch.manual_seed(0)
        opened = open_model("demo", "reward", device="cpu")
        model = lora.attach(opened.model, LoraConfig(rank=8), task="reward")
        rows = [row for row, _ in real_pairs(opened.tokenizer, "train", pairs)]
        dev = [row for row, _ in real_pairs(opened.tokenizer, "dev", held)]
        mask = uniform([row.id for row in rows], SHARE, seed=0)
        turned = corrupt(rows, mask)
        data = [
            {"id": row.id, "prompt": [{"role": "user", "content": row.prompt}],
             "chosen": [{"role": "assistant", "content": row.chosen}],
             "rejected": [{"role": "assistant", "content": row.rejected}]}
            for row in turned
        ]  # fmt: skip
        args = _arguments("reward", per_device_train_batch_size=4, num_train_epochs=1, learning_rate=2e-4,
                          max_length=1024, seed=0, logging_steps=10)  # fmt: skip
        trainer = R3MRewardTrainer(model, args=args, train_dataset=Dataset.from_list(data),
                                   processing_class=opened.tokenizer, robust=robust)  # fmt: skip
        began, wall = time.process_time(), time.perf_counter()
        trainer.train()
        cpu, wall = time.process_time() - began, time.perf_counter() - wall
        margins = trainer.margins()
        doubts = [-margins[row.id] for row in turned]
        clean = score_pairs(model, opened.tokenizer, dev).margins.double()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        keep({"part": "adapter", "loss": name, "pairs": len(rows), "held": len(dev), "wrong": sum(mask), "cpu": cpu,
              "wall": wall, **_clean(clean), "auc": roc_auc(doubts, mask),
              "precision": precision_at(doubts, mask, sum(mask)), "losses": losses})  # fmt: skip


# ---- table ----------------------------------------------------------------------------------------------------------


def table() -> None:
    """Markdown for docs/results."""
    _cost_tables()
    _bandit_table()
    _heads_table()
    from benchmarks import r3m_ranking  # it takes its pairs from here

    r3m_ranking.table()
    _rest_tables()


@cache
def _rows_once() -> list[dict[str, Any]]:
    return rows()  # a table asks for them some thousand times


def _of(part: str, **keys: Any) -> list[dict[str, Any]]:
    return [row for row in _rows_once() if row["part"] == part and all(row.get(key) == keys[key] for key in keys)]


def paired(first: Sequence[float], second: Sequence[float], scale: float = 100) -> str:
    """Mean difference with its 95 % interval over seeds."""
    differences = [scale * (a - b) for a, b in zip(first, second, strict=True)]
    middle = statistics.mean(differences)
    if len(differences) < 2:
        return f"{middle:+.1f}"
    half = t_quantile(len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{middle:+.1f} [{middle - half:+.1f}, {middle + half:+.1f}]"


def _ratio(first: Sequence[float], second: Sequence[float]) -> str:
    """Median of paired ratios with its 95 % interval (order statistics), in per cent above 1."""
    ratios = sorted(100 * (a / b - 1) for a, b in zip(first, second, strict=True))
    half = 0.98 * math.sqrt(len(ratios))
    low = ratios[max(0, math.floor(len(ratios) / 2 - half))]
    high = ratios[min(len(ratios) - 1, math.ceil(len(ratios) / 2 + half))]
    return f"{statistics.median(ratios):+.2f} % [{low:+.2f}, {high:+.2f}]"


def _cost_tables() -> None:
    section("Time of an audit", "r3m audit", _of("audit"))
    for row in _of("audit"):
        cells = " | ".join(f"{statistics.median(row['seconds'][name]):.2f}" for name in row["seconds"])
        total = sum(statistics.median(values) for values in row["seconds"].values())
        print("| pairs | rows, s | cached margins, s | audit, s | csv, s | all, s | peak growth, MiB |")
        print("|---|---|---|---|---|---|---|")
        print(f"| {row['pairs']} | {cells} | {total:.2f} | {row['peak'] / 2**20:.0f} |")
    section("Cost of a step", "r3m overhead", [*_of("step"), *_of("loss")])
    print("| what | R3M | TRL / Bradley-Terry | ratio of pairs |\n|---|---|---|---|")
    for row in (*_of("step"), *_of("loss")):
        ours, theirs = row["seconds"]["r3m"], row["seconds"]["trl" if row["part"] == "step" else "bt"]
        unit, factor = ("ms", 1e3) if row["part"] == "step" else ("µs", 1e6)
        name = f"step, {row['model']}" if row["part"] == "step" else f"loss and gradient, {row['size']} margins"
        cells = " | ".join(f"{factor * statistics.median(values):.1f} {unit}" for values in (ours, theirs))
        print(f"| {name} | {cells} | {_ratio(ours, theirs)} |")


def _bandit_table() -> None:
    section("Made-up rewards", "r3m bandit", _of("bandit"))
    print("In a cell: error of the rewards, the same after rescaling, accuracy in %.\n")
    print(f"| setting | pairs | wrong labels | {' | '.join(f'lam {lam:g}' for lam in LAMS)} |")
    print("|---|---|---|" + "---|" * len(LAMS))
    for row in (row for row in _of("bandit") if row["n"] in (1000, 16000)):
        found = [row["lams"][str(lam)] for lam in LAMS]
        cells = [
            f"{statistics.mean(one['error']):.2f}, {statistics.mean(one['scaled']):.3f}, "
            f"{100 * statistics.mean(one['accuracy']):.1f}"
            for one in found
        ]
        wrong = f"{100 * row['wrong']:g} %" if isinstance(row["wrong"], float) else f"{row['wrong']}"
        kind = "" if row["kind"] == "none" else f" {row['kind']}"
        print(f"| {row['setting']} | {row['n']} | {wrong}{kind} | {' | '.join(cells)} |")


def _heads_table() -> None:
    for truth in TRUTHS:
        for name, path in FIGURES.items():
            section(f"Heads on real pairs: {name}, the {truth} is right", "r3m heads", _of("heads"))
            print(f"| noise | wrong | {' | '.join(METHODS)} |")
            print("|---|---|" + "---|" * len(METHODS))
            for part, noise in (*(("heads", noise) for noise in NOISES), ("memorise", "uniform 20%")):
                found = {method: _of(part, truth=truth, noise=noise, loss=method) for method in METHODS}
                if found["bt"] and (name == "accuracy" or path[-1] in COUNTS or noise != "none"):
                    wrong = statistics.mean([row["wrong"] for row in found["bt"]])
                    cells = " | ".join(_cell(found[method], found["bt"], path) for method in METHODS)
                    print(f"| {noise}{', memorised' if part == 'memorise' else ''} | {wrong:.0f} | {cells} |")


FIGURES = {"accuracy": ("accuracy",), "nll": ("nll",), "AUC, cross-fitted": ("crossed", "margin auc"),
           "AUC, in-sample": ("seen", "margin auc"), "precision, cross-fitted": ("crossed", "margin precision"),
           "excess, cross-fitted": ("crossed", "excess"), "share, cross-fitted": ("crossed", "share"),
           "to drop or flip, cross-fitted": ("crossed", "suspects"), "of these wrong": ("crossed", "hits")}  # fmt: skip


COUNTS = ("excess", "share", "suspects", "hits")


def _cell(found: list[dict[str, Any]], plain: list[dict[str, Any]], path: tuple[str, ...]) -> str:
    """Mean over seeds; for others than Bradley-Terry also what it is more, in hundredths, with its interval."""

    def values(rows: list[dict[str, Any]]) -> list[float]:
        return [row[path[0]] if len(path) == 1 else row[path[0]][path[1]] for row in rows]

    mean = statistics.mean(values(found))
    if path[-1] in COUNTS:
        return f"{mean:.0f}" if path[-1] != "share" else f"{mean:.3f}"
    against = "" if found is plain or found[0]["loss"] == "bt" else f" {paired(values(found), values(plain))}"
    return f"{mean:.3f}{against}"


def _rest_tables() -> None:
    section("DPO on StepAudit", "r3m dpo", _of("dpo"))
    print("| wrong | loss | accuracy | minus bt | nll | AUC seen | AUC online | precision seen | precision online |")
    print("|---|---|---|---|---|---|---|---|---|")
    for noise in (0.0, SHARE):
        plain = {row["seed"]: row["accuracy"] for row in _of("dpo", noise=noise, loss="bt")}
        for name, _ in TUNED:
            found = _of("dpo", noise=noise, loss=name)
            if not found:
                continue
            right = [row["accuracy"] for row in found]
            against = "" if name == "bt" else paired(right, [plain[row["seed"]] for row in found])
            names = ("nll", "auc seen", "auc online", "precision seen", "precision online")
            cells = [f"{statistics.mean([row[key] for row in found]):.3f}" if key in found[0] else "" for key in names]
            print(f"| {100 * noise:.0f} % | {name} | {100 * statistics.mean(right):.1f} | {against} | "
                  f"{' | '.join(cells)} |")  # fmt: skip
    section("DPO on what the audit cleaned", "r3m dpo", _of("cleaning"))
    print("| wrong | cleaned by | accuracy | minus plain DPO | nll | wrong, estimated | suspects | of these wrong |")
    print("|---|---|---|---|---|---|---|---|")
    for noise in (0.0, SHARE):
        plain = {row["seed"]: row["accuracy"] for row in _of("dpo", noise=noise, loss="bt")}
        for action in ("drop", "flip"):
            found = _of("cleaning", noise=noise, action=action)
            if found:
                right = [row["accuracy"] for row in found]
                means = [statistics.mean([row[key] for row in found]) for key in ("nll", "share", "suspects", "hits")]
                print(f"| {100 * noise:.0f} % | {action} | {100 * statistics.mean(right):.1f} | "
                      f"{paired(right, [plain[row['seed']] for row in found])} | {means[0]:.3f} | {means[1]:.3f} | "
                      f"{means[2]:.0f} | {means[3]:.0f} |")  # fmt: skip
    section("The embedded model on real pairs", "r3m adapter", _of("adapter"))
    print("| loss | pairs | minutes of CPU | accuracy on held-out pairs | nll | AUC | precision |")
    print("|---|---|---|---|---|---|---|")
    for row in _of("adapter"):
        error = math.sqrt(row["accuracy"] * (1 - row["accuracy"]) / row["held"])
        right = f"{100 * row['accuracy']:.1f} ± {100 * error:.1f} of {row['held']}"
        figures = " | ".join(f"{row[key]:.3f}" for key in ("nll", "auc", "precision"))
        print(f"| {row['loss']} | {row['pairs']}, {row['wrong']} wrong | {row['cpu'] / 60:.0f} | {right} | {figures} |")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts that are asked for; all of them by default."""
    from benchmarks.r3m_ranking import ranking

    parts: dict[str, Callable[[], None]] = {
        "audit": audit,
        "overhead": overhead,
        "bandit": bandit,
        "embed": embed,
        "heads": heads,
        "ranking": ranking,
        "dpo": dpo,
        "adapter": adapter,
        "table": table,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=list(parts), default=[])
    quiet_upstream()
    for part in parser.parse_args(argv).parts or parts:
        parts[part]()


if __name__ == "__main__":
    main()
