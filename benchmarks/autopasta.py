"""AutoPASTA: what finding the evidence buys on questions over a context, and what it costs.

    python -m benchmarks.autopasta cost    # time to an answer, with and without the shared prefix; an idle machine
    python -m benchmarks.autopasta nq      # resumable, batch by batch; needs the real data (TENFOLD_DATA)
    python -m benchmarks.autopasta bench   # the synthetic bench of the specification
    python -m benchmarks.autopasta words   # finding quotes again, and nonsense; no model
    python -m benchmarks.autopasta table   # what docs/results/autopasta.md shows

Questions: 200 of the dev split of NQ-Open with distractors, each with as many passages as fit into 384 tokens (passages
without an answer are left out first; the gold passage stays where it was among the others; questions whose gold passage
alone does not fit are passed over). All modes answer the same
prompts with the shipped profile `default`, which was found without any question of this kind; the synthetic bench is
of the kind that it was found on (other items).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import rows_in, section
from benchmarks.adalora import alternate, quotient, spread
from benchmarks.pasta import DATA, interval, keep_steered, shipped
from tenfold.attend.autopasta.answering import AutoPasta
from tenfold.attend.autopasta.quote_matching import MIN_RARE, bag_of_words, locate_quote, rare_words
from tenfold.attend.autopasta.sentences import sentences
from tenfold.attend.autopasta.stage import Asked, measure
from tenfold.attend.pasta.heads import batches_of, margins
from tenfold.attend.pasta.profiles import load_profile
from tenfold.attend.pasta.tasks import Item, colour_questions, evidence_items
from tenfold.attend.text_marks import from_spans, from_substrings
from tenfold.compat import quiet_upstream
from tenfold.data.read import read_rows
from tenfold.data.rows import Question
from tenfold.errors import DataError
from tenfold.evaluate.qa import holds
from tenfold.models.open import open_model

RESULTS = Path(__file__).parent / "results" / "autopasta.jsonl"
QUESTIONS, BATCH, ROOM = 200, 4, 384
WAYS = ("direct", "iterative", "autopasta", "gold")


rows = partial(rows_in, RESULTS)
keep = partial(keep_steered, RESULTS)


def nq() -> None:
    """Every mode on the same questions; one row a batch."""
    opened = open_model("demo", device="cpu")
    ask = AutoPasta(opened.model.eval(), opened.tokenizer, max_quote_tokens=48, max_answer_tokens=12)
    found = [
        row for row in read_rows(str(DATA / "qa_nq_distractors.jsonl.gz"), rows="question") if isinstance(row, Question)
    ]
    dev = {json.loads(line)["id"] for line in _lines() if json.loads(line)["split"] == "dev"}
    asked = []
    for row in (row for row in found if row.id in dev):
        with suppress(DataError):  # its gold passage alone is too long
            asked.append(Asked.of(row, ask, ROOM))
        if len(asked) == QUESTIONS:
            break
    done = {(row["mode"], row["start"]) for row in rows() if row["part"] == "nq" and row["profile"] == shipped()}
    for start in range(0, len(asked), BATCH):
        for mode in WAYS:
            if (mode, start) not in done:
                keep({"part": "nq", "mode": mode, "start": start, **measure(ask, asked[start : start + BATCH], mode)})


def _lines() -> list[str]:
    import gzip

    with gzip.open(DATA / "qa_nq_distractors.jsonl.gz", "rt", encoding="utf-8") as file:
        return file.readlines()


def words(count: int = 200) -> None:
    """How often a made-up quote is found again, and how often fluent text from another question's passages is marked.

    Quotes: half of the words of a sentence that holds an answer; the question without its first word, and the answer.
    """
    ways = {"counts, 0.3": (bag_of_words, 0.3), "rare words, 0.25": (rare_words, MIN_RARE)}
    for split in ("train", "dev"):
        chosen = [row for row in map(json.loads, _lines()) if row["split"] == split][:count]
        for way, (embed, least) in ways.items():
            found: dict[str, list[float]] = {}
            for number, row in enumerate(chosen):
                texts = [passage["text"] for passage in row["context"]]
                gold = next((s for s in _parts(texts[row["gold"][0]]) if holds(s, row["answers"])), None)
                if gold is None:
                    continue
                other = chosen[(number + 37) % len(chosen)]["context"][0]["text"]
                foreign = max(_parts(other), key=len)
                quotes = {
                    "half of its words": " ".join(random.Random(number).sample(gold.split(), len(gold.split()) // 2)),
                    "question and answer": f"{row['question'].partition(' ')[2]} {row['answers'][0]}",
                    "nonsense": foreign,
                }
                context = "\n\n".join(texts)
                for name, quote in quotes.items():
                    hits = (
                        locate_quote(quote, context, embed=embed, min_similarity=least)
                        if foreign not in context
                        else ()
                    )
                    right = any(holds(context[hit.start : hit.end], row["answers"]) for hit in hits)
                    found.setdefault(f"{name}, marked", []).append(float(bool(hits)))
                    found.setdefault(f"{name}, right", []).append(float(right))
            shares = {name: round(100 * statistics.mean(values), 1) for name, values in found.items()}
            keep({"part": "words", "split": split, "way": way, "questions": len(found["nonsense, marked"]), **shares})


def _parts(text: str) -> list[str]:
    return [text[lo:hi] for lo, hi in sentences(text)]


def bench(count: int = 48) -> None:
    """The next token after "The ... of ... is", with the right sentence, a wrong one, or all of the context marked."""
    opened = open_model("demo", device="cpu")
    model, tokenizer, heads = opened.model.eval(), opened.tokenizer, load_profile("default").heads
    items = evidence_items(count, seed=5)
    marked: dict[str, tuple[list[Item], Any]] = {
        "plain": (items, None),
        "the sentence": (items, heads),
        "another person's sentence": ([Item(_distractor(item), item.target, item.foils) for item in items], heads),
        "the whole context": ([Item(_whole(item), item.target, item.foils) for item in items], heads),
        "the sentence, all heads": (items, {layer: range(9) for layer in range(30)}),
    }
    for name, (chosen, steered) in marked.items():
        found = margins(model, batches_of(model, tokenizer, chosen, 16), steered)
        keep({"part": "bench", "marked": name, "right": (found > 0).float().tolist(),
              "probability": found.sigmoid().tolist()})  # fmt: skip


def _distractor(item: Item) -> Any:
    text, (span,) = item.prompt.text, item.prompt.spans
    other = next(
        sentence
        for sentence in text.split("\n")[0].split(". ")
        if any(f" is{foil}" in sentence for foil in item.foils) and text.find(sentence) != span.start
    )
    return from_substrings(text, other)


def _whole(item: Item) -> Any:
    return from_spans(item.prompt.text, [(0, item.prompt.text.index("\n"))])


def cost(repeats: int = 5) -> None:
    """Seconds to one answer: direct, AutoPASTA with the shared prefix, and without."""
    opened = open_model("demo", device="cpu")
    options = {"max_quote_tokens": 24, "max_answer_tokens": 8}
    model, tokenizer = opened.model.eval(), opened.tokenizer
    shared = AutoPasta(model, tokenizer, **options)
    alone = AutoPasta(model, tokenizer, reuse=False, **options)
    for tokens in (512, 1024, 2048):
        row = colour_questions(1, seed=7)[0]
        filler = " The committee met in the afternoon and read the minutes of the last session."
        context = row.context + filler * ((tokens - 150) // 14)
        work: dict[str, Callable[[], object]] = {
            "direct": partial(shared, row.question, context, mode="direct"),
            "autopasta, shared prefix": partial(shared, row.question, context),
            "autopasta, two passes": partial(alone, row.question, context),
        }
        answers = [shared(row.question, context), alone(row.question, context)]
        for name, seconds in alternate(work, repeats).items():
            keep({"part": "cost", "tokens": len(tokenizer(context)["input_ids"]), "way": name, "seconds": seconds,
                  "reused": answers[0].reused, "same answer": answers[0].answer == answers[1].answer})  # fmt: skip


def table() -> None:
    """Markdown for docs/results."""
    found = rows()
    nq_rows: dict[str, dict[str, list[float]]] = {}
    asked = [row for row in found if row["part"] == "nq" and row["profile"] == shipped()]
    whole = set.intersection(*({row["start"] for row in asked if row["mode"] == mode} for mode in WAYS))
    for row in (row for row in asked if row["start"] in whole):
        for name, values in row.items():
            if isinstance(values, list):
                nq_rows.setdefault(row["mode"], {}).setdefault(name, []).extend(values)
    section("NQ-Open with distractors", "autopasta nq", asked)
    print("| mode | questions | p(gold), % | to direct, points [95 %] | evidence, % | EM, % | F1, % | fallback, % |")
    print("|---|---|---|---|---|---|---|---|")
    for mode, values in nq_rows.items():
        against = ""
        if mode != "direct":
            pairs = zip(values["probability"], nq_rows["direct"]["probability"], strict=True)
            against = interval([a - b for a, b in pairs])
        names = ("probability", "evidence", "exact_match", "f1", "fallback")
        cells = [_mean(values[name]) if name in values else "" for name in names]
        print(f"| {mode} | {len(values['f1'])} | {cells[0]} | {against} | {' | '.join(cells[1:])} |")
    section("Made-up texts of six alike sentences", "autopasta bench", [row for row in found if row["part"] == "bench"])
    print("| marked | accuracy, % | p(gold against the best foil), % |\n|---|---|---|")
    for row in (row for row in found if row["part"] == "bench"):
        print(f"| {row['marked']} | {_mean(row['right'])} | {_mean(row['probability'])} |")
    section("Time to an answer", "autopasta cost", [row for row in found if row["part"] == "cost"])
    print("| context tokens | way | median [quartiles] | of direct |\n|---|---|---|---|")
    direct = {row["tokens"]: row for row in found if row["part"] == "cost" and row["way"] == "direct"}
    for row in (row for row in found if row["part"] == "cost"):
        ratio = quotient(row["seconds"], direct[row["tokens"]]["seconds"])
        print(f"| {row['tokens']} | {row['way']} | {spread(row['seconds'])} | {ratio} |")


def _mean(values: Sequence[float]) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{100 * statistics.mean(values):.1f} ± {100 * error:.1f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts that are asked for; all of them by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["cost", "nq", "bench", "words", "table"], default=[])
    parts = parser.parse_args(argv).parts or ["cost", "nq", "bench", "words", "table"]
    quiet_upstream()
    for part in parts:
        {"cost": cost, "nq": nq, "bench": bench, "words": words, "table": table}[part]()


if __name__ == "__main__":
    main()
