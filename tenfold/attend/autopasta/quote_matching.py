"""Evidence: a model's free-text quote found again among the sentences of a context.

The part of AutoPASTA (arXiv 2409.10790, steps 1 and 2) that needs no model: what the model wrote says *where* to look
and is never used as text.  A wrong mark costs more than none, so whatever cannot be found again yields no evidence.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal

import torch

from tenfold.attend.autopasta.sentences import DOUBLE_QUOTES, QUOTE, SINGLE_QUOTES, sentences
from tenfold.errors import ConfigError, DataError

Stage = Literal["exact", "normalised", "ratio", "embedding"]
Embed = Callable[[Sequence[str]], Any]

MIN_RATIO = 0.8
MIN_RARE = 0.25  # chosen on NQ's train split: nonsense is marked in 1 % (docs/results/autopasta.md)
SHORT = 3  # pieces of fewer words are headings and cells: they match anything by accident
_LAYERS = 20
_EDGE = " .,;:!?-"  # models end a quote with "..." or drop the full stop
_AUTOJUNK = 2000  # characters from which difflib may take its shortcut
_STAGES: tuple[Stage, ...] = ("exact", "normalised", "ratio", "embedding")
_TIE = 1e-6  # the same sentence at another place of a padded batch embeds this much apart

# ---- characters -----------------------------------------------------------------------------------------------------
_APOSTROPHE = re.compile(r"(?<=\w)['’](?=\w)")
_IDEOGRAPH = r"\u3040-\u30ff\u3400-\u9fff"  # scripts without spaces: each character counts as a word
_WORD = re.compile(rf"[{_IDEOGRAPH}]|[^\W{_IDEOGRAPH}]+")

_FUNCTION = frozenset(
    """
    a an the of in on at to for from by with and or but nor as is are was were be been being am do does did has have had
    it its this that these those he she they we i you his her their our my your him them us me who whom whose which what
    when where why how not no so than then there here if while also can could will would shall should may might must
    about into over under after before between during through
    """.split()  # noqa: SIM905
)

# ---- what models put around a quote ---------------------------------------------------------------------------------
_TAG = r"(?:think|thinking|thought|reasoning)"
_THINKING = re.compile(
    rf"<({_TAG})>.*?</\1>|\A(?:(?!<{_TAG}>).)*</{_TAG}>|<{_TAG}>.*\Z",  # closed; opened by the prompt; cut off
    re.DOTALL | re.IGNORECASE,
)
_LIST_MARK = re.compile(r"\A(?:(?:[-–—*•‣·>]+|#{1,6}|\(?\d{1,3}[.):]|\(?[A-Za-z]\)|\[\d{1,3}\]:?)\s+)*+")
_LEAD_IN = re.compile(
    r"\A(?:(?:sure|certainly|of course|okay|ok|yes|absolutely)\b[^\w\n]{0,4})?"
    r"(?:here\b|[^:.!?\n]{0,100}\b(?:sentences?|evidence|quote|quotation|answer|excerpt)\b)[^:.!?\n]{0,100}"
    rf"(?::|\bis\b\s*,?(?=\s*{QUOTE}))\s*",
    re.IGNORECASE,
)
_QUOTED = re.compile(rf"(?P<open>{QUOTE})(?P<inside>.*)(?P<close>{QUOTE})[.,;:!?]?", re.DOTALL)
_REFUSAL = re.compile(
    r"(?:none|nothing|unknown|unanswerable|n/?a|no answer|not (?:found|given|stated|mentioned|available|applicable)|"
    r"none of (?:the|these|them)(?: (?:above|sentences?))?|"
    r"(?:sorry,? ?(?:but )?)?i(?: am|m) (?:not sure|unsure|unable to\b.*)|"
    r"(?:sorry,? ?(?:but )?)?i (?:do not|dont|cannot|cant|can not|could not|couldnt) (?:know|tell|say|answer|find|"
    r"determine|identify|see)(?: (?:it|that|this))?(?:\b.*\b(?:answer|question|sentence|context|text|evidence)\b.*)?|"
    r"(?:there (?:is|are) |theres )?no (?:\w+ ){0,2}(?:sentences?|evidence|information|quote|match)\b.*|"
    r"the (?:given |provided )?(?:context|text|passage) (?:does not|doesnt|has no|contains no)\b.*)"
)


@dataclass(frozen=True)
class Hit:
    """A sentence of the context that a quote was mapped to.

    Args:
        start: first character of the sentence in the caller's context.
        end: one past its last character.
        score: how alike quote and sentence are by the measure of the stage: 1 for a verbatim find, the difflib ratio
            (``MIN_RATIO`` to 1), or the cosine (``min_similarity`` to 1).  Not comparable between stages.
        stage: the first rung of the cascade that found it.

    Example:
        >>> Hit(0, 14, 1.0, "exact").stage
        'exact'
    """

    start: int
    end: int
    score: float
    stage: Stage


def clean_quote(quote: str) -> str:
    """A model's quote without what models put around it.

    Taken away, as often as they occur: thinking in ``<think>`` tags (closed, cut off, or opened by the prompt), outer
    white space, list marks (``1.``, ``-``, ``[2]``), emphasis (``**``), lead-ins (``The key sentence is:``) and
    surrounding quotation marks of any alphabet.  AutoPASTA, step 1; what counts as decoration is ours.

    Args:
        quote: the generated text; any string.

    Returns:
        The rest, possibly empty; empty also for what is wrapped more than ``_LAYERS`` times, which nobody quotes.
        Cleaning twice changes nothing more.

    Example:
        >>> clean_quote("<think>Which?</think>The key sentence is: “The Nile is long.”")
        'The Nile is long.'
    """
    text = quote
    for _ in range(_LAYERS):
        shorter = _THINKING.sub(" ", text).strip().strip("*_").strip()
        shorter = _LIST_MARK.sub("", shorter, count=1)
        shorter = _unquote(_LEAD_IN.sub("", shorter, count=1))
        if shorter == text:
            return text
        text = shorter
    return ""


def _unquote(text: str) -> str:
    """Without a pair of quotation marks around the whole, or one double mark whose partner was cut off."""
    pair = _QUOTED.fullmatch(text)
    if pair:
        family = SINGLE_QUOTES if pair["open"] in SINGLE_QUOTES else DOUBLE_QUOTES
        inner = _APOSTROPHE.sub("x", pair["inside"])
        at = next((place for place, character in enumerate(inner) if character in family), None)
        # In '"A" and "B"' the first inner mark closes: the outer two are not a pair.
        opens = not at or inner[at - 1].isspace() or inner[at - 1] in "([{" + SINGLE_QUOTES + DOUBLE_QUOTES
        return pair["inside"] if opens else text
    if sum(character in DOUBLE_QUOTES for character in text) == 1:
        return text.strip(DOUBLE_QUOTES)
    return text


def is_refusal(quote: str) -> bool:
    """Whether a quote names no sentence: nothing but marks, or one of a few English ways to say that there is none.

    Small on purpose: "none", "N/A", "unknown", "not found", "I do not know" / "cannot find" (alone, or going on about
    the answer or the text), "no (relevant) sentence ...", "the context does not ...".  Other refusals are left to
    ``min_similarity``.  AutoPASTA, step 2: then the answer is not steered.

    Args:
        quote: the generated text, cleaned or not.

    Example:
        >>> is_refusal("Answer: None."), is_refusal("None of the crew survived.")
        (True, False)
    """
    text = _plain(clean_quote(quote)).strip(_EDGE)
    return not _WORD.search(text) or _REFUSAL.fullmatch(text) is not None


def bag_of_words(texts: Sequence[str]) -> torch.Tensor:
    """Counts of the words ``[a-z0-9]+`` of the lower-cased texts: the embedder that needs no model.

    Columns are the vocabulary of these texts, so only rows of one call can be compared.  AutoPASTA, step 2, takes a
    sentence-embedding model; this is the default without a further dependency.

    Args:
        texts: any strings.

    Returns:
        float64 ``[texts, words]``; a text without such a word is a row of zeros.

    Example:
        >>> bag_of_words(["The cat, the dog.", "A dog!"]).tolist()
        [[2.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0]]
    """
    counts = [Counter(re.findall("[a-z0-9]+", text.lower())) for text in texts]
    column = {word: index for index, word in enumerate(dict.fromkeys(word for count in counts for word in count))}
    table = torch.zeros(len(texts), len(column), dtype=torch.float64)
    for row, count in enumerate(counts):
        for word, number in count.items():
            table[row, column[word]] = number
    return table


def rare_words(texts: Sequence[str]) -> torch.Tensor:
    """Words weighed by how few of the texts have them: what a quote shares with one sentence alone counts most.

    ``(1 + log count) * log((n + 1) / d)`` for a word in ``d`` of ``n`` texts. So words in nearly every sentence count
    for little, and words of the quote that no sentence has lower its cosine with all of them: fluent text about
    something else stays below ``MIN_RARE``. English function words count a fifth, since in a context of a few sentences
    they look rare. Each ideograph is a word.

    Args:
        texts: any strings; quotes and sentences alike count as texts.

    Returns:
        float64 ``[texts, words]``; only rows of one call can be compared.

    Example:
        >>> texts = ["The Nile is long.", "The Nile is in Africa.", "The cat is on the mat.", "The dog is in the hut."]
        >>> cosine(rare_words(texts)[0], rare_words(texts)[1:]).argmax().item()
        0
    """
    counts = [Counter(_WORD.findall(unicodedata.normalize("NFKC", text).casefold())) for text in texts]
    having = Counter(word for count in counts for word in count)
    column = {word: index for index, word in enumerate(having)}
    table = torch.zeros(len(texts), len(column), dtype=torch.float64)
    for row, count in enumerate(counts):
        for word, number in count.items():
            weight = math.log((len(texts) + 1) / having[word]) * (0.2 if word in _FUNCTION else 1.0)
            table[row, column[word]] = (1 + math.log(number)) * weight
    return table


def matcher(quote: str, sentence: str) -> SequenceMatcher[str]:
    """Tells by its `ratio` how alike two texts are: 2 x matching characters / all characters, case kept, quote first.

    The order matters: difflib is not symmetric.  Unlike difflib's own setting, common letters count in texts of 200
    characters and more; otherwise a long sentence with one changed word would score below ``MIN_RATIO``.

    Args:
        quote: what the model wrote.
        sentence: of the context.

    Example:
        >>> round(matcher("The Nile is the longest river.", "The Nile is often called the longest river.").ratio(), 6)
        0.821918
    """
    return SequenceMatcher(None, quote, sentence, autojunk=max(len(quote), len(sentence)) > _AUTOJUNK)


def cosine(row: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Cosine of one embedding with each of several; 0 where one of the two is all zeros.

    No matrix product: equal rows give equal cosines to the last bit.

    Args:
        row: ``[features]``, float64.
        rows: ``[texts, features]``, float64.

    Returns:
        ``[texts]``, -1 to 1.

    Example:
        >>> rows = bag_of_words(["The Nile is long.", "Long is the Nile!", "Rome is old."])
        >>> cosine(rows[0], rows[1:])
        tensor([1.0000, 0.2887], dtype=torch.float64)
    """
    scale = ((row * row).sum() * (rows * rows).sum(1)).sqrt()
    return ((row * rows).sum(1) / scale.masked_fill(scale == 0, 1)).clamp(-1, 1)


