"""The published choice of layers: a share of them, by number, those whose outputs a low format changes least.

Algorithm 1 and section 5 of "Win Fast or Lose Slow" (arXiv 2505.19481).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tenfold.errors import ConfigError


def most_tolerant(errors: Sequence[float], gamma: float) -> list[int]:
    r"""The layers that go to the low format: the :math:`\lfloor\gamma L\rfloor` with the smallest error.

    Equal errors go by module order, so the layers of a smaller share are always among those of a larger one.

    Args:
        errors: of each layer, in module order.
        gamma: 0 to 1.

    Returns:
        Their places, the most tolerant first.

    Raises:
        ConfigError: a share outside 0 to 1, or an error that is NaN.

    >>> most_tolerant([0.3, 0.1, 0.2, 0.1], 0.5)
    [1, 3]
    """
    if not 0 <= gamma <= 1:
        raise ConfigError(f"gamma: {gamma} is outside 0 to 1", remedy="give the share of layers in the low format")
    for place, error in enumerate(errors):
        if math.isnan(error):
            raise ConfigError(f"errors: that of layer {place} is NaN", remedy="look for NaN in the calibration")
    # 0.29 * 100 is 28.999999999999996
    count = math.floor(gamma * len(errors) + 1e-9)
    return sorted(range(len(errors)), key=lambda place: (errors[place], place))[:count]


def average_bits(low: int, layers: int, low_bits: float = 4, base_bits: float = 8) -> float:
    """Bits of a layer's numbers, each layer counted once whatever its size, as the paper counts them.

    Args:
        low: layers in the low format.
        layers: all of them, at least one.
        low_bits: of a number there.
        base_bits: of a number elsewhere.

    >>> average_bits(2, 10), average_bits(3, 10)
    (7.2, 6.8)
    """
    return base_bits - (base_bits - low_bits) * low / layers


def best_gamma(
    rewards: Mapping[float, float], latencies: Mapping[float, float] | None = None, limit: float = math.inf
) -> float:
    """The share with the highest reward among those that are fast enough; of equal rewards the smallest share.

    Args:
        rewards: by gamma.
        latencies: by gamma, of the same shares; needed with a limit.
        limit: the latency allowed, in their unit.

    Raises:
        ConfigError: no share is fast enough, or a reward is NaN.

    >>> best_gamma({0: 23.14, 0.2: 26.52, 0.4: 12.93}), best_gamma({0: 1, 0.5: 1}, {0: 9, 0.5: 5}, limit=6)
    (0.2, 0.5)
    """
    times = dict.fromkeys(rewards, -math.inf) if latencies is None else latencies
    allowed = [gamma for gamma in rewards if times[gamma] <= limit]
    if not allowed:
        raise ConfigError(
            f"limit: no gamma is as fast as {limit}", remedy=f"the fastest takes {min(times.values(), default=None)}"
        )
    for gamma in allowed:
        if math.isnan(rewards[gamma]):
            raise ConfigError(f"rewards: that of gamma {gamma} is NaN", remedy="leave it out, or measure it again")
    return min(allowed, key=lambda gamma: (-rewards[gamma], gamma))
