"""A model's weights and inputs as a format has them: shared by the scores, which look at one unit, and by `apply`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tenfold.compress.fpx.units import Unit, UnitWeight
from tenfold.compress.losparse.layer import LowRankRowsLinear
from tenfold.core.weight_formats import WeightFormat, weight_format
from tenfold.errors import ConfigError, ModelError
from tenfold.kernels.low_rank_rows import Form
from tenfold.kernels.packed_matrix import packed_format
from tenfold.models.layer_map import plain_modules

Codec = Literal["reference", "gguf", "kernels"]


def format_of(name: str, codec: Codec) -> WeightFormat:
    """A format by its name; GGUF's ``mxfp4`` is another than the reference, as is ``int4_g32`` of kernels.

    Raises:
        ConfigError: an unknown format or codec.

    >>> format_of("nvfp4", "reference").bytes(1, 16)
    13
    """
    if codec == "reference":
        return weight_format(name)
    if codec == "gguf":
        from tenfold.models.gguf_types import gguf_format

        return gguf_format(name)
    if codec == "kernels":
        return packed_format(name)
    raise ConfigError(f"codec: unknown codec {codec!r}", remedy=f"give one of {', '.join(get_args(Codec))}")


def rounded_weight(form: WeightFormat, weight: UnitWeight, tensor: Tensor) -> Tensor:
    """A parameter rounded to a format along its inputs; shape, type and device stay.

    Args:
        form: the format.
        weight: how the parameter is stored.
        tensor: its numbers: ``[out, in]``, transposed or with experts in front where the weight is so.

    Raises:
        ModelError: numbers that are not finite; names the weight.
    """
    matrices = tensor.transpose(-2, -1) if weight.transposed else tensor
    try:
        flat = matrices.reshape(-1, weight.out, weight.inner)
        rounded = torch.stack([form.weight(matrix) for matrix in flat]) if weight.count > 1 else form.weight(flat[0])
    except ModelError as error:
        raise ModelError(f"{weight.name}: {error.problem}", error.remedy) from error
    rounded = rounded.reshape(matrices.shape)
    return (rounded.transpose(-2, -1) if weight.transposed else rounded).contiguous()


def stored_size(form: WeightFormat, unit: Unit, align: int = 1) -> int:
    """Bytes of a unit's weights in a format, scales included.

    Args:
        form: the format.
        unit: the unit.
        align: each weight begins at a multiple of so many bytes.
    """
    sizes = (weight.count * form.bytes(weight.out, weight.inner) for weight in unit.weights)
    return sum(-(-size // align) * align for size in sizes)


def rounding_inputs(form: WeightFormat) -> Callable[..., Any]:
    """A forward pre-hook that rounds what a layer reads.

    Of stacked experts and compressed layers that is what comes in, not what lies between their two products.
    """

    def on_inputs(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (form.inputs(args[0]), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, {**kwargs, first: form.inputs(kwargs[first])}

    return on_inputs


@contextmanager
def holding(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """A module computes with other numbers in place of its own parameters."""
    before = dict(module._parameters)
    module._parameters.update(tensors)  # type: ignore[arg-type]
    try:
        yield
    finally:
        module._parameters.update(before)


Forms = list[tuple[LowRankRowsLinear, Form, Form]]
"""Compressed layers, and in which forms they multiply few and many tokens."""


def stored_forms(modules: Iterable[Any]) -> Forms:
    """Let compressed layers multiply by what they store; other forms hold products of numbers that were there before.

    Returns:
        How they multiplied, for `own_forms`.
    """
    forms = [(layer, layer.few, layer.many) for layer in modules if isinstance(layer, LowRankRowsLinear)]
    for layer, _, _ in forms:
        layer.take("stored", "stored")
    return forms


def own_forms(forms: Forms) -> None:
    """Let compressed layers multiply as they did before `stored_forms`."""
    for layer, few, many in forms:
        layer.take(few, many)


class Rounding:
    """Units of a model in their formats until it is undone: weights rounded, inputs rounded as layers read them.

    Parameters stay the objects that they are, so that tied weights stay tied and optimizers and adapters keep theirs.
    The original numbers are held beside the rounded ones.

    Args:
        model: a model, also with adapters, which are not touched.
        formats: of each unit that is rounded.

    Raises:
        ModelError: numbers that are not finite; nothing is changed then.
    """

    def __init__(self, model: Any, formats: Iterable[tuple[Unit, WeightFormat]]) -> None:
        modules = dict(plain_modules(model))
        self._originals: list[tuple[nn.Parameter, Tensor]] = []
        self._hooks: list[Any] = []
        self._forms = stored_forms(modules.values())
        try:
            for unit, form in formats:
                for weight in unit.weights:
                    parameter = modules[weight.modules[0]]._parameters[weight.name.rpartition(".")[2]]
                    rounded = rounded_weight(form, weight, parameter.data)
                    self._originals.append((parameter, parameter.data))
                    parameter.data = rounded
                for name in unit.modules:
                    if not isinstance(modules[name], nn.Embedding):
                        hook = modules[name].register_forward_pre_hook(rounding_inputs(form), with_kwargs=True)
                        self._hooks.append(hook)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Put the original tensors back, the same storage where the model has not been moved meanwhile."""
        for parameter, original in self._originals:
            parameter.data = original.to(parameter.device, parameter.dtype)
        for hook in self._hooks:
            hook.remove()
        own_forms(self._forms)
        self._originals, self._hooks, self._forms = [], [], []