def locate_quote(
    quote: str,
    context: str,
    spans: Sequence[tuple[int, int]] | None = None,
    *,
    embed: Embed = bag_of_words,
    min_similarity: float = 0.3,
    max_spans: int = 1,
    all_matches: bool = False,
) -> tuple[Hit, ...]:
    """The sentences of the context that a free-text quote means (AutoPASTA, step 2).

    Each sentence of the cleaned quote goes down a cascade until a rung finds it: verbatim within a sentence of the
    context; the same after NFKC and without regard to case, spaces and quotation marks; difflib ratio of at least
    ``MIN_RATIO``; cosine of the embeddings of at least ``min_similarity``.  A sentence equal to the quote goes before
    one that holds it; otherwise ties go to the first.  A quote that runs over several sentences means all of them.

    Pieces of fewer than ``SHORT`` words: such a quote maps to its copy, else to the one sentence that holds it as whole
    words; held by several it could mean any, and it is never embedded.  Such a sentence of the context (a heading) is
    found by copy, and embedded only as the beginning of the next one.

    Args:
        quote: the generated text.  An exact copy of a sentence of ``SHORT`` words or more counts as a quote even if it
            reads like a refusal.
        context: the caller's context.
        spans: ``[lo, hi)`` of its sentences, ordered and disjoint; by default ``sentences(context)``.
        embed: called at most once, with the open quotes and then the sentences of ``SHORT`` words or more, each with
            the headings before it; returns one row of numbers for each (list, array or tensor ``[texts, features]``).
            Rows of zeros have cosine 0. `tenfold.attend.autopasta.embed.hidden_states` makes one from the model.
        min_similarity: least cosine, -1 to 1; tune it for the embedder.
        max_spans: at most so many sentences, the surest first (earlier rung, higher score, lower index); 1 or more.
        all_matches: also return the copies of the sentences found, beyond ``max_spans``.

    Returns:
        Hits in the order of the context; empty means no evidence: answer unsteered.

    Raises:
        ConfigError: an argument out of its range, or ``embed`` returned something other than a row of finite numbers
            for each text.
        DataError: spans that are not ordered, disjoint and within the context.

    Example:
        >>> locate_quote("“the nile is long”", "The Amazon is wide. The Nile is long.")
        (Hit(start=20, end=37, score=1.0, stage='normalised'),)
    """
    _check(min_similarity, max_spans)
    spans = sentences(context) if spans is None else _checked_spans(spans, context)
    texts = [context[lo:hi] for lo, hi in spans]
    plain = [_plain(text) for text in texts]
    best: dict[int, _Rank] = {}
    pieces = _pieces(quote, texts)
    open_pieces = []
    for piece in pieces:
        found = _verbatim(piece, texts, plain) or _alike(piece, texts)
        if not found and not _short(piece):
            open_pieces.append(piece)
        for index, rank in found.items():
            best[index] = min(rank, best.get(index, rank))
    if open_pieces and not all(map(_short, texts)):
        for index, rank in _nearest(open_pieces, texts, embed, min_similarity).items():
            best[index] = min(rank, best.get(index, rank))
    chosen = dict(sorted(best.items(), key=lambda item: (item[1], item[0]))[:max_spans])
    if all_matches:
        for index, rank in list(chosen.items()):
            chosen |= {copy: rank for copy, text in enumerate(plain) if text == plain[index] and copy not in chosen}
    return tuple(Hit(*spans[index], -score, _STAGES[rung]) for index, (rung, score, _) in sorted(chosen.items()))


