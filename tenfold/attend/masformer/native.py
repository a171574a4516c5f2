"""Spans in files: a folder that stock transformers runs with its own sliding layers, or tenfold's own form, read again.

Stock layers know one local pattern, a window without sinks, and only some architectures let a configuration say which
layers have it. `save_native` writes what they can say and refuses the rest; `tenfold.models.export.save_model` keeps
everything, as ``tenfold_span`` in ``config.json``, which `tenfold.models.open.open_model` honours through `restore` and
stock transformers does not know: it refuses the name of the attention function that stands there too. MASFormer
specification, section 2.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from tenfold.attend.attention import self_attentions
from tenfold.attend.masformer.conversion import Converted, check_spans, put_on, stock_implementation
from tenfold.attend.spans import FIELD, NAME, SAVED, common_span, own_spans
from tenfold.errors import ConfigError, ModelError
from tenfold.models.folders import write_folder
from tenfold.models.head_sizes import kv_heads
from tenfold.models.heads import auto_class

NATIVE = {
    "llama": "ministral",
    "mistral": "ministral",
    "ministral": "ministral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
}
"""By ``config.model_type``: the stock type of the same mathematics whose layers may differ in their spans."""

_OURS = {"full_layers", "pattern", "size", "previous", "sinks"}
_ELSEWHERE = "use save_model: that folder keeps tenfold_span, and tenfold's open_model brings the spans back"
_NOT_CARRIED = ("model_type", "architectures", "transformers_version", "_name_or_path", FIELD, SAVED)
_LLAMA_ALONE = ("attention_bias", "mlp_bias", "pretraining_tp")


def save_native(model: Any, tokenizer: Any, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write a converted model so that ``AutoModelForCausalLM.from_pretrained`` opens it with equal logits.

    Llama and Mistral become a Ministral, which has the same parameters and computes the same, and reads which layers
    are local; a Llama would ignore that in its forward pass and still give its cache windows. The model itself stays
    as it is.

    Args:
        model: from `tenfold.attend.masformer.convert`, with sliding windows and no sinks; adapters merged.
        tokenizer: saved beside it.
        folder: replaced if tenfold wrote it; refused if it holds anything else. It appears when it is complete.
        overwrite: replace whatever is there.

    Returns:
        The folder.

    Raises:
        ModelError: not converted, or with spans or parameters that no stock architecture has.
        RunError: the folder is taken, or cannot be written.

    >>> import tempfile
    >>> from tenfold.attend import masformer
    >>> from tenfold.kernels.local import AttentionWindow
    >>> from tenfold.models.tiny import tiny_model
    >>> opened = tiny_model("llama")
    >>> handle = masformer.convert(opened.model, full_layers=[0], span=AttentionWindow("sliding", 16))
    >>> with tempfile.TemporaryDirectory() as parent:
    ...     _ = save_native(opened.model, opened.tokenizer, f"{parent}/native")
    ...     '"model_type": "ministral"' in Path(f"{parent}/native/config.json").read_text()
    True
    """
    if hasattr(model, "peft_config"):
        raise ModelError("adapters are attached to this model", remedy="save merge(model)")
    stock, weights = _stock_model(model)
    with write_folder(folder, "model", overwrite=overwrite) as partial:
        stock.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
    return Path(folder)


def native_config(model: Any) -> Any:
    """The stock configuration that says what a converted model does; a new object.

    Raises:
        ModelError: there is none; says why.

    >>> from tenfold.attend import masformer
    >>> from tenfold.kernels.local import AttentionWindow
    >>> from tenfold.models.tiny import tiny_model
    >>> model = tiny_model("qwen2").model
    >>> handle = masformer.convert(model, full_layers=[1], span=AttentionWindow("sliding", 16))
    >>> native_config(model).layer_types
    ['sliding_attention', 'full_attention']
    """
    from transformers import AutoConfig

    config = model.config
    table = getattr(config.get_text_config(decoder=True), FIELD, None)
    if table is None:
        raise ModelError("the model is not converted, so it needs no other form", remedy="use save_model")
    _check_architecture(config)
    _check_table(table)
    kind = NATIVE[config.model_type]
    left = {*_NOT_CARRIED, *(_LLAMA_ALONE if kind == "ministral" else ())}
    fields = {key: value for key, value in config.to_dict().items() if key not in left}
    fields["layer_types"] = [
        "full_attention" if layer in table["full_layers"] else "sliding_attention"
        for layer in range(config.num_hidden_layers)
    ]
    fields["sliding_window"] = table["size"]  # a number also where all layers are full: Ministral's masks want one
    if kind != "ministral":
        fields["use_sliding_window"] = True  # without it the window is dropped when the folder is opened
    return AutoConfig.for_model(kind, **fields)


