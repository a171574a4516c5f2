"""Folders that vLLM runs: a number format for each layer, in the form of the package compressed-tensors.

write_compressed_tensors(model, tokenizer, "folder", {"model.layers.0.mlp.down_proj": "fp8_row", ...})
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.core.floats import E2M1_MAX, E4M3_MAX, e4m3
from tenfold.core.weight_formats import INT4_MAX, INT8_MAX, refuse_infinite, weight_format
from tenfold.errors import ConfigError, MissingDependencyError, ModelError
from tenfold.models.changes import changes_of, compression
from tenfold.models.folders import write_folder
from tenfold.models.fused import fused_name
from tenfold.models.layer_map import Slot, layer_map
from tenfold.models.quantised import refuse_quantised
from tenfold.models.simulated import refuse_simulated

INSTALL = 'pip install "tenfold[packed]"'
_EIGHT: dict[str, Any] = {"num_bits": 8, "strategy": "channel", "symmetric": True}
_TOKENS: dict[str, Any] = {"num_bits": 8, "strategy": "token", "symmetric": True, "dynamic": True}
_FOUR: dict[str, Any] = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True}
SCHEMES: Mapping[str, dict[str, Any]] = {
    "fp8_row": {"weights": {**_EIGHT, "type": "float"}, "input_activations": {**_TOKENS, "type": "float"}},
    "int8_row": {"weights": {**_EIGHT, "type": "int"}, "input_activations": {**_TOKENS, "type": "int"}},
    "int8_row_a16": {"weights": {**_EIGHT, "type": "int"}},
    "int4_sym_g32": {"weights": {**_FOUR, "group_size": 32}},
    "int4_sym_g64": {"weights": {**_FOUR, "group_size": 64}},
    "int4_sym_g128": {"weights": {**_FOUR, "group_size": 128}},
    "nvfp4_a16": {
        "weights": {
            "num_bits": 4, "type": "float", "strategy": "tensor_group", "symmetric": True, "group_size": 16,
            "scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn",
        }
    },
}  # fmt: skip
"""Formats of `tenfold.core.weight_formats` -> schemes of compressed-tensors: FP8_DYNAMIC, INT8 (W8A8), W8A16, W4A16
and NVFP4A16."""
PLAIN = ("bf16", "f16", "f32")
"""Formats that leave a layer as the model has it."""


@dataclass(frozen=True)
class Written:
    """What became of the layers.

    Args:
        formats: by module, that it has in the folder.
        notes: what was changed of what was asked, in words.
    """

    formats: dict[str, str]
    notes: tuple[str, ...]


def write_compressed_tensors(
    model: Any,
    tokenizer: Any,
    folder: str | Path,
    formats: str | Mapping[str, str],
    *,
    overwrite: bool = False,
) -> Written:
    """Write a folder of packed weights that vLLM runs and ``from_pretrained`` opens, by the package compressed-tensors.

    What vLLM multiplies as one matrix (queries, keys and values; gate and up) gets one format, the most precise that
    was asked for among them. Embeddings and heads stay as they are, as engines read them. With ``nvfp4_a16`` among the
    formats all that is not packed is bfloat16. It needs the memory of the model a second time.

    Args:
        model: a causal model, plain: adapters merged, not quantised in memory.
        tokenizer: saved beside it.
        folder: replaced if tenfold wrote it; refused if it holds anything else.
        formats: one of `SCHEMES` or `PLAIN` for all layers of the blocks, or one for each by the name of the module.
        overwrite: replace whatever is there.

    Raises:
        ConfigError: a format that cannot be written; a layer without one, or whose rows a format does not divide; a
            name of no layer.
        MissingDependencyError: compressed-tensors is absent.
        ModelError: adapters, packed or compressed layers, local spans, experts in stacks, layers of another kind than
            ``nn.Linear``, or numbers that are not finite; names it.
        RunError: the folder is taken, or cannot be written.
    """
    written = settled_formats(model, formats)
    check_package()
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import apply_quantization_config

    packed = copy.deepcopy(model)
    if "nvfp4_a16" in written.formats.values():  # what compressed-tensors unpacks it to
        packed = packed.to(torch.bfloat16)
    config = _configuration(model, written.formats)
    apply_quantization_config(packed, config, show_progress=False)
    peaks = _peaks(packed, written.formats)
    for name, form in written.formats.items():
        if form in SCHEMES:
            _scale(packed.get_submodule(name), name, form, peaks.get(name))
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(packed)
    with write_folder(folder, "model", overwrite=overwrite) as partial:
        packed.save_pretrained(partial)
        compressor.update_config(str(partial))
        tokenizer.save_pretrained(partial)
    return written


def settled_formats(model: Any, formats: str | Mapping[str, str]) -> Written:
    """The format of each layer of the blocks, alike where they are multiplied as one.

    Args:
        model: as `write_compressed_tensors` takes it, with weights or without any.
        formats: as there.

    Raises:
        ConfigError, ModelError: as there.

    >>> from tenfold.models.tiny import tiny_model
    >>> model = tiny_model("llama").model
    >>> asked = {name: "int4_sym_g32" for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)}
    >>> settled_formats(model, asked | {"model.layers.0.self_attn.k_proj": "fp8_row"}).notes[1:]
    ('one format for model.layers.0.self_attn.q_proj+k_proj+v_proj, which vLLM multiplies as one: fp8_row',)
    """
    _check_model(model)
    found = layer_map(model)
    slots = [slot for slot in found.slots if slot.layout == "linear" and slot.layer is not None]
    slots = [slot for slot in slots if slot.part != "router"]
    named = dict.fromkeys((slot.name for slot in slots), formats) if isinstance(formats, str) else formats
    for form in dict.fromkeys(named.values()):
        if form not in (*SCHEMES, *PLAIN):
            raise ConfigError(
                f"format: {form!r} cannot be written for vLLM", f"give one of {', '.join((*SCHEMES, *PLAIN))}"
            )
    if strange := [name for name in named if name not in {slot.name for slot in found.slots}]:
        raise ConfigError(f"format: no layer named {strange[0]!r} in this model", f"such as {slots[0].name}")
    if missing := [slot.name for slot in slots if slot.name not in named]:
        raise ConfigError(f"format: none for {missing[0]}, of {len(missing)} in all", "give each layer one, or bf16")
    groups: dict[str, list[Slot]] = {}
    for slot in slots:
        groups.setdefault(fused_name(slot, found), []).append(slot)
    settled, notes = {}, []
    for group, members in groups.items():
        best = max((named[slot.name] for slot in members), key=_precision)
        if {named[slot.name] for slot in members} != {best}:
            notes.append(f"one format for {group}, which vLLM multiplies as one: {best}")
        for slot in members:
            _check_rows(slot, best)
            settled[slot.name] = best
    if others := sorted(name for name, form in named.items() if name not in settled and form not in PLAIN):
        notes.insert(0, f"left as they are, as engines read them: {', '.join(others)}")
    elif isinstance(formats, str):
        notes.insert(0, "left as they are, as engines read them: embeddings and heads")
    if "nvfp4_a16" in settled.values():
        notes.append("all that is not packed is bfloat16, which nvfp4_a16 is unpacked to")
    return Written(settled, tuple(notes))


def check_package() -> None:
    """Refuse an installation that cannot write such folders.

    Raises:
        MissingDependencyError: compressed-tensors is absent.
    """
    if importlib.util.find_spec("compressed_tensors") is None:
        raise MissingDependencyError("packed folders for vLLM need the package compressed-tensors", INSTALL)


def _precision(form: str) -> tuple[int, bool]:
    """More bytes, and among equals inputs that are not rounded."""
    return weight_format(form).bytes(128, 128), form.endswith("_a16")


def _check_rows(slot: Slot, form: str) -> None:
    block = SCHEMES[form]["weights"].get("group_size", 1) if form in SCHEMES else 1
    if slot.in_features % block:
        raise ConfigError(
            f"format: {slot.name} has rows of {slot.in_features}, which {form} does not divide into {block}",
            remedy="give it another format, such as fp8_row",
        )


def _check_model(model: Any) -> None:
    remedy = "take the plan back first (fpx.remove)"
    if hasattr(model, "peft_config"):
        raise ModelError("adapters are attached to this model", remedy="write merge(model)")
    refuse_quantised(model, "the model cannot be written for vLLM", "open it without load, and write that")
    refuse_simulated(model, "its weights are rounded already", remedy)
    if (method := compression(model.config)) is not None:
        raise ModelError(f"vLLM has no form for layers compressed by {method}", "export the dense form of the model")
    if changed := changes_of(model):
        raise ModelError(f"vLLM has no form for {', '.join(changed)}", remedy="write the model before it is converted")
    found = layer_map(model)
    if found.stacked:
        raise ModelError(
            f"{next(iter(found.stacked))}: experts in a stack cannot be written for vLLM", "take a model without"
        )
    odd = next((slot for slot in found.slots if slot.layer is not None and slot.layout == "conv1d"), None)
    if odd is not None:
        raise ModelError(f"{odd.name}: a layer that stores its transpose cannot be written for vLLM", "take another")


def _configuration(model: Any, formats: Mapping[str, str]) -> Any:
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    groups: dict[str, Any] = {}
    for form in SCHEMES:
        if names := [name for name, own in formats.items() if own == form]:
            scheme = QuantizationScheme(targets=names, **SCHEMES[form])
            scheme.format = infer_module_format(torch.nn.Linear, scheme)
            groups[form] = scheme
    if not groups:
        raise ConfigError("format: all layers stay as they are", remedy="write form: merged")
    kinds = {str(getattr(one.format, "value", one.format)) for one in groups.values()}
    ignored = [name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear) and name not in formats]
    ignored += [name for name, form in formats.items() if form in PLAIN]
    return QuantizationConfig(
        config_groups=groups, ignore=ignored, format=kinds.pop() if len(kinds) == 1 else "mixed-precision"
    )


def _peaks(model: Any, formats: Mapping[str, str]) -> dict[str, Tensor]:
    """The largest magnitude among layers that are multiplied as one: vLLM has one global scale for them."""
    found = layer_map(model)
    groups = {slot.name: fused_name(slot, found) for slot in found.slots if formats.get(slot.name) == "nvfp4_a16"}
    together: dict[str, Tensor] = {}
    for name, group in groups.items():
        own = model.get_submodule(name).weight.detach().abs().max().float()
        together[group] = torch.maximum(together.get(group, own), own)
    return {name: together[group] for name, group in groups.items()}


@torch.no_grad()
def _scale(module: Any, name: str, form: str, peak: Tensor | None) -> None:
    """Fill in the scales that a layer is packed by: those of the reference."""
    weight = module.weight.float()
    refuse_infinite(weight, name)
    if form == "nvfp4_a16":
        assert peak is not None
        whole = (peak / (E2M1_MAX * E4M3_MAX)).clamp_min(torch.finfo(torch.float32).tiny)
        blocks = weight.unflatten(-1, (-1, 16)).abs().amax(-1) / E2M1_MAX
        module.weight_global_scale.copy_(1 / whole)
        module.weight_scale.copy_(e4m3(blocks / whole))
        return
    if form.startswith("int4"):
        scale = weight.unflatten(-1, (-1, SCHEMES[form]["weights"]["group_size"])).abs().amax(-1) / INT4_MAX
    else:
        largest = E4M3_MAX if form.startswith("fp8") else INT8_MAX
        scale = weight.abs().amax(-1, keepdim=True) / largest
    module.weight_scale.copy_(scale.masked_fill(scale == 0, 1.0))
