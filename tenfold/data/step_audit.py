"""StepAudit: chains of arithmetic on digits, where the truth of every step is known.

A problem is a start digit and K operations modulo 10: ``+d``, ``-d`` with d from 1 to 9, ``*d`` with d in {3, 7, 9}.
Each operation maps the ten digits onto the ten digits, so every result is equally likely, a claim betrays nothing by
itself, and a single wrong step always makes the result wrong. One problem is told in two ways:

* **For a judge** (Think-RM): two claims of the result, of which exactly one is right, in a format of one token per word
  (`problem`, `trace`).
* **As a preference pair**, in plain English: two answers that show a value after each operation (`prompt`,
  `answer_text`). A step is worth 1 where its value follows from the value that the answer states before it, else 0; the
  true return of an answer is the sum. A step is judged by itself because a slip that spoilt all later steps would make
  one answer at least as good as the other at every step, and then a myopic judge could never err. The answers have
  different numbers of slips (any two of 0 to K, equally likely), at random steps: a few late ones against many early
  ones is what a myopic judge gets wrong.

Source: Think-RM specification, section 8.1; the rewards per step, which the noise models of the R3M specification
(section 4) need, are ours.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from tenfold.errors import ConfigError, DataError

FACTORS = (3, 7, 9)
"""By these a digit may be multiplied: they are the ones that lose nothing modulo 10 (but for 1)."""

TOKENS = (
    *"0123456789",
    *"+-*S;AB?|yn",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<eos>",
)
"""Every word of the format of `problem` and `trace`; words are separated by one space."""

_COUNT, _SEED = 2000, 0
_VERBS = {"+": "Add", "-": "Subtract", "*": "Multiply by"}


class Operation(NamedTuple):
    """One step of a chain.

    >>> Operation("-", 7)(4)
    7
    """

    sign: Literal["+", "-", "*"]
    digit: int

    def __call__(self, value: int) -> int:
        """The digit that follows ``value``."""
        if self.sign == "*":
            return value * self.digit % 10
        return (value + self.digit if self.sign == "+" else value - self.digit) % 10


@dataclass(frozen=True)
class WorkedAnswer:
    """An answer that shows its work.

    Args:
        values: the digit that it states after each operation, [steps].
        rewards: 1.0 where that digit follows from the one stated before, else 0.0, [steps].
    """

    values: tuple[int, ...]
    rewards: tuple[float, ...]


@dataclass(frozen=True)
class Problem:
    """A problem, two claims of its result for a judge, and two answers for a preference pair.

    Args:
        id: made of seed and index; the same whatever the count.
        start: the first digit.
        operations: what is done to it.
        values: the right digit after each operation, [steps].
        claims: the results that A and B claim; exactly one is right.
        label: which of them.
        better: the answer with more right steps.
        worse: the answer with fewer.
    """

    id: str
    start: int
    operations: tuple[Operation, ...]
    values: tuple[int, ...]
    claims: tuple[int, int]
    label: Literal["A", "B"]
    better: WorkedAnswer
    worse: WorkedAnswer

    @property
    def distance(self) -> int:
        """How far the wrong claim lies from the right one: 1, 2, or 3 for anything more."""
        return min(3, abs(self.claims[0] - self.claims[1]))

    @property
    def score(self) -> int:
        """The graded label, with Think-RM's sign: minus the distance where A is right, plus where B is."""
        return -self.distance if self.label == "A" else self.distance


def step_audit(count: int, seed: int, *, steps: int = 6) -> Iterator[Problem]:
    """The problems of a seed; the first of many are those of few.

    Args:
        count: how many, 1 or more.
        seed: of all that is drawn, 0 or more.
        steps: operations of a problem (K), 1 or more.

    Raises:
        ConfigError: a number below its bound.

    >>> item = next(step_audit(1, seed=0, steps=3))
    >>> print(prompt(item) + answer_text(item, item.better))
    Start with 1. Subtract 1. Add 3. Subtract 5. Work modulo 10, so that every value is a digit. Show each value.
    1 - 1 = 2
    2 + 3 = 5
    5 - 5 = 5
    The result is 5.
    """
    for name, value, least in (("count", count, 1), ("seed", seed, 0), ("steps", steps, 1)):
        if value < least:
            raise ConfigError(f"{name}: {value} is below {least}", remedy=f"give a {name} of {least} or more")
    return (_item(index, seed, steps) for index in range(count))


def _item(index: int, seed: int, steps: int) -> Problem:
    # Seeded by text, so that an item depends on nothing but its own name.
    rng = random.Random(f"step-audit|{seed}|{steps}|{index}")
    start = rng.randrange(10)
    operations = tuple(_operation(rng) for _ in range(steps))
    values = _run(start, operations)
    wrong = _other(rng, values[-1])
    label: Literal["A", "B"] = "A" if rng.randrange(2) else "B"
    fewer, more = sorted(rng.sample(range(steps + 1), 2))
    return Problem(
        id=f"step-audit-{seed}-{index}",
        start=start,
        operations=operations,
        values=values,
        claims=(values[-1], wrong) if label == "A" else (wrong, values[-1]),
        label=label,
        better=_answer(rng, start, operations, fewer),
        worse=_answer(rng, start, operations, more),
    )


