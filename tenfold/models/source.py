"""Where a model comes from, and a hash of what lies there; torch-free, and no weights are loaded."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import expanduser  # Path.expanduser raises where there is no such user
from pathlib import Path
from typing import Any, Literal

from tenfold.errors import ModelError
from tenfold.models.embedded import DEMO_COMMAND, DEMO_HUB_ID, demo_file
from tenfold.models.gguf import check_header, gguf_sha256
from tenfold.models.names import is_hub_id, no_such, refuse_data
from tenfold.models.tiny import KINDS

_SAMPLE = 1024  # bytes read at each of three places of every tensor
_WHOLE = 1 << 24  # files up to 16 MiB (every adapter) are read whole
_TEXT = (".json", ".jinja", ".txt", ".model", ".py")
_NOT_CONTENT = {"tenfold.json", "trainer_state.json"}
REFERENCE = "ref"
"""Name and folder of the adapter that a policy started from, as TRL and PEFT have it beside the trained one."""


@dataclass(frozen=True)
class Located:
    """A source that was found: what it is and where it lies.

    Args:
        kind: ``tiny`` (made from code), ``gguf`` (a file), ``folder``, ``adapter`` (a PEFT folder) or ``hub``.
        name: what to open: the tiny kind, the path as text, or the hub id.
    """

    kind: Literal["tiny", "gguf", "folder", "adapter", "hub"]
    name: str

    @property
    def path(self) -> Path:
        """The file or folder; meaningless for ``tiny`` and ``hub``."""
        return Path(self.name)


def locate(source: str) -> Located:
    """Tell what a source is, without reading more than a file name or two.

    Args:
        source: ``demo``, ``tiny:<kind>``, a folder, a ``.gguf`` file or a hub id.

    A folder of an adapter that also holds the configuration of its base, as some trainers write it, is an adapter. A
    folder with a GGUF file and no configuration is that file.

    Raises:
        ModelError: a path that does not exist, a name that nothing has (with the nearest that something has), or a
            folder that holds no model. The hub is not asked.

    >>> locate("tiny:llama")
    Located(kind='tiny', name='llama')
    >>> locate("Qwen/Qwen3-0.6B")
    Located(kind='hub', name='Qwen/Qwen3-0.6B')
    """
    if source == "demo":
        file = demo_file()
        return Located("gguf", str(file)) if file else Located("hub", DEMO_HUB_ID)
    tiny = [f"tiny:{kind}" for kind in KINDS]
    if source in tiny:
        return Located("tiny", source.removeprefix("tiny:"))
    if not source:
        raise ModelError("the source of the model is empty", remedy="give demo, a hub id, a folder or a .gguf file")
    refuse_data(source)
    path = Path(expanduser(source))
    if path.is_dir():
        return _locate_folder(path)
    if path.exists():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{path}: a file that is not GGUF", remedy="give a folder, a .gguf file or a hub id")
        check_header(path)
        return Located("gguf", str(path))
    if path.suffix.lower() != ".gguf" and is_hub_id(source):
        return Located("hub", source)
    raise no_such(source, ["demo", *tiny])


def _locate_folder(path: Path) -> Located:
    model, adapter = ((path / name).is_file() for name in ("config.json", "adapter_config.json"))
    if adapter and not (model and _model_files(path)):
        return Located("adapter", str(path))
    if model:
        return Located("folder", str(path))
    if files := sorted(path.glob("*.gguf")):
        if len(files) == 1:
            return locate(str(files[0]))
        names = ", ".join(file.name for file in files[:5])
        raise ModelError(f"{path}: holds {len(files)} GGUF files", remedy=f"give one of them: {names}")
    within = sorted(entry.name for entry in path.iterdir() if (entry / "adapter_config.json").is_file())
    raise ModelError(
        f"{path}: no config.json, adapter_config.json or .gguf file in this folder",
        remedy=f"give one of the folders in it: {', '.join(within[:5])}"
        if within
        else "give the folder that save_pretrained wrote",
    )


def _model_files(folder: Path) -> list[Path]:
    """Files that can hold the weights of a whole model, beside those of an adapter."""
    names = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
    found = [file for name in names for file in folder.glob(name)]
    return [file for file in found if not file.name.startswith(("adapter_", "training_args"))]


def resolve_source(source: str, adapters: Sequence[str] = ()) -> tuple[Located, str, tuple[Path, ...]]:
    """Follow adapter folders down to the model they belong to.

    Args:
        source: as `locate` takes it.
        adapters: PEFT folders on top of it, in order.

    Returns:
        The base that was found, the name it was found by, and all adapter folders from the base upwards.

    Raises:
        ModelError: as `locate`; or a folder that holds no adapter, or an adapter that names no base, or itself.

    >>> resolve_source("tiny:llama")
    (Located(kind='tiny', name='llama'), 'tiny:llama', ())
    """
    chain = [Path(expanduser(folder)) for folder in adapters]
    located = locate(source)
    seen = set()
    while located.kind == "adapter":
        config = located.path / "adapter_config.json"
        source = str(read_json(config).get("base_model_name_or_path") or "")
        if not source or located.name in seen:
            what = "names no base model" if not source else "belongs, in the end, to itself"
            raise ModelError(f"{config}: {what}", remedy="open the base model and give this folder in adapters=")
        seen.add(located.name)
        chain.insert(0, located.path)
        located = locate(source)
    inside = (located.path / "adapter_config.json", *located.path.glob("adapter_model.*"))
    if located.kind == "folder" and len(inside) > 1 and inside[0].is_file():
        chain.insert(0, located.path)  # a whole model with an adapter beside it: one goes on the other, as elsewhere
    for folder in chain:
        if not (folder / "adapter_config.json").is_file():
            what = "no adapter_config.json" if folder.is_dir() else "no such folder"
            raise ModelError(f"{folder}: {what}", remedy="give the folder that save_adapter wrote")
    return located, source, tuple(chain)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: missing, unreadable or malformed; names the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path}: missing", remedy="save or download the folder again") from error
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: not readable as JSON: {error}", remedy="save or download the folder again"
        ) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds no JSON object", remedy="save or download the folder again")
    return value


def check_weights(folder: Path) -> list[Path]:
    """The weight files of a folder, each checked to be whole.

    Reads only the headers: a truncated file is shorter than its header says.

    Returns:
        Paths of the ``safetensors`` files (or ``.bin`` files, whose content cannot be checked).

    Raises:
        ModelError: no weights, a shard that the index names is missing, or a file is truncated or corrupt.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing or not shards:
            what = f"names {missing[0]}, which is missing" if missing else "names no file"
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise ModelError(f"{index}: {what}{more}", remedy="download the missing files into the folder")
        files = [folder / name for name in shards]
    else:
        files = [file for name in ("model", "adapter_model") if (file := folder / f"{name}.safetensors").is_file()]
    if not files:
        files = sorted(folder.glob("*.bin"))
    if not files:
        raise ModelError(f"{folder}: no weights (*.safetensors)", remedy="save or download the folder again")
    for file in files:
        if file.suffix == ".safetensors":
            _tensor_spans(file)
    return files


