"""Perplexity of documents, with the error that documents and not tokens are the independent observations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tenfold.attend.text_marks import Marked, Marks, tokens_of
from tenfold.data.encode import RowTokens, pad_id
from tenfold.errors import ConfigError, DataError
from tenfold.models.inference import max_positions
from tenfold.models.quantised import number_format
from tenfold.models.scoring import Around, Tell, Window, score
from tenfold.stage.results import Metric, Result

ANSWERS = "answers only"
"""What the settings say is scored of conversations and completions."""


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts documents.

    Args:
        result: the figures for the report.
        nll: mean negative log-likelihood, nats per token.
        perplexity: exp(nll).
        bits_per_byte: bits per UTF-8 byte of the scored text; comparable between tokenizers.
        stderr: standard error of ``nll``, clustered by document; None for one document.
        token_nll: ``[tokens]``, nats, float64: every scored token, document after document.
        token_ids: ``[tokens]``, the scored tokens.
        document: ``[tokens]``, the index of each token's document in the texts.
    """

    result: Result
    nll: float
    perplexity: float
    bits_per_byte: float
    stderr: float | None
    token_nll: torch.Tensor
    token_ids: torch.Tensor
    document: torch.Tensor


def perplexity(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str | Marked | RowTokens],
    *,
    max_length: int,
    stride: int | None = None,
    batch_size: int = 1,
    subject: str = "model",
    progress: Tell | None = None,
    make_cache: Callable[[], Any] | None = None,
    steering: Callable[[Marks], AbstractContextManager[Any]] | None = None,
) -> Perplexity:
    """Score each document by itself, in windows that overlap.

    A window moves on by ``stride`` tokens and scores those that no earlier window scored, so each token is scored once
    and, beyond the first window, sees at least ``max_length - stride`` tokens before it. The first token of a document
    is scored only where the tokenizer puts a beginning-of-text token before it; otherwise nothing precedes it, and its
    bytes do not count either. Documents of which no token is scored are skipped and counted in the settings.

    Of conversations and completions, given as `tenfold.data.encode.row_tokens` makes them, only what training learns is
    scored: the answers and what ends them, given all that precedes them within the window. Their bytes are those of the
    answers' text as the chat template writes it; an end-of-text token behind a completion is scored and has none.

    With ``make_cache`` a window is read through a cache, `tenfold.models.scoring.STEP` tokens at a time. A token then
    sees its own step and what the cache keeps exactly as they are, and everything before as the cache holds it, as a
    token that is written does; the model's own exact cache gives the figures of a single pass.

    Args:
        model: a causal language model on any device, in any float type.
        tokenizer: its tokenizer.
        texts: documents, of which some may be marked, or tokens of rows of which only the answers are scored.
        max_length: tokens per window.
        stride: tokens between windows, below ``max_length``; half of it by default.
        batch_size: windows per forward pass.
        subject: which model this is, for the report.
        progress: called with windows done and windows in all.
        make_cache: makes the cache of a batch; by default windows are read at once, without one.
        steering: emphasises marks, as `tenfold.engines.session.Session.steering` does; all of a window counts as its
            prompt, so what follows a mark attends less to all else. By default marks play no part.

    Returns:
        The figures and the score of every token, for ``compare``.

    Raises:
        ConfigError: for an impossible length or stride.
        DataError: when no token can be scored.

    Example:
        >>> perplexity(model, tokenizer, ["Some text."], max_length=512).perplexity  # doctest: +SKIP
        14.2

    Bytes are exact unless a document begins with a token that is a fraction of a character, which then counts whole.
    """
    stride = _check(model, max_length, stride)
    documents = [_document(tokenizer, text) for text in texts]
    pieces = [
        piece for index, document in enumerate(documents) for piece in _pieces(index, document, max_length, stride)
    ]
    if not pieces:
        raise DataError(
            f"no token to score in {len(texts)} documents", remedy="give longer texts, or conversations with answers"
        )
    keys: Any = {"pad_id": pad_id(tokenizer), "batch_size": batch_size, "progress": progress}
    if steering is not None:
        keys["around"] = _steered(tokenizer, steering, documents, pieces)
    scores = score(model, [piece.window for piece in pieces], **keys, make_cache=make_cache)
    token_nll = torch.cat([part[piece.wanted] for part, piece in zip(scores, pieces, strict=True)])
    token_ids = torch.cat([torch.tensor(piece.window.ids[piece.window.start :])[piece.wanted] for piece in pieces])
    owner = [piece.document for piece in pieces]
    document = torch.repeat_interleave(torch.tensor(owner), torch.stack([piece.wanted.sum() for piece in pieces]))
    sums, counts = document_sums(token_nll, document)
    scored = sorted(set(owner))
    byte_counts = torch.tensor([documents[index].size for index in scored], dtype=torch.float64)
    nll, stderr = ratio(sums, counts)
    bits, bits_stderr = ratio(sums / math.log(2), byte_counts)
    settings = {
        "max_length": max_length,
        "stride": stride,
        "batch_size": batch_size,
        "dtype": number_format(model),
        "documents": len(scored),
        "documents_skipped": len(documents) - len(scored),
        "tokens": len(token_nll),
        "bytes": int(byte_counts.sum()),
        **({"scored": ANSWERS} if any(isinstance(text, RowTokens) for text in texts) else {}),
    }
    return Perplexity(
        result=_result(subject, (nll, stderr), (bits, bits_stderr), len(token_nll), settings),
        nll=nll,
        perplexity=math.exp(nll),
        bits_per_byte=bits,
        stderr=stderr,
        token_nll=token_nll,
        token_ids=token_ids,
        document=document,
    )


