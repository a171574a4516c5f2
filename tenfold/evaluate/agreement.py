"""How near the predictions of two models are, token by token: what a change of the weights did, before any task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenfold.evaluate.perplexity import document_sums, ratio
from tenfold.models.inference import evaluating, input_device
from tenfold.stage.results import Metric, Result


@dataclass(frozen=True)
class Agreement:
    """Of two models on the same texts.

    Args:
        result: the figures for the report.
        kl: mean divergence of the second model's predictions from the first's, nats a token.
        same: share of tokens for which both find the same next one likeliest.
        kl_of_texts: ``[texts]``, the sum over the tokens of each, float64.
        tokens: ``[texts]``, predictions in each.
    """

    result: Result
    kl: float
    same: float
    kl_of_texts: Tensor
    tokens: Tensor


@torch.no_grad()
def agreement(
    first: Any,
    second: Any,
    texts: Sequence[Tensor],
    *,
    subject: str = "after",
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Agreement:
    r"""Mean :math:`KL(p\Vert q)` of the predictions, and how often the likeliest token is the same.

    Args:
        first: gives p; both are causal models with one vocabulary.
        second: gives q.
        texts: token ids, ``[tokens]`` each, 2 or more.
        subject: what the second model is called in the report.
        tell: hears of the texts.

    >>> from tenfold.models.tiny import tiny_model
    >>> model = tiny_model("llama").model
    >>> found = agreement(model, model, [torch.arange(5, 25), torch.arange(9, 40)])
    >>> found.kl, found.same, found.tokens.tolist()
    (0.0, 1.0, [20.0, 31.0])
    """
    kl, same, owner = [], [], []
    with evaluating(first), evaluating(second):
        for index, ids in enumerate(texts):
            p, q = (one(input_ids=ids[None].to(input_device(one))).logits[0].double().cpu() for one in (first, second))
            before, after = p.log_softmax(-1), q.log_softmax(-1)
            kl.append((before.exp() * (before - after)).sum(-1).clamp_min(0))
            same.append((p.argmax(-1) == q.argmax(-1)).double())
            owner.append(torch.full((len(ids),), index))
            tell(index + 1, len(texts))
    document = torch.cat(owner)
    sums, counts = document_sums(torch.cat(kl), document)
    shares, _ = document_sums(torch.cat(same), document)
    (mean, error), (alike, doubt) = ratio(sums, counts), ratio(shares, counts)
    tokens = int(counts.sum())
    metrics = (
        Metric(name="kl", value=mean, unit="nats/token", count=tokens, stderr=error, better="lower"),
        Metric(name="same_likeliest_token", value=alike, count=tokens, stderr=doubt, better="higher"),
    )
    settings = {"texts": len(texts), "tokens": tokens}
    result = Result(task="agreement", subject=subject, metrics=metrics, settings=settings)
    return Agreement(result, mean, alike, sums, counts)
