"""How long an answer takes on a game's clock: a number, a trace, what was measured, or tokens at stated rates.

No game reads the clock of the machine. What an answer costs depends on the question and the answer alone, neither on
what else is asked beside it nor on the order, so that batches, several processes and resumed runs charge the same.

>>> answer = Action("jab", "jab", 0.0, prompt_tokens=350, tokens=9)
>>> parse_latency("tokens:3500,90").seconds(Turn("", "", ("jab",)), answer)
0.2
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tenfold.arena.agents import Action, Turn
from tenfold.core.statistics import wilson
from tenfold.errors import ConfigError, DataError, RunError
from tenfold.stage.results import Metric

KINDS = "SECONDS, trace:FILE, measured or tokens:PREFILL,DECODE"


class Latency(Protocol):
    """What an answer costs."""

    measures: bool
    """Whether it charges what an engine took, for which questions must not wait for each other."""

    def seconds(self, question: Turn, answer: Action) -> float:
        """Seconds from the question to the answer, 0 or more."""
        ...


@dataclass(frozen=True)
class Fixed:
    """Every answer takes the same time.

    Args:
        value: seconds, 0 or more.
    """

    value: float
    measures = False

    def __post_init__(self) -> None:
        if not _is_time(self.value):
            raise ConfigError(f"latency: fixed:{self.value:g}", remedy="give seconds, 0 or more, as in fixed:0.2")

    def seconds(self, question: Turn, answer: Action) -> float:
        """The same for all."""
        return self.value


@dataclass(frozen=True)
class Tokens:
    """Tokens that are read and written, at stated rates: results do not depend on the machine that plays.

    The default rates are about those of a model of 8 billion parameters in 6 bits on one RTX 3090 in llama.cpp: 3,500
    tokens/s read (measured in its pull request 7860), 90 written (6.6 GB of weights a token at two thirds of the card's
    936 GB/s). The whole prompt is charged, also where an engine has read its beginning before.

    Args:
        prefill: tokens read in a second, above 0.
        decode: tokens written in a second, above 0.
    """

    prefill: float = 3500.0
    decode: float = 90.0
    measures = False

    def __post_init__(self) -> None:
        for name, rate in (("PREFILL", self.prefill), ("DECODE", self.decode)):
            if not (_is_time(rate) and rate > 0):
                raise ConfigError(
                    f"latency: {name} of tokens:PREFILL,DECODE is {rate:g}",
                    remedy="give tokens per second, above 0, as in tokens:3500,90",
                )

    def seconds(self, question: Turn, answer: Action) -> float:
        """Tokens read and tokens written, each by its rate.

        Raises:
            RunError: no tokens were read, as of a server that does not count them, or of an agent without a model.
        """
        if answer.prompt_tokens < 1:
            raise RunError(
                f"latency: tokens: {answer.text!r} came without a count of the tokens that were read",
                remedy="charge seconds, such as 0.2, or what was measured; a server must tell the usage of its tokens",
            )
        return answer.prompt_tokens / self.prefill + answer.tokens / self.decode


@dataclass(frozen=True)
class Trace:
    """What was recorded: a question that is among it takes what it took then, any other one draws one of the lines.

    The draw depends on the question's seed and state.

    Args:
        values: seconds, one or more, 0 or more each.
        known: of these, seconds by question (`question_key`).
    """

    values: tuple[float, ...]
    known: dict[str, float] = field(default_factory=dict)
    measures = False

    def seconds(self, question: Turn, answer: Action) -> float:
        """As recorded, or drawn."""
        key = question_key(question)
        return self.known[key] if key in self.known else self.values[int(key, 16) % len(self.values)]


@dataclass
class Measured:
    """What answering took here, written down: the file is a trace, with which every run repeats exactly.

    A question that comes again takes what it took at first, also in a later run with the same file.

    Args:
        path: a file of JSON lines, one for each agent; it is added to. None keeps the trace in memory alone.
    """

    path: Path | None = None
    known: dict[str, float] = field(default_factory=dict)
    measures = True

    def __post_init__(self) -> None:
        if self.path is not None and self.path.exists() and self.path.stat().st_size:
            self.known |= read_trace(self.path).known

    def seconds(self, question: Turn, answer: Action) -> float:
        """What the answer says that it took."""
        key = question_key(question)
        if key not in self.known:
            self.known[key] = answer.seconds
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"question": key, "seconds": answer.seconds}) + "\n")
        return self.known[key]


def question_key(question: Turn) -> str:
    """What a trace calls a question: a hash of its seed and state, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps([question.seed, question.state]).encode()).hexdigest()[:16]


