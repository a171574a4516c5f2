"""Multiple choice: the option that the model finds most likely after the prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tenfold.data.encode import pad_id
from tenfold.data.rows import Choice
from tenfold.data.tokens import tokens_within
from tenfold.errors import DataError
from tenfold.models.quantised import number_format
from tenfold.models.scoring import Tell, Window, score
from tenfold.stage.results import Metric, Result


@dataclass(frozen=True)
class Choices:
    """What was chosen.

    Args:
        result: the figures for the report.
        log_likelihoods: for each item ``[options]``, nats, float64.
        correct: for each item, whether the most likely option is right.
        correct_normalised: the same with log-likelihoods divided by the option's length in UTF-8 bytes.
    """

    result: Result
    log_likelihoods: tuple[torch.Tensor, ...]
    correct: tuple[bool, ...]
    correct_normalised: tuple[bool, ...]


def multiple_choice(
    model: Any,
    tokenizer: Any,
    items: Sequence[Choice],
    *,
    batch_size: int = 8,
    subject: str = "model",
    progress: Tell | None = None,
) -> Choices:
    """Score every option after its prompt.

    A space stands between prompt and option unless either brings white space. They are tokenised together, and white
    space at the end of the prompt belongs to the option, as in lm-evaluation-harness. Where the end of the prompt
    merges with an option, all options are scored from that token on. Of equally likely options the first counts as
    chosen.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        items: the questions.
        batch_size: options per forward pass.
        subject: which model this is, for the report.
        progress: called with options done and options in all.

    Returns:
        ``accuracy`` by log-likelihood and ``accuracy_normalised`` by log-likelihood per byte, with standard errors.

    Raises:
        DataError: for no items, or an option without a token of its own.

    Example:
        >>> item = Choice("1", "The sky is", ("blue", "a fish"), 0)
        >>> multiple_choice(model, tokenizer, [item]).correct  # doctest: +SKIP
        (True,)
    """
    if not items:
        raise DataError("no items to choose in", remedy="give at least one")
    windows = []
    for item in items:
        windows += _windows(tokenizer, item)
    scores = iter(score(model, windows, pad_id=pad_id(tokenizer), batch_size=batch_size, progress=progress))
    likelihoods, correct, normalised = [], [], []
    for item in items:
        found = torch.stack([-next(scores).sum() for _ in item.options])
        lengths = torch.tensor([max(1, len(option.strip().encode())) for option in item.options])
        likelihoods.append(found)
        correct.append(int(found.argmax()) == item.answer)
        normalised.append(int((found / lengths).argmax()) == item.answer)
    metrics = (share("accuracy", correct), share("accuracy_normalised", normalised))
    settings = {
        "batch_size": batch_size,
        "dtype": number_format(model),
        "normalised_by": "UTF-8 bytes",
    }
    return Choices(
        result=Result(task="multiple_choice", subject=subject, metrics=metrics, settings=settings),
        log_likelihoods=tuple(likelihoods),
        correct=tuple(correct),
        correct_normalised=tuple(normalised),
    )


def share(name: str, values: Sequence[float | bool]) -> Metric:
    """The mean of values in [0, 1], more being better, with its standard error ``s / sqrt(n)``.

    >>> share("accuracy", [True, False]).stderr
    0.5
    """
    count = len(values)
    mean = sum(values) / count
    stderr = None
    if count > 1:
        stderr = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return Metric(name=name, value=mean, count=count, stderr=stderr, better="higher")


def _windows(tokenizer: Any, item: Choice) -> list[Window]:
    """A window for each option; all score from the same token on."""
    prompt = item.prompt.rstrip()
    space = item.prompt[len(prompt) :]
    found = []
    for option in item.options:
        whole = prompt + (space or ("" if option[0].isspace() else " ")) + option
        ids, inside = tokens_within(tokenizer, whole, [(len(prompt), len(whole))])
        if inside[0] or not any(inside):
            raise DataError(
                f"row {item.id!r}: {option!r} has no token of its own after {prompt[-40:]!r}",
                remedy="mend or remove the row",
            )
        found.append((ids[: len(ids) - inside[::-1].index(True)], inside.index(True)))
    start = min(first for _, first in found)
    return [Window(ids, start) for ids, _ in found]
