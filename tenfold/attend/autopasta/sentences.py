"""Sentences of a text as character spans: what evidence is looked for among."""

from __future__ import annotations

import re

SINGLE_QUOTES = "'`´‘’‚‛‹›′‵＇❛❜"
DOUBLE_QUOTES = '"“”„‟«»″‶〝〞〟＂❝❞「」『』｢｣'
QUOTE = f"[{re.escape(SINGLE_QUOTES + DOUBLE_QUOTES)}]"
"""The pattern of one quotation mark of any alphabet."""

_LINE = re.compile(r"[^\n\r\v\f\x85\u2028\u2029]+")
# A run of stops with the quotes, brackets and reference marks that close on it.  Possessive and anchored at the start
# of the run, so that a table of contents full of dots stays linear.
_CLOSER = rf"(?:{QUOTE}|[)\]}}）*_]|\[\w{{1,4}}\])"
_STOP = re.compile(
    rf"(?<![.!?…؟।])(?P<stop>[.!?…؟।]++){_CLOSER}*+(?=\s)"
    rf"|(?P<wide>[。！？｡]++)(?:(?![「『｢“‘«‹〝]){_CLOSER})*+"  # with no space between, what opens belongs to the next
)
_NEXT = re.compile(r"(?!\s*[,;])[\W_]{0,16}+(?P<word>[^\W_]+)(?P<whole>(?=[\s,'’]|\Z))?")
_LAST_WORD = re.compile(r"[^\W_]+(?:['’.][^\W_]+)*\Z")
_ENUMERATOR = re.compile(r"[(\[]?(?:\d{1,3}(?:\.\d{1,3})*|[A-Za-z]|[ivxlc]{1,4}|[IVXLC]{1,4})")
_DOTTED = re.compile(r"(?:[^\W\d_]{1,2}\.)+[^\W\d_]{1,2}")  # U.S, p.m, Ph.D
# Always followed by what they belong to.
_OPENING = frozenset(
    """
    dr mr mrs ms mx prof rev gen col sgt capt cpt lt maj cmdr adm gov sen rep pres hon fr mt messrs supt insp e.g
    i.e cf viz vs v ca approx esp incl
    """.split()  # noqa: SIM905
)
# Followed by a number or by a new sentence.
_NUMBERED = frozenset(
    """
    no nos fig figs eq eqs ref refs tab vol vols ch chap sec p pp par est jan feb mar apr jun jul aug sep sept oct
    nov dec
    """.split()  # noqa: SIM905
)
# Inside a name, or the end of it.
_CLOSING = frozenset("jr sr inc ltd co corp bros st ave blvd rd ft dept univ assn al ed eds esq".split())  # noqa: SIM905
# Words that begin a sentence and hardly ever continue a name.  "I" is left out: "At 5 p.m. I left."
_STARTERS = frozenset(
    """
    The He She It They We You This That These Those There Then His Her Its Their Our My In On At By For From After
    Before When While If Although Though However But And Or So As A An What Who Why How Where Which With Since Until
    During Because Many Most Some Several Also Today Now Later Yet
    """.split()  # noqa: SIM905
)


def sentences(context: str) -> list[tuple[int, int]]:
    r"""Sentences of a context as character spans (AutoPASTA's input; the paper leaves the splitter open).

    A line break always ends a sentence.  A run of ``. ! ? …`` with the quotes, brackets and marks like ``[1]`` that
    close on it ends one when white space and a capital, digit or caseless letter follow; the CJK stops need no space.
    A full stop does not end a sentence

    - after a title (``Dr.``) or a linking abbreviation (``e.g.``, ``v.``), ever;
    - after ``No.``, ``Fig.``, ``Jan.``, ``c.`` and their like before a number (``No. 5``);
    - after an enumerator that opens the sentence (``1. First``), hence not after an answer of one bare number either;
    - after an initial, ``U.S.``, ``p.m.``, ``Inc.`` and their like, unless the next word clearly begins a sentence
      (``the U.S. He left`` splits, ``the U.S. Open`` does not; nor does ``5 p.m. I left``, which may be one sentence).

    In a context without one capital letter, lower-case letters begin sentences.

    Args:
        context: any text.

    Returns:
        ``[lo, hi)`` pairs, ordered and disjoint, without outer white space; together they cover every character that
        is not white space.  Empty for an empty or blank context.

    Example:
        >>> text = "Dr. Smith won the U.S. Open! No.\nIt was 3.14 m."
        >>> [text[lo:hi] for lo, hi in sentences(text)]
        ['Dr. Smith won the U.S. Open!', 'No.', 'It was 3.14 m.']
    """
    cased = any(character.isupper() for character in context)
    spans: list[tuple[int, int]] = []
    for line in _LINE.finditer(context):
        begin, last = line.span()
        for stop in _STOP.finditer(context, begin, last):
            following = _NEXT.match(context, stop.end(), last)
            if following and _ends(context, begin, stop, following, cased):
                spans.append(_strip(context, begin, stop.end()))
                begin = stop.end()
        spans.append(_strip(context, begin, last))
    return [(lo, hi) for lo, hi in spans if lo < hi]


def _strip(context: str, lo: int, hi: int) -> tuple[int, int]:
    """The span without outer white space."""
    while lo < hi and context[lo].isspace():
        lo += 1
    while lo < hi and context[hi - 1].isspace():
        hi -= 1
    return lo, hi


def _ends(context: str, begin: int, stop: re.Match[str], following: re.Match[str], cased: bool) -> bool:
    """Whether the stop ends the sentence that begins at ``begin``."""
    word = following["word"]
    if cased and word[0].islower() and word.islower():  # "iPhone" may begin a sentence
        return False
    if stop["stop"] != ".":
        return True
    head = context[max(begin, stop.start() - 32) : stop.start()]
    if _ENUMERATOR.fullmatch(head.strip()):
        return False
    found = _LAST_WORD.search(head)
    if found is None:
        return True
    before = found[0].strip("'’")
    name = before.lower()
    if name in _OPENING:
        return False
    one_letter = len(before) == 1 and before.isalpha()
    if name in _NUMBERED or (one_letter and before.islower()):
        return not (word[0].isdigit() or re.fullmatch("[IVXLC]{2,}", word))
    if name in _CLOSING or _DOTTED.fullmatch(before) or (one_letter and before.isupper()):
        return word in _STARTERS and following["whole"] is not None
    return True
