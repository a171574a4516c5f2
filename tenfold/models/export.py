"""Write models and adapters as standard folders, merge adapters, push to the hub."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

from tenfold.errors import ModelError
from tenfold.models.changes import absorb_adapters, mark
from tenfold.models.folders import write_folder
from tenfold.models.gguf import source_of
from tenfold.models.quantised import refuse_quantised
from tenfold.models.simulated import refuse_simulated
from tenfold.models.source import REFERENCE
from tenfold.models.tied import untie

_EXPECTED = (
    "Model with `tie_word_embeddings=True`",
    "Input and output embeddings are no longer tied",
    "All adapters are already merged",  # in compressed layers
)

_TAKE_BACK = "take the plan back first (fpx.remove)"


def merge(model: Any, *, in_place: bool = False) -> Any:
    """The plain ``transformers`` model with all attached PEFT adapters added into its weights.

    Where an adapter changes the head or the input embedding and the two share a weight, they do not any more.
    Compressed layers stay so: their rank grows by that of the adapter.

    Args:
        model: a ``PeftModel``; a model without adapters is returned as it is.
        in_place: use the weights of ``model``, which must not be used afterwards. Default: work on a copy, which
            needs the memory of the model a second time and leaves ``model`` as it was.

    Raises:
        ModelError: an adapter holds NaN or infinite values, or is of a kind that cannot be merged; quantised weights,
            which would be rounded again.
        ConfigError: the weights are those of a plan (`tenfold.compress.fpx.apply`), as is `save_model`'s.

    >>> from peft import LoraConfig, get_peft_model
    >>> from tenfold.models.tiny import tiny_model
    >>> adapted = get_peft_model(tiny_model("llama").model, LoraConfig(target_modules=["q_proj"]))
    >>> type(merge(adapted)).__name__
    'LlamaForCausalLM'
    """
    if not hasattr(model, "peft_config"):
        return model
    refuse_quantised(model, "the adapter cannot be merged", "open the base without load, with the adapter on it")
    refuse_simulated(model, "the adapter cannot be merged into rounded weights", _TAKE_BACK)
    if not hasattr(model, "merge_and_unload"):
        kinds = sorted({str(config.peft_type.value) for config in model.peft_config.values()})
        raise ModelError(f"{'/'.join(kinds)} adapters cannot be merged", remedy="save the adapter instead")
    if not in_place:
        model = _copy(model)
    untie(model)
    entry = getattr(model.config, "tie_word_embeddings", None)
    try:
        with warnings.catch_warnings():
            for message in _EXPECTED:
                warnings.filterwarnings("ignore", message=message)
            absorb_adapters(model)
            merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(f"the adapter cannot be merged: {error}", remedy="train again with a lower rate") from error
    if entry is not None:  # `untie` has decided it; PEFT would turn off what T5 scales its output by
        merged.config.tie_word_embeddings = entry
    # PEFT leaves its configuration on the model, and transformers would then save the merged model as an adapter.
    for name in ("peft_config", "_hf_peft_config_loaded"):
        merged.__dict__.pop(name, None)
    # These weights lie in no folder; an adapter trained on them must not claim the unmerged base as its own.
    merged.name_or_path = merged.config._name_or_path = ""
    return merged


def save_model(model: Any, tokenizer: Any, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write a folder that ``from_pretrained`` opens; it appears under its name only when it is complete.

    A model with local spans (`tenfold.attend.masformer`) is opened by `open_model` alone: transformers refuses the name
    of its attention. See `tenfold.attend.masformer.native.save_native`.

    Args:
        model: a ``transformers`` model; adapters must be merged first.
        tokenizer: saved beside it.
        folder: replaced if tenfold wrote it; refused if it holds anything else.
        overwrite: replace whatever is there.

    Returns:
        The folder.

    Raises:
        ModelError: adapters are attached, or the weights are quantised.
        RunError: the folder is taken, or cannot be written.

    >>> import tempfile
    >>> from tenfold.models.tiny import tiny_model
    >>> opened = tiny_model("llama")
    >>> with tempfile.TemporaryDirectory() as parent:
    ...     save_model(opened.model, opened.tokenizer, f"{parent}/model").name
    'model'
    """
    if hasattr(model, "peft_config"):
        raise ModelError("adapters are attached to this model", remedy="save merge(model), or use save_adapter")
    refuse_quantised(model, "the model cannot be saved", "open it without load, and save that")
    refuse_simulated(model, "the model cannot be saved in number formats that it does not store", _TAKE_BACK)
    with write_folder(folder, "model", overwrite=overwrite) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return Path(folder)


