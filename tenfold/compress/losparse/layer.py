"""A linear layer whose weight is low rank plus kept rows, stored as some of its own rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tenfold.compress.losparse.factors import Factors, stored
from tenfold.compress.losparse.format import record_layers
from tenfold.compress.losparse.spanning import spanning_rows
from tenfold.compress.losparse.unmade import UnmadeWeight
from tenfold.errors import ConfigError, ModelError
from tenfold.kernels.low_rank_rows import FEW, Form, combinations, joined, product
from tenfold.models.quantised import parameter_count

Kind = Literal["linear", "conv1d"]


class LowRankRowsLinear(nn.Linear):
    """A linear layer of which ``rank + kept`` rows are stored; the others are combinations of the first ``rank``.

    To the libraries around it, it is a linear layer: PEFT puts adapters on it, and its shape outwards is that of the
    layer that it replaces. Its weight exists only when it is asked for.

    Args:
        in_features: columns of the matrix.
        out_features: its rows.
        rank: of what is not kept.
        kept: rows that are kept as a whole.
        bias: whether a bias is added.
        kind: of the layer that it replaces, which `tenfold.compress.losparse.dense.to_dense` gives
            back.
        elastic: whether it also holds what kept rows are without being kept, for `trim`.
        device: of all tensors.
        dtype: of all tensors but ``place``.

    >>> layer = LowRankRowsLinear(6, 4, rank=1, kept=1)
    >>> layer(torch.ones(2, 3, 6)).shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([2, 3, 4]), 18)
    """

    place: Tensor
    spare: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        kept: int,
        *,
        bias: bool = True,
        kind: Kind = "linear",
        elastic: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make the weight
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.kept, self.kind = rank, kept, kind
        whole = rank + kept
        make: dict[str, Any] = {"device": device, "dtype": dtype}
        self.rows = nn.Parameter(torch.zeros(whole, in_features, **make))
        """``[rank + kept, in]``: the rows that the others are made of, then the kept ones, the most important first."""
        self.mix = nn.Parameter(torch.zeros(out_features - whole, rank, **make))
        """``[out - rank - kept, rank]``: the other rows as combinations of the first."""
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features, **make)) if bias else None)
        self.register_buffer("place", torch.arange(out_features, dtype=torch.int32, device=device))
        self.register_buffer("spare", torch.zeros(kept, rank, **make) if elastic else None)
        """``[kept, rank]``: the kept rows as combinations of the first, which is what `trim` makes of them."""
        self.few: Form = "stored"
        self.many: Form = "stored"
        """In which form up to `FEW` tokens, and more, are multiplied (`tenfold.kernels.low_rank_rows`)."""
        # What other forms multiply with, and the versions of the parameters that it was made of.
        for form in ("joined", "whole"):
            self.register_buffer(f"made_{form}", None, persistent=False)
        self._made_of: dict[Form, tuple[int, ...]] = {}

    @classmethod
    def from_factors(
        cls,
        factors: Factors,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        kind: Kind = "linear",
        *,
        elastic: bool = False,
    ) -> LowRankRowsLinear:
        """The layer that multiplies with a compressed matrix; exact but for one rounding to ``dtype``.

        Rows that span the others are found by QR with column pivoting, in float64, so that the combinations have small
        coefficients. Where the part that is not kept has a lower rank than its factors, the layer has that rank.

        Args:
            factors: the matrix. Its bias, where it has one, goes before ``bias``.
            bias: ``[out]``.
            dtype: of the parameters. Default: that of the kept rows.
            kind: of the layer that it replaces.
            elastic: also hold what kept rows are without being kept: as ``left`` says or, where its kept rows are all
                zero, the combination that is nearest to each.
        """
        out, device, dtype = factors.left.shape[0], factors.rows.device, dtype or factors.rows.dtype
        bias = bias if factors.bias is None else factors.bias
        keeps = factors.kept.cpu()
        others = torch.ones(out, dtype=torch.bool).index_fill(0, keeps, False).nonzero()[:, 0]
        left, right = factors.left.detach().cpu().double()[others], factors.right.detach().cpu().double()
        chosen, mix = spanning_rows(left, right)
        rest = torch.ones(len(others), dtype=torch.bool).index_fill(0, chosen, False)
        order = torch.cat((others[chosen], keeps, others[rest]))
        layer = cls(
            right.shape[1],
            out,
            len(chosen),
            len(keeps),
            bias=bias is not None,
            kind=kind,
            elastic=elastic,
            device=device,
            dtype=dtype,
        )
        spanning = left[chosen] @ right
        with torch.no_grad():
            layer.rows[: len(chosen)] = spanning.to(layer.rows)
            layer.rows[len(chosen) :] = factors.rows.detach().to(layer.rows)
            layer.mix.copy_(mix[rest])
            layer.place[order.to(device)] = torch.arange(out, dtype=torch.int32, device=device)
            if bias is not None:
                layer.bias.data.copy_(bias.detach())
            if layer.spare is not None and len(chosen):
                low = factors.left.detach().cpu().double()[keeps] @ right
                near = low if bool(low.any()) else factors.rows.detach().cpu().double()
                layer.spare.copy_(torch.linalg.lstsq(spanning.mT, near.mT).solution.mT)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        form = self.few if input.numel() <= FEW * self.in_features else self.many
        # Not as attributes: modules look those up slowly, which of a small matrix is a part of the time.
        held: dict[str, Any] = self._parameters
        rows, mix, bias = held["rows"], held["mix"], held["bias"]
        # What is made of the parameters has no gradient to them, and is not there while they are trained.
        if form == "stored" or (torch.is_grad_enabled() and rows.requires_grad):
            return product(input, rows, mix, self.place, bias)
        if form == "joined":
            return joined(input, rows, self._made(form), bias)
        return nn.functional.linear(input, self._made(form), bias)

    def take(self, few: Form, many: Form) -> None:
        """Choose the forms for few and many tokens; what they need beside the parameters is made at their first use."""
        self.few, self.many = few, many
        self._forget({"joined", "whole"} - {few, many})

    def form_bytes(self) -> int:
        """Bytes beside the parameters that the chosen forms take once they are in use."""
        columns = {"stored": 0, "joined": self.rank + self.kept, "whole": self.in_features}
        return sum(columns[form] for form in {self.few, self.many}) * self.out_features * self.rows.element_size()

    def _made(self, form: Form) -> Tensor:
        """What a form multiplies with; made again when a parameter has changed or gone elsewhere."""
        made = self._buffers["made_whole" if form == "whole" else "made_joined"]
        if made is not None and torch.compiler.is_compiling():
            return made
        held: dict[str, Any] = self._parameters
        rows, mix = held["rows"], held["mix"]
        versions = (id(rows), _version(rows), id(mix), _version(mix))
        if made is None or self._made_of[form] != versions:
            with torch.no_grad():
                if form == "whole":
                    made = self.dense_weight()
                else:
                    made = combinations(self.rank + self.kept, self.mix, self.place)
            setattr(self, f"made_{form}", made)
            self._made_of[form] = versions
        return made

    def _forget(self, forms: Iterable[str] = ("joined", "whole")) -> None:
        for form in forms:
            setattr(self, f"made_{form}", None)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """To another type or device: what was made goes, and forms that another device is fast with."""
        before = self.rows.device.type
        self._forget()
        super()._apply(*args, **kwargs)
        if self.rows.device.type != before:
            self.take("stored", "stored")
        return self

    def dense_weight(self) -> Tensor:
        """The matrix itself, ``[out, in]``, with a gradient to rows and mix."""
        return torch.cat((self.rows, self.mix @ self.rows[: self.rank])).index_select(0, self.place)

    @property
    def numbers(self) -> int:
        """What it holds in the place of its matrix, as `tenfold.compress.losparse.factors.stored` counts."""
        return stored(self.out_features, self.in_features, self.rank, self.kept, elastic=self.spare is not None)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The same for those who know linear layers: of its shape and type, read-only, made when it is read."""
        shape = (self.out_features, self.in_features)
        return UnmadeWeight(self.dense_weight, shape, self.rows.dtype, self.rows.device)

    def trim(self, kept: int) -> None:
        """Keep fewer rows, the most important ones; the others become combinations.

        Raises:
            ModelError: more rows than there are, or a layer that is not elastic.
        """
        if self.spare is None:
            raise ModelError("a compressed layer that is not elastic has no fewer rows", "compress with elastic: true")
        if not 0 <= kept <= self.kept:
            raise ModelError(f"kept: {kept} of {self.kept} rows", f"give 0 to {self.kept}")
        with torch.no_grad():  # rows that go stand next to the combinations already, so that no place changes
            self.rows = nn.Parameter(self.rows[: self.rank + kept].clone(), self.rows.requires_grad)
            self.mix = nn.Parameter(torch.cat((self.spare[kept:], self.mix)), self.mix.requires_grad)
        self.spare, self.kept = self.spare[:kept].clone(), kept
        self._forget()

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """``[out, rank]`` and ``[rank, in]``, whose product is the matrix without its kept rows; float64, on the CPU.

        Kept rows are zero in it, or of an elastic layer what they are without being kept.
        """
        exact: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
        unit = torch.eye(self.rank, **exact)
        low = torch.zeros(self.kept, self.rank, **exact) if self.spare is None else self.spare.to(**exact)
        mix = torch.cat((unit, low, self.mix.detach().to(**exact)))[self.place.cpu().long()]
        return mix, self.rows[: self.rank].detach().to(**exact)

    def plus(self, left: Tensor, right: Tensor) -> LowRankRowsLinear:
        """A layer for the sum of this matrix and ``left @ right``: its rank is larger by that of the summand, at most.

        Args:
            left: ``[out, rank]``.
            right: ``[rank, in]``.
        """
        exact: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
        order, rows = self.place.argsort().cpu(), self.rows.detach().to(**exact)
        kept = order[self.rank : self.rank + self.kept]
        mix, basis = self.low_rank()
        left, right = left.detach().to(**exact), right.detach().to(**exact)
        factors = Factors(
            torch.cat((mix, left), 1), torch.cat((basis, right)), kept, rows[self.rank :] + left[kept] @ right
        )
        elastic = self.spare is not None
        layer = self.from_factors(factors, self.bias, self.rows.dtype, self.kind, elastic=elastic)
        layer.to(self.rows.device).requires_grad_(self.rows.requires_grad)
        layer.take(self.few, self.many)  # until it is measured for its own rank
        return layer.train(self.training)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of it."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, rank={self.rank}, kept={self.kept}, bias={self.bias is not None}"


