"""A fight in words: what an agent is asked.

The rules come first and never change, so that a model reads them once; a few lines of state follow. After the prompt
of "Win Fast or Lose Slow" (arXiv 2505.19481): moves, hints, three examples, far or near, the opponent's side, the last
moves, who is winning. Each player is told of its own lead, and every move that is offered can be chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from tenfold.arena.agents import Turn
from tenfold.arena.fighting.fight import Fight
from tenfold.arena.fighting.moves import MOVES
from tenfold.arena.fighting.plans import ANSWERS
from tenfold.arena.fighting.rules import (
    ATTACKING,
    BOLT_WAY,
    BOLT_X,
    FIELDS,
    FRAMES,
    FRAMES_PER_SECOND,
    GUARD,
    HEALTH,
    LAST_ACTIVE,
    LYING,
    MODE,
    MOVE,
    PIXEL,
    STAMINA,
    STARTUP,
    STUNNED,
    TIME,
    X,
)

FAR = 96
"""Pixels beyond which only a bolt reaches."""
NO_MOVE = "none"

NAMES = tuple(MOVES)
DOING = ("standing", "walking forward", "walking back", "attacking", "jumping", "stunned", "blocking", "lying")


@dataclass(frozen=True)
class FightView:
    """What a scripted agent looks at: the fight, which it must not change, and which player it is."""

    fight: Fight
    side: int


def pixels_apart(fight: Fight) -> int:
    """Whole pixels between the two."""
    first, second = fight.fighters
    return abs(first[X] - second[X]) // PIXEL


def pixels_to_bolt(fight: Fight, side: int) -> int | None:
    """Whole pixels from this player to the other's bolt; None where none flies."""
    own, other = fight.fighters[side], fight.fighters[1 - side]
    return abs(other[BOLT_X] - own[X]) // PIXEL if other[BOLT_WAY] != 0 else None


def fight_question(
    fight: Fight,
    side: int,
    last_moves: tuple[str, str] = (NO_MOVE, NO_MOVE),
    *,
    seed: int = 0,
    time: float = 0.0,
    game: str = "",
) -> Turn:
    """The question that a player is asked.

    Args:
        fight: as it stands.
        side: which player is asked, 0 or 1.
        last_moves: what player 0 and player 1 did last, `plans.ANSWERS` or ``"none"``.
        seed: of what the agent draws.
        time: seconds of the fight that are over when it is asked.
        game: names the fight and the side.

    >>> print(fight_question(Fight(), 1).state)
    The opponent is on your left, 96 px away: near.
    Opponent: standing, guard high, health 1000, stamina 1000, last move none.
    You: guard high, health 1000, stamina 1000, last move none.
    Nobody leads.
    Your move:
    """
    view = FightView(fight, side)
    state = state_in_words(fight, side, last_moves) + "\nYour move:"
    rules = RULES if fight.bell == FRAMES else _until(fight.bell)
    return Turn(rules, state, ANSWERS, view, seed, time, game)


def state_in_words(fight: Fight, side: int, last_moves: tuple[str, str]) -> str:
    """The state in a few lines, as a player sees it."""
    own, other = fight.fighters[side], fight.fighters[1 - side]
    pixels = pixels_apart(fight)
    right = own[X] < other[X] or (own[X] == other[X] and side == 0)
    reach = "far" if pixels > FAR else "near"
    lines = [
        f"The opponent is on your {'right' if right else 'left'}, {pixels} px away: {reach}.",
        f"Opponent: {_doing(other)}, {_figures(other)}, last move {last_moves[1 - side]}.",
        f"You: {_figures(own)}, last move {last_moves[side]}.",
    ]
    bolt = pixels_to_bolt(fight, side)
    if bolt is not None:
        lines.append(f"The opponent's bolt is {bolt} px away.")
    lead = own[HEALTH] - other[HEALTH]
    lines.append(f"You {'lead' if lead > 0 else 'are behind'} by {abs(lead)} health." if lead else "Nobody leads.")
    return "\n".join(lines)


def _figures(fighter: list[int]) -> str:
    guard = "low" if fighter[GUARD] else "high"
    return f"guard {guard}, health {fighter[HEALTH]}, stamina {fighter[STAMINA]}"


def _doing(fighter: list[int]) -> str:
    mode = fighter[MODE]
    if mode == ATTACKING:
        move, time = fighter[MOVE], fighter[TIME]
        phase = "starting" if time <= STARTUP[move] else "hitting" if time <= LAST_ACTIVE[move] else "recovering"
        return f"{phase} {NAMES[move]}"
    if mode in (STUNNED, LYING):
        return f"{DOING[mode]} for {fighter[TIME]} more frames"
    return DOING[mode]


def _example(pixels: int, answer: str, **other: int) -> str:
    """A state made for the purpose, and a good answer to it."""
    fight = Fight()
    fight.fighters[1][X] = fight.fighters[0][X] + pixels * PIXEL
    for name, value in other.items():
        fight.fighters[1][FIELDS.index(name)] = value
    return f"{state_in_words(fight, 0, ('close', NO_MOVE))}\nYour move: {answer}"


RULES = "\n".join(
    [
        "You are the best and most aggressive player of a fighting game. Two fighters stand on a line; whoever takes"
        f" all of the other's 1000 health wins, and after {FRAMES // FRAMES_PER_SECOND} seconds whoever has more."
        " A frame is 1/60 second, and you stand still while you think.",
        "Moves:",
        "- close: walk towards the opponent",
        "- away: walk back with the guard up",
        "- stand guard: guard high, against all but low kicks and throws",
        "- low guard: guard low, against all but overheads and throws",
        "- jump in: jump towards the opponent, over bolts and most attacks",
        "- wait: stand with the guard up and gain stamina",
        *(
            f"- {name}: {move.hint}; damage {move.damage}, "
            + (f"reach {move.reach} px, " if move.reach > 0 else "")
            + f"hits in {move.startup + 1} frames, stamina {move.stamina}"
            for name, move in MOVES.items()
        ),
        "Hints: far away, close in or throw a bolt. Near, take the attack that the opponent's guard does not stop:"
        " sweep or short against a high guard, axe against a low one. Punish who is stunned or recovering from an"
        " attack. Guard against an attack that is about to hit. Below 300 stamina go away or guard: who runs out is"
        " stunned. Take the strong moves when you lead, go away and kick when you are behind.",
        "Answer with the name of one move.",
        "",
        _example(140, "bolt"),
        "",
        _example(70, "sweep"),
        "",
        _example(78, "fierce", mode=STUNNED, time=14),
    ]
)
"""What never changes: moves, hints and three examples."""


@cache
def _until(bell: int) -> str:
    """The rules of a fight with another bell."""
    return RULES.replace(f"{FRAMES // FRAMES_PER_SECOND} seconds", f"{bell / FRAMES_PER_SECOND:g} seconds", 1)
