"""GEAR: how the KV cache is packed, and what to compare it on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import Field, model_validator

from tenfold.config.base import Config
from tenfold.config.budget import CacheBudget, parse_budget
from tenfold.config.data import DataFields
from tenfold.config.reading import read_yaml
from tenfold.config.shape import Shape
from tenfold.config.stage import RowsRead, StageConfig, check_kind
from tenfold.errors import ConfigError

Bits = Literal[2, 3, 4, 8, 16]
Variant = Literal["best", "gear", "gear-l", "outlier-reduced", "plain"]
Backbone = Literal["kivi", "kcvt", "per-token"]


class GearPaper(Config):
    """What the paper's caches take; no measurement favours any of it at equal bytes."""

    backbone: Backbone = "kivi"
    """Which numbers share a scale. ``kivi``: ``group_size`` tokens of a key channel, as many channels of a value;
    ``kcvt``: all tokens of a key channel, all channels and heads of a value; ``per-token``: channels for both.
    Turn it to repeat the paper."""
    s: Annotated[float, Field(ge=0, le=0.5)] | None = None
    """Share of the numbers that are outliers; 0.02 where the variant has any. At equal bytes a further bit is worth
    more, so raise ``bits`` first."""
    prefill_rank: Annotated[int, Field(ge=0)] | None = None
    """Rank of the low-rank part of the prompt (of every block under ``prefill: blocks``); 4 where there is any. As
    with ``s``, a further bit is worth more."""
    rank: Annotated[int, Field(ge=0)] | None = None
    """Rank of the low-rank part of later blocks; 2 where there is any. As with ``prefill_rank``."""
    loop: Annotated[int, Field(ge=1)] = 3
    """Rounds of the power iteration that finds the low-rank part; fewer pack faster and fit worse."""


