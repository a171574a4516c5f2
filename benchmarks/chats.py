"""PASTA in chats: which dose makes the embedded model obey a marked instruction and still write well.

    python -m benchmarks.chats write   # resumable: every dose on every instruction, one row a text
    python -m benchmarks.chats table   # what docs/results/pasta.md shows of chats

``chat_instructions.jsonl`` has 80 instructions of eight kinds, written for this benchmark, each with a rule that says
whether a text obeys. Half of each kind (``choose``) is for choosing the dose, the other half (``report``) says what the
choice is worth. Greedy, 72 new tokens, the shipped profile, the model's chat template.

``obeyed``: by the rule. ``repeating``: `tenfold.data.text_checks.repeats`. ``nats``: of each token of the text, by the
plain model after the same prompt, mean of the texts. ``by eye``: whether a reader who saw both texts found the steered
one better or worse than the plain one; the verdicts are in ``results/chats_by_eye.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import rows_in, section
from benchmarks.pasta import interval, keep_steered, shipped
from tenfold.attend.chat_marks import MessageSpan, in_chat
from tenfold.attend.pasta import steer
from tenfold.attend.text_marks import Marks, encode
from tenfold.compat import quiet_upstream
from tenfold.data.text_checks import json_valid, repeats
from tenfold.models.generation import decoding
from tenfold.models.inference import evaluating
from tenfold.models.open import open_model

HERE = Path(__file__).parent
RESULTS, EYE = HERE / "results" / "chats.jsonl", HERE / "results" / "chats_by_eye.jsonl"
DOSES: dict[str, dict[str, float]] = {
    "plain": {},
    "alpha 0.01": {"alpha": 0.01},
    "alpha 0.03": {"alpha": 0.03},
    "alpha 0.1": {"alpha": 0.1},
    "alpha 0.3": {"alpha": 0.3},
    "alpha 0.5": {"alpha": 0.5},
    "target mass 0.15": {"target_mass": 0.15},
    "target mass 0.3": {"target_mass": 0.3},
}
TOKENS, BATCH = 72, 40

WORDS = {
    "fr": "le la les est dans une des et je vous il pas pour que à de du au ai bonjour",
    "es": "el la los es en una un y yo por que de del con muy estoy hola para las",
    "de": "der die das ist und ich in ein eine nicht zu von guten morgen den mit auf",
    "en": "the is are of and to in that it was for with you this i my your",
}
"""Frequent words: a text is in the language of which it has most, and has at least one."""

rows = partial(rows_in, RESULTS)
keep = partial(keep_steered, RESULTS)


def instructions() -> list[dict[str, Any]]:
    """What is asked: ``id``, ``split``, ``kind``, ``prompt``, its part ``mark``, and the ``rule``."""
    return [json.loads(line) for line in (HERE / "chat_instructions.jsonl").read_text("utf-8").splitlines()]


# ---- rules ----------------------------------------------------------------------------------------------------------


def obeys(text: str, rule: dict[str, Any]) -> bool:
    """Whether a text satisfies every entry of a rule; an empty one satisfies none."""
    return bool(text.strip()) and all(RULES[name](text.strip(), wanted) for name, wanted in rule.items())


def count_between(pattern: str) -> Callable[[str, list[int]], bool]:
    """A rule: so many matches."""
    return lambda text, wanted: wanted[0] <= len(re.findall(pattern, text)) <= wanted[1]


def in_case(text: str, wanted: str) -> bool:
    """All letters are of the wanted case, but for one in twenty."""
    letters = [letter for letter in text if letter.isalpha()]
    return sum(getattr(letter, f"is{wanted}")() for letter in letters) >= max(1, 0.95 * len(letters))


def in_language(text: str, wanted: str) -> bool:
    """By its frequent words."""
    words = re.findall(r"\w+", text.lower())
    found = {name: sum(word in listed.split() for word in words) for name, listed in WORDS.items()}
    return found[wanted] > 0 and found[wanted] == max(found.values()) and found["en"] < found[wanted]


def seek(pattern: str, text: str) -> bool:
    """A match without regard to case, but in a pattern about the pronoun I."""
    return re.search(pattern, text, 0 if r"\bI\b" in pattern else re.IGNORECASE) is not None


RULES: dict[str, Callable[[str, Any], bool]] = {
    "all": lambda text, wanted: all(seek(pattern, text) for pattern in wanted),
    "none": lambda text, wanted: not any(seek(pattern, text) for pattern in wanted),
    "lines": lambda text, wanted: sum(seek(wanted[0], line) for line in text.splitlines()) >= wanted[1],
    "words": count_between(r"[\w'’-]*\w[\w'’-]*"),
    "sentences": count_between(r"[.!?]+(?=\s|[\"”)]|\Z)"),
    "case": in_case,
    "json": lambda text, wanted: json_valid(text),
    "language": in_language,
}


# ---- writing --------------------------------------------------------------------------------------------------------


def write() -> None:
    """Every dose on every instruction that has no row yet."""
    opened = open_model("demo", device="cpu")
    model, tokenizer = opened.model.eval(), opened.tokenizer
    done = {(row["id"], row["dose"]) for row in rows() if row["profile"] == shipped()}
    for name, dose in DOSES.items():
        todo = [item for item in instructions() if (item["id"], name) not in done]
        for start in range(0, len(todo), BATCH):
            part = todo[start : start + BATCH]
            marks = encode(tokenizer, [said(tokenizer, item) for item in part])
            for item, found in zip(part, texts(model, tokenizer, marks, dose), strict=True):
                keep({"id": item["id"], "dose": name, **found})


def said(tokenizer: Any, item: dict[str, Any]) -> Any:
    """The prompt in the chat template."""
    start = item["prompt"].index(item["mark"])
    span = MessageSpan(0, start, start + len(item["mark"]))
    return in_chat(tokenizer, [{"role": "user", "content": item["prompt"]}], [span])


def texts(model: Any, tokenizer: Any, marks: Marks, dose: dict[str, float]) -> list[dict[str, Any]]:
    """What is written under a dose, and how likely the plain model finds it."""
    config, prompt = decoding(model, tokenizer, TOKENS), marks.input_ids.shape[1]
    with evaluating(model):
        with steer(model, marks, **dose) if dose else ExitStack():
            ids = model.generate(**marks.inputs, generation_config=config)
        new = ids[:, prompt:]
        ended = torch.isin(new, torch.tensor(config.eos_token_id)).long()
        real = (ended.cumsum(1) - ended) == 0  # the first end counts, and what fills the row after it does not
        mask = torch.cat([marks.attention_mask, real.long()], 1)
        logits = model(ids, attention_mask=mask, logits_to_keep=new.shape[1] + 1).logits[:, :-1]
        nats = -logits.float().log_softmax(-1).gather(2, new[..., None])[..., 0]
    mean = (nats * real).sum(1) / real.sum(1)
    return [
        {"text": text.strip(), "nats": round(value, 4), "tokens": count}
        for text, value, count in zip(
            tokenizer.batch_decode(new, skip_special_tokens=True), mean.tolist(), real.sum(1).tolist(), strict=True
        )
    ]


# ---- table ----------------------------------------------------------------------------------------------------------


def table() -> None:
    """Markdown for docs/results."""
    section("Chats", "chats", rows())
    found = {(row["id"], row["dose"]): row for row in rows() if row["profile"] == shipped()}
    eye = {(row["id"], row["dose"]): row["verdict"] for row in rows_in(EYE)}
    print("| half | dose | obeyed, % | to plain, points [95 %] | repeating, % | nats a token | by eye: better, worse |")
    print("|---|---|---|---|---|---|---|")
    for split in ("choose", "report"):
        asked = [item for item in instructions() if item["split"] == split]
        plain = [obeyed(found[item["id"], "plain"], item) for item in asked]
        for dose in DOSES:
            if any((item["id"], dose) not in found for item in asked):
                continue
            group = [found[item["id"], dose] for item in asked]
            right = [obeyed(row, item) for row, item in zip(group, asked, strict=True)]
            against = "" if dose == "plain" else interval([a - b for a, b in zip(right, plain, strict=True)])
            verdicts = [eye.get((item["id"], dose)) for item in asked]
            read = "" if None in verdicts else f"{verdicts.count('better')}, {verdicts.count('worse')}"
            print(
                f"| {split} ({len(asked)}) | {dose} | {100 * statistics.mean(right):.1f} | {against} "
                f"| {100 * statistics.mean(repeats(row['text']) for row in group):.1f} "
                f"| {statistics.mean(row['nats'] for row in group):.2f} | {read} |"
            )


def obeyed(row: dict[str, Any], item: dict[str, Any]) -> float:
    """1 or 0."""
    return float(obeys(row["text"], item["rule"]))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts that are asked for; both by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["write", "table"], default=[])
    quiet_upstream()
    for part in parser.parse_args(argv).parts or ["write", "table"]:
        {"write": write, "table": table}[part]()


if __name__ == "__main__":
    main()
