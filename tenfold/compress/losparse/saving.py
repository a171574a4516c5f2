"""Compressed models for transformers: ``from_pretrained`` and ``save_pretrained`` once this module is imported."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from tenfold.compress.losparse.format import METHOD, LowRankRowsConfig, renaming
from tenfold.compress.losparse.layer import LowRankRowsLinear, layer_like, remark, replace_module
from tenfold.compress.losparse.layout import settle
from tenfold.errors import ModelError


@register_quantizer(METHOD)
class _LowRankRowsQuantizer(HfQuantizer):
    """Puts compressed layers into a model that transformers is about to fill, and then leaves: nothing is packed.

    All is floating-point numbers that can be trained, so the model counts as a plain one from then on.
    """

    requires_calibration = True  # transformers' word for: cannot be applied on opening
    is_trainable = True
    is_qat_trainable = True
    quantization_config: LowRankRowsConfig

    def is_serializable(self) -> bool:
        """Always."""
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        restructure(model, self.quantization_config)

    def get_weight_conversions(self) -> list[Any]:
        """Names in files and in the model."""
        return [renaming(list(self.quantization_config.modules))]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            model.__dict__.pop(name, None)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config.__dict__.pop("_is_quantized", None)
        remark(model)
        if model.config.quantization_config.layouts:
            settle(model)


def restructure(model: Any, config: LowRankRowsConfig | dict[str, Any] | None = None) -> None:
    """Put empty compressed layers where a configuration says that they are; on the meta device it costs nothing.

    Args:
        model: with its plain layers, as transformers builds it.
        config: Default: the model's own.

    Raises:
        ModelError: a name that the model does not have.
    """
    config = config or model.config.quantization_config
    config = LowRankRowsConfig(**config) if isinstance(config, dict) else config
    names = dict(model.named_modules(remove_duplicate=False))
    made: dict[int, nn.Module] = {}
    found = {}
    for name, entry in config.modules.items():
        own = _own_name(names, name, model.base_model_prefix)
        if own is None:
            continue
        module = names[own]
        if id(module) not in made:
            made[id(module)] = layer_like(module, entry)
        replace_module(model, own, made[id(module)])
        found[own] = entry
    if not found:
        some = next(iter(config.modules), "none")
        raise ModelError(f"none of the compressed layers is in this model, such as {some}", "open it with its own task")


def absorb(model: Any) -> None:
    """Add the active LoRA adapters of a PEFT model into its compressed layers, and tell PEFT that it is done.

    Raises:
        ModelError: an adapter other than a plain low-rank product.
    """
    for name, module in list(model.named_modules()):
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else None
        if not isinstance(base, LowRankRowsLinear):
            continue
        if not isinstance(module, LoraLayer) or module.lora_variant or any(module.lora_bias.values()):
            kind = type(module).__name__
            raise ModelError(
                f"{name}: an adapter of this kind ({kind}) cannot be merged into a compressed layer",
                remedy="export with form: dense, or keep the adapter (form: adapter)",
            )
        for adapter in module.active_adapters:
            if adapter in module.lora_A and adapter not in module.merged_adapters:
                left, right = module.lora_B[adapter].weight, module.lora_A[adapter].weight
                if not bool(left.isfinite().all() and right.isfinite().all()):
                    raise ModelError(
                        f"{name}: the adapter holds NaN or infinite values", "train again with a lower rate"
                    )
                module.base_layer = module.base_layer.plus(left * module.scaling[adapter], right)
                module.merged_adapters.append(adapter)
    remark(model.get_base_model())


def _own_name(names: dict[str, Any], name: str, prefix: str) -> str | None:
    """A module's name in this model: a head more or less changes how names begin."""
    return next((one for one in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}") if one in names), None)