def install(model: nn.Module, factors: Mapping[str, Factors], *, elastic: bool = False) -> nn.Module:
    """Put compressed layers in the place of a model's linear layers.

    Modules and weights that are shared stay shared. What is put in has the dtype, device and ``requires_grad`` of what
    was there; a bias stays, unless its factors bring another one. A matrix of which all rows are kept stays a plain
    layer, with these rows, unless it is to be elastic. A ``transformers`` model is ready for ``save_pretrained``.

    Args:
        model: changed in place.
        factors: by the name of an ``nn.Linear`` or ``Conv1D``.
        elastic: whether the layers can be trimmed. It takes ``rank`` numbers more for each kept row, which the budget
            holds where `tenfold.compress.losparse.oneshot.compress_once` was told so.

    Returns:
        The model.

    Raises:
        ModelError: a name that the model does not have, a module of another kind or shape, a weight that is shared with
            a module of another kind or that is given two matrices.
    """
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(weight := module._parameters.get("weight"), nn.Parameter):
            owners.setdefault(id(weight), []).append((name, module))
    done: set[int] = set()
    for name, matrix in factors.items():
        module = _replaceable(model, name, matrix)
        weight, sharing = module.weight, owners[id(module.weight)]
        if id(weight) in done:
            raise ModelError(f"{name}: shares its weight with a layer that is compressed too", "name one of them")
        if other := next(
            (f"{name} ({type(one).__name__})" for name, one in sharing if type(one) is not type(module)), ""
        ):
            raise ModelError(f"{name}: shares its weight with {other}", "leave it out, or untie the two first")
        done.add(id(weight))
        if len(matrix.kept) == weight.shape[isinstance(module, Conv1D)] and not elastic:
            _fill(module, matrix)
            continue
        layer = _filled(module, matrix, elastic)
        twins = {id(module): layer}
        for other, owner in sharing:
            if id(owner) not in twins:
                twins[id(owner)] = _twin(layer, owner)
            replace_module(model, other, twins[id(owner)])
    return remark(model)