def restore(model: Any) -> Converted:
    """Give a model the spans that its configuration holds, as it was when it was saved.

    `tenfold.models.open.open_model` calls this; call it for the handle that reverts such a model.

    Args:
        model: with ``tenfold_span`` in its configuration.

    Returns:
        As `tenfold.attend.masformer.convert`.

    Raises:
        ModelError: the entry cannot be read.

    >>> from tenfold.models.tiny import tiny_model
    >>> table = {"full_layers": [0], "pattern": "sliding", "size": 16}
    >>> restore(tiny_model("llama", tenfold_span=table).model).report()["full layers"]
    [0]
    """
    config = model.config.get_text_config(decoder=True)
    table: Any = getattr(config, FIELD, None)
    try:
        full, span = tuple(sorted(table["full_layers"])), common_span(table)
        heads = {int(layer): own_spans(table, int(layer)) for layer in table.get("heads", {})}
        check_spans(full, span, heads, self_attentions(model), kv_heads(config))
    except (TypeError, KeyError, AttributeError, ValueError, ConfigError) as error:
        raise ModelError(
            f"{FIELD} in the configuration: {table!r} cannot be read",
            remedy="upgrade tenfold, or convert the original model again",
        ) from error
    before = config._attn_implementation
    put_on(model)
    return Converted(model, full, span, stock_implementation(model) if before == NAME else before, heads)


def _check_architecture(config: Any) -> None:
    """Refuse what no stock architecture can stand for.

    Raises:
        ModelError: naming the field and why.
    """
    kind = config.model_type
    if kind.startswith("gemma"):
        raise ModelError(
            f"model_type: {kind!r}: its layer_types choose the base of the rotations too, so a layer that is only made"
            " local there would be rotated differently",
            remedy=_ELSEWHERE,
        )
    if kind not in NATIVE:
        raise ModelError(
            f"model_type: {kind!r}: stock transformers has no layers of different spans for it; it has for"
            f" {', '.join(sorted(NATIVE))}",
            remedy=_ELSEWHERE,
        )
    if kind == "llama":
        for field in ("attention_bias", "mlp_bias"):
            if getattr(config, field, False):
                raise ModelError(
                    f"{field}: True: a Llama is saved as a Ministral, which has no biases", remedy=_ELSEWHERE
                )


def _check_table(table: dict[str, Any]) -> None:
    """Refuse spans that stock sliding layers do not have.

    Raises:
        ModelError: naming the entry and why.
    """
    more = sorted(key for key in set(table) - _OURS if table[key])
    if more:
        raise ModelError(f"{more[0]}: {table[more[0]]!r}: stock layers know no such thing", remedy=_ELSEWHERE)
    if table["pattern"] != "sliding":
        raise ModelError(
            f"pattern: {table['pattern']!r}: stock layers of these architectures know sliding windows alone",
            remedy=f"convert with pattern 'sliding', or {_ELSEWHERE}",
        )
    if table.get("sinks"):
        raise ModelError(
            f"sinks: {table['sinks']}: a stock sliding window forgets the first tokens",
            remedy=f"convert with sinks=0, or {_ELSEWHERE}",
        )
    if table["size"] < 2:
        raise ModelError(
            f"size: {table['size']}: transformers' cache of a sliding layer holds a window of 2 or more",
            remedy=f"convert with a larger window, or {_ELSEWHERE}",
        )


def _stock_model(model: Any) -> tuple[Any, dict[str, Any]]:
    """A model without storage of the stock architecture, and the weights for it: those of the given model.

    Raises:
        ModelError: there is no such architecture, or its parameters are others.
    """
    config = native_config(model)
    task = "classification" if type(model).__name__.endswith("ForSequenceClassification") else "causal"
    with torch.device("meta"):
        stock = auto_class(config, task, type(model).__name__).from_config(config, dtype=model.dtype)
    weights = model.state_dict()
    wanted = {(name, tuple(tensor.shape)) for name, tensor in stock.state_dict().items()}
    different = sorted(wanted ^ {(name, tuple(tensor.shape)) for name, tensor in weights.items()})
    if different:
        raise ModelError(
            f"{different[0][0]} {list(different[0][1])}: not in both, this model and a stock {config.model_type}",
            remedy=f"take a model with its own plain weights, or {_ELSEWHERE}",
        )
    if any(tensor.is_meta for tensor in weights.values()):
        raise ModelError("parts of the model are offloaded", remedy="open it without device_map")
    stock.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    return stock, weights
