"""R3M: a reward learnt from preferences of which some are wrong (Bukharin et al. 2024, arXiv 2406.15568).

* `losses`: the mathematics (`tenfold.align.trainers` has TRL's trainers with them);
* `choose`: which cap explains unseen pairs best.
"""

from tenfold.align.r3m.losses import (
    RunningKink,
    expected_flags,
    kink,
    lipschitz_envelope,
    pair_loss,
    perturbation,
    r3m_loss,
)

__all__ = ["RunningKink", "expected_flags", "kink", "lipschitz_envelope", "pair_loss", "perturbation", "r3m_loss"]
