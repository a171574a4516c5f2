"""From a configuration to the formats of each layer, and from a budget to the best known format for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tenfold.cache.gear.recipe import Format, element_bits
from tenfold.config.budget import parse_budget
from tenfold.config.gear import CacheConfig
from tenfold.errors import ConfigError

KEYS, VALUES = -2, -1
"""Along which dimension the outlier lines of a side run."""

LADDER: tuple[tuple[int, int], ...] = ((2, 2), (3, 2), (3, 3), (4, 3), (4, 4), (8, 4), (8, 8), (16, 16))
"""Widths of keys and values by rising size: each measures better than all before it, and keys deserve the bits (GEAR
specification, section 4; docs/results/gear.md)."""


@dataclass(frozen=True)
class LayerFormats:
    """Keys and values of one layer: in the prompt's block, and in later ones."""

    prompt: tuple[Format, Format]
    block: tuple[Format, Format]

    def element_bits(self, tokens: int, channels: int, kv_heads: int, *, later: bool = False) -> float:
        """Bits per number of one block, the mean of keys and values, by the formula."""
        keys, values = self.block if later else self.prompt
        parts = [
            element_bits(form, tokens, channels, kv_heads, lines=lines)
            for form, lines in ((keys, KEYS), (values, VALUES))
        ]
        return sum(parts) / 2


def layer_formats(config: CacheConfig, layer: int) -> LayerFormats:
    """How a layer is packed.

    >>> layer_formats(CacheConfig(bits=2, variant="gear", paper={"backbone": "kcvt"}), 0).prompt[1]
    Format(bits=2, axis=-1, group=None, shared=True, rank=4, share=0.02, loop=3)
    """
    bits, paper = config.bits or 4, config.paper
    widths = config.layer_bits.get(layer) or (config.key_bits or bits, config.value_bits or bits)
    low = config.variant in ("gear", "gear-l")
    share = paper.s if paper.s is not None else 0.02 if config.variant in ("gear", "outlier-reduced") else 0.0
    prefill_rank = paper.prefill_rank if paper.prefill_rank is not None else 4 if low else 0
    rank = paper.rank if paper.rank is not None else 2 if low else 0
    group = None if paper.backbone == "kcvt" else config.group_size
    prompt = (
        Format(
            widths[0],
            -1 if paper.backbone == "per-token" else -2,
            group,
            rank=prefill_rank,
            share=share,
            loop=paper.loop,
        ),
        Format(widths[1], -1, group, paper.backbone == "kcvt", prefill_rank, share, paper.loop),
    )
    later = prefill_rank if config.prefill == "blocks" else rank
    return LayerFormats(prompt, (replace(prompt[0], rank=later), replace(prompt[1], rank=later)))


def within_budget(config: CacheConfig, *, layers: int, channels: int, kv_heads: int) -> CacheConfig:
    """The same configuration with the best known widths that its budget pays for; without a budget, as it is.

    Args:
        config: with ``budget``.
        layers: that are packed.
        channels: head_dim.
        kv_heads: heads of keys and values.

    Raises:
        ConfigError: the budget buys nothing.

    >>> found = within_budget(CacheConfig(budget="4.1bits"), layers=30, channels=64, kv_heads=3)
    >>> found.key_bits, found.value_bits
    (4, 3)
    """
    if config.budget is None:
        return config
    amount = parse_budget(config.budget)
    numbers = 2 * layers * channels * kv_heads  # of a token
    allowed = amount.amount if amount.unit == "bits" else 8 * amount.amount / numbers
    cost = 0.0
    for key_bits, value_bits in reversed(LADDER):
        chosen = config.model_copy(update={"budget": None, "key_bits": key_bits, "value_bits": value_bits})
        cost = layer_formats(chosen, 0).element_bits(config.buffer, channels, kv_heads)
        if cost <= allowed + 1e-9:
            return chosen
    least = cost if amount.unit == "bits" else cost * numbers / 8
    raise ConfigError(
        f"budget: {config.budget} is {allowed:.2f} bits a number, and the smallest format takes {cost:.2f}",
        remedy=f"give {least:.3g}bits or more"
        if amount.unit == "bits"
        else f"give {least / 1024:.3g}KiB/token or more",
    )


def rotates(config: CacheConfig) -> bool:
    """Whether heads are rotated before packing."""
    return config.rotate if config.rotate is not None else config.variant == "best"
