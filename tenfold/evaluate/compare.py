"""Two models on the same tokens: what changed, and whether it could be chance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.core.statistics import t_quantile
from tenfold.errors import DataError
from tenfold.evaluate.perplexity import Perplexity, document_sums, ratio
from tenfold.stage.results import Metric, Result


@dataclass(frozen=True)
class Comparison:
    """The paired difference of two models.

    Args:
        result: the figures for the report.
        difference: mean of NLL(after) - NLL(before), nats per token; below 0 is better.
        interval: its 95 % interval, or None for one document.
        improved: share of the tokens that became more likely.
        perplexity_ratio: perplexity after / before.
    """

    result: Result
    difference: float
    interval: tuple[float, float] | None
    improved: float
    perplexity_ratio: float


def compare(before: Perplexity, after: Perplexity) -> Comparison:
    """Compare token by token, with documents as the independent observations.

    The interval is Student's t over documents with the clustered standard error: it needs no seed, gives the same
    figures every time, and with few documents it is wider than a bootstrap, which understates the spread then. It
    supposes that documents are independent and that no single one dominates.

    Raises:
        DataError: when the two were not measured on the same tokens.

    Example:
        >>> compare(before, after).perplexity_ratio  # doctest: +SKIP
        0.83
    """
    same = torch.equal(before.token_ids, after.token_ids) and torch.equal(before.document, after.document)
    if not same:
        raise DataError(
            f"the two models were scored on different tokens ({len(before.token_ids)} and {len(after.token_ids)})",
            remedy="measure both on the same texts with the same tokenizer; between tokenizers compare bits per byte",
        )
    change = after.token_nll - before.token_nll
    sums, counts = document_sums(change, before.document)
    difference, stderr = ratio(sums, counts)
    documents = len(sums)
    interval = None
    if stderr is not None:
        half = t_quantile(documents - 1) * stderr
        interval = (difference - half, difference + half)
    improved, improved_stderr = ratio(document_sums((change < 0).double(), before.document)[0], counts)
    fraction = math.exp(difference)
    tokens = len(change)
    metrics = (
        Metric(
            name="perplexity_ratio",
            value=fraction,
            count=tokens,
            stderr=None if stderr is None else fraction * stderr,
            interval=None if interval is None else (math.exp(interval[0]), math.exp(interval[1])),
            better="lower",
        ),
        Metric(
            name="nll_difference",
            value=difference,
            unit="nats/token",
            count=tokens,
            stderr=stderr,
            interval=interval,
            better="lower",
        ),
        Metric(name="tokens_improved", value=improved, count=tokens, stderr=improved_stderr, better="higher"),
    )
    subject = f"{after.result.subject} - {before.result.subject}"
    settings = {"documents": documents, "tokens": tokens, "interval": "95 %, Student's t over documents"}
    return Comparison(
        result=Result(task="perplexity", subject=subject, metrics=metrics, settings=settings),
        difference=difference,
        interval=interval,
        improved=improved,
        perplexity_ratio=fraction,
    )


def paired_metric(name: str, change: Tensor, unit: str = "") -> Metric:
    """Mean of paired differences with the 95 % interval of Student's t.

    >>> paired_metric("accuracy_difference", torch.tensor([1.0, 0.0, 1.0, 1.0])).value
    0.75
    """
    count = len(change)
    if count == 1:
        return Metric(name=name, value=float(change), unit=unit, count=1, better="higher")
    mean, error = float(change.mean()), float(change.std()) / count**0.5
    half = t_quantile(count - 1) * error
    interval = (mean - half, mean + half)
    return Metric(name=name, value=mean, unit=unit, count=count, stderr=error, interval=interval, better="higher")
