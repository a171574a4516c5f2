"""Profiles: which heads of a model to steer, found once and kept as a small JSON file."""

from __future__ import annotations

import hashlib
import json
import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tenfold.attend.attention import self_attentions
from tenfold.config.pasta import profile_path
from tenfold.errors import ConfigError
from tenfold.files import write_text

FORMAT = "tenfold-heads-1"


@dataclass(frozen=True)
class Profile:
    """A set of heads, and where it comes from.

    Args:
        heads: query heads by layer.
        model: what it was found on: ``model_type``, ``layers``, ``heads`` (per layer) and ``weights``, a fingerprint;
            empty in the files that the paper's authors released.
        tasks: the tasks whose best heads were intersected.
        curve: one entry per size that was tried: ``heads``, ``score``, ``fluency``, ...
        provenance: how it was found: metric, alpha, data and its hash, seed, passes, seconds, versions.

    >>> Profile({3: (0, 2), 1: (1,)}).size
    3
    """

    heads: dict[int, tuple[int, ...]]
    model: dict[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    curve: tuple[dict[str, Any], ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """How many heads there are."""
        return sum(map(len, self.heads.values()))

    def check_model(self, model: Any) -> None:
        """Compare with the model that is to be steered.

        Other weights than those it was found on give a warning: profiles carry over to adapted or quantised weights,
        often with a loss.

        Raises:
            ConfigError: a model of another shape.
        """
        if not self.model:
            return  # released files name no model; heads that do not exist are refused when they are used
        here = describe_model(model)
        wrong = [key for key in ("layers", "heads") if here[key] != self.model[key]]
        if wrong:
            raise ConfigError(
                f"profile: made for a {self.model['model_type']} model of {self.model['layers']} layers with "
                f"{self.model['heads']} heads each, this {here['model_type']} has {here['layers']} of {here['heads']}",
                remedy="find this model's own heads: tenfold steer profile MODEL",
            )
        adapted = hasattr(model, "peft_config")
        if adapted or here["weights"] != self.model["weights"]:
            reason = "an adapter is on the model" if adapted else "the weights are others"
            warnings.warn(
                f"this profile was found on other weights ({reason}): check it, or find heads again with "
                "`tenfold steer profile MODEL`",
                stacklevel=3,
            )


def describe_model(model: Any) -> dict[str, Any]:
    """Shape and fingerprint of a model's attention, for `Profile.model`.

    The fingerprint covers the beginning of every attention matrix, rounded to bfloat16, so that it is the same in
    float32 and bfloat16, and not changed by an adapter that is not merged.

    >>> from tenfold.models.tiny import tiny_model
    >>> describe_model(tiny_model("llama").model)["layers"]
    2
    """
    attentions = self_attentions(model)
    digest = hashlib.sha256()
    for layer in sorted(attentions):
        for name, parameter in sorted(attentions[layer].named_parameters()):
            if ".lora_" not in name:
                start = parameter.detach().flatten()[:64].float().bfloat16().float().cpu()
                digest.update(f"{layer}.{name.replace('.base_layer', '')}".encode() + start.numpy().tobytes())
    config = attentions[min(attentions)].config
    return {
        "model_type": config.model_type,
        "layers": max(attentions) + 1,
        "heads": config.num_attention_heads,
        "weights": digest.hexdigest()[:16],
    }


def save_profile(profile: Profile, path: str | Path) -> Path:
    """Write a profile; it appears under its name only when it is complete.

    >>> import tempfile
    >>> path = save_profile(Profile({0: (1, 2)}), Path(tempfile.mkdtemp()) / "profile.json")
    >>> load_profile(path).heads
    {0: (1, 2)}
    """
    values = {"format": FORMAT, **asdict(profile)}
    values["heads"] = {str(layer): list(profile.heads[layer]) for layer in sorted(profile.heads)}
    write_text(Path(path), json.dumps(values, indent=1) + "\n")
    return Path(path)


def load_profile(source: str | Path) -> Profile:
    """Read a profile.

    Args:
        source: the name of one that comes with the package (``default``), or a file: ours, or ``{"layer": [heads]}``
            as the authors of PASTA released them (QingruZhang/PASTA, config/head_config).

    Raises:
        ConfigError: no such profile; not one of the two formats.

    >>> load_profile("default").tasks != ()
    True
    """
    path = profile_path(source)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"profile: {path} cannot be read: {error}", remedy="give a JSON file") from error
    try:
        if not isinstance(values, dict):
            raise TypeError(f"a {type(values).__name__} instead of a dictionary")
        ours = values.get("format") == FORMAT
        heads = parse_heads(values["heads"] if ours else values)
        if not any(heads.values()):
            raise ValueError("it names no head")
        if not ours:
            return Profile(heads)
        missing = {"model_type", "layers", "heads", "weights"} - set(values["model"])
        if values["model"] and missing:
            raise ValueError(f"its model lacks {', '.join(sorted(missing))}")
        curve = tuple(dict(point) for point in values["curve"])
        return Profile(heads, dict(values["model"]), tuple(values["tasks"]), curve, dict(values["provenance"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"profile: {path} is not a head file ({type(error).__name__}: {error})",
            remedy='write {"layer": [heads], ...}, or make one with `tenfold steer profile MODEL`',
        ) from error


def parse_heads(values: Mapping[str, Sequence[int]]) -> dict[int, tuple[int, ...]]:
    """``{"layer": [heads]}`` with its keys as text, as JSON has them, in order of layers.

    >>> parse_heads({"10": [3, 1], "2": [0]})
    {2: (0,), 10: (1, 3)}
    """
    return {
        layer: tuple(sorted({operator.index(head) for head in heads}))
        for layer, heads in sorted((int(layer), heads) for layer, heads in values.items())
    }


def by_layer(heads: Iterable[tuple[int, int]]) -> dict[int, tuple[int, ...]]:
    """Pairs of layer and head, grouped.

    >>> by_layer([(3, 1), (0, 2), (3, 0)])
    {0: (2,), 3: (0, 1)}
    """
    found: dict[int, list[int]] = {}
    for layer, head in sorted(set(heads)):
        found.setdefault(layer, []).append(head)
    return {layer: tuple(indices) for layer, indices in found.items()}


def all_heads(model: Any) -> list[tuple[int, int]]:
    """Every (layer, head) that can be steered, in order.

    >>> from tenfold.models.tiny import tiny_model
    >>> all_heads(tiny_model("llama").model)[:2]
    [(0, 0), (0, 1)]
    """
    attentions = self_attentions(model)
    counts = {layer: module.config.num_attention_heads for layer, module in attentions.items()}
    return [(layer, head) for layer in sorted(counts) for head in range(counts[layer])]