def _version(tensor: Tensor) -> int:
    """How often it was changed in place; of an inference tensor nobody counts."""
    return -1 if tensor.is_inference() else tensor._version


def trim(model: nn.Module, share: float) -> nn.Module:
    """Keep the most important part of the rows that an elastic model keeps.

    Args:
        model: compressed with ``elastic``; changed in place.
        share: of the kept rows of each layer, from 0 to 1, rounded to whole rows. A layer in which nothing but kept
            rows is left stays as it is.

    Returns:
        The model.

    Raises:
        ModelError: no layer is elastic.
        ConfigError: a share outside of [0, 1].
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"share: must be in [0, 1], got {share}", remedy="give what part of the kept rows stays")
    elastic = [one for one in model.modules() if isinstance(one, LowRankRowsLinear) and one.spare is not None]
    if not elastic:
        raise ModelError("no layer of this model is elastic", remedy="compress it with elastic: true")
    for layer in elastic:
        if layer.rank:
            layer.trim(round(share * layer.kept))
    return remark(model)


def compressed_layers(model: nn.Module) -> dict[str, LowRankRowsLinear]:
    """The compressed layers of a model, by every name that they have."""
    found = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in found if isinstance(module, LowRankRowsLinear)}


def number_count(model: nn.Module) -> int:
    """What a model holds, compressed or not: its parameters, and beside these the spare combinations of elastic layers.

    >>> from tenfold.models.tiny import tiny_model
    >>> model = tiny_model("llama").model
    >>> number_count(model) == model.num_parameters()
    True
    """
    spare = {id(one.spare): one.spare.numel() for one in compressed_layers(model).values() if one.spare is not None}
    return parameter_count(model) + sum(spare.values())


def layer_like(module: Any, entry: Mapping[str, Any]) -> LowRankRowsLinear:
    """An empty layer in the place of a linear layer.

    Args:
        module: an ``nn.Linear`` or a ``Conv1D``.
        entry: as `tenfold.compress.losparse.format.LowRankRowsConfig` has it.
    """
    conv1d = isinstance(module, Conv1D)
    in_features, out_features = (module.nx, module.nf) if conv1d else (module.in_features, module.out_features)
    layer = LowRankRowsLinear(
        in_features,
        out_features,
        entry["rank"],
        entry["kept"],
        bias=entry.get("bias", module.bias is not None),
        kind="conv1d" if conv1d else "linear",
        elastic=entry.get("elastic", False),
        device=module.weight.device,
        dtype=module.weight.dtype,
    )
    return layer.train(module.training)


def entry_of(layer: LowRankRowsLinear) -> dict[str, Any]:
    """What `layer_like` needs to know of a layer."""
    flags = {"bias": layer.bias is not None, "elastic": layer.spare is not None}
    return {"rank": layer.rank, "kept": layer.kept, **flags}


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module where another one stands."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def remark(model: nn.Module) -> nn.Module:
    """Write into a model's configuration, where it has one, which layers are compressed now."""
    plain: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(plain, PreTrainedModel):
        layers = compressed_layers(plain)
        record_layers(plain, {name.removesuffix(".base_layer"): entry_of(layer) for name, layer in layers.items()})
    return model


