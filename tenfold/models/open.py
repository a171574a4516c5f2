"""Open a model from any source, with errors that name what is wrong and what to do."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tenfold.config.shape import Load, Task
from tenfold.errors import ConfigError, MissingDependencyError, ModelError, TenfoldError
from tenfold.models.changes import compression, finish_for, finish_opening, prepare_opening, unwarned
from tenfold.models.export import merge
from tenfold.models.gguf import converted
from tenfold.models.heads import PEFT_TASKS, auto_class, check_loaded
from tenfold.models.opened import Opened, check_task, describe, settle_padding
from tenfold.models.quantised import check_load, check_own, computing_dtype, is_quantised, packing, quantised_copy
from tenfold.models.source import (
    REFERENCE,
    Located,
    check_weights,
    content_hash,
    hub_error,
    read_json,
    resolve_source,
    weights_hash,
)
from tenfold.models.tied import tying_handled, untie
from tenfold.models.tiny import tiny_model
from tenfold.models.vocabulary import adapter_tokenizer, check_embedding, fit_embedding


def open_model(
    source: str | Path,
    task: Task = "causal",
    *,
    dtype: str | torch.dtype | None = None,
    load: Load | None = None,
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    num_labels: int | None = None,
    adapters: Sequence[str | Path] = (),
    merged: bool = False,
) -> Opened:
    """Open a model and its tokenizer.

    An adapter folder's own tokenizer, chat template and added tokens are used, and the embedding is given as many
    rows as the adapter was trained with. Where an adapter changes the head or the embedding and the two share a
    weight, each gets its own, so that the adapter can be merged.

    Args:
        source: ``demo`` (embedded SmolLM2-135M-Instruct), a hub id, a folder, a ``.gguf`` file, a PEFT adapter folder
            (opens its base and attaches it), or ``tiny:<kind>`` (a tiny random model, see `tiny_model`).
        task: which head: ``causal``, ``seq2seq``, ``classification`` (``num_labels`` scores) or ``reward`` (one score).
            A head that the files do not hold is new and random, drawn from the global random state.
        dtype: ``float32``, ``bfloat16``, ... or a ``torch.dtype``. Default: what the files hold on a GPU, and
            ``float32`` on a CPU, where training in bfloat16 is about three times slower. GGUF files open in float32.
        load: pack the weights of the linear layers, through bitsandbytes: ``4bit`` (NF4 with double quantisation, as
            in QLoRA) or ``8bit`` (LLM.int8()). Adapters that are merged go into the weights before. ``dtype`` is then
            what the rest is held in and 4-bit weights compute in; default: bfloat16 on a GPU that has it, else float32.
        device: ``cpu``, ``cuda``, ``cuda:1``, ... Default: ``cuda`` where there is one, else ``cpu``.
        device_map: passed through to ``from_pretrained``, to spread a model over devices; excludes ``device``.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run Python code that comes with the model. Never assumed.
        num_labels: number of scores for ``classification``. Default: what the configuration says.
        adapters: PEFT adapter folders, attached in this order on top of the source. All but the last are merged into
            the weights; the last stays attached (not trainable), so that it can be switched off or merged later.
        merged: merge the last as well.

    Returns:
        Model (in evaluation mode), tokenizer (with a pad token), identity, and notes (each is also warned of).

    Raises:
        ConfigError: arguments that exclude each other, unknown task, dtype or load.
        MissingDependencyError: the package that quantised weights need is absent.
        ModelError: missing, truncated or corrupt files, unreachable hub, unknown architecture, no head for the task.

    >>> opened = open_model("tiny:llama", device="cpu")
    >>> opened.model.config.model_type, opened.tokenizer.pad_token
    ('llama', '<pad>')
    """
    source = str(source)
    check_task(task)
    if device is not None and device_map is not None:
        raise ConfigError("device and device_map both say where the model goes", remedy="give one of them")
    check_load(load)
    if load is not None and device_map is not None:
        raise ConfigError(f"load: {load} with a device_map is not supported", remedy="give device, or leave load out")
    if num_labels is not None and task != "classification":
        raise ConfigError(f"num_labels: only for task 'classification', not {task!r}", remedy="leave it out")
    located, base, chain = resolve_source(source, [str(adapter) for adapter in adapters])
    hashes = tuple(content_hash(folder) for folder in chain)  # a damaged adapter shows before the base is read
    place = resolve_device(device)
    placing: dict[str, Any] = {"dtype": resolve_dtype(dtype, place if device_map is None else None, load=load)}
    placing["device_map"] = device_map
    # Nothing can be added to packed weights: they are packed once all that goes into them is in them.
    inside = len(chain) if merged else max(len(chain) - 1, 0)
    to_pack = load is not None and (inside > 0 or located.kind == "tiny")
    if load is not None and not to_pack:
        placing |= {"device_map": {"": place}, "quantization_config": packing(load, placing["dtype"])}
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    if located.kind == "tiny":
        tiny = tiny_model(located.name, task=task, **({} if num_labels is None else {"num_labels": num_labels}))
        model, tokenizer, resolved = tiny.model, tiny.tokenizer, source
        if placing["dtype"] != "auto":
            model = model.to(placing["dtype"])
    else:
        resolved = str(converted(located.path, source=base)) if located.kind == "gguf" else located.name
        labels = 1 if task == "reward" else num_labels
        model, tokenizer = _load(located, resolved, task, labels, options, placing, place)
    finish_opening(model)
    # A hub id's commit is the one that was loaded: asking again could meet a newer one.
    commit = getattr(model.config, "_commit_hash", None) if located.kind == "hub" else None
    weights = commit or weights_hash(located, revision)
    if device_map is None and not to_pack and not is_quantised(model):
        model = _move(model, place)
    notes = []
    for index, folder in enumerate(chain):
        model = merge(model, in_place=True)
        if to_pack and index == inside:
            model, to_pack = _packed(model, load, place), False
        tokenizer = adapter_tokenizer(folder, tokenizer, model.config, trust_remote_code=trust_remote_code)
        notes.append(fit_embedding(model, tokenizer, folder))
        model = attach_adapter(model, folder, task)
    if merged:
        model = merge(model, in_place=True)
    if to_pack:
        model = _packed(model, load, place)
    check_embedding(model, tokenizer, source)
    settle_padding(model, tokenizer)
    said = tuple(note for note in notes if note is not None)
    for note in said:
        warnings.warn(note, stacklevel=2)
    return Opened(model.eval(), tokenizer, describe(model, source, resolved, weights, hashes), said)


def open_tokenizer(
    source: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    adapters: Sequence[str | Path] = (),
) -> Any:
    """The tokenizer that `open_model` would give, with its chat template, before any weight is read.

    Args:
        source: as for `open_model`.
        revision: as for `open_model`.
        trust_remote_code: as for `open_model`.
        adapters: as for `open_model`.

    Raises:
        ModelError: as `open_model`.

    >>> open_tokenizer("tiny:llama").pad_token
    '<pad>'
    """
    from transformers import AutoConfig, AutoTokenizer

    located, base, chain = resolve_source(str(source), [str(adapter) for adapter in adapters])
    if located.kind == "tiny":
        tokenizer, config = tiny_model(located.name).tokenizer, None
    else:
        folder = str(converted(located.path, source=base)) if located.kind == "gguf" else located.name
        options = {"revision": revision if located.kind == "hub" else None, "trust_remote_code": trust_remote_code}
        try:
            config = AutoConfig.from_pretrained(folder, **options)
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            raise explain(located, folder, error) from error
    for adapter in chain:
        tokenizer = adapter_tokenizer(adapter, tokenizer, config, trust_remote_code=trust_remote_code)
    return tokenizer


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Where a model goes: what the caller asked for, else a GPU where there is one.

    Raises:
        ConfigError: no such device, or none on this machine.

    >>> resolve_device("cpu")
    device(type='cpu')
    """
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ConfigError(f"device: unknown device {device!r}", remedy="give cpu, cuda or cuda:1") from None
    devices = torch.cuda.device_count()
    if place.type == "cuda" and (place.index or 0) >= devices:
        what = f"has {devices} GPU{'s' * (devices > 1)}" if devices else "has no GPU that this torch can use"
        raise ConfigError(
            f"device: {str(device)!r}, and this machine {what}", remedy="leave device out to take what there is"
        )
    return place


