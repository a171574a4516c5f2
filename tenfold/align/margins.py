"""The margin of every preference pair: how much more a model thinks of the answer that the label calls better.

Rows are read as a stream, a few batches at a time; what is scored is kept batch by batch: a killed run ends the same.
Source: R3M specification, sections 2.4 (step 5), 2.5 and 8.3; tokens are those of TRL's RewardTrainer and DPOTrainer.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from operator import length_hint
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from tenfold.align.margin_cache import fingerprint, row_key, tokenizer_hash
from tenfold.data.encode import pad_id
from tenfold.data.groups import kept_together, places
from tenfold.data.readable import need_template
from tenfold.data.rows import Preference
from tenfold.data.templates import render_chat, require_chat_template
from tenfold.data.tokens import shared, tokens
from tenfold.errors import ConfigError, DataError, ModelError
from tenfold.models.inference import evaluating, input_device
from tenfold.models.scoring import Tell, Window, score
from tenfold.models.source import REFERENCE
from tenfold.stage.store import Store

Model = TypeVar("Model")

_AHEAD = 32
"""Batches that are tokenised at once, so that texts of like length can share one."""


@dataclass(frozen=True)
class Scored:
    """The margins of pairs.

    Args:
        ids: of the scored pairs, in the order of the rows.
        margins: of these pairs, [pairs], float32, on the CPU, in units of reward; above 0 the model agrees.
        over_long: ids of the pairs that were left out because an answer with its prompt is longer than ``max_length``.
    """

    ids: tuple[str, ...]
    margins: Tensor
    over_long: tuple[str, ...] = ()


class _Pair(NamedTuple):
    key: str
    """What the cache knows it by."""
    row: Preference
    chosen: list[int]
    """Tokens of prompt and answer."""
    rejected: list[int]

    @property
    def length(self) -> int:
        return max(len(self.chosen), len(self.rejected))


Tokenise = Callable[[str, Preference], _Pair]
Measure = Callable[[list[_Pair]], Tensor]


def score_pairs(
    model: Any,
    tokenizer: Any,
    rows: Iterable[Preference],
    *,
    batch_size: int = 8,
    max_length: int = 1024,
    chat: bool | None = None,
    cache: Path | None = None,
    progress: Tell | None = None,
) -> Scored:
    """The margins of a reward model: reward of ``chosen`` minus reward of ``rejected``.

    Args:
        model: a sequence classifier with one logit, with or without an adapter.
        tokenizer: its tokenizer.
        rows: the pairs; read once, as a stream.
        batch_size: pairs of a forward pass, which has twice as many sequences.
        max_length: tokens of prompt and answer; longer pairs are left out, as TRL's RewardTrainer leaves them out.
        chat: whether the rows are turns of the chat template, as they must have been in training; by default where the
            tokenizer has one.
        cache: a file of JSON lines to read margins from and append new ones to. A margin is found again only for the
            same row, model, template and ``max_length``, so one file may serve many models.
        progress: called after each batch with rows done and rows in all (0 where the rows do not know their number).

    Raises:
        ConfigError: a number below 1.
        DataError: the cache is another kind of file, or the chat template refuses a pair.
        ModelError: the model has not one logit or no pad token, or a margin is not finite.

    Example:
        >>> score_pairs(model, tokenizer, rows, cache=Path("margins.jsonl")).margins.shape  # doctest: +SKIP
        torch.Size([2000])
    """
    if model.config.num_labels != 1:
        raise ModelError(
            f"the model has {model.config.num_labels} classes, and a reward is one number",
            remedy="open it with one label: num_labels=1 (task reward)",
        )
    pad = model.config.get_text_config().pad_token_id
    if pad is None:
        raise ModelError(
            "the model has no pad token, so it cannot find the last token of a padded text",
            remedy="set model.config.pad_token_id to that of the tokenizer",
        )
    chat = _uses_chat(tokenizer, chat)
    settings = [fingerprint(model), _template(tokenizer, chat), max_length]
    return _score(
        rows,
        partial(_tokenised, tokenizer=tokenizer, chat=chat),
        partial(_reward_margins, model, pad),
        known=Store(cache),
        settings=settings,
        sizes=(batch_size, max_length),
        progress=progress,
    )


def score_policy_pairs(
    model: Any,
    tokenizer: Any,
    rows: Iterable[Preference],
    *,
    beta: float,
    reference: Any = None,
    batch_size: int = 8,
    max_length: int = 1024,
    chat: bool | None = None,
    cache: Path | None = None,
    progress: Tell | None = None,
) -> Scored:
    """The margins of a DPO policy: ``beta * (log-ratio of chosen - log-ratio of rejected)`` to a reference.

    Args:
        model: a causal language model, with or without an adapter.
        tokenizer: its tokenizer.
        rows: the pairs; read once, as a stream.
        beta: that of the training, above 0, reward per nat.
        reference: the model that the policy started from. By default the adapter ``ref`` where there is one, which
            TRL makes where training starts from an adapter, and else the model without its adapter.
        batch_size: pairs of a forward pass, which has twice as many sequences.
        max_length: tokens of prompt and answer; longer pairs are left out (TRL's DPOTrainer cuts their end off).
        chat: as for `score_pairs`.
        cache: as for `score_pairs`; ``beta`` and the reference must be the same, too.
        progress: as for `score_pairs`.

    Raises:
        ConfigError: a number out of its range.
        DataError: the cache is another kind of file, or the chat template refuses a pair.
        ModelError: there is no reference, or a margin is not finite.

    Example:
        >>> score_policy_pairs(model, tokenizer, rows, beta=0.1).margins.shape  # doctest: +SKIP
        torch.Size([2000])
    """
    if not beta > 0:
        raise ConfigError(f"beta: {beta} is not above 0", remedy="give the beta of the training, such as 0.1")
    if reference is None and not hasattr(model, "disable_adapter"):
        raise ModelError(
            "the policy has no adapter to switch off, and no reference was given",
            remedy="give the model that the policy started from as reference",
        )
    chat = _uses_chat(tokenizer, chat)
    models = [fingerprint(model), reference and fingerprint(reference)]
    return _score(
        rows,
        partial(_tokenised, tokenizer=tokenizer, chat=chat),
        partial(_policy_margins, model, reference, tokenizer, chat, beta),
        known=Store(cache),
        settings=[*models, beta, _template(tokenizer, chat), max_length],
        sizes=(batch_size, max_length),
        progress=progress,
    )


def cross_fit(
    rows: Sequence[Preference],
    folds: int,
    fit: Callable[[list[Preference], int], Model],
    score: Callable[[Model, list[Preference]], Scored],
) -> Scored:
    """Margins by models that have not seen the pair: each fold is scored by a model trained on the others.

    Folds are those of `folds_of`, so that no model has seen a pair under another id. One model lives at a time.

    Args:
        rows: all pairs.
        folds: how many models, 2 or more.
        fit: given training rows and the fold's number, trains a model from the same start.
        score: given that model and the rows of the fold, their margins (`score_pairs` with the rest filled in).

    Returns:
        All margins, in the order of the rows.

    Raises:
        ConfigError: ``folds`` is below 2.
        DataError: a fold has no rows, or an id comes twice.

    Example:
        >>> adapters = lambda rows, fold: train_lora(rows, seed=fold)
        >>> cross_fit(rows, 5, adapters, lambda model, rows: score_pairs(model, tokenizer, rows))  # doctest: +SKIP
    """
    if folds < 2:
        raise ConfigError(f"folds: {folds} leaves nothing to train on", remedy="give 2 or more, such as 5")
    fold_of = complete_folds(rows, folds)
    found: dict[str, float] = {}
    over_long: set[str] = set()
    for fold in range(folds):
        held = [row for row in rows if fold_of[row.id] == fold]
        part = score(fit([row for row in rows if fold_of[row.id] != fold], fold), held)
        found.update(zip(part.ids, part.margins.tolist(), strict=True))
        over_long.update(part.over_long)
    ids = tuple(row.id for row in rows if row.id in found)
    return Scored(
        ids=ids,
        margins=torch.tensor([found[id] for id in ids], dtype=torch.float32),
        over_long=tuple(row.id for row in rows if row.id in over_long),
    )


def complete_folds(rows: Sequence[Preference], folds: int) -> dict[str, int]:
    """The fold of each row, as `folds_of` gives it, where every fold has some.

    Raises:
        DataError: a fold has no rows, or an id comes twice.
    """
    fold_of = folds_of(rows, folds)
    empty = set(range(folds)) - set(fold_of.values())
    if empty:
        raise DataError(f"fold {min(empty)} of {folds} has none of the {len(rows)} rows", remedy="give fewer folds")
    return fold_of


def folds_of(rows: Sequence[Preference], folds: int) -> dict[str, int]:
    """The fold of each row, by a hash that stays when rows come and go.

    Rows of one prompt share a fold, that of the first of them, since what is learnt of one pair tells of the others
    (`tenfold.data.groups`). Where prompts are so few or so uneven that a fold would have 30 % more or fewer rows than
    it should, they are laid out evenly, in the order of their hashes. Of a prompt with more rows than a fold's share,
    only those with the same two answers share a fold, in either order.

    Args:
        rows: all pairs.
        folds: how many, 1 or more.

    Returns:
        Row id -> fold, from 0 on.

    Raises:
        DataError: an id comes twice.

    >>> rows = [Preference(str(n), f"{n // 2}+1=", "1", "2") for n in range(40)]
    >>> found = folds_of(rows, 2)
    >>> all(found[str(n)] == found[str(n + 1)] for n in range(0, 40, 2))
    True
    """
    ids = [row.id for row in rows]
    if twice := [id for id, times in Counter(ids).items() if times > 1]:
        raise DataError(f"id {twice[0]!r} comes twice", remedy="give each row an id of its own")
    groups = kept_together(rows, len(rows) / folds)
    first: dict[str, str] = {}
    heads = [first.setdefault(group, id) for group, id in zip(groups, ids, strict=True)]
    edges = [fold / folds for fold in range(folds + 1)]
    # Not the hash that holds rows out: of what is trained on, it has only the upper part.
    found = places(heads, groups, edges, salt="fold|", near=0.3)
    return {id: int(place * folds) for id, place in zip(ids, found, strict=True)}


def _score(
    rows: Iterable[Preference],
    tokenise: Tokenise,
    measure: Measure,
    *,
    known: Store,
    settings: Sequence[Any],
    sizes: tuple[int, int],
    progress: Tell | None,
) -> Scored:
    for name, value in zip(("batch_size", "max_length"), sizes, strict=True):
        if value < 1:
            raise ConfigError(f"{name}: {value} is below 1", remedy=f"give a {name} of 1 or more")
    ids: list[str] = []
    margins: list[float] = []
    over_long: list[str] = []
    total, stream, done = length_hint(rows), iter(rows), 0
    while window := [(row_key(settings, row), row) for row in islice(stream, _AHEAD * sizes[0])]:
        if any(key not in known.entries for key, _ in window):
            for scored in _fill([tokenise(key, row) for key, row in window], measure, known, sizes):
                if progress is not None:
                    progress(done + scored, total)
        elif progress is not None:
            progress(done + len(window), total)
        for key, row in window:
            margin = known.entries[key]
            if margin is None:
                over_long.append(row.id)
            else:
                ids.append(row.id)
                margins.append(margin)
        done += len(window)
    return Scored(tuple(ids), torch.tensor(margins, dtype=torch.float32), tuple(over_long))


def _fill(pairs: list[_Pair], measure: Measure, known: Store, sizes: tuple[int, int]) -> Iterator[int]:
    """Make the margins of a window known; gives after each batch how many of its pairs are done."""
    batch_size, max_length = sizes
    over_long = [pair for pair in pairs if pair.length > max_length]
    new = [pair for pair in over_long if pair.key not in known.entries]
    known.add({pair.key: None for pair in new})
    fitting = sorted((pair for pair in pairs if pair.length <= max_length), key=lambda pair: -pair.length)
    for first in range(0, len(fitting), batch_size):
        # Batches are those of a run without a cache: after a kill, padding and margins come out the same.
        missing = [pair for pair in fitting[first : first + batch_size] if pair.key not in known.entries]
        if missing:
            found = _finite(missing, measure(missing))
            known.add({pair.key: margin for pair, margin in zip(missing, found, strict=True)})
        yield len(over_long) + min(first + batch_size, len(fitting))


def _finite(pairs: Sequence[_Pair], margins: Tensor) -> list[float]:
    values: list[float] = margins.float().cpu().tolist()
    for pair, value in zip(pairs, margins.isfinite().tolist(), strict=True):
        if not value:
            raise ModelError(
                f"the margin of row {pair.row.id!r} is not finite",
                remedy="check that training did not diverge; in float16, use bfloat16 or float32",
            )
    return values


def _uses_chat(tokenizer: Any, chat: bool | None) -> bool:
    chat = tokenizer.chat_template is not None if chat is None else chat
    if chat:
        require_chat_template(tokenizer)
    elif tokenizer.eos_token is None:
        raise ModelError("the tokenizer has no end-of-text token", "name an eos_token in tokenizer_config.json")
    return chat


def _template(tokenizer: Any, chat: bool) -> str:
    """What, beside the row, decides its tokens; the number counts the ways in which rows became messages."""
    form = f"chat 2: {tokenizer.get_chat_template()}" if chat else f"plain: {tokenizer.eos_token}"
    return f"{tokenizer_hash(tokenizer)} {form}"


def pair_tokens(row: Preference, tokenizer: Any, chat: bool | None = None) -> tuple[list[int], list[int]]:
    """Tokens of a prompt with each of its answers, one text each, as TRL's trainers make them.

    Args:
        row: the pair.
        tokenizer: of the model.
        chat: as for `score_pairs`.

    Returns:
        Token ids with the chosen and with the rejected answer.

    Raises:
        DataError: the chat template refuses the pair.
        ModelError: no chat template where one is asked for, or no end-of-text token.

    >>> from tenfold.models.tiny import tiny_tokenizer
    >>> row = Preference("1", "1+1=", "2", "33")
    >>> [len(ids) for ids in pair_tokens(row, tiny_tokenizer("llama"), chat=False)]
    [6, 7]
    """
    pair = _tokenised("", row, tokenizer, _uses_chat(tokenizer, chat))
    return pair.chosen, pair.rejected


def pair_lengths(row: Preference, tokenizer: Any, chat: bool | None = None) -> tuple[int, int, int]:
    """Tokens of the prompt before its answers, and with the chosen and the rejected answer, as TRL counts them.

    Args:
        row: the pair.
        tokenizer: of the model.
        chat: as for `score_pairs`.

    Raises:
        DataError: the chat template refuses the pair.
        ModelError: no chat template where one is asked for, or no end-of-text token.

    >>> from tenfold.models.tiny import tiny_tokenizer
    >>> pair_lengths(Preference("1", "1+1=", "2", "33"), tiny_tokenizer("llama"), chat=False)
    (4, 6, 7)
    """
    chat = _uses_chat(tokenizer, chat)
    pair = _tokenised("", row, tokenizer, chat)
    return _in_common(pair, tokenizer, chat), len(pair.chosen), len(pair.rejected)


def _tokenised(key: str, row: Preference, tokenizer: Any, chat: bool) -> _Pair:
    """Tokens of prompt and answers, as TRL makes them: with its eos token, or by the chat template."""
    if chat:
        chosen, rejected = (_rendered(row, [*row.turns, *reply], tokenizer, ask=False) for reply in row.replies)
    else:
        chosen, rejected = (_plain(row, answer, tokenizer) for answer in (row.chosen, row.rejected))
    return _Pair(key, row, chosen, rejected)


def _plain(row: Preference, answer: str, tokenizer: Any) -> list[int]:
    need_template(row, f"row {row.id!r}")
    end = "" if answer.endswith(tokenizer.eos_token) else tokenizer.eos_token
    return tokens(tokenizer, row.prompt + answer + end)


def _prompt(row: Preference, tokenizer: Any, chat: bool) -> list[int]:
    return _rendered(row, row.turns, tokenizer, ask=True) if chat else tokens(tokenizer, row.prompt)


def _rendered(row: Preference, turns: list[dict[str, Any]], tokenizer: Any, *, ask: bool) -> list[int]:
    text = render_chat(tokenizer, turns, f"row {row.id!r}", ask=ask, **row.options)
    return tokens(tokenizer, text, special=False)


def _reward_margins(model: Any, pad: int, pairs: list[_Pair]) -> Tensor:
    """``[pairs]``, float32: both answers of all pairs in one forward pass, padded on the right as in training."""
    texts = [torch.tensor(pair.chosen) for pair in pairs] + [torch.tensor(pair.rejected) for pair in pairs]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(text) for text in texts])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    device = input_device(model)
    with evaluating(model):
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), **_without_cache(model)).logits
    chosen, rejected = logits.squeeze(-1).float().chunk(2)
    return chosen - rejected


def _without_cache(model: Any) -> dict[str, bool]:
    """Encoders have no cache to switch off."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {"use_cache": False} if "use_cache" in inspect.signature(inner.forward).parameters else {}


def _policy_margins(model: Any, reference: Any, tokenizer: Any, chat: bool, beta: float, pairs: list[_Pair]) -> Tensor:
    """``[pairs]``, float64."""
    starts = [_prompt_length(pair, tokenizer, chat) for pair in pairs]
    windows = [Window(pair.chosen, start) for pair, start in zip(pairs, starts, strict=True)]
    windows += [Window(pair.rejected, start) for pair, start in zip(pairs, starts, strict=True)]

    def likelihoods(scorer: Any) -> Tensor:
        parts = score(scorer, windows, pad_id=pad_id(tokenizer), batch_size=len(windows))
        return -torch.stack([part.sum() for part in parts])

    policy = likelihoods(model)
    with _referring(model, reference) as start_model:
        chosen, rejected = (policy - likelihoods(start_model)).chunk(2)
    return beta * (chosen - rejected)


def _prompt_length(pair: _Pair, tokenizer: Any, chat: bool) -> int:
    return max(1, _in_common(pair, tokenizer, chat))  # nothing predicts a first token


def _in_common(pair: _Pair, tokenizer: Any, chat: bool) -> int:
    """Tokens that the prompt shares with both texts, as in TRL.

    Not all of the prompt's, where it ends with an opened thought that the conversation lacks, or where its last word
    merges with an answer. Both answers begin at the same token, so what is shared falls out of the margin.
    """
    prompt = _prompt(pair.row, tokenizer, chat)
    return min(shared(prompt, pair.chosen), shared(prompt, pair.rejected))


@contextmanager
def _referring(model: Any, reference: Any) -> Iterator[Any]:
    """What the policy is measured against; the model is left as it was."""
    if reference is not None:
        yield reference
    elif REFERENCE in model.peft_config:
        before, active = model.active_adapter, model.active_adapters
        free = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model.set_adapter(REFERENCE)
        try:
            yield model
        finally:
            model.set_adapter(before)
            if model.active_adapters != active:
                model.base_model.set_adapter(active)
            model.requires_grad_(False)
            for parameter in free:  # switching also decides what is trained
                parameter.requires_grad_(True)
    else:
        with model.disable_adapter():
            yield model
