"""Training compressed models: LoSparse, low rank alone, rows alone, at equal size and equal tokens.

    python -m benchmarks.losparse training        # language modelling
    python -m benchmarks.losparse classification  # TREC, six kinds of question; LoSparse with frozen rows

A run trains on 20,000 tokens (`--tokens`) with AdamW and linear decay, 2 sequences of 128 tokens or 16 questions a
step. The rate of each method is the better of two on validation texts, at the first size and a quarter of the tokens;
then come two seeds of the order of the texts (`--seeds 3` adds the third where intervals overlap). All methods store
the same numbers, low rank as rows and combinations of them, and look at the same 4,096 tokens before they train.
"""

from __future__ import annotations

import gzip
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from benchmarks import keep_in, rows_in, section
from benchmarks.losparse_oneshot import DATA, LENGTH, PIECE, RESULTS, calibration, on, texts
from benchmarks.losparse_peers import Subject, affordable, truncated
from tenfold.adapt.training import train
from tenfold.compress.losparse.factors import Factors, stored
from tenfold.compress.losparse.handle import LoSparse, attach
from tenfold.compress.losparse.layer import compressed_layers, install
from tenfold.compress.losparse.oneshot import OneShot, compress_once
from tenfold.config.budget import Budget
from tenfold.config.training import TextTrainingFields
from tenfold.core.statistics import t_quantile
from tenfold.data.encode import Encoded, encode
from tenfold.data.groups import hash_share
from tenfold.data.rows import Completion, Text
from tenfold.evaluate.perplexity import document_sums, perplexity, ratio
from tenfold.models.inference import evaluating
from tenfold.models.open import open_model

KEPT = (0.5, 0.3)
TOKENS, RATES, TUNING_SEED = 20_000, (1e-4, 3e-4), 100
BATCH = {"text": 2, "trec": 16}
"""Sequences a step."""
PIECES = 16
VALIDATION = 5
"""Topics, of those that the one-shot benchmark calibrates on, that no run learns from."""
KINDS = {"ABBR": "abbreviation", "DESC": "description", "ENTY": "entity", "HUM": "human", "LOC": "location",
         "NUM": "number"}  # fmt: skip
"""Labels of TREC and the word that the model says for each."""

Numbers = Callable[[], int]
"""What the replaced matrices store, once a run is over."""


def by_parts(subject: Subject, factors: dict[str, Factors]) -> Numbers:
    """Compressed layers are put in, and all they hold trains."""
    install(subject.model, factors)
    whole = sum(subject.matrices[name].weight.numel() for name in subject.matrices.keys() - factors.keys())
    layers = compressed_layers(subject.model).values()
    return lambda: whole + sum(stored(m.out_features, m.in_features, m.rank, m.kept) for m in layers)


def compressed(subject: Subject, kept: float, refit: bool = True) -> OneShot:
    """LoSparse without training, which all runs of a size begin with: made once."""
    if (key := (kept, refit)) not in _FOUND:
        _FOUND[key] = compress_once(subject.model, list(subject.ids), budget=Budget(kept, "share"), refit=refit)
    return _FOUND[key]


_FOUND: dict[tuple[float, bool], OneShot] = {}


def after_oneshot(subject: Subject, kept: float, steps: int) -> Numbers:
    """LoSparse as it is by default: compressed, then trained."""
    return by_parts(subject, compressed(subject, kept).factors)


def low_rank(subject: Subject, kept: float, steps: int) -> Numbers:
    """Rank alone, whitened, with one ratio for all matrices, then trained."""
    factors = {}
    if not _TRUNCATED:
        found = {name: truncated(matrix.weight, subject.moments[name]) for name, matrix in subject.matrices.items()}
        _TRUNCATED.update(found)
    for name, matrix in subject.matrices.items():
        left, right = _TRUNCATED[name]
        rank = affordable(*matrix.weight.shape, kept, pivoted=True)
        none = torch.empty(0, dtype=torch.int64, device=left.device)
        factors[name] = Factors(left[:, :rank], right[:rank], none, right.new_empty(0, matrix.in_features))
    return by_parts(subject, factors)


_TRUNCATED: dict[str, tuple[Tensor, Tensor]] = {}


def norms(subject: Subject, kept: float, steps: int) -> Numbers:
    """The same share of each matrix's rows, those of largest norm, from the start."""
    factors = {}
    for name, matrix in subject.matrices.items():
        weight = matrix.weight.detach()
        rows = weight.norm(dim=1).topk(int(kept * len(weight))).indices
        none = weight.new_empty(len(weight), 0), weight.new_empty(0, weight.shape[1])
        factors[name] = Factors(*none, rows, weight[rows])
    return by_parts(subject, factors)


def scheduled(subject: Subject, kept: float, steps: int, frozen: bool = False) -> Numbers:
    """LoSparse in the course of the run, from the ranks that were found without training, as the stage does it."""
    first = compressed(subject, kept, refit=False)
    choices = {row.name: row.choice for row in first.matrices if row.name in first.factors}
    costs = {row.name: row.shape[1] - row.choice.rank for row in first.matrices if row.name in choices}
    handle = attach(
        subject.model,
        {name: choice.rank for name, choice in choices.items()},
        sum(costs[name] * choice.kept for name, choice in choices.items()),
        total_steps=steps,
        starts={name: (parts.left, parts.right) for name, parts in first.factors.items()},
        costs=costs,
        frozen=frozen,
    )
    return _pruned(subject, handle)


