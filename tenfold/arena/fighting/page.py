"""Fights as a page to look at: every frame drawn, and what each agent saw, said and did, by the time that it took."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tenfold.arena.fighting.moves import MOVES
from tenfold.arena.fighting.plans import NOTHING, PLANS
from tenfold.arena.fighting.play import Decision, FightRecord, frames_of, replay
from tenfold.arena.fighting.question import DOING
from tenfold.arena.fighting.rules import (
    ATTACKING,
    BLOCKING,
    BOLT_REACH,
    FIELDS,
    FRAMES_PER_SECOND,
    FULL,
    HEALTH,
    IDLE,
    JUMPING,
    LAST_ACTIVE,
    LENGTH_BLOCKED,
    LENGTH_HIT,
    LENGTH_MISSED,
    LYING,
    MODE,
    PIXEL,
    RETREATING,
    STAGE,
    STARTUP,
    STUNNED,
    WALKING,
)
from tenfold.arena.replay_page import Pieces, packed, replay_page
from tenfold.errors import ConfigError, DataError
from tenfold.files import write_text


def fight_page(records: Sequence[FightRecord], path: Path) -> None:
    """Write fights to one HTML file, which shows them frame by frame, each chosen from a list.

    Args:
        records: one or more; about 0.1 to 0.4 MB each.
        path: of the file.

    Raises:
        ConfigError: no fight.
        DataError: inputs that do not lead to the health that the record ends with.
        OSError: the file cannot be written.

    >>> import tempfile
    >>> from tenfold.arena.fighting.play import play_fight
    >>> from tenfold.arena.fighting.scripted import ScriptedFighter
    >>> record = play_fight((ScriptedFighter(1.0), ScriptedFighter(0.2)), seed=0)
    >>> page = Path(tempfile.mkdtemp()) / "fight.html"
    >>> fight_page([record], page)
    >>> "<title>scripted:1" in page.read_text()
    True
    """
    if not records:
        raise ConfigError("records: none are given", remedy="give one or more")
    pieces = Pieces()
    games = [_game(record, pieces) for record in records]
    names = list(dict.fromkeys(name for record in records for name in record.names))
    title = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    data = {"rules": _rules(), "games": games, "pieces": pieces.all}
    write_text(path, replay_page("fight", title, data))


def _rules() -> dict[str, Any]:
    """What of the rules is drawn; lengths in pixels and frames."""
    lengths = zip(LENGTH_MISSED, LENGTH_HIT, LENGTH_BLOCKED, strict=True)
    return {
        "pixel": PIXEL,
        "stage": STAGE // PIXEL,
        "full": FULL,
        "rate": FRAMES_PER_SECOND,
        "boltReach": BOLT_REACH // PIXEL,
        "fields": FIELDS,
        "doing": DOING,
        "modes": {
            "idle": IDLE,
            "walking": WALKING,
            "retreating": RETREATING,
            "attacking": ATTACKING,
            "jumping": JUMPING,
            "stunned": STUNNED,
            "blocking": BLOCKING,
            "lying": LYING,
        },
        "moves": [
            {
                "name": name,
                "startup": STARTUP[place],
                "lastActive": LAST_ACTIVE[place],
                "lengths": length,  # by what it touched: nothing, a fighter, a guard
                "reach": max(move.reach, 0),
                "level": move.height,
                "antiAir": move.anti_air,
            }
            for place, ((name, move), length) in enumerate(zip(MOVES.items(), lengths, strict=True))
        ],
    }


def _game(record: FightRecord, pieces: Pieces) -> dict[str, Any]:
    states: tuple[list[list[int]], list[list[int]]] = ([], [])
    for fight in replay(record.inputs, record.bell):
        for side in (0, 1):
            states[side].append(fight.fighters[side])
    ends = tuple(side[-1][HEALTH] for side in states)
    if ends != record.health:
        raise DataError(
            f"fight of seed {record.seed}: its inputs end with health {ends}, the record with {record.health}",
            remedy="play it again; it was written by other rules, or changed",
        )
    modes = [[state[MODE] for state in side] for side in states]
    return {
        "names": record.names,
        "result": _result(record),
        "seed": record.seed,
        "frames": len(states[0]) - 1,
        "bell": record.bell,
        "fighters": [[packed(column) for column in zip(*side, strict=True)] for side in states],
        "decisions": [[_decision(each, modes[side], pieces) for each in record.decisions[side]] for side in (0, 1)],
    }


def _decision(decision: Decision, modes: Sequence[int], pieces: Pieces) -> dict[str, Any]:
    """All times are frames that were over."""
    return {
        "asked": decision.frame,
        "lands": decision.frame + frames_of(decision.seconds),
        "begins": decision.begins,
        "ends": _end(decision, modes),
        "seconds": decision.seconds,
        "move": decision.move,
        "saw": pieces.places(decision.saw),
        "said": pieces.places(decision.said),
    }


def _end(decision: Decision, modes: Sequence[int]) -> int | None:
    """When the move is over and its fighter free again; the fight's end at the latest."""
    if decision.begins is None:
        return None
    at = decision.begins + len(NOTHING if decision.move is None else PLANS[decision.move])
    while at < len(modes) and modes[at] > RETREATING:
        at += 1
    return min(at, len(modes) - 1)


def _result(record: FightRecord) -> str:
    seconds = f"{record.frames / FRAMES_PER_SECOND:.1f} s"
    how = "by knock-out" if 0 in record.health else "on time"
    ends = "A draw" if record.winner is None else f"{record.names[record.winner]} wins"
    unrated = "" if record.rated else "; not rated, since an agent gave no valid answer"
    return f"{ends} {how} after {seconds}, {record.health[0]} to {record.health[1]} health{unrated}"