def replaceable(module: nn.Module) -> bool:
    """Whether `install` can put a compressed layer in its place: it multiplies with its weight, and no more."""
    return type(module) in (nn.Linear, Conv1D)


def _replaceable(model: nn.Module, name: str, matrix: Factors) -> Any:
    module: Any
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ModelError(f"{name}: the model has no such module", "give names of its linear layers") from None
    if not replaceable(module):
        raise ModelError(f"{name}: a {type(module).__name__} cannot be compressed", "give an nn.Linear or a Conv1D")
    shape = tuple(module.weight.shape) if isinstance(module, nn.Linear) else tuple(module.weight.mT.shape)
    wanted = (matrix.left.shape[0], matrix.right.shape[1])
    if shape != wanted:
        raise ModelError(f"{name}: is {shape}, and its factors make {wanted}", "take the factors of this model")
    return module


def _filled(module: Any, matrix: Factors, elastic: bool) -> LowRankRowsLinear:
    kind: Kind = "conv1d" if isinstance(module, Conv1D) else "linear"
    layer = LowRankRowsLinear.from_factors(matrix, module.bias, module.weight.dtype, kind, elastic=elastic)
    layer.to(module.weight.device).requires_grad_(module.weight.requires_grad)
    if layer.bias is not None and module.bias is not None:
        layer.bias.requires_grad_(module.bias.requires_grad)
    return layer.train(module.training)


@torch.no_grad()
def _fill(module: Any, matrix: Factors) -> None:
    """The same for a layer that stays a plain one."""
    weight = matrix.dense()
    module.weight.copy_(weight.mT if isinstance(module, Conv1D) else weight)
    if matrix.bias is not None:
        new = matrix.bias.to(module.weight, copy=True)
        module.bias = nn.Parameter(
            new, module.weight.requires_grad if module.bias is None else module.bias.requires_grad
        )


def _twin(layer: LowRankRowsLinear, module: Any) -> LowRankRowsLinear:
    """A layer for another module with the same weight: all is shared but the bias."""
    with torch.device("meta"):
        twin = layer_like(layer, {**entry_of(layer), "bias": False})
    twin.rows, twin.mix, twin.place, twin.spare, twin.bias = (
        layer.rows,
        layer.mix,
        layer.place,
        layer.spare,
        module.bias,
    )
    twin.kind = layer.kind
    return twin.train(module.training)