def _operation(rng: random.Random) -> Operation:
    sign: Literal["+", "-", "*"] = rng.choice(("+", "-", "*"))
    return Operation(sign, rng.choice(FACTORS) if sign == "*" else rng.randrange(1, 10))


def _run(value: int, operations: tuple[Operation, ...]) -> tuple[int, ...]:
    values = []
    for operation in operations:
        value = operation(value)
        values.append(value)
    return tuple(values)


def _other(rng: random.Random, digit: int) -> int:
    """Any other digit, each equally likely."""
    return (digit + rng.randrange(1, 10)) % 10


def _answer(rng: random.Random, value: int, operations: tuple[Operation, ...], slips: int) -> WorkedAnswer:
    wrong = set(rng.sample(range(len(operations)), slips))
    values = []
    for step, operation in enumerate(operations):
        value = operation(value)
        if step in wrong:
            value = _other(rng, value)
        values.append(value)
    return WorkedAnswer(tuple(values), tuple(0.0 if step in wrong else 1.0 for step in range(len(operations))))


def prompt(item: Problem) -> str:
    """The problem in plain English; ends with a newline, so that an answer can follow it directly."""
    todo = " ".join(f"{_VERBS[operation.sign]} {operation.digit}." for operation in item.operations)
    return f"Start with {item.start}. {todo} Work modulo 10, so that every value is a digit. Show each value.\n"


def answer_text(item: Problem, answer: WorkedAnswer) -> str:
    """An answer in plain text: a line for each operation, and the result."""
    before = (item.start, *answer.values)
    lines = [
        f"{value} {operation.sign} {operation.digit} = {after}"
        for value, operation, after in zip(before[:-1], item.operations, answer.values, strict=True)
    ]
    return "\n".join([*lines, f"The result is {answer.values[-1]}."])


def preference_values(item: Problem) -> dict[str, Any]:
    """The item as a raw preference row; ``chosen_rewards`` and ``rejected_rewards`` are the true rewards per step.

    ``solution`` is an answer without slips, to learn the task from: ``rows: completion``, ``columns: {completion:
    solution}``.
    """
    return {
        "id": item.id,
        "prompt": prompt(item),
        "chosen": answer_text(item, item.better),
        "rejected": answer_text(item, item.worse),
        "solution": answer_text(item, WorkedAnswer(item.values, (1.0,) * len(item.values))),
        "chosen_rewards": list(item.better.rewards),
        "rejected_rewards": list(item.worse.rewards),
    }


def from_source(source: str) -> Iterator[Problem]:
    """The problems that ``step-audit``, ``step-audit:count`` or ``step-audit:count:seed`` names.

    Without them, the count is 2000 and the seed 0.

    Raises:
        DataError: for anything else behind the name.

    >>> [item.id for item in from_source("step-audit:2:7")]
    ['step-audit-7-0', 'step-audit-7-1']
    """
    numbers = source.split(":")[1:]
    right = re.fullmatch(r"step-audit(:[0-9]{1,9}){0,2}", source)
    count, seed = [*map(int, numbers), *(_COUNT, _SEED)[len(numbers) :]] if right else (0, 0)
    if count < 1:
        raise DataError(
            f"{source}: expected step-audit:count:seed, whole numbers, with a count of 1 or more",
            remedy=f"write step-audit ({_COUNT} rows, seed {_SEED}), step-audit:500 or step-audit:500:7",
        )
    return step_audit(count, seed)


def problem(item: Problem) -> str:
    """What a judge is given, one token per word: ``S v0 ; (op d ;)xK A a B b ? |``.

    >>> problem(next(step_audit(1, seed=0, steps=2)))
    'S 2 ; * 9 ; + 2 ; A 0 B 3 ? |'
    """
    todo = " ".join(f"{operation.sign} {operation.digit} ;" for operation in item.operations)
    return f"S {item.start} ; {todo} A {item.claims[0]} B {item.claims[1]} ? |"


def trace(item: Problem, stride: int | None) -> str:
    """What a teacher writes behind `problem`.

    ``<think> (op d v)x(K/stride) A a y|n B b y|n </think> <answer> X </answer> <eos>``

    Both claims are checked in so many words, since a verdict is one token in thirty and is not learned without.

    Args:
        item: the problem.
        stride: every how many-th operation is written down with the right value behind it; divides K. None: no thought
            at all, the verdict alone.

    Returns:
        Words separated by spaces, ending in ``<eos>``.

    Raises:
        ConfigError: the stride does not divide the number of operations, so that the last value would be missing.

    >>> trace(next(step_audit(1, seed=0, steps=2)), stride=1)
    '<think> * 9 8 + 2 0 A 0 y B 3 n </think> <answer> A </answer> <eos>'
    """
    thought: list[str] = []
    if stride is not None:
        if stride < 1 or len(item.operations) % stride:
            raise ConfigError(
                f"stride: {stride} does not divide the {len(item.operations)} operations",
                remedy=f"give 1, {len(item.operations)}, a number between that divides it, or None",
            )
        for step in range(stride - 1, len(item.operations), stride):
            operation = item.operations[step]
            thought += [operation.sign, str(operation.digit), str(item.values[step])]
        for name, claim in zip("AB", item.claims, strict=True):
            thought += [name, str(claim), "y" if claim == item.values[-1] else "n"]
    return " ".join(["<think>", *thought, "</think>", "<answer>", item.label, "</answer>", "<eos>"])
