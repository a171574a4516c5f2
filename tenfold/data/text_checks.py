"""Whether a text keeps to the format that was asked for, and whether it still reads like text.

The metrics of PASTA's tasks (arXiv 2311.02262; definitions in section 4 of its specification), which every method that
steers a model can use. An empty answer satisfies none of them.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from tenfold.errors import DataError

_SUBJECTS = frozenset({"she", "he"})
_PRONOUNS = _SUBJECTS | {"her", "him", "hers", "his", "herself", "himself"}


def json_valid(text: str) -> bool:
    """Whether some part of the text, from a ``{`` to a ``}``, is JSON.

    >>> json_valid('Sure: {"a":1} ok'), json_valid("{a:1}"), json_valid("")
    (True, False, False)
    """
    return any(True for _ in _objects(text))


def json_contains(text: str, target: str) -> bool:
    """Whether a JSON object in the text has a string among its values, however deep, that contains the target.

    Letter case is ignored; keys do not count.

    Raises:
        DataError: an empty target, which everything would contain.

    >>> json_contains('{"x":{"occupation":"Doctor"}}', "doctor"), json_contains('{"doctor": 1}', "doctor")
    (True, False)
    """
    if not target:
        raise DataError("json_contains: the target is empty", remedy="give the text that the answer should hold")
    wanted = target.casefold()
    return any(wanted in value.casefold() for found in _objects(text) for value in _strings(found))


def pronouns_changed(text: str) -> tuple[bool, bool]:
    """Whether no whole word *she* or *he* is left, and whether none of all their forms is.

    A text without any word gives (False, False): who answers nothing has changed nothing.

    >>> pronouns_changed("They said her book"), pronouns_changed("They said the theme"), pronouns_changed(" ")
    ((True, False), (True, True), (False, False))
    """
    words = set(re.findall(r"[^\W_]+", text.casefold()))
    return bool(words) and not words & _SUBJECTS, bool(words) and not words & _PRONOUNS


def fluency(texts: Sequence[str]) -> float:
    """Entropy of word pairs and triples in bits, ``(2/3 H2 + 4/3 H3) / 2``, mean over the texts.

    Text that repeats itself scores low. Words and punctuation marks count alike; compare texts of similar length only,
    since longer ones score higher.

    Raises:
        DataError: no text.

    >>> round(fluency(["a b c d"]), 3), fluency(["so so so so so so"])
    (1.195, 0.0)
    """
    if not texts:
        raise DataError("fluency: no texts", remedy="give at least one")
    return sum((2 / 3 * _entropy(text, 2) + 4 / 3 * _entropy(text, 3)) / 2 for text in texts) / len(texts)


def repeats(text: str) -> bool:
    """Whether a text goes round in circles: the same four words three times, or a short piece six times in a row.

    A rule for a warning, not a measure: it sees loops as greedy decoding falls into, and may see one in a refrain.

    >>> repeats("The sky is blue. " * 3), repeats("Ha" + "ha" * 6), repeats("| --- | --- |"), repeats("a b c a b c")
    (True, True, False, False)
    """
    words = re.findall(r"\w+", text.casefold())
    counts = Counter(zip(*(words[start:] for start in range(4)), strict=False))
    return max(counts.values(), default=0) >= 3 or re.search(r"([^\W\d_]\S{0,7}?)\1{5}", text.casefold()) is not None


def _entropy(text: str, n: int) -> float:
    words = re.findall(r"\w+|[^\w\s]", text)
    counts = Counter(zip(*(words[start:] for start in range(n)), strict=False))
    total = counts.total()
    return sum(count / total * math.log2(total / count) for count in counts.values())


def _objects(text: str) -> Iterator[dict[str, Any]]:
    decoder = json.JSONDecoder(parse_constant=_no_json)
    for match in re.finditer(r"\{", text):
        try:
            yield decoder.raw_decode(text, match.start())[0]
        except (ValueError, RecursionError):
            continue


def _no_json(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