# What a sentence is ranked by, least first: rung of the cascade, minus the score, and its place among the sentences
# that one verbatim find runs over (0 holds most of it).
_Rank = tuple[int, float, int]


def _check(min_similarity: float, max_spans: int) -> None:
    if max_spans < 1:
        raise ConfigError(f"max_spans: {max_spans} is below 1", remedy="give 1 or more; the paper marks 1")
    if not -1 <= min_similarity <= 1:
        raise ConfigError(f"min_similarity: must be in [-1, 1], got {min_similarity}", remedy="give a cosine")


def _checked_spans(spans: Sequence[tuple[int, int]], context: str) -> list[tuple[int, int]]:
    """The caller's spans, if they are ordered, disjoint and within the context."""
    last = 0
    for number, (lo, hi) in enumerate(spans):
        if not last <= lo < hi <= len(context):
            raise DataError(
                f"spans[{number}]: [{lo}, {hi}) is not within [{last}, {len(context)}), what is left of the context",
                remedy="give ordered, disjoint spans of this very context, as sentences(context) does",
            )
        last = hi
    return [(lo, hi) for lo, hi in spans]


def _plain(text: str) -> str:
    """What stays the same when a model copies: NFKC, case folded, spaces squeezed, quotes and emphasis dropped."""
    text = unicodedata.normalize("NFKC", text.replace("´", "'")).casefold()  # NFKC makes a space and an accent of it
    text = re.sub(rf"{QUOTE}|[*_\u00ad\u200b-\u200d\u2060\ufeff]", "", text)
    text = re.sub(r"[‐‑‒–—―−]", "-", unicodedata.normalize("NFKC", text))
    return re.sub(r"\s+(?=[.,;:!?)\]])|(?<=[(\[])\s+", "", " ".join(text.split()))  # tokenised text: "left ."


