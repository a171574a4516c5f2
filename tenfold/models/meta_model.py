"""A model without weights: its shapes alone, from the configuration."""

from __future__ import annotations

from typing import Any

import torch

from tenfold.models.changes import compress_shapes, prepare_opening
from tenfold.models.gguf import converted
from tenfold.models.heads import auto_class
from tenfold.models.open import explain, resolve_device, resolve_dtype
from tenfold.models.packed_shapes import with_packed_shapes
from tenfold.models.reference import ModelRef
from tenfold.models.source import hub_commit, resolve_source
from tenfold.models.tiny import tiny_model


def meta_model(ref: ModelRef) -> Any:
    """The model of a reference on the ``meta`` device: modules and shapes, no storage, in milliseconds to seconds.

    Adapters are left out: they are folded in when a stage opens the model. Layers whose weights are packed on opening
    have stand-ins of the same size (`tenfold.models.packed_shapes`).

    Raises:
        ModelError: as `tenfold.models.open.open_model`; only the configuration is read.

    >>> meta_model(ModelRef("tiny:llama")).device
    device(type='meta')
    """
    model = _plain(ref)
    return model if ref.load is None else with_packed_shapes(model, ref.load)


def _plain(ref: ModelRef) -> Any:
    from transformers import AutoConfig

    located, base, _ = resolve_source(ref.source)
    if located.kind == "tiny":
        model = tiny_model(located.name, task=ref.task).model.to("meta")
        model.tie_weights()  # moving to the meta device gives each of two that are one its own
        return model
    folder = str(converted(located.path, source=base)) if located.kind == "gguf" else located.name
    options = {"revision": ref.revision, "trust_remote_code": ref.trust_remote_code}
    if located.kind == "hub":
        hub_commit(folder, ref.revision)  # the clear error for one that cannot be had
    else:
        options["revision"] = None
    try:
        config = AutoConfig.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise explain(located, folder, error) from error
    if ref.task == "reward":
        config.num_labels = 1
    prepare_opening(config)
    dtype = resolve_dtype(ref.dtype, resolve_device(ref.device), ref.load)
    with torch.device("meta"):
        model = auto_class(config, ref.task, folder).from_config(
            config, dtype=(config.dtype or torch.float32) if dtype == "auto" else dtype
        )
        compress_shapes(model)
    return model
