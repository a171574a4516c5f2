"""People as agents: their keys, and how long they took.

Only how long a person took is read from the machine's clock; it goes to the game as the answer's seconds, so that what
was played replays exactly.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console

from tenfold.arena.agents import Action, Turn
from tenfold.errors import ConfigError

QUIT = "q"
KEYS: dict[str, str] = {
    "d": "close",
    "a": "away",
    "w": "jump in",
    " ": "wait",
    "e": "stand guard",
    "s": "low guard",
    "n": "throw",
    "p": "bolt",
    "u": "jab",
    "i": "strong",
    "o": "fierce",
    "y": "upper",
    "j": "short",
    "k": "sweep",
    "l": "axe",
    "h": "spin",
}
"""The moves of a fight by their keys: the left hand walks and guards, of the right one the upper row punches and the
lower one kicks."""


class Keys(Protocol):
    """Whatever keys come from."""

    def __enter__(self) -> Keys: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None: ...

    def key(self, seconds: float | None) -> str | None:
        """The next key, waiting for it some seconds at most, or for ever; None where there was none."""
        ...


class Keyboard:
    """A terminal's keys, each as soon as it is pressed, while the context is open.

    Nothing is shown of them, what was typed before is forgotten, and Ctrl-C interrupts as ever. On leaving, however
    that comes about, the terminal is as it was.

    Args:
        descriptor: of the terminal; the standard input by default.

    Raises:
        ConfigError: on entering, where that is not a terminal.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self.descriptor = descriptor
        self._before: list[Any] = []

    def __enter__(self) -> Keyboard:
        self.descriptor = _terminal(self.descriptor)
        import termios
        import tty

        self._before = termios.tcgetattr(self.descriptor)
        tty.setcbreak(self.descriptor)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import termios

        with contextlib.suppress(termios.error):  # the terminal is gone
            termios.tcflush(self.descriptor or 0, termios.TCIFLUSH)  # else the shell gets what was pressed too late
            termios.tcsetattr(self.descriptor or 0, termios.TCSANOW, self._before)

    def key(self, seconds: float | None) -> str | None:
        """The next key in lower case, waiting for it some seconds at most, or for ever.

        None where there was none, or one that writes nothing, such as an arrow; `QUIT` where the terminal is gone.
        """
        descriptor = self.descriptor or 0
        if not select.select([descriptor], [], [], seconds)[0]:
            return None
        try:
            pressed = os.read(descriptor, 1)
            if pressed == b"\x1b":  # the first of what an arrow or another such key sends at once
                while select.select([descriptor], [], [], 0)[0]:
                    os.read(descriptor, 1)
                return None
        except OSError:
            return QUIT
        return pressed.decode("latin-1").lower() if pressed else QUIT


def _terminal(descriptor: int | None) -> int:
    """The descriptor, if it is a terminal's."""
    try:
        import termios  # noqa: F401  # not everywhere

        found = sys.stdin.fileno() if descriptor is None else descriptor
        known = os.isatty(found)
    except (ImportError, OSError, ValueError, AttributeError):
        found, known = -1, False
    if not known:
        raise ConfigError(
            "human: the standard input is not a terminal, so keys cannot be read",
            remedy="play in a terminal, without a pipe and not in the background, or let another agent play",
        )
    return found


class HumanFighter:
    """A person in a fight, a key of `KEYS` for each move: `live.play_live` shows the fight and reads the keys.

    Args:
        name: in the record.
    """

    def __init__(self, name: str = "human") -> None:
        self.name = name

    def answer(self, questions: Sequence[Turn]) -> list[Action]:
        """Refused: the fight goes on while a person thinks, and only `live.play_live` shows that.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"{self.name}: a person fights in real time, one fight at a time, not in a tournament",
            remedy="call tenfold.arena.live.play_live",
        )


class HumanTrader:
    """A person in a market: reads each question as text, and presses one key for the answer.

    Args:
        name: in the record.
        console: where questions are shown; the terminal by default.
        keyboard: where keys come from; the standard input by default.
        clock: seconds, from any start.

    >>> class Prepared:
    ...     def __enter__(self): return self
    ...     def __exit__(self, *error): pass
    ...     def key(self, seconds): return "s"
    >>> times = iter([5.0, 6.5])
    >>> person = HumanTrader(console=Console(quiet=True), keyboard=Prepared(), clock=lambda: next(times))
    >>> person.answer([Turn("You trade.", "AAA jumped up.", ("sell", "pass"))])
    [Action(text='sell', choice='sell', seconds=1.5, prompt_tokens=0, tokens=0)]
    """

    def __init__(
        self,
        name: str = "human",
        console: Console | None = None,
        keyboard: Keys | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.name = name
        self.console = console or Console()
        self.keyboard = keyboard or Keyboard()
        self.clock = clock
        self._told = ""  # the rules that were shown

    def answer(self, questions: Sequence[Turn]) -> list[Action]:
        """An answer for each question, one after the other, with the seconds from its showing to the key.

        Raises:
            ConfigError: the standard input is not a terminal.
            KeyboardInterrupt: the person quits.
        """
        return [self._answer(question) for question in questions]

    def _answer(self, question: Turn) -> Action:
        keys = answer_keys(question.answers)
        with self.keyboard as keyboard:
            if question.rules != self._told:
                self._told = question.rules
                self._show(question.rules)
            offered = "   ".join(f"{key} {answer}" for key, answer in keys.items())
            self._show(f"\n{question.state}\n[ {offered}   {QUIT} quits ]")
            shown = self.clock()
            while (pressed := keyboard.key(None)) not in keys:
                if pressed == QUIT:
                    raise KeyboardInterrupt
            seconds = self.clock() - shown
        choice = keys[str(pressed)]
        self._show(f"{choice} after {seconds:.2f} s")
        return Action(choice, choice, seconds)

    def _show(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def answer_keys(answers: Sequence[str]) -> dict[str, str]:
    """A key for each answer: its first letter where no two begin alike, else digits and then letters.

    >>> answer_keys(("sell", "pass"))
    {'s': 'sell', 'p': 'pass'}
    >>> answer_keys(("hold", "buy AAA", "buy BBB"))
    {'1': 'hold', '2': 'buy AAA', '3': 'buy BBB'}

    Raises:
        ConfigError: more answers than keys.
    """
    letters = [answer[:1].lower() for answer in answers]
    if len(set(letters)) < len(answers) or QUIT in letters:
        letters = [key for key in "123456789abcdefghijklmnopqrstuvwxyz" if key != QUIT]
    if len(answers) > len(letters):
        raise ConfigError(
            f"human: {len(answers)} answers, and {len(letters)} keys", remedy="play in a market of fewer tickers"
        )
    return dict(zip(letters, answers, strict=False))
