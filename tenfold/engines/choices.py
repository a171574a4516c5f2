"""Texts to choose from: as tokens for transformers, as a grammar or an expression for servers; torch-free.

What is written is known before it is complete: as soon as only one text can still be meant, writing may end.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from tenfold.errors import ConfigError


class ChoiceTokens:
    """Which tokens may come next, so that one of some texts is written, and which text it is.

    Args:
        choices: the texts.
        sequences: the tokens of each, one or more.
        ends: tokens that end a turn: they decide between a text and a longer one that begins with it.

    Raises:
        ConfigError: two texts of the same tokens; a text that begins another one where no token ends a turn.

    >>> tokens = ChoiceTokens(("low", "low guard", "wait"), ([5], [5, 6, 7], [8, 9]), [2])
    >>> sorted(tokens.following([])), sorted(tokens.following([5]))
    ([5, 8], [2, 6])
    >>> tokens.chosen([8]), tokens.chosen([5]), tokens.chosen([5, 2]), tokens.chosen([5, 6])
    ('wait', None, 'low', 'low guard')
    """

    def __init__(self, choices: Sequence[str], sequences: Sequence[Sequence[int]], ends: Collection[int]) -> None:
        self.choices, self.sequences, self.ends = tuple(choices), [list(ids) for ids in sequences], frozenset(ends)
        for at, ids in enumerate(self.sequences):
            for other in range(len(self.sequences)):
                if other == at or self.sequences[other][: len(ids)] != ids:
                    continue
                pair = f"{self.choices[at]!r} and {self.choices[other]!r}"
                if self.sequences[other] == ids:
                    raise ConfigError(f"choices: {pair} are the same tokens to this model", "give one of them")
                if not self.ends:
                    raise ConfigError(
                        f"choices: {pair} begin alike, and this model has no token that ends a turn",
                        remedy="give texts none of which begins another one",
                    )

    def following(self, written: Sequence[int]) -> set[int]:
        """Tokens that may follow what is written; none where it begins no text."""
        length = len(written)
        possible = self._possible(written)
        complete = any(len(ids) == length for ids in possible)
        return {ids[length] for ids in possible if len(ids) > length} | (set(self.ends) if complete else set())

    def chosen(self, written: Sequence[int]) -> str | None:
        """The text that is meant, as soon as no other one can be; None until then."""
        end = next((at for at, token in enumerate(written) if token in self.ends), None)
        if end is None:
            possible = self._possible(written)
        else:
            possible = [ids for ids in self.sequences if ids == list(written[:end])]
        return self.choices[self.sequences.index(possible[0])] if len(possible) == 1 else None

    def _possible(self, written: Sequence[int]) -> list[list[int]]:
        return [ids for ids in self.sequences if ids[: len(written)] == list(written)]


def choices_grammar(choices: Sequence[str]) -> str:
    r"""A grammar of llama.cpp (GBNF) that writes exactly one of some texts.

    >>> print(choices_grammar(["yes", 'say "no"\n']))
    root ::= "yes" | "say \"no\"\x0A"
    """
    return "root ::= " + " | ".join(f'"{"".join(map(_escaped, text))}"' for text in choices)


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    return character if character.isprintable() else _code(ord(character))


def _code(point: int) -> str:
    """As llama.cpp's grammars write a character by its number."""
    return f"\\x{point:02X}" if point < 0x100 else f"\\u{point:04X}" if point < 0x10000 else f"\\U{point:08X}"


def choices_pattern(choices: Sequence[str]) -> str:
    r"""A regular expression that matches exactly some texts, for servers that take one.

    >>> print(choices_pattern(["a+b", "c d"]))
    (a\+b|c d)
    """
    # re.escape also escapes spaces and dashes, which not every other dialect takes
    return "(" + "|".join(re.sub(r"([\\.^$*+?{}()|[\]])", r"\\\1", text) for text in choices) + ")"


def decisive(choices: Sequence[str]) -> dict[str, str]:
    """For each text its shortest beginning that stands in no other text, where there is one: a place to stop writing.

    >>> decisive(["low", "low guard", "jab", "jump"])
    {'low ': 'low guard', 'ja': 'jab', 'ju': 'jump'}
    """
    found = {}
    for text in choices:
        others = [other for other in choices if other != text]
        beginnings = (text[:length] for length in range(1, len(text) + 1))
        first = next((part for part in beginnings if not any(part in other for other in others)), None)
        if first is not None:
            found[first] = text
    return found