def rows_alone(subject: Subject, kept: float, steps: int) -> Numbers:
    """The same course without rank."""
    ranks = dict.fromkeys(subject.matrices, 0)
    return _pruned(subject, attach(subject.model, ranks, int(kept * subject.numbers), total_steps=steps))


def _pruned(subject: Subject, handle: LoSparse) -> Numbers:
    whole = subject.numbers - sum(layer.out_features * layer.in_features for layer in handle.layers.values())

    def numbers() -> int:
        handle.finish()
        return whole + int(handle.attached()["numbers"])

    return numbers


def dense(subject: Subject, kept: float, steps: int) -> Numbers:
    """The model as it is: what the tokens alone teach."""
    return lambda: subject.numbers


METHODS: dict[str, Callable[[Subject, float, int], Numbers]] = {
    "LoSparse": after_oneshot,
    "LoSparse, scheduled": scheduled,
    "low rank": low_rank,
    "rows, scheduled": rows_alone,
    "rows, ln_structured": norms,
}
FROZEN: dict[str, Callable[[Subject, float, int], Numbers]] = {
    "LoSparse, frozen rows": partial(scheduled, frozen=True),
    "LoSparse": after_oneshot,
    "low rank": low_rank,
}
"""For the classification."""


@cache
def questions() -> dict[str, list[tuple[str, str]]]:
    """Questions with their kinds; 248 training ones validate."""
    with gzip.open(DATA / "cls_trec.jsonl.gz", "rt", encoding="utf-8") as file:
        found = sorted(map(json.loads, file), key=lambda row: hash_share(f"losparse {row['id']}"))
    asked = {
        split: [(f"Question: {row['text'].strip()}\nAbout:", f" {KINDS[row['label']]}") for row in found
                if row["split"] == split]
        for split in ("train", "test")
    }  # fmt: skip
    count = len(asked["test"])
    return {"train": asked["train"][count:], "validation": asked["train"][:count], "test": asked["test"]}


def examples(task: str, tokenizer: Any) -> Encoded:
    """Training texts as tokens."""
    if task == "text":
        rows: list[Any] = [Text(str(index), text) for index, text in enumerate(texts()["calibration"][:-VALIDATION])]
        return encode(rows, tokenizer, max_length=128, packing=True)
    rows = [Completion(str(index), prompt, answer) for index, (prompt, answer) in enumerate(questions()["train"])]
    return encode(rows, tokenizer, max_length=128, packing=False, chat=False)


def joined(encoded: Encoded, pieces: int) -> Tensor:
    """``[pieces, PIECE]``: what is learned from is calibrated on, one example after the other."""
    ids = torch.tensor([token for example in encoded.examples for token in example["input_ids"]])
    return ids[: pieces * PIECE].view(-1, PIECE)


def scored(task: str, split: str, model: Any, tokenizer: Any, few: int | None = None) -> dict[str, Any]:
    """NLL of each document; of questions, of the right kind among the six, and whether it is the likeliest."""
    if task == "text":
        held = texts()["calibration"][-VALIDATION:] if split == "validation" else texts()["python"]
        found = perplexity(model, tokenizer, [text[:3000] for text in held][:few], max_length=LENGTH)
        sums, counts = document_sums(found.token_nll, found.document)
        return {"nll": found.nll, "document nll": sums.tolist(), "document tokens": counts.tolist()}
    words = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in KINDS.values()]
    losses, right = [], []
    with evaluating(model):
        for prompt, answer in questions()[split][:few]:
            ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
            logits = model(input_ids=ids).logits[0, -1, words]
            label = list(KINDS.values()).index(answer.strip())
            losses.append(-logits.log_softmax(0)[label].item())
            right.append(float(logits.argmax() == label))
    return {"nll": statistics.mean(losses), "document nll": losses, "document tokens": [1.0] * len(losses),
            "accuracy": statistics.mean(right), "right": right}  # fmt: skip