def resolve_dtype(
    dtype: str | torch.dtype | None, device: torch.device | None, load: Load | None = None
) -> str | torch.dtype:
    """What to load weights as; ``"auto"`` means as the files hold them.

    Args:
        dtype: what the caller asked for.
        device: where the model goes; None when a device map decides.
        load: what weights are packed into; the others then have what those compute in.

    Raises:
        ConfigError: no floating-point type of that name.

    >>> resolve_dtype(None, torch.device("cpu")), resolve_dtype("bfloat16", torch.device("cpu"))
    (torch.float32, torch.bfloat16)
    """
    if load is not None and device is not None and dtype in (None, "auto"):
        return computing_dtype(device)
    if dtype is None:
        return torch.float32 if device is not None and device.type == "cpu" else "auto"
    if dtype == "auto":
        return "auto"
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype: {dtype!r} is not a floating-point type", remedy="give float32, bfloat16 or float16")
    return found


@unwarned()
def attach_adapter(model: Any, folder: Path, task: str) -> Any:
    """Put a saved PEFT adapter on a model, and with it the reference that DPO started from, where the folder has one.

    Raises:
        ModelError: an adapter for another task, or one that does not fit the model.
    """
    from peft import PeftConfig, PeftModel

    finish_for(model, folder)
    made_for = str(read_json(folder / "adapter_config.json").get("task_type"))
    fitting = [known for known, name in PEFT_TASKS.items() if name == made_for]
    keys = {}
    config = PeftConfig.from_pretrained(str(folder))
    moves = made_for == PEFT_TASKS["causal"] and PEFT_TASKS.get(task) == PEFT_TASKS["reward"]
    if moves and not config.is_prompt_learning:
        # What was learnt under one head serves under another; only PEFT's wrapper for it would want to generate.
        config.task_type = None
        keys["config"] = config
    elif fitting and task not in fitting:
        raise ModelError(
            f"{folder}: an adapter for {made_for}, not for task {task!r}", f"open it with task={fitting[0]!r}"
        )
    try:
        with tying_handled():
            # PEFT sets what it warns of; a packed layer is not a Conv1D any more, and the adapter is the same.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            adapted = PeftModel.from_pretrained(model, str(folder), **keys)
            if (folder / REFERENCE / "adapter_config.json").is_file() and not keys:
                adapted.load_adapter(str(folder / REFERENCE), REFERENCE)
        untie(adapted)
        return adapted
    except (RuntimeError, ValueError, KeyError) as error:
        raise ModelError(
            f"{folder}: does not fit a {model.config.model_type} model: {_first_line(error)}",
            remedy="open the base model that adapter_config.json names",
        ) from error


