"""``python-reference``: the language reference that every CPython carries for ``help()``, as rows of text."""

from __future__ import annotations

from tenfold.errors import MissingDependencyError

_SHORTEST_PARAGRAPH = 40
_SHORTEST_TOPIC = 200


def python_reference() -> tuple[dict[str, str], tuple[str, ...]]:
    """The topics of ``pydoc_data``, sorted by name, each paragraph in one topic only.

    Many topics are excerpts of longer ones (``sequence-types`` stands whole in ``specialnames``). Split by topic,
    held-out text would then also be training text and a lower perplexity would only show memory. So a paragraph
    (of 40 characters or more) that several topics share stays in the longest of them, and a topic of which fewer than
    200 characters remain is left out. Nothing else is changed.

    Returns:
        topic -> text, and sentences that say how much was left out.

    Raises:
        MissingDependencyError: when this Python was built without ``pydoc_data``.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise MissingDependencyError(
            "python-reference: this Python has no module pydoc_data",
            remedy="install the full Python (on Debian: apt install libpython3-stdlib), or give a file",
        ) from None
    kept, repeated = without_repeats(topics)
    shorter = {name: text for name, text in kept.items() if len(text) >= _SHORTEST_TOPIC}
    left_out = sorted(set(topics) - set(shorter))
    note = (
        f"python-reference: {repeated} paragraphs that also stand in a longer topic were left out, so that "
        f"held-out text is never training text; of {len(topics)} topics {len(left_out)} vanish with them: "
        f"{', '.join(left_out)}."
    )
    return dict(sorted(shorter.items())), (note,)


def without_repeats(topics: dict[str, str]) -> tuple[dict[str, str], int]:
    r"""Keep each paragraph of 40 characters or more only in the longest text that has it.

    Returns:
        the shortened texts, and how many paragraphs were left out.

    >>> long, short = "A sentence that both of the topics contain.", "Another sentence, which only one contains."
    >>> without_repeats({"a": long, "b": long + "\n\n" + short})[0]
    {'b': 'A sentence that both of the topics contain.\n\nAnother sentence, which only one contains.', 'a': ''}
    """
    seen: set[str] = set()
    kept: dict[str, str] = {}
    repeated = 0
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = []
        own: set[str] = set()
        for paragraph in topics[name].split("\n\n"):
            key = " ".join(paragraph.split())
            if key in seen:
                repeated += 1
                continue
            if len(key) >= _SHORTEST_PARAGRAPH:
                own.add(key)
            paragraphs.append(paragraph)
        seen |= own
        kept[name] = "\n\n".join(paragraphs)
    return kept, repeated