def save_adapter(
    model: Any, tokenizer: Any, folder: str | Path, *, base: str | None = None, overwrite: bool = False
) -> Path:
    """Write the active adapter as a PEFT folder, which ``PeftModel.from_pretrained`` and `open_model` open.

    An adapter named ``ref`` (TRL keeps the policy that DPO started from so) goes into the subfolder ``ref``.

    Of an adapter that was trained on a converted model, with local spans, the folder says so: `open_model` gives its
    base the spans, PEFT warns of them.

    Args:
        model: a ``PeftModel`` with one active adapter.
        tokenizer: saved beside it.
        folder: replaced if tenfold wrote it; refused if it holds anything else.
        base: the source of the base model, written into the adapter's configuration. Default: where the base was
            opened from; the cached folder of ``demo`` or of a GGUF file is written as what it was made from. A base
            that lies nowhere (a tiny model, or one with adapters merged in) is left open, and `open_model` then wants
            the adapter in ``adapters``. For an adapter trained on top of another one, give that one's folder.
        overwrite: replace whatever is there.

    Returns:
        The folder.

    Raises:
        ModelError: no adapter is attached, or several are active.
        RunError: the folder is taken, or cannot be written.

    >>> import tempfile
    >>> from peft import LoraConfig, get_peft_model
    >>> from tenfold.models.tiny import tiny_model
    >>> opened = tiny_model("llama")
    >>> adapted = get_peft_model(opened.model, LoraConfig(target_modules=["q_proj"]))
    >>> with tempfile.TemporaryDirectory() as parent:
    ...     save_adapter(adapted, opened.tokenizer, f"{parent}/adapter", base="tiny:llama").name
    'adapter'
    """
    if not hasattr(model, "peft_config"):
        raise ModelError("no adapter is attached to this model", remedy="use save_model")
    with write_folder(folder, "adapter", overwrite=overwrite) as partial:
        _save_active(model, partial)
        tokenizer.save_pretrained(partial)
        for part in (partial, partial / REFERENCE):
            if part.is_dir():
                _name_base(part, base)
        mark(partial, model)
    return Path(folder)


def push_to_hub(folder: str | Path, repo_id: str, *, private: bool = True) -> str:
    """Upload a saved folder to the Hugging Face hub.

    Args:
        folder: a model or adapter folder.
        repo_id: ``owner/name``; made if it does not exist.
        private: whether a new repository is private.

    Returns:
        The address of the repository.

    Raises:
        ModelError: nothing to upload, no token, or the hub refused or cannot be reached.
    """
    from huggingface_hub import HfApi, get_token

    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ModelError(f"{folder}: no model or adapter to upload", remedy="give a folder that save_model wrote")
    if get_token() is None:
        raise ModelError("no Hugging Face token on this machine", remedy="hf auth login")
    api = HfApi()
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload with tenfold")
    except Exception as error:  # huggingface_hub raises its own, httpx's and plain OS errors
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ModelError(
            f"{repo_id}: the hub cannot be used: {reason}", remedy="check name, rights, connection"
        ) from error
    return str(address)


def _copy(model: Any) -> Any:
    """A deep copy; PEFT 0.21.2 keeps views of tied adapters (``ensure_weight_tying``), which torch will not copy."""
    kept = [getattr(module, "kwargs", None) for module in model.modules()]
    views = [view for options in kept if isinstance(options, dict) for view in options.get("tied_adapter", {}).values()]
    return copy.deepcopy(model, {id(view): view.detach() for view in views})


def _save_active(model: Any, folder: Path) -> None:
    """The active adapter into the folder itself, whatever its name, and the reference below it."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):  # adapters that transformers put in; it saves the active one
        model.save_pretrained(folder)
        return
    if len(model.active_adapters) != 1:
        problem = f"several adapters are active: {', '.join(model.active_adapters)}"
        raise ModelError(problem, remedy="activate the one to save (set_adapter), or save merge(model)")
    (name,) = model.active_adapters
    options = {"save_embedding_layers": True} if _grown_text_part(model) else {}
    model.save_pretrained(folder, selected_adapters=[name], **options)
    if name != "default":  # PEFT gives every other name a folder of its own
        for file in (folder / name).iterdir():
            file.rename(folder / file.name)
        (folder / name).rmdir()
    if REFERENCE in model.peft_config and name != REFERENCE:
        model.save_pretrained(folder, selected_adapters=[REFERENCE])


def _grown_text_part(model: Any) -> bool:
    """Whether a composite model has other rows than its base; PEFT looks for the number in the whole, not the part."""
    from transformers import AutoConfig

    text = model.config.get_text_config()
    base = Path(str(model.peft_config[model.active_adapters[0]].base_model_name_or_path or ""))
    if text is model.config or not (base / "config.json").is_file():
        return False
    return AutoConfig.from_pretrained(str(base)).get_text_config().vocab_size != text.vocab_size


def _name_base(folder: Path, base: str | None) -> None:
    """Write a base into the adapter's configuration that means something on another machine."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    found = config.get("base_model_name_or_path")
    base = base or (source_of(found) if found else None)
    if base:
        config["base_model_name_or_path"] = base
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    card = folder / "README.md"
    if base and found and card.is_file():  # PEFT's model card names the base too
        card.write_text(card.read_text().replace(found, base))
