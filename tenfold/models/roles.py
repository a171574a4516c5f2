"""Which part a matrix plays in its block, by where it stands, its shape and the words that all families share."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

Part = Literal["attention", "mlp", "mixer", "router", "head", "other"]

GROUPS: dict[str, tuple[Part, ...]] = {
    "attention": ("attention",),
    "mlp": ("mlp",),
    "mixer": ("mixer",),
    "all-linear": ("attention", "mlp", "mixer", "other"),
}
"""What a target may name beside a role: the parts that belong to it. Heads and routers are never meant by one."""

_ATTENTION = {
    "q": "q", "query": "q", "k": "k", "key": "k", "v": "v", "value": "v", "pos_query": "pos_q", "pos_key": "pos_k",
    "qkv": "qkv", "query_key_value": "qkv", "c_attn": "qkv",
    "o": "o", "out": "o", "output": "o", "dense": "o", "c": "o", "attention_out": "o",
}  # fmt: skip
"""A label without its ``proj`` -> the role in attention."""
_MLP = ("gate", "up", "down", "gate_up")
ROLES = frozenset(
    (*_ATTENTION.values(), *(f"cross_{role}" for role in "qkvo"), "cross_qkv", *_MLP, "fc1", "fc2", "head")
)
"""Roles that a target may name; a matrix of no such role has its own name for one."""

_IN_ATTENTION = re.compile(r"att(n|ention)?s?\b|attention|attn|_att\b")
_IN_CROSS = re.compile(r"enc_?dec|encoder_att|cross_?att")
_IN_MIXER = re.compile(r"linear_att|mamba|lstm|ssm|temporal|^conv$|short_conv")
_IN_MLP = re.compile(r"mlp|ffn|^ff$|feed_?forward|dense_?relu|expert|moe")
_ROUTER = re.compile(r"^gate$|router|^shared_expert_gate$|indexer")
_PLAIN_MLP = re.compile(r"(fc|lin|linear)_?(1|2|in|out)|intermediate|output")
_INNER = ("dense", "linear", "layer")


@dataclass(frozen=True)
class BlockMatrix:
    """A matrix of a block before its role is known.

    Args:
        name: of the module.
        inside: its name within the block, split at dots.
        shape: (in, out).
        alone: whether it is the only matrix of its parent, so that the parent's name says what it is.
    """

    name: str
    inside: tuple[str, ...]
    shape: tuple[int, int]
    alone: bool

    @property
    def path(self) -> tuple[str, ...]:
        """Where it stands: the names above its label."""
        return self.inside[:-2] if self._within else self.inside[:-1]

    @property
    def label(self) -> str:
        """What it is called there: ``output`` of ``attention.output.dense``, ``q_proj`` of ``q_proj.linear``."""
        return self.inside[-2 if self._within else -1]

    @property
    def word(self) -> str:
        """The label without what every family adds to it: ``q`` of ``q_proj``, ``q_lin``, ``Wq`` and ``project_q``."""
        bare = re.sub(r"_?(proj|lin|linear)$", "", self.label.lower())
        return re.sub(r"^(project_|w(?=(q|k|v|o|qkv)$))", "", bare)

    @property
    def _within(self) -> bool:
        return self.alone and len(self.inside) > 1 and self.inside[-1] in _INNER


def roles_of(block: Sequence[BlockMatrix]) -> dict[str, tuple[Part, str]]:
    """The part and role of each matrix of one block, by name.

    Args:
        block: its matrices, in model order.

    >>> shapes = {"attn.c_attn": (8, 24), "attn.c_proj": (8, 8), "mlp.c_fc": (8, 32), "mlp.c_proj": (32, 8)}
    >>> found = roles_of([BlockMatrix(name, tuple(name.split(".")), shape, False) for name, shape in shapes.items()])
    >>> [role for _, role in found.values()]
    ['qkv', 'o', 'fc1', 'fc2']
    """
    places: dict[tuple[str, ...], list[BlockMatrix]] = {}
    for matrix in block:
        places.setdefault(matrix.path, []).append(matrix)
    found: dict[str, tuple[Part, str]] = {}
    for path, there in places.items():
        parts = {matrix.name: _part(path, matrix, there) for matrix in there}
        roles = _mlp_roles([matrix for matrix in there if parts[matrix.name] == "mlp"])
        attention = [matrix for matrix in there if parts[matrix.name] == "attention"]
        roles |= _attention_roles(attention, cross=_matches(_IN_CROSS, path))
        found |= {name: (part, roles[name]) for name, part in parts.items() if name in roles}
        found |= {matrix.name: (parts[matrix.name], matrix.inside[-1]) for matrix in there if matrix.name not in roles}
    return {matrix.name: found[matrix.name] for matrix in block}


def _part(path: Sequence[str], matrix: BlockMatrix, there: Sequence[BlockMatrix]) -> Part:
    if _matches(_ROUTER, (*path, matrix.label)):
        return "router"
    words = {one.word for one in there}
    if _matches(_IN_MIXER, path):
        return "mixer"
    if _matches(_IN_ATTENTION, path) or ({"q", "k"} <= words and matrix.word in _ATTENTION):
        return "attention"
    if _matches(_IN_MLP, path) or (
        matrix.word in _MLP and {"up", "down"} <= words | {"up" if "gate_up" in words else ""}
    ):
        return "mlp"
    if not path and _PLAIN_MLP.fullmatch(matrix.label):
        return "mlp"
    return "mixer" if "mixer" in path else "other"


def _attention_roles(there: Sequence[BlockMatrix], *, cross: bool) -> dict[str, str]:
    roles = {matrix.name: _ATTENTION[matrix.word] for matrix in there if matrix.word in _ATTENTION}
    if len(there) == 2 and there[1].shape[1] == there[0].shape[0] < there[0].shape[1]:
        roles = {there[0].name: "qkv", there[1].name: "o"}  # one matrix in, one back to the stream
    return {name: f"cross_{role}" if cross else role for name, role in roles.items()}


def _mlp_roles(there: Sequence[BlockMatrix]) -> dict[str, str]:
    """Roles by name where one says ``up`` or ``down``, else by shape: what rises from the stream, and what falls."""
    named = {matrix.name: matrix.word for matrix in there if matrix.word in _MLP}
    if named:
        return named
    if len(there) == 2:
        (_, wide), (inner, _) = there[0].shape, there[1].shape
        pair = {inner: ("fc1", "fc2"), 2 * inner: ("gate_up", "down")}.get(wide, ())
        return {matrix.name: role for matrix, role in zip(there, pair, strict=False)}
    if len(there) == 3:
        # The one that leads back; where all are square, the one that is defined last.
        falling = next(
            (
                one
                for one in reversed(there)
                if all(one.shape == other.shape[::-1] for other in there if other is not one)
            ),
            None,
        )
        rising = [matrix for matrix in there if matrix is not falling]
        if falling is not None:
            gate = next((matrix for matrix in rising if "gate" in matrix.label), rising[0])
            return {
                matrix.name: "down" if matrix is falling else "gate" if matrix is gate else "up" for matrix in there
            }
    return {}


def _matches(pattern: re.Pattern[str], names: Sequence[str]) -> bool:
    return any(pattern.search(name.lower()) for name in names if "norm" not in name)


@cache
def reads_weight(kind: type, child: str) -> bool:
    """Whether a class of modules reads the weight of a layer within it, by its source, so that no adapter is seen.

    Mamba's kernels are given weights, and PEFT would train an adapter that nothing reads. Where the source cannot be
    had, nothing is.

    Args:
        kind: the class of the module.
        child: the attribute that the layer is.

    >>> from tenfold.models.tiny import tiny_model
    >>> reads_weight(type(tiny_model("llama").model.model.layers[0].mlp), "down_proj")
    False
    """
    # Not where only its type or place is asked for, nor the slices of Bloom's and Llama's pretraining.
    aside = r"\.(?:dtype|device|shape|data|split)\b|\["
    read = re.compile(rf"(?<!isinstance\()\bself\.{re.escape(child)}\.weight\b(?!{aside})")
    methods = [
        own for base in kind.__mro__ if base.__module__.partition(".")[0] != "torch" for own in vars(base).values()
    ]
    for method in map(inspect.unwrap, filter(inspect.isfunction, methods)):
        if {child, "weight"} <= {*method.__code__.co_names}:  # few do, and source is slow to find
            try:
                if read.search(inspect.getsource(method)):
                    return True
            except (OSError, TypeError):
                continue
    return False
