"""Models whose weights are packed into a few bits: by us when they are opened (``load``), or in their files."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from typing import Any, get_args

from tenfold.config.shape import Load
from tenfold.errors import ConfigError, MissingDependencyError, ModelError
from tenfold.models.changes import compression

INSTALL = 'pip install "tenfold[bnb]"'

PACKAGES: Mapping[str, tuple[str, ...]] = {
    "bitsandbytes": ("bitsandbytes",),
    "gptq": ("optimum", "gptqmodel"),
    "awq": ("gptqmodel",),
    "compressed-tensors": ("compressed_tensors",),
    "aqlm": ("aqlm",),
    "quanto": ("optimum.quanto",),
    "hqq": ("hqq",),
    "torchao": ("torchao",),
    "auto-round": ("auto_round",),
    "vptq": ("vptq",),
    "spqr": ("spqr_quant",),
    "eetq": ("kernels",),
    "nvfp4": ("kernels",),
    "quark": ("quark",),
}
"""What transformers needs to open files of each ``quant_method``; methods that are missing here need nothing more."""

_PIP = {"optimum.quanto": "optimum-quanto", "compressed_tensors": "compressed-tensors", "auto_round": "auto-round"}


def check_load(load: str | None) -> None:
    """Refuse a ``load`` that is not one, or that this installation cannot serve.

    Raises:
        ConfigError: not ``4bit`` or ``8bit``.
        MissingDependencyError: bitsandbytes is absent.

    >>> check_load(None)
    """
    if load is None:
        return
    if load not in get_args(Load):
        raise ConfigError(f"load: must be one of {', '.join(get_args(Load))}, got {load!r}", "leave it out to load all")
    if not _is_there("bitsandbytes"):
        raise MissingDependencyError(f"load: {load} needs the package bitsandbytes", INSTALL)


def own_method(config: Mapping[str, Any]) -> str | None:
    """How the weights of a saved model are packed, as its ``config.json`` says it; None of plain weights.

    >>> own_method({"quantization_config": {"quant_method": "gptq", "bits": 4}})
    'gptq'
    """
    found = config.get("quantization_config")
    if not isinstance(found, Mapping) or compression(dict(config)):
        return None
    if found.get("load_in_4bit") or found.get("load_in_8bit"):
        return "bitsandbytes"
    return str(found.get("quant_method") or "unknown")


def check_own(config: Mapping[str, Any], name: str, *, packs: bool) -> str | None:
    """Refuse files whose weights are packed already, where that cannot be opened as asked.

    Args:
        config: of the saved model.
        name: as the user calls it.
        packs: whether the weights are to be packed on opening (``load``).

    Returns:
        As `own_method`.

    Raises:
        ConfigError: both the files and ``load`` pack the weights.
        MissingDependencyError: the package that these files need is absent.
    """
    if packs and (compressed := compression(dict(config))):
        raise ConfigError(
            f"load: the layers of {name} are compressed ({compressed}), and packing is for plain ones",
            remedy="leave load out; or write a plain model first: tenfold export --form dense",
        )
    method = own_method(config)
    if method is None:
        return None
    if packs:
        raise ConfigError(
            f"load: the weights of {name} are quantised already ({method})",
            remedy="leave load out: the model opens as it is, and adapters train on it",
        )
    missing = [package for package in PACKAGES.get(method, ()) if not _is_there(package)]
    if missing:
        raise MissingDependencyError(
            f"{name}: its weights are quantised ({method}), which needs {' and '.join(missing)}",
            INSTALL if method == "bitsandbytes" else f"pip install {' '.join(_PIP.get(one, one) for one in missing)}",
        )
    return method


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the parent of a package within another one
        return False


PACKED_MARK = "_tenfold_packed"
"""The attribute of a model whose weights were packed in memory, by a plan; its text says into which formats."""


def is_quantised(model: Any) -> bool:
    """Whether a model's weights are packed, so that they have no gradient and nothing can be added to them.

    >>> from tenfold.models.tiny import tiny_model
    >>> is_quantised(tiny_model("llama").model)
    False
    """
    return getattr(model, "hf_quantizer", None) is not None or getattr(model, PACKED_MARK, None) is not None


def quantisation(model: Any) -> str:
    """How a quantised model's weights are packed: ``4bit`` or ``8bit`` by bitsandbytes, formats, or another method."""
    if (formats := getattr(model, PACKED_MARK, None)) is not None:
        return str(formats)
    config = model.hf_quantizer.quantization_config
    method = str(getattr(config.quant_method, "value", config.quant_method))
    return method if method != "bitsandbytes" else "8bit" if config.load_in_8bit else "4bit"


