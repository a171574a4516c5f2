"""The stage ``export``: a folder that transformers or PEFT opens without tenfold."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from tenfold.attend.masformer.native import save_native
from tenfold.compress.losparse.dense import to_dense
from tenfold.compress.losparse.layer import compressed_layers, number_count, trim
from tenfold.config.export import ExportConfig
from tenfold.errors import ConfigError
from tenfold.models.changes import compression, settle_layers
from tenfold.models.export import merge, push_to_hub, save_adapter, save_model
from tenfold.models.reference import ModelRef
from tenfold.stage.context import Context, StageOutput


def run_export(config: ExportConfig, context: Context) -> StageOutput:
    """Write the model, adapters folded in, or its last adapter alone."""
    ref: ModelRef = context.model
    whole = ref.load is not None and config.form != "adapter"
    opened = (dataclasses.replace(ref, load=None) if whole else ref).open()
    adapted = hasattr(opened.model, "peft_config")
    attached: dict[str, Any] = {"form": config.form}
    if config.form == "adapter":
        if not adapted:
            raise ConfigError(
                f"form: {opened.identity['source']} carries no adapter", remedy="write form: merged, or adapt it first"
            )
        folder = context.folder / "adapter"
        save_adapter(opened.model, opened.tokenizer, folder)
    else:
        folder = context.folder / "model"
        model = opened.model
        if config.rows is not None:
            trim(model, config.rows)
            layers = compressed_layers(model).values()
            attached |= {"kept rows": sum(layer.kept for layer in layers), "numbers": number_count(model)}
        if config.form == "dense":
            context.progress.begin("making its layers whole")
            to_dense(model)
        if adapted:
            context.progress.begin("merging the adapter")
            model = merge(model)
        if config.save_dtype is not None:
            model = model.to(getattr(torch, config.save_dtype))
        if compression(model.config) is not None:
            context.progress.begin("timing its layers")
            settle_layers(model)
        context.progress.begin("writing the model")
        (save_native if config.form == "native" else save_model)(model, opened.tokenizer, folder)
    if config.push_to_hub:
        context.progress.begin(f"uploading to {config.push_to_hub}")
        push_to_hub(folder, config.push_to_hub)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return StageOutput(
        attached=attached | {"bytes": size},
        artefact=folder.name,
        # An adapter that is only copied changes nothing for the stages that follow.
        continues_with=None if config.form == "adapter" else "model",
        notes=[f"The weights are those of the source, not those that load: {ref.load} packs."] if whole else [],
    )
