"""One-shot LoSparse beside its peers, at equal shares of the replaced matrices' numbers.

    python -m benchmarks.losparse oneshot   # resumable; needs the real data (TENFOLD_DATA)

The Python reference is divided by topics: 40 to test on, the other 25 to calibrate. The second test set is of
Wikipedia, of which the calibration saw nothing. All look at the same calibration tokens.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import done_in, keep_in, rows_in, section
from benchmarks.losparse_peers import PEERS, ROUNDED, At, Made, Subject, applied, rounded
from tenfold.compress.losparse.oneshot import compress_once
from tenfold.compress.losparse.own_text import own_text
from tenfold.config.budget import Budget
from tenfold.data.groups import hash_share
from tenfold.data.read import read_rows
from tenfold.evaluate.perplexity import document_sums, perplexity, ratio
from tenfold.models.open import open_model
from tenfold.models.opened import Opened

RESULTS = Path(__file__).parent / "results" / "losparse.jsonl"
DATA = Path(os.environ.get("TENFOLD_DATA", Path(__file__).parents[2] / "shared" / "data"))
KEPT = (0.8, 0.5, 0.9, 0.7)
"""Shares of the replaced matrices' numbers, the most telling ones first."""
WEAK = (*tuple(PEERS)[3:], "rank and rows, no refit", "rank and rows, all outputs alike")
"""Beaten by others of their kind: measured at the first two shares alone."""
TOPICS, PASSAGES = 40, 24
PIECE, PIECES = 256, 64
"""Calibration: tokens of a piece, and pieces."""
LENGTH = 512
"""Tokens of a window of the evaluation; no document is longer."""
PROMPTS, PROMPT, NEW = 16, 32, 64
"""Texts that are continued, half of each test set; their tokens, and how many are written."""

rows = partial(rows_in, RESULTS)
keep = partial(keep_in, RESULTS)
done = partial(done_in, RESULTS)


@cache
def texts() -> dict[str, list[str]]:
    """Texts to calibrate or train on, and the two test sets."""
    topics = sorted(read_rows("python-reference"), key=lambda row: hash_share(f"losparse {row.id}"))
    with gzip.open(DATA / "lm_wiki_passages.jsonl.gz", "rt", encoding="utf-8") as file:
        passages = [row for row in map(json.loads, file) if len(row["text"]) >= 600]
    passages.sort(key=lambda row: hash_share(f"losparse {row['id']}"))
    return {
        "calibration": [row.text for row in topics[TOPICS:]],
        "python": [row.text[:800] for row in topics[:TOPICS]],
        "wikipedia": [row["text"][:600] for row in passages[:PASSAGES]],
    }