def parse_latency(text: str, *, record: Path | None = None) -> Latency:
    """A latency from its text.

    Args:
        text: ``0.2`` or ``fixed:0.2``, ``trace:FILE``, ``measured``, ``tokens:3500,90``, or ``tokens`` for the default
            rates.
        record: where ``measured`` writes its trace.

    Raises:
        ConfigError: another text, or a value out of its range.
        DataError: a trace that cannot be read, with file and line.

    >>> parse_latency("0.2"), parse_latency("tokens")
    (Fixed(value=0.2), Tokens(prefill=3500.0, decode=90.0))
    """
    kind, colon, value = text.partition(":")
    if kind == "trace" and value:
        return read_trace(Path(value))
    if text == "measured":
        return Measured(record)
    if text == "tokens":
        return Tokens()
    seconds = _number(text)
    if seconds is not None:
        return Fixed(seconds)
    if kind in ("fixed", "tokens") and colon:
        numbers = [_number(part) for part in value.split(",")]
        wanted = {"fixed": 1, "tokens": 2}[kind]
        if len(numbers) == wanted and None not in numbers:
            return Fixed(*numbers) if kind == "fixed" else Tokens(*numbers)  # type: ignore[arg-type]
        words = "one number of seconds" if kind == "fixed" else "two numbers of tokens per second"
        example = "fixed:0.2" if kind == "fixed" else "tokens:3500,90"
        raise ConfigError(f"latency: {text!r}: {kind} takes {words}", remedy=f"write it as {example}")
    raise ConfigError(f"latency: {text!r} is unknown", remedy=f"give {KINDS}")


def read_trace(path: Path) -> Trace:
    """Seconds from a file of JSON lines: each a number, or an object with ``seconds`` as `Measured` writes it.

    Raises:
        DataError: no such file, an empty one, or a line without a time, by file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 at byte {error.start}"
        raise DataError(
            f"latency: {path}: {reason}", remedy="give a file of JSON lines, each a number of seconds"
        ) from None
    values: list[float] = []
    known: dict[str, float] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        found = _line(line)
        seconds = found.get("seconds") if isinstance(found, dict) else found
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not _is_time(seconds):
            raise DataError(
                f"latency: {path}, line {number}: {line.strip()[:60]!r} is not a time",
                remedy='write a number of seconds, 0 or more, or {"seconds": ...}, on each line',
            )
        values.append(float(seconds))
        if isinstance(found, dict) and isinstance(found.get("question"), str):
            known.setdefault(found["question"], float(seconds))
    if not values:
        raise DataError(f"latency: {path} is empty", remedy="give a file of JSON lines, each a number of seconds")
    return Trace(tuple(values), known)


def _line(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _is_time(value: float) -> bool:
    return math.isfinite(value) and value >= 0


def latency_metrics(seconds: Sequence[float], deadline: float | None = None) -> tuple[Metric, ...]:
    """Median and upper quantiles of what answers took, and how many came after a deadline.

    Args:
        seconds: of answers, one or more.
        deadline: seconds after which an answer is of no use.

    >>> [metric.value for metric in latency_metrics([0.1, 0.2, 0.3, 0.4, 2.0], deadline=1.0)]
    [0.3, 1.68, 1.936, 0.2]
    """
    shares = (0.5, 0.95, 0.99)
    found = [
        Metric(
            name=f"latency_p{share * 100:.0f}",
            value=round(float(value), 9),
            unit="s",
            count=len(seconds),
            better="lower",
        )
        for share, value in zip(shares, np.quantile(np.asarray(seconds), shares), strict=True)
    ]
    if deadline is not None:
        late = sum(value > deadline for value in seconds)
        rate, interval = late / len(seconds), wilson(late, len(seconds))
        found.append(
            Metric(name="deadline_miss_rate", value=rate, count=len(seconds), interval=interval, better="lower")
        )
    return tuple(found)
