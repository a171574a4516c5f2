"""FPX: the precision of every layer, chosen for what the model loses by it (Kang et al. 2025, arXiv 2505.19481).

* `units`: what gets a precision; `losses`: what each unit loses by each format;
* `knapsack`, `assign`: the choice within a budget, and the published one;
* `plan`: the plan, its file and its totals; `apply`: a plan on a model in memory, simulated;
* `packing`: the same for real, by torch's kernels;
* `stage`: a GGUF file with a type for each tensor.
"""

from tenfold.compress.fpx.apply import apply, remove
from tenfold.compress.fpx.packing import pack
from tenfold.compress.fpx.plan import Plan, plan
from tenfold.config.fpx import FpxConfig

__all__ = ["FpxConfig", "Plan", "apply", "pack", "plan", "remove"]
