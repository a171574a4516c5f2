"""What an agent may answer: 16 moves, each some frames of input.

Source: the specification of the latency arena, 7.3.
"""

from __future__ import annotations

from tenfold.arena.fighting.moves import BACKWARD, FIRST_ATTACK, FORWARD, HIGH, JUMP_FORWARD, LOW, MOVES, NEUTRAL

Plan = tuple[int, ...]
"""Inputs of consecutive frames, places in `moves.INPUTS`."""

NOTHING: Plan = (NEUTRAL,)

PLANS: dict[str, Plan] = {
    "close": (FORWARD,) * 16 + NOTHING,
    "away": (BACKWARD,) * 16 + NOTHING,
    "stand guard": (HIGH,) + NOTHING * 6,
    "low guard": (LOW,) + NOTHING * 6,
    "jump in": (JUMP_FORWARD, *NOTHING),
    "wait": NOTHING * 11,
    **{name: (FIRST_ATTACK + place, *NOTHING) for place, name in enumerate(MOVES)},
}
"""The inputs of each answer; the last frame is neutral."""

ANSWERS: tuple[str, ...] = tuple(PLANS)

ALIASES: dict[str, str] = {
    "move closer": "close",
    "move away": "away",
    "jump closer": "jump in",
    "jump away": "away",
    "fireball": "bolt",
    "megapunch": "upper",
    "hurricane": "spin",
    "low punch": "jab",
    "medium punch": "strong",
    "high punch": "fierce",
    "low kick": "short",
    "medium kick": "sweep",
    "high kick": "axe",
}
"""The paper's names, and which of ours stands in for each."""


def named_move(text: str) -> str | None:
    """The answer that a text names, whatever its case; None where it names none.

    >>> named_move("- Fireball"), named_move("Med kick."), named_move("Dance")
    ('bolt', 'sweep', None)
    """
    words = text.strip().lstrip("-*").strip().rstrip(".!").lower().replace("_", " ").split()
    if words and words[-1] in ("punch", "kick"):
        words[0] = {"lower": "low", "med": "medium"}.get(words[0], words[0])
    name = " ".join(words)
    name = ALIASES.get(name, name)
    return name if name in PLANS else None
