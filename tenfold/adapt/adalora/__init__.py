"""AdaLoRA: adaptive budget allocation for low-rank fine-tuning (Zhang et al. 2023, arXiv 2303.10512).

The update of each matrix is a sum of singular triplets. Training starts with more of them than the budget allows,
measures how much the loss depends on each, and takes them away from the matrices that do not use them.

* `mathematics`: the penalty and its gradient, folding, decomposition (functions on tensors);
* `plan`: what a budget means for the matrices of a model;
* `layer`, `attaching`: the adapter inside PEFT's model;
* `controller`, `shrinking`, `trainer`: what happens around each optimizer step (`tenfold.adapt.step_hooks`);
* `exporting`, `opening`: plain LoRA folders out, PEFT's adapters in;
* `handle`: what a user holds.
"""

from tenfold.adapt.adalora.handle import AdaLora, attach, open_adapter
from tenfold.config.adalora import AdaLoraConfig

__all__ = ["AdaLora", "AdaLoraConfig", "attach", "open_adapter"]