def _check(model: Any, max_length: int, stride: int | None) -> int:
    limit = max_positions(model)
    if max_length < 2 or (limit is not None and max_length > limit):
        top = f" to {limit}, the positions the model has" if limit is not None else " or more"
        raise ConfigError(f"max_length: {max_length} tokens per window cannot be", remedy=f"give 2{top}")
    stride = max_length // 2 if stride is None else stride
    if not 1 <= stride < max_length:
        raise ConfigError(
            f"stride: {stride} is not between 1 and {max_length - 1}",
            remedy="a window must see at least one token before those it scores; leave stride out for half a window",
        )
    return stride


def _result(
    subject: str,
    nll: tuple[float, float | None],
    bits: tuple[float, float | None],
    tokens: int,
    settings: dict[str, Any],
) -> Result:
    mean, stderr = nll
    value = math.exp(mean)
    return Result(
        task="perplexity",
        subject=subject,
        metrics=(
            # The delta method: d exp(x) = exp(x) dx.
            Metric(
                name="perplexity",
                value=value,
                count=tokens,
                stderr=None if stderr is None else value * stderr,
                better="lower",
            ),
            Metric(name="nll", value=mean, unit="nats/token", count=tokens, stderr=stderr, better="lower"),
            Metric(name="bits_per_byte", value=bits[0], unit="bits/byte", count=tokens, stderr=bits[1], better="lower"),
        ),
        settings=settings,
    )


class _Document(NamedTuple):
    """Tokens, which of them are scored if something precedes them, and the bytes of these."""

    ids: list[int]
    wanted: list[bool]
    size: int
    marked: Marked | None = None


def _document(tokenizer: Any, text: str | Marked | RowTokens) -> _Document:
    if isinstance(text, RowTokens):
        first = len(tokenizer.decode(text.ids[:1]).encode()) if text.learned[:1] == [True] else 0
        return _Document(text.ids, text.learned, max(0, text.size - first))
    marked = text if isinstance(text, Marked) else Marked(text)
    ids, size = _whole(tokenizer, marked.text)
    return _Document(ids, [True] * len(ids), size, marked)


def _whole(tokenizer: Any, text: str) -> tuple[list[int], int]:
    """The tokens of a document, after a beginning-of-text token where the tokenizer adds one, and its scored bytes."""
    offsets: list[tuple[int, int]] | None = None
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = encoded["offset_mapping"]
    else:
        encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    ids: list[int] = encoded["input_ids"]
    size = len(text.encode())
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a")["input_ids"][:1] == [bos]:
        return [bos, *ids], size
    if len(ids) < 2:
        return ids, 0
    if offsets is not None:
        # The nearer of both ends: between words some tokenizers leave the space out of their offsets.
        return ids, len(text[min(offsets[0][1], offsets[1][0]) :].encode())
    return ids, size - len(tokenizer.decode(ids[:1]).encode())