def _short(text: str) -> bool:
    return sum(1 for _ in zip(range(SHORT), _WORD.finditer(text), strict=False)) < SHORT


def _pieces(quote: str, texts: Sequence[str]) -> list[str]:
    """The quote as the sentences to look for: one where the context has it as one, else cleaned and split."""
    cleaned = clean_quote(quote)
    # First as it is: a lead-in or a refusal may be what the context says.
    copies = [text for text in (quote.strip(), cleaned) if text in texts and not _short(text)]
    if copies:
        return copies[:1]
    if is_refusal(cleaned):
        return []
    if any(cleaned in text for text in texts):
        return [cleaned]
    pieces = [clean_quote(cleaned[lo:hi]) for lo, hi in sentences(cleaned)]
    return [piece for piece in dict.fromkeys(pieces) if not is_refusal(piece)]


def _verbatim(piece: str, texts: Sequence[str], plain: Sequence[str]) -> dict[int, _Rank]:
    """Rungs 1 and 2: the sentence that is the piece, else the first that holds it, else those it runs over."""
    wanted = _plain(piece).strip(_EDGE)
    for rung, (needle, where) in enumerate(((piece, texts), (wanted, plain))):
        equal = [index for index, text in enumerate(where) if needle == (text.strip(_EDGE) if rung else text)]
        if _short(piece):
            words = re.compile(rf"(?<!\w){re.escape(needle)}(?!\w)")
            inside = [index for index, text in enumerate(where) if words.search(text)]
            inside = inside if len(inside) == 1 else []
        else:
            inside = [index for index, text in enumerate(where) if needle in text]
        if equal or inside:
            return {(equal or inside)[0]: (rung, -1.0, 0)}
    return {} if _short(piece) else _running_over(wanted, plain)