def saved_task(folder: Path, default: Task) -> Task:
    """What the head of a saved model or adapter is for, where its files say so.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "adapter_config.json").write_text('{"task_type": "SEQ_CLS"}')
    ...     saved_task(Path(folder), "causal")
    'reward'
    """
    files = [folder / name for name in ("adapter_config.json", "config.json")]
    found = next((read_json(path) for path in files if path.exists()), {})
    scoring = any(str(name).endswith("ForSequenceClassification") for name in found.get("architectures") or ())
    scoring |= found.get("task_type") == PEFT_TASKS["reward"]
    return "reward" if scoring and default == "causal" else default


def _load(
    located: Located,
    folder: str,
    task: str,
    labels: int | None,
    options: dict[str, Any],
    placing: dict[str, Any],
    place: torch.device,
) -> tuple[Any, Any]:
    """Configuration, tokenizer and weights, cheapest first, so that mistakes show before the weights are read."""
    from transformers import AutoConfig, AutoTokenizer

    if located.kind != "hub":
        read_json(Path(folder) / "config.json")
        check_weights(Path(folder))
        options = {**options, "revision": None}
        if (Path(folder) / "adapter_config.json").is_file():
            # transformers would put the adapter on by itself, so that it could not be merged; it is told to look where
            # there is none.
            placing = {**placing, "adapter_kwargs": {"subfolder": "none"}}
    try:
        extra = {} if labels is None else {"num_labels": labels}
        config = AutoConfig.from_pretrained(folder, **options, **extra)
        if check_own(config.to_dict(), folder, packs="quantization_config" in placing) or compression(config):
            placing = {**placing, "device_map": placing["device_map"] or {"": place}}
        prepare_opening(config)
        builder = auto_class(config, task, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model, report = builder.from_pretrained(folder, config=config, output_loading_info=True, **options, **placing)
        check_loaded(model, report["missing_keys"], folder)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise explain(located, folder, error) from error
    return model, tokenizer


def explain(located: Located, folder: str, error: Exception) -> Exception:
    """Turn what ``transformers`` raised into what it means."""
    text = str(error)
    if isinstance(error, TenfoldError):
        return error
    if isinstance(error, ImportError):
        return MissingDependencyError(f"{folder}: cannot be opened: {_first_line(error)}", "install what it names")
    if "trust_remote_code" in text:
        return ModelError(
            f"{folder}: comes with Python code of its own, which runs on this machine when the model is opened",
            remedy="read that code, then pass trust_remote_code=True",
        )
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        return ModelError(
            f"{folder}: unknown architecture: {_first_line(error)}",
            remedy="upgrade transformers, or pass trust_remote_code=True if the model brings its own code",
        )
    if "tokenizer" in text and located.kind != "hub" and not any(Path(folder).glob("*token*")):
        return ModelError(
            f"{folder}: holds no tokenizer (no tokenizer.json or tokenizer_config.json)",
            remedy="copy the tokenizer's files from the model that it was made of: tokenizer.save_pretrained(folder)",
        )
    if located.kind == "hub" and isinstance(error, OSError):
        return hub_error(folder, error)
    return ModelError(f"{folder}: cannot be opened: {_first_line(error)}", remedy="save or download the folder again")


def _packed(model: Any, load: Load | None, place: torch.device) -> Any:
    assert load is not None
    packed = quantised_copy(model, load, place)
    finish_opening(packed)
    return packed


def _move(model: Any, device: torch.device) -> Any:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch asserts when it was built without CUDA
        raise ModelError(f"device {str(device)!r}: {_first_line(error)}", remedy="give device='cpu'") from error


def _first_line(error: BaseException) -> str:
    """The first line of an error, and the next where the first only announces it."""
    lines = [line.strip() for line in str(error).strip().split("\n") if line.strip()]
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]) or type(error).__name__