def number_format(model: Any) -> str:
    """What a model computes in and, where its weights are packed, what they are packed into.

    >>> from tenfold.models.tiny import tiny_model
    >>> number_format(tiny_model("llama").model)
    'float32'
    """
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{quantisation(model)}, {dtype}" if is_quantised(model) else dtype


def refuse_quantised(model: Any, what: str, remedy: str) -> None:
    """Refuse what needs whole weights.

    Raises:
        ModelError: the model is quantised.
    """
    if is_quantised(model):
        raise ModelError(f"{what}: the weights are quantised ({quantisation(model)})", remedy=remedy)


def packing(load: Load, dtype: Any) -> Any:
    """What ``from_pretrained`` is told: NF4 with double quantisation as in QLoRA, or LLM.int8().

    Args:
        load: ``4bit`` or ``8bit``.
        dtype: of products with 4-bit weights, a ``torch.dtype``. LLM.int8() multiplies whole numbers.
    """
    from transformers import BitsAndBytesConfig

    # Two lines for each matrix product of a step: inputs are rounded to float16 first, which is how LLM.int8() works.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if load == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def computing_dtype(device: Any) -> Any:
    """The number format that packed weights compute in: bfloat16 on a GPU that has it, else float32.

    >>> import torch
    >>> computing_dtype(torch.device("cpu"))
    torch.float32
    """
    import torch

    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def quantised_copy(model: Any, load: Load, device: Any) -> Any:
    """A copy of a model that is in memory with its weights packed, through transformers' own way of opening one.

    Args:
        model: a plain ``transformers`` model.
        load: ``4bit`` or ``8bit``.
        device: where the copy goes.
    """
    dtype = model.dtype
    tied = {name for name, source in model.all_tied_weights_keys.items() if _same(model, name, source)}
    weights = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    packed = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=weights,
        dtype=dtype,
        quantization_config=packing(load, dtype),
        device_map={"": device},
    )
    packed.generation_config = getattr(model, "generation_config", None)  # a head that scores has none
    packed.name_or_path = packed.config._name_or_path = model.name_or_path
    return packed


def _same(model: Any, name: str, source: str) -> bool:
    return model.get_parameter(name) is model.get_parameter(source)


def for_training(model: Any) -> Any:
    """A model as its adapter is trained on it: quantised ones as PEFT's QLoRA wants them, others as they are.

    All is frozen, and what is not packed (norms, embedding, head) computes in float32. Gradient checkpointing is the
    Trainer's, by its own key.
    """
    if not is_quantised(model):
        return model
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def parameter_count(model: Any, counts: Callable[[str], bool] = lambda name: True) -> int:
    """The number of parameters, those of packed matrices by the shape that they stand for.

    Args:
        model: a module.
        counts: by the name of a parameter, whether it counts.

    >>> from tenfold.models.tiny import tiny_model
    >>> model = tiny_model("llama").model
    >>> parameter_count(model) == model.num_parameters()
    True
    """
    seen: set[int] = set()
    total = 0
    for name, module in model.named_modules():
        if is_packed(module):
            total += module.in_features * module.out_features * counts(f"{name}.weight")
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen and counts(f"{name}.{own}") and not (own == "weight" and is_packed(module)):
                seen.add(id(parameter))
                total += parameter.numel()
    return total


def is_packed(module: Any) -> bool:
    """Whether a module is a linear layer whose weight is codes: in bitsandbytes a parameter, elsewhere buffers."""
    if not hasattr(module, "in_features") or not hasattr(module, "out_features"):
        return False
    matrices = [one for one in module._parameters.values() if one is not None and one.ndim > 1]
    if matrices:  # more than one in a compressed layer
        return not any(one.is_floating_point() for one in matrices)
    return any(not buffer.is_floating_point() for buffer in module._buffers.values() if buffer is not None)
