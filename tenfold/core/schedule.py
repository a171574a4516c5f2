"""The schedule of a shrinking budget: full, then cubic decay, then constant. AdaLoRA and LoSparse share it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tenfold.errors import ConfigError

Phase = Literal["warmup", "shrink", "final"]


@dataclass(frozen=True)
class CubicSchedule:
    r"""How much may be kept at each step.

    With :math:`b_0` = ``start``, :math:`b_T` = ``end``, :math:`T` = ``total``, :math:`t_i` = ``warmup``,
    :math:`t_f` = ``cooldown`` and :math:`p` = ``power``,

    .. math:: b_t = b_T + (b_0 - b_T)\left(1 - \frac{t - t_i}{T - t_i - t_f}\right)^p
              \quad\text{for } t_i < t \le T - t_f,

    :math:`b_0` before and :math:`b_T` after. Equation 14 of AdaLoRA (arXiv 2303.10512) as printed subtracts
    :math:`t_f` once more in the numerator, which would let the budget rise above :math:`b_0` at :math:`t_i`; this is
    the form that its authors ran.

    Args:
        start: what is kept at first; a count or a share, not below ``end``.
        end: what is kept at last, 0 or more.
        total: steps of the run.
        warmup: steps at the full budget.
        cooldown: steps at the final budget; ``warmup + cooldown`` must be below ``total``.
        every: steps between two decisions while the budget shrinks.
        power: 3 in both papers.

    Raises:
        ConfigError: values that fit no run, with the valid range.

    >>> schedule = CubicSchedule(96, 64, total=100, warmup=10, cooldown=20, every=5)
    >>> [int(schedule.value(step)) for step in (0, 10, 11, 45, 80, 120)]
    [96, 96, 94, 68, 64, 64]
    >>> schedule.phase(45), schedule.due(45), schedule.due(46)
    ('shrink', True, False)
    """

    start: float
    end: float
    total: int
    warmup: int = 0
    cooldown: int = 0
    every: int = 1
    power: int = 3

    def __post_init__(self) -> None:
        if not 0 <= self.end <= self.start:
            raise ConfigError(
                f"the final budget {self.end:g} is not between 0 and the initial budget {self.start:g}",
                remedy="lower the final budget, or raise the initial one",
            )
        if self.warmup < 0 or self.cooldown < 0 or self.every < 1 or self.power < 1:
            raise ConfigError(
                f"warm-up {self.warmup}, cool-down {self.cooldown}, interval {self.every}, power {self.power}: out of "
                "range",
                remedy="warm-up and cool-down are 0 steps or more, interval and power 1 or more",
            )
        if self.warmup + self.cooldown >= self.total:
            raise ConfigError(
                f"warm-up ({self.warmup}) and cool-down ({self.cooldown}) leave none of the {self.total} steps to "
                "shrink in",
                remedy=f"together they may take at most {max(self.total - 1, 0)} steps; or train longer",
            )

    def value(self, step: int) -> float:
        """What may be kept after the optimizer step of this zero-based index.

        Args:
            step: the index, 0 or more; beyond ``total`` the value stays at ``end``.

        Returns:
            The exact value; AdaLoRA floors it to a count, LoSparse reads it as a share.
        """
        if step <= self.warmup:
            return self.start
        if step > self.total - self.cooldown:
            return self.end
        left = 1 - (step - self.warmup) / (self.total - self.warmup - self.cooldown)
        # This order of operations is PEFT's, so that floors agree with it to the last bit.
        return float((self.start - self.end) * left**self.power + self.end)

    def phase(self, step: int) -> Phase:
        """``warmup`` up to :math:`t_i`, ``final`` after :math:`T - t_f`, ``shrink`` between."""
        if step <= self.warmup:
            return "warmup"
        return "final" if step > self.total - self.cooldown else "shrink"

    def due(self, step: int) -> bool:
        """Whether what is kept is decided, or enforced, after this step.

        Never in the warm-up, always in the final phase, every ``every`` steps between, and at ``total - cooldown``, so
        that the last decision is made at the final budget.
        """
        phase = self.phase(step)
        if phase == "shrink":
            return step % self.every == 0 or step == self.total - self.cooldown
        return phase == "final"
