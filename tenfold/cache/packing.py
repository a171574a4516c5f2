"""Packed caches for whoever writes: made for each batch, read by attention, reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tenfold.attend.attention import installed
from tenfold.cache.gear import CacheConfig, GearCache
from tenfold.cache.gear.cache import check_readable
from tenfold.cache.spans import SpanCache, own_cache
from tenfold.config.gear import parse_kv


def _packed_cache(model: Any, settings: CacheConfig) -> GearCache | SpanCache:
    """A packed cache, of the full layers where the model has local spans."""
    return own_cache(model, settings) or GearCache(model.config, settings)


@contextmanager
def packed_caches(model: Any, kv: str) -> Iterator[tuple[Callable[[], Any], list[GearCache | SpanCache]]]:
    """Caches for ``--kv``: a factory, and the longest and newest that it made; attention reads them in the block."""
    made: list[GearCache | SpanCache] = []

    def make() -> GearCache | SpanCache:
        if made:  # no more than two are kept alive
            made[:] = [max(made, key=lambda cache: cache.get_seq_length())]
        made.append(_packed_cache(model, parse_kv(kv)))
        return made[-1]

    check_readable(model.config.get_text_config(decoder=True))
    with installed(model):
        yield make, made


def cache_note(kv: str, caches: Sequence[GearCache | SpanCache]) -> str:
    """What the cache of the longest batch came to, measured."""
    cache = max(caches, key=lambda cache: cache.get_seq_length())
    report = cache.report()
    if isinstance(cache, SpanCache):
        return (
            f"{kv}, in layers of full attention; others keep what is in reach: {report['bytes'] / 2**20:.2f} MiB for "
            f"{report['tokens']} tokens, {report['dense bytes'] / 2**20:.2f} without spans and packing."
        )
    if not report["packed tokens"]:
        return (
            f"{kv}: nothing was packed, as {report['tokens']} tokens fill no block of {cache.settings.buffer}: its "
            "text is the exact cache's."
        )
    return (
        f"{kv}: {report['bits']:.2f} bits a number in packed blocks (formula {report['formula bits']:.2f}), "
        f"{report['bits with buffer']:.2f} with the exact first tokens and the buffer; {report['packed tokens']} of "
        f"{report['tokens']} tokens are packed; {report['bytes'] / 2**20:.2f} MiB, read by {report['kernel']}."
    )