class CacheConfig(Config):
    """How keys and values are stored (Kang et al. 2024, arXiv 2403.05527).

    >>> CacheConfig(bits=3).variant
    'best'
    """

    variant: Variant = "best"
    """``gear``: codes, low rank and outliers; ``gear-l``: codes and low rank; ``outlier-reduced``: codes and outliers;
    ``plain``: codes alone; ``best``: what measures best for its bytes, codes of rotated heads beside exact sinks. Turn
    it to repeat the paper."""
    bits: Bits | None = None
    """Width of the codes of keys and values; 4 unless a budget says otherwise. Lower it where bytes are short, raise it
    where texts change. 16 stores bfloat16."""
    key_bits: Bits | None = None
    """Width of the codes of keys, where it is another one: keys deserve the bits, so raise this one first."""
    value_bits: Bits | None = None
    """Width of the codes of values, where it is another one; lower it first where bytes are short."""
    layer_bits: dict[int, tuple[Bits, Bits]] = {}
    """Layers with widths of their own: ``{0: [8, 8]}``, keys and values; for a layer that packs
    badly."""
    budget: CacheBudget | None = None
    """Instead of ``bits``: what a number (``3.5bits``) or a token of the whole model (``9KiB/token``) may cost; where
    you know the memory that there is."""
    group_size: Annotated[int, Field(ge=8)] = 64
    """Numbers that share a scale, except under ``kcvt``: fewer are more exact and cost more in scales. Sensible: 32 to
    128."""
    buffer: Annotated[int, Field(ge=1)] = 128
    """Tokens that wait uncompressed until they are a block. Sensible: 64 to 256; small blocks cost more in scales."""
    prefill: Literal["tail", "compress", "blocks"] = "tail"
    """``tail`` packs the prompt's largest multiple of ``buffer`` as one block; ``compress`` packs all of it, as in the
    paper; ``blocks`` packs blocks of ``buffer`` tokens. Turn it to ``blocks`` where the state must not depend on how a
    prompt was split."""
    sinks: Annotated[int, Field(ge=0)] | None = None
    """First tokens that stay exact; 4 for ``best``, else 0 (not in the paper). Give 4 to any variant: idle attention
    goes there."""
    rotate: bool | None = None
    """Multiply heads by a Hadamard matrix before packing; on for ``best``, else off (not in the paper). Turn
    it on where few channels hold large numbers."""
    mode: Literal["store", "simulate"] = "store"
    """``store`` packs; ``simulate`` keeps what the packed form would give as plain numbers, to study quality alone."""
    kernel: Literal["auto", "torch", "numba", "triton"] = "auto"
    """What reads the packed form; ``auto`` takes the fastest that runs. Turn it to compare them."""
    paper: GearPaper = GearPaper()
    """What shapes the paper's parts (``s``, ``rank``, ``backbone``); in one word: ``gear-full:2,s=0.01``. Turn it to
    repeat the paper."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.budget is not None:
            amount = parse_budget(self.budget)
            if amount.unit not in ("bits", "bytes/token") or amount.amount <= 0:
                raise ValueError(f"budget: {self.budget} is not what a cache may cost: write 3.5bits or 9KiB/token")
            given = [name for name in ("bits", "key_bits", "value_bits", "layer_bits") if getattr(self, name)]
            if given or self.variant != "best":
                raise ValueError(f"budget chooses the format: leave out {', '.join(given) or 'variant'}")
        if self.variant in ("gear-l", "plain") and self.paper.s:
            raise ValueError(
                f"paper.s: {self.paper.s}, but variant {self.variant} has no outliers: give gear or outlier-reduced"
            )
        if self.variant in ("outlier-reduced", "plain") and (self.paper.rank or self.paper.prefill_rank):
            raise ValueError(f"paper.rank: variant {self.variant} has no low-rank part: give gear or gear-l")
        raw = [
            self.bits,
            self.key_bits,
            self.value_bits,
            *(width for pair in self.layer_bits.values() for width in pair),
        ]
        if 16 in raw and self.variant not in ("best", "plain"):
            raise ValueError(f"bits: 16 is exact to bfloat16, and variant {self.variant} has nothing to repair")
        if self.kernel == "triton" and self.mode == "simulate":
            raise ValueError("kernel: simulate has no packed form that a kernel could read; leave kernel out")
        return self

    @property
    def exact_tokens(self) -> int:
        """First tokens that stay exact."""
        return self.sinks if self.sinks is not None else 4 if self.variant == "best" else 0


VARIANTS: dict[str, Variant] = {
    "gear": "best",
    "gear-full": "gear",
    "gear-l": "gear-l",
    "outlier-reduced": "outlier-reduced",
    "plain": "plain",
}
"""How caches are called in one word: ``gear`` is our best, ``gear-full`` all three parts of the paper."""

_LOW_RANK = ("prefill_rank", "rank", "loop")
_PARTS: dict[Variant, tuple[str, ...]] = {
    "best": (),
    "gear": ("backbone", "s", *_LOW_RANK),
    "gear-l": ("backbone", *_LOW_RANK),
    "outlier-reduced": ("backbone", "s"),
    "plain": ("backbone",),
}
"""What of `GearPaper` the variants of the paper have."""


def parse_kv(text: str) -> CacheConfig:
    """A cache written in one word: ``VARIANT:AMOUNT[,KEY=VALUE...]``.

    The amount is a width (``gear:4``), two of them (``gear:K4V3``) or a budget (``gear:3.5bits``, ``gear:9KiB/token``).

    Raises:
        ConfigError: none of these.

    >>> parse_kv("gear:3").bits, parse_kv("gear-l:2").variant, parse_kv("gear:9KiB/token").budget
    (3, 'gear-l', '9KiB/token')
    >>> parse_kv("gear-full:K4V2,backbone=kcvt,s=0.01").model_dump(exclude_defaults=True)
    {'variant': 'gear', 'key_bits': 4, 'value_bits': 2, 'paper': {'backbone': 'kcvt', 's': 0.01}}
    """
    head, *options = re.split(r",(?![^{\[]*[}\]])", text)  # not at the commas of {0: [8, 8]}
    name, _, amount = head.partition(":")
    if name not in VARIANTS or not amount or not all("=" in option for option in options):
        raise ConfigError(
            f"unknown cache {text!r}",
            remedy="write gear:4, gear:K4V3, gear:3.5bits, gear:9KiB/token, gear-full:4, gear-l:2, plain:4, or one of "
            "them with keys: gear-full:2,backbone=kcvt",
        )
    widths = re.fullmatch(r"K(\d+)V(\d+)", amount)
    if widths:
        values: dict[str, Any] = {"key_bits": int(widths[1]), "value_bits": int(widths[2])}
    else:
        values = {"bits": int(amount)} if re.fullmatch("[0-9]+", amount) else {"budget": amount}
    for option in options:
        key, _, value = option.removeprefix("paper.").partition("=")
        if key in ("variant", "bits", "key_bits", "value_bits", "budget"):
            raise ConfigError(f"{text!r}: {key} is said before the comma already", remedy="leave it out behind it")
        try:
            values[key] = read_yaml(value)
        except yaml.YAMLError:
            raise ConfigError(f"{text!r}: {key}={value} cannot be read", remedy=f"write {key}=VALUE") from None
    return CacheConfig.parse({"variant": VARIANTS[name], **values}, text)


def checked_kv(key: str, text: str) -> None:
    """Refuse an unknown cache, for a validator.

    Raises:
        ValueError: naming the key.
    """
    try:
        parse_kv(text)
    except ConfigError as error:
        raise ValueError(f"{key}: {error}") from None


def check_packing(shape: Shape, key: str, caches: Sequence[str]) -> None:
    """Refuse caches that a model has no layers for.

    Args:
        shape: of the model.
        key: that names the caches.
        caches: as `parse_kv` reads them.

    Raises:
        ConfigError: naming what is missing.
    """
    spans = shape.spans or {}
    if spans.get("full_layers") == [] and not spans.get("heads"):
        raise ConfigError(
            f"{key}: {shape.name} has local spans in every layer, so there is nothing to pack",
            remedy=f"leave {key} out: local layers keep few keys, exactly",
        )
    for cache in caches:
        beyond = [layer for layer in parse_kv(cache).layer_bits if shape.layers is not None and layer >= shape.layers]
        if beyond:
            raise ConfigError(
                f"{key}: {cache}: layer_bits: {beyond[0]}; the model has layers 0 to {(shape.layers or 0) - 1}",
                remedy="correct the layer",
            )


class PackedFields(StageConfig):
    """A packed cache beside the exact one."""

    kv: str | None = None
    """A packed KV cache (GEAR) such as ``gear:4``. Give it to see what packing costs."""

    def applied_to(self, shape: Shape) -> Shape:
        """There must be layers to pack."""
        if self.kv is not None:
            check_packing(shape, "kv", [self.kv])
        return super().applied_to(shape)

    @model_validator(mode="after")
    def _known_cache(self) -> Self:
        if self.kv is not None:
            checked_kv("kv", self.kv)
        return self


class GearConfig(DataFields):
    """Compare caches: quality against bytes on texts, time of a token against the length of the context.

    ``data`` has texts; they are joined and cut into pieces.
    """

    verb = "evaluate"
    summary = "GEAR: a KV cache in 2 to 4 bits; quality against bytes, time against context"
    examples = ("tenfold evaluate demo --method gear --data python-reference --caches gear:2 gear:4 gear-full:2",)
    reads: ClassVar[tuple[str, ...]] = ("text",)
    run = "tenfold.cache.gear.stage:run_gear"

    caches: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "gear:2",
        "gear:3",
        "gear:4",
        "gear-full:2",
        "gear-full:4",
    )
    """What to compare with the model's own cache: ``gear:4``, ``gear:K4V3``, ``gear:9KiB/token``, or with keys as in
    ``gear-full:2,backbone=kcvt,group_size=32``. Name those that you could afford."""
    context: Annotated[int, Field(ge=16)] = 512
    """Tokens of each piece that are read before predictions are compared; they lie in the cache. Set it to the length
    of your contexts."""
    scored: Annotated[int, Field(ge=1)] = 128
    """Tokens of each piece whose predictions are compared; raise it for narrower intervals."""
    texts: Annotated[int, Field(ge=1)] = 6
    """Pieces, spread evenly over the data; raise it for narrower intervals."""
    timed_contexts: tuple[Annotated[int, Field(ge=1)], ...] = (1024, 4096)
    """Lengths of context, in tokens, at which the time of a token is measured; ``[]`` measures none. Set them to the
    lengths of your contexts."""
    steps: Annotated[int, Field(ge=1)] = 6
    """Timed tokens of each turn; raise it where timings scatter."""
    repeats: Annotated[int, Field(ge=1)] = 3
    """Turns of each cache; the caches alternate. Raise it on a busy machine."""
    paper: GearPaper = GearPaper()
    """For the paper's caches among ``caches`` (``gear-full``, ``gear-l``, ``outlier-reduced``, ``plain``): each takes
    the keys that it has parts for, unless it gives them itself. Turn it to repeat the paper."""

    def named(self) -> tuple[str, ...]:
        """The caches with the keys of ``paper`` behind those that have such parts.

        >>> GearConfig(caches=("gear:2", "gear-l:2,rank=1"), paper=GearPaper(rank=3, loop=5)).named()
        ('gear:2', 'gear-l:2,rank=1,loop=5')
        """
        keys = self.paper.model_dump(exclude_defaults=True)
        found = []
        for cache in self.caches:
            known = parse_kv(cache)
            own = [key for key in keys if key in _PARTS[known.variant] and key not in known.paper.model_fields_set]
            found.append(",".join([cache, *(f"{key}={keys[key]}" for key in own)]))
        return tuple(found)

    def check(self, rows: RowsRead | None) -> None:
        """Texts to compare on."""
        check_kind(rows, self.reads, "comparing caches")

    def applied_to(self, shape: Shape) -> Shape:
        """What is read must be within what the model can read, and layers there to be packed."""
        check_packing(shape, "caches", self.caches)
        shape.check_positions("context", self.context + self.scored, " tokens with those that are scored")
        return shape

    @model_validator(mode="after")
    def _caches_are_known(self) -> Self:
        for cache in self.caches:
            checked_kv("caches", cache)
        if len(set(self.named())) < len(self.caches):
            raise ValueError(f"caches: {', '.join(self.caches)} names one twice")
        for cache in self.named():
            known = parse_kv(cache)
            needed = known.buffer + known.exact_tokens
            if self.context < needed and known.prefill != "compress":
                raise ValueError(
                    f"context: {cache} packs nothing of {self.context} tokens, only from {needed} on: give a context "
                    f"of {needed} or more, or {cache},buffer=64"
                )
        for key in self.paper.model_dump(exclude_defaults=True):
            if not any(key in _PARTS[parse_kv(cache).variant] for cache in self.caches):
                raise ValueError(f"paper.{key}: none of the caches has such a part: add gear-full:2 to caches, for one")
        return self