def _windows(ids: Sequence[Any], max_length: int, stride: int) -> list[Window]:
    """Windows that score each token but the first once, in order.

    >>> [(w.ids, w.start) for w in _windows([0, 1, 2, 3, 4, 5], max_length=4, stride=2)]
    [([0, 1, 2, 3], 1), ([2, 3, 4, 5], 2)]
    """
    if len(ids) < 2:
        return []
    windows = [Window(ids[:max_length], 1)]
    done = max_length
    while done < len(ids):
        begin = done - (max_length - stride)
        windows.append(Window(ids[begin : begin + max_length], done - begin))
        done += stride
    return windows


class _Piece(NamedTuple):
    """A window of a document, where it begins there, and which of the tokens that the window scores count."""

    document: int
    begin: int
    window: Window
    wanted: torch.Tensor


def _pieces(index: int, document: _Document, max_length: int, stride: int) -> list[_Piece]:
    """The windows of a document that have a token to score, no longer than that needs."""
    found = []
    for places in _windows(range(len(document.ids)), max_length, stride):
        scored = [place for place in places.ids[places.start :] if document.wanted[place]]
        if scored:
            begin, first, last = places.ids[0], scored[0], scored[-1] + 1
            wanted = torch.tensor(document.wanted[first:last])
            found.append(_Piece(index, begin, Window(document.ids[begin:last], first - begin), wanted))
    return found


def _strengths(tokenizer: Any, document: _Document) -> list[float | None]:
    """The strength of each token of a document that is marked.

    Raises:
        ConfigError: marks, and a tokenizer that cannot say where its tokens stand.
    """
    strengths: list[float | None] = [None] * len(document.ids)
    if document.marked is None or not document.marked.spans:
        return strengths
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{type(tokenizer).__name__} does not say where its tokens stand in the text",
            remedy="open the model with its fast tokenizer",
        )
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    offsets = tokenizer(document.marked.text, **options)["offset_mapping"]
    ahead = len(document.ids) - len(offsets)  # a token that begins the text
    for span in document.marked.spans:
        for token in tokens_of(offsets, span.start, span.end):
            strengths[token + ahead] = span.strength
    return strengths


def _steered(
    tokenizer: Any,
    steering: Callable[[Marks], AbstractContextManager[Any]],
    documents: Sequence[_Document],
    pieces: Sequence[_Piece],
) -> Around:
    """Emphasis of what is marked in each window."""
    strengths = [_strengths(tokenizer, document) for document in documents]

    def around(indices: Sequence[int], ids: torch.Tensor, mask: torch.Tensor) -> AbstractContextManager[Any]:
        marked, strength = torch.zeros_like(ids, dtype=torch.bool), torch.ones(ids.shape, device=ids.device)
        chosen = [pieces[index] for index in indices]
        for row, piece in enumerate(chosen):
            inside = strengths[piece.document][piece.begin : piece.begin + len(piece.window.ids)]
            for token, value in enumerate(inside):
                if value is not None:
                    marked[row, token], strength[row, token] = True, value
        names = tuple(f"text {piece.document + 1}" for piece in chosen)
        return steering(Marks(ids, mask, marked, strength, names))

    return around


def document_sums(values: torch.Tensor, document: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum and count of ``values`` (``[tokens]``) for each document that occurs; both ``[documents]``, float64."""
    _, index = torch.unique(document, return_inverse=True)
    size = int(index.max()) + 1
    sums = torch.zeros(size, dtype=torch.float64).index_add_(0, index, values.double())
    counts = torch.zeros(size, dtype=torch.float64).index_add_(0, index, torch.ones_like(values, dtype=torch.float64))
    return sums, counts


def ratio(sums: torch.Tensor, sizes: torch.Tensor) -> tuple[float, float | None]:
    """A mean over clusters, ``sum(sums) / sum(sizes)``, and its standard error between clusters.

    Tokens of one document resemble each other, so the spread between documents tells how far the mean may be off:
    ``var = D / (D - 1) * sum((sums - mean * sizes)^2) / sum(sizes)^2`` for D documents; None for one.

    >>> ratio(torch.tensor([2.0, 4.0]), torch.tensor([2.0, 2.0]))
    (1.5, 0.5)
    """
    total = sizes.sum()
    mean = sums.sum() / total
    clusters = len(sums)
    if clusters < 2:
        return mean.item(), None
    residuals = (sums - mean * sizes).square().sum() * clusters / (clusters - 1)
    return mean.item(), (residuals.sqrt() / total).item()