def calibration(tokenizer: Any, pieces: int = PIECES) -> Tensor:
    """``[pieces, PIECE]``: each topic in turn gives a piece, as long as it has one."""
    found = [torch.tensor(tokenizer(text, verbose=False)["input_ids"]) for text in texts()["calibration"]]
    cut = [list(ids[: len(ids) // PIECE * PIECE].split(PIECE)) for ids in found]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*cut))
    return torch.stack(list(itertools.islice((piece for piece in turns if piece is not None and len(piece)), pieces)))


def measured(opened: Opened, few: int | None = None) -> dict[str, Any]:
    """NLL of each document of both test sets, and the share of 4-grams that come again in greedy continuations."""
    found: dict[str, Any] = {}
    prompts = []
    for name in ("python", "wikipedia"):
        test = texts()[name][:few]
        scores = perplexity(opened.model, opened.tokenizer, test, max_length=LENGTH, batch_size=1)
        sums, counts = document_sums(scores.token_nll, scores.document)
        found |= {f"{name} nll": sums.tolist(), f"{name} tokens": counts.tolist()}
        ids = [opened.tokenizer(text, verbose=False)["input_ids"][:PROMPT] for text in test]
        prompts += [piece for piece in ids if len(piece) == PROMPT][: PROMPTS // 2]
    given = torch.tensor(prompts, device=opened.model.device)
    options = {"do_sample": False, "min_new_tokens": NEW, "max_new_tokens": NEW}
    written = opened.model.generate(given, attention_mask=torch.ones_like(given), **options)[:, PROMPT:]
    return found | {"repeated": [repetition(ids) for ids in written.tolist()]}


def repetition(ids: Sequence[int], size: int = 4) -> float:
    """The share of n-grams that stood before.

    >>> repetition([1, 2, 3, 4, 1, 2, 3])
    0.0
    >>> repetition([1, 2, 3, 4, 1, 2, 3, 4])
    0.2
    """
    grams = list(zip(*(ids[start:] for start in range(size)), strict=False))
    return (len(grams) - len(set(grams))) / len(grams)


def oneshot(
    source: str = "demo", methods: Iterable[str] = (), pieces: int = PIECES, few: int | None = None,
    device: str = "cpu",
) -> None:  # fmt: skip
    """A row for each method and share; those that ignore shares have one row."""
    opened = open_model(source, device=device, dtype="float32")
    opened.model.eval()
    subject = Subject(opened.model, calibration(opened.tokenizer, pieces).to(device), opened.tokenizer)
    keys = {"part": "oneshot", "model": Path(source).stem}
    if not done(**keys, method="dense"):
        _keep(keys | {"method": "dense", "kept": 1.0}, opened, subject, None, 0.0, few)
    for shares, name in itertools.product((KEPT[:2], KEPT[2:]), methods or METHODS):
        todo = [kept for kept in shares if not done(**keys, method=name, kept=kept)]
        if not todo or (name in WEAK and shares == KEPT[2:]):
            continue
        began = time.perf_counter()
        at = METHODS[name](subject)
        ready = time.perf_counter() - began
        for kept in todo:
            began = time.perf_counter()
            made = at(kept)
            seconds = ready + time.perf_counter() - began
            _keep(keys | {"method": name, "kept": kept}, opened, subject, made, seconds, few)
    for name, bits in ROUNDED.items():
        if not done(**keys, method=name):
            _keep(keys | {"method": name, "kept": 1.0}, opened, subject, rounded(subject, bits), 0.0, few)


def ours(subject: Subject, own: float = 0.0, **options: Any) -> At:
    """LoSparse without training; a share of the calibration may be the model's own text, at as many tokens in all."""
    pieces = list(subject.ids)
    if own:
        pieces = pieces[: round((1 - own) * len(pieces))]
        pieces += own_text(subject.model, subject.tokenizer, subject.ids.numel() - len(pieces) * PIECE, length=PIECE)

    def at(kept: float) -> Made:
        found = compress_once(subject.model, pieces, budget=Budget(kept, "share"), **options)
        biases = {name: parts.bias for name, parts in found.factors.items() if parts.bias is not None}
        numbers = found.numbers + sum(bias.numel() for bias in biases.values())
        indices = sum(parts.left.shape[0] for parts in found.factors.values())
        weights = {name: parts.dense() for name, parts in found.factors.items()}
        return Made(weights, biases, numbers, 2 * numbers + 4 * indices)

    return at


OURS = {
    "rank and rows (LoSparse)": ours,
    "rank and rows, half of the text its own": partial(ours, own=0.5),
    "rank and rows, no refit": partial(ours, refit=False),
    "rank and rows, all outputs alike": partial(ours, weigh=False),
}
METHODS: dict[str, Callable[[Subject], At]] = {**PEERS, **OURS}
"""All that are asked for shares."""


def _keep(
    row: dict[str, Any], opened: Opened, subject: Subject, made: Made | None, seconds: float, few: int | None
) -> None:
    whole = sum(parameter.numel() for parameter in opened.model.parameters())
    numbers, size = (made.numbers, made.bytes) if made else (subject.numbers, 2 * subject.numbers)
    with applied(opened.model, made) if made else nullcontext():
        found = measured(opened, few)
    config = opened.model.config
    keep(
        row
        | {
            "numbers": numbers / subject.numbers,
            "bytes": size / (2 * subject.numbers),
            "numbers of the whole": (whole - subject.numbers + numbers) / whole,
            "checkpoint": Path(config.name_or_path).name,
            "tokenizer": f"{type(opened.tokenizer).__name__} of {len(opened.tokenizer)}",
            "calibration tokens": subject.ids.numel(),
            "length": LENGTH,
            **on(opened.model.device),
            "seconds": round(seconds, 1),
            **found,
        }
    )


def on(device: torch.device) -> dict[str, str]:
    """What a row says of a GPU."""
    return {"device": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}


def mean_nll(row: dict[str, Any], name: str) -> tuple[float, float]:
    """Nats a token, and the standard error between documents."""
    mean, error = ratio(torch.tensor(row[f"{name} nll"]).double(), torch.tensor(row[f"{name} tokens"]).double())
    return mean, error or 0.0


def oneshot_table() -> None:
    """Perplexities at each share, beside what is stored."""
    found = [row for row in rows() if row["part"] == "oneshot"]
    if not found:
        return
    first = found[0]
    section("One-shot, against peers at equal size", "losparse oneshot", found)
    print(
        f"{first['checkpoint']}, tokenizer of {first['tokenizer'].rpartition(' ')[2]} entries; windows of "
        f"{first['length']} tokens; {len(first['python nll'])} topics of the Python reference "
        f"({sum(first['python tokens']):,.0f} tokens) and {len(first['wikipedia nll'])} passages of Wikipedia "
        f"({sum(first['wikipedia tokens']):,.0f}); {first['calibration tokens']:,} calibration tokens.\n"
    )
    print("| kept | method | numbers | bytes | perplexity, Python | perplexity, Wikipedia | repeated 4-grams |")
    print("|---|---|---|---|---|---|---|")
    for kept in sorted({row["kept"] for row in found}, reverse=True):
        of_share = [row for row in found if row["kept"] == kept]
        for row in sorted(of_share, key=lambda row: mean_nll(row, "python")[0]):
            cells = [_perplexity(row, name) for name in ("python", "wikipedia")]
            share = "" if kept == 1 else f"{kept:.0%}"
            print(
                f"| {share} | {row['method']} | {row['numbers']:.1%} | {row['bytes']:.1%} | {' | '.join(cells)} | "
                f"{statistics.mean(row['repeated']):.2f} |"
            )


def _perplexity(row: dict[str, Any], name: str) -> str:
    """With its standard error."""
    mean, error = mean_nll(row, name)
    value = torch.tensor(mean).exp().item()
    return f"{value:.4g} ± {value * error:.2g}"