def measure(
    task: str, method: str, kept: float, rate: float, seed: int, split: str, tokens: int, device: str = "cpu",
    pieces: int = PIECES, few: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Compress, train and score once."""
    set_seed(seed)
    opened = open_model("demo", device=device, dtype="float32")
    model, tokenizer = opened.model, opened.tokenizer
    encoded = examples(task, tokenizer)
    average = encoded.tokens / len(encoded.examples)
    steps = round(tokens / (BATCH[task] * average))
    fields: dict[str, Any] = {"steps": steps, "batch_size": BATCH[task], "max_length": 128, "learning_rate": rate}
    read = calibration(tokenizer, pieces) if task == "text" else joined(encoded, pieces)
    subject = Subject(model.eval(), read.to(device))
    began = time.perf_counter()
    numbers = {**METHODS, **FROZEN, "dense": dense}[method](subject, kept, steps)
    ready = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        config = TextTrainingFields(**fields, save_every=10**6)
        trained = train(model, tokenizer, encoded, config, folder=Path(folder), seed=seed)
    share = numbers() / subject.numbers
    return {"numbers": share, "trained tokens": trained.tokens, "preparing seconds": round(ready, 1),
            "training seconds": round(trained.seconds, 1), **on(model.device),
            **scored(task, split, model.eval(), tokenizer, few)}  # fmt: skip


def once(
    part: str, task: str, method: str, kept: float, rate: float, seed: int, split: str, tokens: int, **options: Any
) -> float:
    """A row, read back or measured; its loss."""
    keys = {"part": part, "task": task, "tokens": tokens, "method": method, "kept": kept, "rate": rate, "seed": seed,
            "split": split}  # fmt: skip
    if not _kept(**keys):
        keep_in(RESULTS, keys | measure(task, method, kept, rate, seed, split, tokens, **options))
    return _kept(**keys)[0]["nll"]


def _kept(**keys: Any) -> list[dict[str, Any]]:
    return [row for row in rows_in(RESULTS) if all(row.get(key) == value for key, value in keys.items())]


def training(methods: Sequence[str] = (), **options: Any) -> None:
    """Language modelling: all methods at each size, seed by seed."""
    _compare("training", "text", methods or ["dense", *METHODS], **options)


def classification(methods: Sequence[str] = (), **options: Any) -> None:
    """TREC."""
    _compare("classification", "trec", methods or ["dense", *FROZEN], **options)


def _compare(
    part: str, task: str, methods: Sequence[str], seeds: int = 2, kept: Iterable[float] = KEPT, tokens: int = TOKENS,
    **options: Any,
) -> None:  # fmt: skip
    _FOUND.clear()
    _TRUNCATED.clear()

    def loss(*keys: Any) -> float:
        return once(part, task, *keys, **options)

    if "dense" in methods:
        loss("dense", 1.0, RATES[0], 0, "test", tokens)
    compressed_ones = [method for method in methods if method != "dense"]
    shares, rates = list(kept), {}
    for method in compressed_ones:
        tried = {rate: loss(method, shares[0], rate, TUNING_SEED, "validation", tokens // 4) for rate in RATES}
        rates[method] = min(tried, key=tried.__getitem__)
    for seed, share, method in itertools.product(range(seeds), shares, compressed_ones):
        loss(method, share, rates[method], seed, "test", tokens)


# ---- tables ---------------------------------------------------------------------------------------------------------


def training_tables() -> None:
    """What each method reaches, and its distance to LoSparse on the same documents and seeds."""
    for part, title, first in (
        ("training", "Trained, at equal size and tokens", "LoSparse"),
        ("classification", "Questions of six kinds, with frozen rows", "LoSparse, frozen rows"),
    ):
        found = [row for row in rows_in(RESULTS) if row["part"] == part and row["split"] == "test"]
        if not found:
            continue
        section(title, f"losparse {part} --tokens {found[0]['tokens']}", found)
        accuracy = " accuracy |" if part == "classification" else ""
        print(
            f"| kept | method | numbers | rate | seeds | nll |{accuracy} nll above {first}, paired [95 %] | minutes |"
        )
        print(f"|---|---|---|---|---|---|{'---|' if accuracy else ''}---|---|")
        for kept in sorted({row["kept"] for row in found}, reverse=True):
            of_share = [row for row in found if row["kept"] == kept]
            for method in dict.fromkeys(row["method"] for row in of_share):
                _line(method, [row for row in of_share if row["method"] == method], [
                    row for row in of_share if row["method"] == first and first != method])  # fmt: skip


def _line(method: str, found: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]]) -> None:
    cells = [f"{found[0]['numbers']:.1%}", f"{found[0]['rate']:g}", str(len(found)), _spread(found, "nll", 4)]
    if "accuracy" in found[0]:
        cells.append(_spread(found, "accuracy", 3))
    theirs = {row["seed"]: row for row in reference}
    shared = [row for row in found if row["seed"] in theirs]
    against = ""
    if shared:
        mean, half = beside(shared, [theirs[row["seed"]] for row in shared])
        against = f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]"
    minutes = statistics.median(row["training seconds"] for row in found) / 60
    kept = "" if method == "dense" else f"{found[0]['kept']:.0%}"
    print(f"| {kept} | {method} | {' | '.join(cells)} | {against} | {minutes:.1f} |")


def beside(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Mean difference in NLL of the same seeds, and the half width of its 95 % interval over documents."""
    change = sum(
        torch.tensor(one["document nll"]).double() - torch.tensor(other["document nll"]).double()
        for one, other in zip(first, second, strict=True)
    )
    counts = sum(torch.tensor(row["document tokens"]).double() for row in first)
    mean, error = ratio(torch.as_tensor(change), torch.as_tensor(counts))
    return mean, t_quantile(len(torch.as_tensor(counts)) - 1) * (error or 0.0)


def _spread(found: Sequence[dict[str, Any]], key: str, digits: int) -> str:
    values = [row[key] for row in found]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"