def _running_over(wanted: str, plain: Sequence[str]) -> dict[int, _Rank]:
    """Rung 2 for a piece that the context breaks, say at a line end: all sentences under it, largest part first."""
    low = " ".join(plain).find(wanted)
    if low < 0:
        return {}
    parts, begin = [], 0
    for index, text in enumerate(plain):
        common = min(begin + len(text), low + len(wanted)) - max(begin, low)
        if common > 0:
            parts.append((-common, index))
        begin += len(text) + 1
    return {index: (1, -1.0, place) for place, (_, index) in enumerate(sorted(parts))}


def _alike(piece: str, texts: Sequence[str]) -> dict[int, _Rank]:
    """Rung 3: the sentence with the largest difflib ratio, where that is ``MIN_RATIO`` or more."""
    score, found = 0.0, -1
    for index, text in enumerate(texts):
        alike = matcher(piece, text)
        # The two quick ratios are upper bounds and spare most sentences the slow one.
        if min(alike.real_quick_ratio(), alike.quick_ratio()) >= max(score, MIN_RATIO):
            exact = alike.ratio()
            if exact >= MIN_RATIO and exact > score:
                score, found = exact, index
    return {found: (2, -score, 0)} if found >= 0 else {}


def _nearest(pieces: Sequence[str], texts: Sequence[str], embed: Embed, least: float) -> dict[int, _Rank]:
    """Rung 4: for each piece the sentence of the largest cosine, where that is ``least`` or more."""
    candidates, attached, heading = [], [], ""
    for index, text in enumerate(texts):
        heading += text
        if _short(text):
            heading += " "
        else:
            candidates.append(index)
            attached.append(heading)
            heading = ""
    rows = _table(embed([*pieces, *attached]), len(pieces) + len(attached))
    hits: dict[int, _Rank] = {}
    for row in rows[: len(pieces)]:
        scores = cosine(row, rows[len(pieces) :])
        first = int((scores >= scores.max() - _TIE).nonzero()[0])
        score, index = float(scores[first]), candidates[first]
        if score >= least:
            hits[index] = min((3, -score, 0), hits.get(index, (3, -score, 0)))
    return hits


def _table(rows: Any, count: int) -> torch.Tensor:
    """What an embedder returned as float64 ``[texts, features]`` on the CPU; float32 must hold it: it gets squared."""
    remedy = "return one row of finite numbers for each text, [texts, features]"
    try:
        listed = [row.detach() if isinstance(row, torch.Tensor) else torch.tensor(row) for row in rows]
        table = torch.stack(listed).to("cpu").to(torch.float64) if listed else torch.empty(0, 0)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"embed: returned no table of numbers ({error})", remedy=remedy) from error
    if table.dim() != 2 or len(table) != count:
        raise ConfigError(f"embed: returned shape {list(table.shape)} for {count} texts", remedy=remedy)
    if not bool(table.float().isfinite().all()):
        raise ConfigError("embed: returned a number that is not finite", remedy=remedy)
    return table