def content_hash(folder: Path) -> str:
    """A hash of a model or adapter folder that does not depend on where it lies; cheap, also for large models.

    Configuration, tokenizer and templates are read whole. Of a weight file above 16 MiB, the header and three
    samples of 1 KiB of every tensor are read, so that a training step on any tensor changes the hash; an edit of a
    few single weights may not.

    Raises:
        ModelError: as `check_weights`.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in _TEXT and file.is_file() and file.name not in _NOT_CONTENT:
            digest.update(f"{file.name}\0".encode())
            digest.update(_portable(file))
    for file in check_weights(folder):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        _hash_weights(file, digest)
    if (folder / REFERENCE / "adapter_config.json").is_file():
        digest.update(f"{REFERENCE}\0{content_hash(folder / REFERENCE)}\0".encode())
    return digest.hexdigest()


def weights_hash(located: Located, revision: str | None = None) -> str:
    """The hash that stands for the weights of a source: of its content, or the commit for a hub id.

    Raises:
        ModelError: not readable, or the hub cannot be reached and nothing is cached.
    """
    if located.kind == "tiny":
        from tenfold.models.tiny import tiny_identity

        return tiny_identity(located.name)
    if located.kind == "gguf":
        return gguf_sha256(located.path)
    if located.kind == "hub":
        return hub_commit(located.name, revision)
    return content_hash(located.path)


def hub_commit(repo_id: str, revision: str | None = None) -> str:
    """The commit of a hub model, for which its configuration (and no weights) is fetched or found in the cache.

    Raises:
        ModelError: the hub cannot be reached and nothing is cached, or there is no such model.
    """
    from huggingface_hub import hf_hub_download

    try:
        config = hf_hub_download(repo_id, "config.json", revision=revision)
    except Exception as error:  # huggingface_hub raises its own, httpx's and plain OS errors
        raise hub_error(repo_id, error) from error
    return Path(config).parent.name


def hub_error(repo_id: str, error: Exception) -> ModelError:
    """The error for a hub model that could not be had; for the demo model it names the one command that helps."""
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    if repo_id == DEMO_HUB_ID:
        return ModelError(f"demo: the embedded model is not installed, and the hub gave: {reason}", DEMO_COMMAND)
    return ModelError(
        f"{repo_id}: no such folder, and not to be had from the hub: {reason}",
        remedy="check the name and the connection (a private model needs: hf auth login), or give a local folder",
    )


def _portable(file: Path) -> bytes:
    """A file's bytes, less the entries that only tell where something lay when it was written."""
    content = file.read_bytes()
    if file.name not in ("config.json", "adapter_config.json"):
        return content
    value = read_json(file)
    for key in ("_name_or_path", "_model_name_or_path", "base_model_name_or_path", "revision"):
        value.pop(key, None)
    return json.dumps(value, sort_keys=True).encode()


def _hash_weights(file: Path, digest: Any) -> None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= _WHOLE:
            digest.update(stream.read())
            return
        if file.suffix == ".safetensors":
            spans = _tensor_spans(file)
            digest.update(stream.read(spans[0][0]))
        else:
            step = size // 256
            spans = [(start, start + step) for start in range(0, size - step, step)]
        for start, end in spans:
            for place in (start, (start + end) // 2, max(start, end - _SAMPLE)):
                stream.seek(place)
                digest.update(stream.read(min(_SAMPLE, end - place)))


def _tensor_spans(file: Path) -> list[tuple[int, int]]:
    """First and last byte (exclusive) of every tensor in a safetensors file, counted from the file's start."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError(f"the header needs {length} bytes")
            header = json.loads(stream.read(length))
        spans = [
            (8 + length + entry["data_offsets"][0], 8 + length + entry["data_offsets"][1])
            for name, entry in header.items()
            if name != "__metadata__"
        ]
        wanted = max((end for _, end in spans), default=8 + length)
        if wanted != size:
            raise ValueError(f"the header describes {wanted} bytes")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(
            f"{file}: truncated or corrupt safetensors file ({size} bytes): {error}",
            remedy="save or download the file again",
        ) from error
    return sorted(spans) or [(size, size)]
