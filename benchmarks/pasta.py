"""PASTA: what steering costs beside plain, dense-mask and eager attention; what it does; how fast heads are found.

    python -m benchmarks.pasta cost decode # one process, the ways taking turns; run them on an idle machine
    python -m benchmarks.pasta effect      # resumable; needs the real data (TENFOLD_DATA)
    python -m benchmarks.pasta profiling   # the shortlist against the exhaustive search
    python -m benchmarks.pasta table       # what docs/results/pasta.md shows

The peers of the cost: sdpa with a dense mask per head in the steered layers, and eager attention everywhere with the
same mask, which is what the authors' pastalib does. Effects: items of the test split, steered with the shipped profile
(`default`, found on built-in tasks; one of them, `conflict`, is of CounterFact's kind with other facts, JSON and
pronouns are not among them) and with one found on the train split of the three (`own`: the paper's multi-task setting).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks import keep_in, rows_in, section
from benchmarks.adalora import alternate, quotient, spread
from tenfold.attend.attention import self_attentions
from tenfold.attend.chat_marks import MessageSpan, in_chat
from tenfold.attend.pasta import steer
from tenfold.attend.pasta.heads import batches_of, effects, gradients, margins, rank, steerable
from tenfold.attend.pasta.profiles import Profile, load_profile, save_profile
from tenfold.attend.pasta.profiling import find_profile
from tenfold.attend.pasta.steering import log_strength
from tenfold.attend.pasta.tasks import Item, task_items
from tenfold.attend.text_marks import Marked, encode, from_spans
from tenfold.compat import quiet_upstream
from tenfold.config.pasta import profile_path
from tenfold.core.statistics import t_quantile
from tenfold.data.text_checks import fluency, json_contains, json_valid, pronouns_changed
from tenfold.models.generation import continue_inputs
from tenfold.models.inference import evaluating, prompt_ids
from tenfold.models.memory import peak_growth
from tenfold.models.open import open_model

RESULTS = Path(__file__).parent / "results" / "pasta.jsonl"
OWN = Path(__file__).parent / "results" / "pasta_own_profile.json"
DATA = Path(os.environ.get("TENFOLD_DATA", Path(__file__).parents[2] / "shared" / "data"))
SHAPES = ((1, 512), (1, 1024), (1, 2048), (1, 4096), (4, 512), (8, 512))
DECODE = ((1, 512), (1, 2048), (8, 512))
EFFECT_ROWS = 200
ALPHA = 0.01


def shipped() -> str:
    """A hash of the shipped profile: rows of another one are measured again."""
    return hashlib.sha256(profile_path("default").read_bytes()).hexdigest()[:12]


def keep_steered(results: Path, row: dict[str, Any]) -> None:
    """Append a row that depends on the shipped profile."""
    keep_in(results, {**row, "profile": shipped()})


rows = partial(rows_in, RESULTS)
keep = partial(keep_steered, RESULTS)


# ---- cost -----------------------------------------------------------------------------------------------------------


def marked_batch(tokenizer: Any, batch: int, tokens: int) -> Any:
    """English text of which the second of sixteen equal parts is marked."""
    ids = prompt_ids(tokenizer, tokens, batch, torch.device("cpu"))
    marks = encode(tokenizer, ["x"])
    marked = torch.zeros_like(ids, dtype=torch.bool)
    marked[:, tokens // 16 : tokens // 8] = True
    ones = torch.ones_like(ids)
    return replace(marks, input_ids=ids, attention_mask=ones, marked=marked, strength=ones.float())


@contextmanager
def dense(model: Any, marks: Any, heads: dict[int, tuple[int, ...]], implementation: str) -> Iterator[None]:
    """The peers' way: a mask ``[batch, heads, queries, keys]`` in every steered layer."""
    values = log_strength(marks, ALPHA)
    before = model.config._attn_implementation
    attentions = self_attentions(model)

    def hook(chosen: tuple[int, ...]) -> Callable[..., Any]:
        def edit(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            queries = kwargs["hidden_states"].shape[1]
            cache = kwargs.get("past_key_values")
            past = 0 if cache is None else cache.get_seq_length(module.layer_idx)
            keys = past + queries
            bias = torch.zeros(len(values), module.config.num_attention_heads, 1, keys)
            bias[:, list(chosen), 0, : values.shape[1]] = values[:, None, :keys]
            causal = torch.ones(queries, keys, dtype=torch.bool).tril(past)
            mask = torch.where(causal, bias.expand(-1, -1, queries, -1), torch.finfo(bias.dtype).min)
            return args, {**kwargs, "attention_mask": mask}

        return edit

    with ExitStack() as stack:
        if implementation != before:
            model.set_attn_implementation(implementation)
            stack.callback(model.set_attn_implementation, before)
        for layer, chosen in heads.items():
            handle = attentions[layer].register_forward_pre_hook(hook(chosen), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def ways(model: Any, marks: Any) -> dict[str, Callable[[], Any]]:
    """Context managers by name."""
    heads = load_profile("default").heads
    return {
        "plain sdpa": ExitStack,
        "steered": lambda: steer(model, marks, heads=heads, alpha=ALPHA),
        "dense mask, sdpa": lambda: dense(model, marks, heads, "sdpa"),
        "dense mask, eager": lambda: dense(model, marks, heads, "eager"),
    }


def cost(repeats: int = 5) -> None:
    """Prefill, the ways taking turns, and its peak growth.

    At 4,096 tokens only plain and steered: an eager pass takes most of a minute there.
    """
    opened = open_model("demo", device="cpu")
    model = opened.model.eval()
    for batch, tokens in SHAPES:
        marks = marked_batch(opened.tokenizer, batch, tokens)
        logits: dict[str, torch.Tensor] = {}
        work: dict[str, Callable[[], object]] = {}
        for name, enter in ways(model, marks).items():
            if tokens == 4096 and "dense" in name:
                continue

            def prefill(name: str = name, enter: Any = enter, marks: Any = marks, logits: Any = logits) -> None:
                with evaluating(model), enter():
                    logits[name] = model(**marks.inputs, use_cache=True, logits_to_keep=1).logits

            work[name] = prefill
        seconds = alternate(work, repeats)
        same = [float((logits["steered"] - found).abs().max()) for name, found in logits.items() if "dense" in name]
        for name, values in seconds.items():
            growth = [peak_growth(work[name]).growth for _ in range(3)]
            keep({"part": "prefill", "batch": batch, "tokens": tokens, "way": name, "seconds": values,
                  "growth": growth, "difference": max(same, default=None)})  # fmt: skip


def decode() -> None:
    """One token after a cached prompt, the ways taking turns."""
    opened = open_model("demo", device="cpu")
    model = opened.model.eval()
    for batch, tokens in DECODE:
        marks = marked_batch(opened.tokenizer, batch, tokens)
        work: dict[str, Callable[[], object]] = {}
        with evaluating(model):
            for name, enter in ways(model, marks).items():
                cache = DynamicCache(config=model.config)
                with enter():
                    model(**marks.inputs, past_key_values=cache, logits_to_keep=1)

                def step(enter: Any = enter, cache: Any = cache, marks: Any = marks) -> None:
                    with evaluating(model), enter():
                        for _ in range(8):
                            model(input_ids=marks.input_ids[:, -1:], past_key_values=cache)
                        cache.crop(-8)

                work[name] = step
        for name, values in alternate(work, 15).items():
            keep({"part": "decode", "batch": batch, "tokens": tokens, "way": name, "seconds": [v / 8 for v in values]})


# ---- effect ---------------------------------------------------------------------------------------------------------


def read(name: str) -> list[dict[str, Any]]:
    """Rows of the shared data."""
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def counterfact(split: str, count: int, kind: str = "prompt") -> list[Item]:
    """The paper's prompt; ``kind`` says what is asked at the end. The neighbour must keep its own fact."""
    found = []
    for row in [row for row in read("pasta_counterfact") if row["split"] == split][:count]:
        old, new = row["target_true"], row["target_new"]
        before, mark = f"Previously, {row['prompt']} {old}. Currently, ", f"{row['prompt']} {new}."
        stem = row["prompt" if kind == "prompt" else f"{kind}_prompt"]
        prompt = from_spans(f"{before}{mark} {stem}", [(len(before), len(before) + len(mark))])
        target, foil = (row["neighborhood_target"], new) if kind == "neighborhood" else (new, old)
        found.append(Item(prompt, f" {target}", (f" {foil}",)))
    return found


def bios(train: bool) -> list[dict[str, Any]]:
    """Every third biography is for finding heads; texts are cut after 40 words."""
    rows = [row for index, row in enumerate(read("pasta_wiki_bios")) if (index % 3 == 0) == train]
    return [{**row, "text": " ".join(row["text"].split()[:40])} for row in rows]


ASK = {
    "json": "Answer with the name and the occupation of the person as a JSON object with the keys name and occupation.",
    "pronouns": "Copy the text above, but write they, them and their instead of she, he, her, him and his.",
}


def said(
    tokenizer: Any, row: dict[str, Any], task: str, shots: Sequence[tuple[str, str]] = (), star: bool = False
) -> Marked:
    """A biography and an instruction, as a user says it; the instruction is marked, or has stars instead."""
    messages = []
    for question, answer in shots:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    ask = f"*{ASK[task]}*" if star else ASK[task]
    text = f"{row['text']}\n{ask}"
    spans = [MessageSpan(len(messages), len(text) - len(ask), len(text))]
    return in_chat(tokenizer, [*messages, {"role": "user", "content": text}], () if star else spans)


def shots(task: str) -> list[tuple[str, str]]:
    """Two solved examples, written for this benchmark."""
    texts = (
        ("Mia Holt is a French painter. She lives in Lyon, and her studio is near the river.",
         '{"name": "Mia Holt", "occupation": "painter"}',
         "Mia Holt is a French painter. They live in Lyon, and their studio is near the river."),
        ("Jan Brook was a Dutch sailor. He crossed the sea, and his ship was lost in 1802.",
         '{"name": "Jan Brook", "occupation": "sailor"}',
         "Jan Brook was a Dutch sailor. They crossed the sea, and their ship was lost in 1802."),
    )  # fmt: skip
    return [(f"{text}\n{ASK[task]}", as_json if task == "json" else changed) for text, as_json, changed in texts]


def json_items(tokenizer: Any, count: int) -> list[Item]:
    """Does the reply begin as JSON?"""
    return [
        Item(said(tokenizer, row, "json"), "{", tuple(dict.fromkeys((row["name"].split()[0], "The", "Here", "I"))))
        for row in bios(train=True)[:count]
    ]


def pronoun_items(tokenizer: Any, count: int) -> list[Item]:
    """The reply has been copied up to the first pronoun: which one comes?"""
    found = []
    for row in bios(train=True):
        before, pronoun, _ = row["text"].partition(f" {row['pronoun'].capitalize()} ")
        if pronoun and len(found) < count:
            prompt = said(tokenizer, row, "pronouns")
            found.append(Item(replace(prompt, text=prompt.text + before), " They", (pronoun.rstrip(),)))
    return found


def own_profile(model: Any, tokenizer: Any) -> Profile:
    """Heads found on the train split of the three tasks."""
    if not OWN.exists():
        tasks = {
            "counterfact": (counterfact("train", 24), counterfact("train", 72)[24:]),
            "json": (json_items(tokenizer, 8), json_items(tokenizer, 32)[8:]),
            "pronouns": (pronoun_items(tokenizer, 8), pronoun_items(tokenizer, 32)[8:]),
        }
        found = find_profile(model, tokenizer, tasks, shortlist=0.1, sizes=(8, 16, 24))
        save_profile(found, OWN)
    return load_profile(OWN)


def settings() -> dict[str, dict[str, Any]]:
    """Name -> arguments of `steer`, {} for none; `own`, whose heads must be found first, comes last and beside."""
    default = load_profile("default").heads
    return {
        "plain": {},
        "default": {"heads": default, "alpha": ALPHA},
        "marks in the text": {},
        "few-shot": {},
        "default, alpha 0.1": {"heads": default, "alpha": 0.1},
        "default, dose 0.3": {"heads": default, "target_mass": 0.3},
        "all heads": {"heads": "all", "alpha": ALPHA},
    }


def starred(item: Item, shots: Sequence[Item] = (), star: bool = False) -> Item:
    """Stars instead of marks, and solved items in front."""
    (span,) = item.prompt.spans
    text = item.prompt.text
    if star:
        text = f"{text[: span.start]}*{text[span.start : span.end]}*{text[span.end :]}"
    front = "".join(f"{shot.prompt.text}{shot.target}.\n\n" for shot in shots)
    return Item(Marked(front + text), item.target, item.foils)


def effect() -> None:
    """CounterFact by next-token probabilities, JSON and pronouns by what is written."""
    opened = open_model("demo", device="cpu")
    model, tokenizer = opened.model.eval(), opened.tokenizer
    done = {(row["task"], row["setting"]) for row in rows() if row["part"] == "effect" and row["profile"] == shipped()}
    ways = settings()
    facts, texts = ("prompt", "paraphrase", "neighborhood"), ("json", "pronouns")
    todo = [(task, name) for name in ways for task in facts] + [(task, name) for name in ways for task in texts]
    todo += [(task, "own") for task in (*facts, *texts)]
    for task, name in todo:
        if (task, name) not in done and (task, name) not in [(text, "all heads") for text in texts]:
            keys = {"heads": own_profile(model, tokenizer).heads, "alpha": ALPHA} if name == "own" else ways[name]
            score = preferred if task in facts else written
            keep({"part": "effect", "task": task, "setting": name, **score(model, tokenizer, task, name, keys)})


def preferred(model: Any, tokenizer: Any, kind: str, name: str, keys: dict[str, Any]) -> dict[str, Any]:
    """Which continuation of each test fact is the more probable."""
    items = counterfact("dev", EFFECT_ROWS, kind)
    if name in ("marks in the text", "few-shot"):
        examples = counterfact("train", 2, kind) if name == "few-shot" else ()
        items = [starred(item, examples, star=name != "few-shot") for item in items]
    found = []
    for batch in batches_of(model, tokenizer, items, 16):
        with steer(model, batch.marks, **keys) if keys else ExitStack():
            found += margins(model, [batch]).tolist()
    return {"right": [float(m > 0) for m in found], "margin": statistics.mean(found)}


def written(model: Any, tokenizer: Any, task: str, name: str, keys: dict[str, Any]) -> dict[str, Any]:
    """Generate for each test biography and score the texts."""
    people = bios(train=False)[:EFFECT_ROWS]
    examples = shots(task) if name == "few-shot" else ()
    prompts = [said(tokenizer, row, task, examples, star=name == "marks in the text") for row in people]
    texts: list[str] = []
    for start in range(0, len(prompts), 40):
        marks = encode(tokenizer, prompts[start : start + 40])
        with steer(model, marks, **keys) if keys and not marks.empty else ExitStack():
            texts += continue_inputs(model, tokenizer, marks.inputs, max_new_tokens=40 if task == "json" else 48)
    if task == "json":
        first = [float(json_valid(text)) for text in texts]
        second = [float(json_contains(text, row["occupation"])) for text, row in zip(texts, people, strict=True)]
    else:
        first, second = map(list, zip(*(map(float, pronouns_changed(text)) for text in texts), strict=True))
    return {"right": first, "second": second, "fluency": fluency(texts)}


# ---- profiling ------------------------------------------------------------------------------------------------------


def profiling(items: int = 16) -> None:
    """One task: the gradient of all heads against the exact effect of every head, and the time of both."""
    opened = open_model("demo", device="cpu")
    model, tokenizer = opened.model.eval(), opened.tokenizer
    batches = batches_of(model, tokenizer, task_items("conflict", items))
    everything = [(layer, head) for layer, count in steerable(model).items() for head in range(count)]
    began = time.perf_counter()
    slopes = gradients(model, batches)
    gradient_seconds = time.perf_counter() - began
    began = time.perf_counter()
    exact = effects(model, batches, everything)
    exact_seconds = time.perf_counter() - began
    began = time.perf_counter()
    for layer, head in everything[:: len(everything) // 9]:
        margins(model, batches, {layer: [head]})
    one_by_one = (time.perf_counter() - began) / len(everything[:: len(everything) // 9]) * len(everything)
    best, guess = rank(exact), rank(slopes)
    began = time.perf_counter()
    effects(model, batches, guess[: round(0.25 * len(everything))])
    shortlist_seconds = time.perf_counter() - began
    keep(
        {
            "part": "profiling", "heads": len(everything), "items": items, "gradient seconds": gradient_seconds,
            "shortlist seconds": shortlist_seconds, "exhaustive seconds": exact_seconds,
            "one head a pass, seconds (from a sample)": one_by_one,
            "spearman": spearman([slopes[head] for head in everything], [exact[head] for head in everything]),
            "recall": {k: len(set(best[:k]) & set(guess[: 3 * k])) / k for k in (5, 10, 20)},
            "recall in the shortlist": {k: len(set(best[:k]) & set(guess[: round(0.25 * len(everything))])) / k
                                        for k in (5, 10, 20)},
        }
    )  # fmt: skip


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Correlation of the ranks."""
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (first, second)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


# ---- tables ---------------------------------------------------------------------------------------------------------


def interval(change: Sequence[float]) -> str:
    """Mean paired difference in points with its 95 % interval."""
    half = t_quantile(len(change) - 1) * statistics.stdev(change) / math.sqrt(len(change))
    mean = statistics.mean(change)
    return f"{100 * mean:+.1f} [{100 * (mean - half):+.1f}, {100 * (mean + half):+.1f}]"


def table() -> None:
    """Markdown for docs/results."""
    found = rows()
    for part, command in (("prefill", "cost"), ("decode", "decode")):
        measured = [row for row in found if row["part"] == part]
        section(f"Time and memory: {part}", f"pasta {command}", measured)
        print(f"| {part}: batch x tokens | way | median [quartiles] | of plain | memory growth, of plain |")
        print("|---|---|---|---|---|")
        shapes = dict.fromkeys((row["batch"], row["tokens"]) for row in measured)
        for shape in shapes:
            group = {r["way"]: r for r in measured if (r["batch"], r["tokens"]) == shape}
            plain = group["plain sdpa"]
            for name, row in group.items():
                memory = ""
                if "growth" in row:
                    memory = f"{statistics.median(row['growth']) / statistics.median(plain['growth']):.2f}"
                ratio = quotient(row["seconds"], plain["seconds"])
                print(f"| {shape[0]} x {shape[1]} | {name} | {spread(row['seconds'])} | {ratio} | {memory} |")
    group = [row for row in found if row["part"] == "effect" and row["profile"] == shipped()]
    plain = {row["task"]: row for row in group if row["setting"] == "plain"}
    section("What emphasis changes", "pasta effect", group)
    print("| task | setting | right, % | against plain, points [95 %] | second, % | fluency |")
    print("|---|---|---|---|---|---|")
    for row in sorted(group, key=lambda row: list(plain).index(row["task"])):
        base = plain[row["task"]]["right"]
        against = (
            "" if row["setting"] == "plain" else interval([a - b for a, b in zip(row["right"], base, strict=True)])
        )
        second = f"{100 * statistics.mean(row['second']):.1f}" if "second" in row else ""
        fluent = f"{row['fluency']:.2f}" if "fluency" in row else ""
        right = 100 * statistics.mean(row["right"])
        print(f"| {row['task']} | {row['setting']} | {right:.1f} | {against} | {second} | {fluent} |")
    for row in (row for row in found if row["part"] == "profiling"):
        section("Finding the heads", "pasta profiling", [row])
        said = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "threads"}
        print("| what | value |\n|---|---|")
        for name, value in said.items():
            print(f"| {name} | {value if isinstance(value, int) else round(value, 2)} |")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts that are asked for; all of them by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["cost", "decode", "effect", "profiling", "table"], default=[])
    parts = parser.parse_args(argv).parts or ["cost", "decode", "effect", "profiling", "table"]
    quiet_upstream()
    for part in parts:
        {"cost": cost, "decode": decode, "effect": effect, "profiling": profiling, "table": table}[part]()


if __name__ == "__main__":
    main()
