"""``tenfold estimate``: what a recipe will need, from the model's configuration alone.

Each stage's work is run once on fake tensors, which have shapes and no contents, while the bytes of all live storages
are counted: no formula per architecture, and the same kernels as in the real run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import prepare_model_for_kbit_training
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tenfold.compat import enable_checkpointing
from tenfold.config.stage import StageConfig
from tenfold.config.training import TrainingFields
from tenfold.models.meta_model import meta_model
from tenfold.models.open import resolve_device
from tenfold.models.packed_shapes import predicted_bytes
from tenfold.models.quantised import parameter_count
from tenfold.models.reference import ModelRef
from tenfold.pipeline.checking import check_model, model_of
from tenfold.pipeline.recipe import ResolvedRecipe, Step
from tenfold.pipeline.references import is_reference
from tenfold.pipeline.stages import load
from tenfold.stage.numbers import quantity

CPU_HEAP = 1.6
"""Resident over live bytes of a training step on a CPU. The C library keeps freed blocks as holes between live ones;
with glibc 2.36 the ratio was 1.62, 1.62 and 1.59 for batches of 4 x 256, 2 x 512 and 4 x 512 tokens of the demo model
(``tests/pipeline/test_estimate.py`` measures it again). CUDA's figure is that of its own allocator, which counts live
bytes."""


@dataclass(frozen=True)
class Estimate:
    """What one stage will need; sizes in bytes."""

    title: str
    amounts: dict[str, float]
    """``parameters``, ``weights``, ``trainable parameters``, ``adapter``, ``optimizer``, ``activations``,
    ``cache per token``, ``cache``, ``peak growth``, as far as the stage has them."""

    @property
    def rows(self) -> list[tuple[str, str]]:
        """For the terminal: counts as they are, sizes as the report shows them."""
        units = {name: "" if "parameters" in name else "bytes" for name in self.amounts}
        return [(name, quantity(value, units[name])) for name, value in self.amounts.items()]


def estimate(plan: ResolvedRecipe) -> list[Estimate]:
    """Predict for each stage of a plan, without reading a weight or a row.

    Returns:
        One estimate for the model, then one for each stage; that of a stage whose needs are not known is empty.
    """
    check_model(plan)
    found: list[Estimate] = []
    if plan.recipe.model is not None:
        ref = model_of(plan)
        model = meta_model(ref)
        amounts: dict[str, float] = {"parameters": parameter_count(model), "weights": predicted_bytes(model)}
        found.append(Estimate(f"model: {ref.source}", amounts))
    return [*found, *(Estimate(step.folder, _needs(plan, step)) for step in plan.steps)]


def _needs(plan: ResolvedRecipe, step: Step) -> dict[str, float]:
    """Of one stage; nothing where it is not known."""
    config = step.config
    if not config.needs.model or is_reference(step.model):
        return {}
    if config.attach is not None and isinstance(config, TrainingFields):
        return training_needs(load(config.attach), config, model_of(plan, step))
    return inference_needs(config, model_of(plan, step)) if config.prefills else {}


def training_needs(attach: Callable[..., Any], config: TrainingFields, ref: ModelRef) -> dict[str, float]:
    """Bytes of one optimizer step of a stage that trains an adapter.

    ``peak growth`` is what the process will grow by over the loaded model: the highest sum of live storages (gradients,
    optimizer moments, activations and the temporaries of the largest operation), on a CPU times `CPU_HEAP`.
    """
    base = meta_model(ref)
    if ref.load is not None:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    before = sum(p.numel() * p.element_size() for p in base.parameters())
    with torch.device("meta"):
        model = attach(base, config, task=ref.task)
    model.train()
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    adapter = sum(p.numel() * p.element_size() for p in model.parameters()) - before
    with FakeTensorMode(), _Live() as live:
        _materialise(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        base_live = live.now
        # Without a mask: full sequences need none, and transformers then leaves grouped heads unexpanded.
        ids = torch.zeros((config.batch_size, config.max_length), dtype=torch.long)
        loss = model(input_ids=ids, labels=ids).loss
        activations = live.now - base_live
        loss.backward()
        del loss
        optimizer.step()
    return {
        "trainable parameters": sum(p.numel() for p in trainable),
        **({"adapter": adapter} if adapter else {}),  # a model trained whole has none
        "optimizer": 2 * sum(p.numel() * p.element_size() for p in trainable),
        "activations": activations,
        "peak growth": (live.peak - base_live) * (1.0 if on_gpu(ref) else CPU_HEAP),
    }


def on_gpu(ref: ModelRef) -> bool:
    """Whether the reference will be opened on a GPU."""
    return resolve_device(ref.device).type == "cuda"


def inference_needs(config: StageConfig, ref: ModelRef) -> dict[str, float]:
    """Bytes of the cache for one token, and the peak growth while ``prompt_tokens`` are read."""
    tokens: int = config.model_dump()["prompt_tokens"]
    model = meta_model(ref).eval()
    with FakeTensorMode(), torch.no_grad(), _Live() as live:
        _materialise(model)
        base_live = live.now
        ids = torch.zeros((1, tokens), dtype=torch.long)
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        del output.logits
        cache = live.now - base_live
        peak = live.peak - base_live
    return {"cache per token": cache / tokens, "cache": cache, "peak growth": peak}


def _materialise(model: nn.Module) -> None:
    """Give every parameter and buffer a fake storage on the CPU; tied ones stay tied."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for holder in (module._parameters, module._buffers):
            for name, tensor in holder.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = fake
                holder[name] = made[id(tensor)]  # type: ignore[assignment]


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations have made and that are still referenced.

    Code that asks for a content, such as whether documents are packed, is told no: fake tensors have none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            out = func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            return False
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._known:
                    self._known.add(key)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, key, storage.nbytes())
        return out

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
