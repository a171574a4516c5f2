"""Profiling tasks: prompts with marks where emphasis decides which of a few continuations is right.

Three are made by code, so that heads can be found without any data; a file of one's own has rows with a tagged prompt,
the continuation to prefer and one to avoid (preference rows of `tenfold.data`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from tenfold.attend.chat_marks import said_by_user
from tenfold.attend.text_marks import Marked, from_spans, from_tags
from tenfold.data.rows import Preference, Question
from tenfold.errors import ConfigError, DataError


@dataclass(frozen=True)
class Item:
    """A marked prompt and what may follow it.

    Args:
        prompt: the prompt, with the span whose emphasis should help.
        target: the continuation that obeying the mark leads to.
        foils: what else may be said; one or more.
        name: what an error calls it; by default ``item 1`` and so on.
    """

    prompt: Marked
    target: str
    foils: tuple[str, ...]
    name: str = ""


_PEOPLE = (
    "Anna", "Boris", "Clara", "David", "Elena", "Felix", "Grace", "Henry", "Irene", "James", "Karen", "Louis",
    "Maria", "Nora", "Oscar", "Paula", "Ruth", "Simon", "Teresa", "Victor", "Walter", "Alice", "Martin", "Julia",
)  # fmt: skip
_SURNAMES = (
    "Albers", "Brandt", "Castell", "Dorne", "Eklund", "Farrow", "Gilmore", "Hale", "Ivers", "Jansen", "Keller",
    "Lowell", "Marsh", "Norden", "Osborne", "Pryce", "Quill", "Rhodes", "Sutter", "Thorne", "Vance", "Weston",
)  # fmt: skip
_COLOURS = ("red", "blue", "green", "black", "white", "yellow")
_OBJECTS = ("bicycle", "house", "coat", "boat", "umbrella", "lamp", "car", "door", "hat", "chair", "scarf", "tent")
_FILLERS = (
    "The market opens early in the morning.", "It rained for most of the week.", "The old bridge was repaired in May.",
    "A new library stands next to the school.", "The train to the coast was late again.",
    "Many visitors come for the festival.", "The bakery sells bread until noon.", "Two roads lead to the harbour.",
)  # fmt: skip
_FACTS = {
    "The mother tongue of {} is": ("French", "German", "Russian", "Spanish", "English", "Dutch", "Italian", "Greek"),
    "{} plays the": ("piano", "guitar", "violin", "trumpet", "drums", "flute", "cello", "harp"),
    "{} lives in": ("London", "Paris", "Rome", "Berlin", "Madrid", "Vienna", "Tokyo", "Boston"),
    "{} works as a": ("teacher", "nurse", "lawyer", "farmer", "chef", "pilot", "painter", "baker"),
    "The favourite sport of {} is": ("tennis", "football", "hockey", "golf", "rugby", "chess", "boxing", "cricket"),
    "The home country of {} is": ("France", "Germany", "Russia", "Spain", "Canada", "Norway", "Italy", "Greece"),
}
_FIELDS = {
    "job": ("teacher", "nurse", "lawyer", "farmer", "chef", "pilot", "painter", "baker"),
    "city": ("London", "Paris", "Rome", "Berlin", "Madrid", "Vienna", "Tokyo", "Boston"),
    "language": ("French", "German", "Russian", "Spanish", "English", "Dutch", "Italian", "Greek"),
    "sport": ("tennis", "football", "hockey", "golf", "rugby", "boxing", "cricket", "judo"),
}


def conflict_items(count: int, seed: int = 0) -> list[Item]:
    """A new fact against an old one that is said three times; the new one is marked (the paper's prompt, but harder).

    >>> item = conflict_items(1)[0]
    >>> item.prompt.text.count(item.foils[0]), item.prompt.text.count(item.target)
    (3, 1)
    """
    draw, items = Random(f"conflict {seed}"), []
    for number in range(count):
        stem, values = list(_FACTS.items())[number % len(_FACTS)]
        fact = stem.format(f"{draw.choice(_PEOPLE)} {draw.choice(_SURNAMES)}")
        old, new = draw.sample(values, 2)
        text = f"Previously, {fact} {old}. Currently, "
        mark = f"{fact} {new}."
        rest = f" Before that, everyone agreed that {fact} {old}. Every book says that {fact} {old}. {fact}"
        items.append(Item(_marked(text, mark, rest), f" {new}", (f" {old}",)))
    return items


def evidence_items(count: int, seed: int = 0) -> list[Item]:
    """One of six alike sentences answers; it is marked (AutoPASTA specification, offline bench of section 2).

    >>> len(evidence_items(1)[0].foils)
    5
    """
    draw, items = Random(f"evidence {seed}"), []
    for _ in range(count):
        thing, colours, sentences, place = _colours(draw)
        before, after = "".join(f"{text} " for text in sentences[:place]), " ".join(["", *sentences[place + 1 :]])
        (person, colour), *others = colours
        ask = f"\nQuestion: What colour is the {thing} of {person}?\nAnswer: The {thing} of {person} is"
        prompt = _marked(before, sentences[place], after + ask)
        items.append(Item(prompt, f" {colour}", tuple(f" {other}" for _, other in others)))
    return items


def colour_questions(count: int, seed: int = 0) -> list[Question]:
    """The same as questions over a context, for AutoPASTA.

    >>> colour_questions(1)[0].question.startswith("What colour is the")
    True
    """
    draw, rows = Random(f"questions {seed}"), []
    for number in range(count):
        thing, ((person, colour), *_), sentences, _ = _colours(draw)
        question = f"What colour is the {thing} of {person}?"
        rows.append(Question(f"colour-{seed}-{number}", question, " ".join(sentences), (colour,)))
    return rows


def _colours(draw: Random) -> tuple[str, list[tuple[str, str]], list[str], int]:
    """A thing, six people with the colour of theirs, sentences that say so among others, and the first one's place."""
    thing, people = draw.choice(_OBJECTS), draw.sample(_PEOPLE, 6)
    colours = list(zip(people, draw.sample(_COLOURS, 6), strict=True))
    about = [f"The {thing} of {person} is {colour}." for person, colour in colours]
    sentences = [*about, *draw.sample(_FILLERS, 3)]
    draw.shuffle(sentences)
    return thing, colours, sentences, sentences.index(about[0])


def instruction_items(count: int, seed: int = 0) -> list[Item]:
    """Four facts and an instruction that asks for one of them; the instruction is marked.

    >>> instruction_items(1)[0].prompt.text.splitlines()[-1]
    'Answer:'
    """
    draw, items = Random(f"instruction {seed}"), []
    for number in range(count):
        person = f"{draw.choice(_PEOPLE)} {draw.choice(_SURNAMES)}"
        values = {field: draw.choice(options) for field, options in _FIELDS.items()}
        facts = [f"The {field} of {person}: {value}." for field, value in values.items()]
        draw.shuffle(facts)
        asked = list(_FIELDS)[number % len(_FIELDS)]
        foils = tuple(f" {value}" for field, value in values.items() if field != asked)
        ask = f"Give the {asked} of {person}."
        items.append(Item(_marked(" ".join(facts) + "\n", ask, "\nAnswer:"), f" {values[asked]}", foils))
    return items


TASKS: Mapping[str, Callable[[int, int], list[Item]]] = {
    "conflict": conflict_items,
    "evidence": evidence_items,
    "instruction": instruction_items,
}
"""Name -> generator ``(count, seed)``; other seeds give other items."""


def task_items(name: str, count: int, seed: int = 0, *, tokenizer: Any = None) -> list[Item]:
    """Items of a built-in task.

    Args:
        name: of `TASKS`.
        count: how many.
        seed: other seeds give other items.
        tokenizer: if it has a chat template, instructions are given in it, as users of such a model do.

    Raises:
        ConfigError: an unknown task.

    >>> task_items("conflict", 2) == task_items("conflict", 2)
    True
    """
    if name not in TASKS:
        raise ConfigError(f"tasks: {name!r} is unknown", remedy=f"choose from {', '.join(TASKS)}, or give data")
    items = TASKS[name](count, seed)
    if name == "instruction" and tokenizer is not None and tokenizer.chat_template is not None:
        return [_as_said(tokenizer, item) for item in items]
    return items


def _as_said(tokenizer: Any, item: Item) -> Item:
    """An instruction as a user's message, and the answer as the beginning of the reply."""
    asked = Marked(item.prompt.text.removesuffix("\nAnswer:"), item.prompt.spans)
    prompt = said_by_user(tokenizer, asked)
    return Item(prompt, item.target.strip(), tuple(foil.strip() for foil in item.foils))


def items_of(rows: Iterable[Preference], tags: tuple[str, str] = ("<mark>", "</mark>")) -> list[Item]:
    """Items from rows of one's own: a tagged prompt, the continuation to prefer, one to avoid.

    Raises:
        DataError: a prompt without a mark, or with messages before it.

    >>> row = Preference("1", "Say <mark>yes</mark>.", " yes", " no")
    >>> items_of([row])[0].foils
    (' no',)
    """
    items = []
    for row in rows:
        if row.needs_template:
            raise DataError(
                f"row {row.id!r}: it has a system message, further turns or tools",
                remedy="give marked prompts as text",
            )
        prompt = from_tags(row.prompt, tags, name=f"row {row.id!r}")
        if not prompt.spans:
            raise DataError(f"row {row.id!r}: its prompt has no {tags[0]}...{tags[1]}", remedy="mark what to emphasise")
        items.append(Item(prompt, row.chosen, (row.rejected,), f"row {row.id!r}"))
    return items


def _marked(before: str, mark: str, after: str) -> Marked:
    return from_spans(before + mark + after, [(len(before), len(before) + len(mark))])
