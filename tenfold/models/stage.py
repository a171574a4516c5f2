"""The stage ``export``: a folder that transformers or PEFT opens without tenfold."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from tenfold.attend.masformer.native import save_native
from tenfold.compress.fpx.digests import weights_digest
from tenfold.compress.fpx.plan import Plan
from tenfold.compress.losparse.dense import to_dense
from tenfold.compress.losparse.layer import compressed_layers, number_count, trim
from tenfold.config.export import ExportConfig
from tenfold.errors import ConfigError
from tenfold.models.changes import compression, settle_layers
from tenfold.models.export import merge, push_to_hub, save_adapter, save_model
from tenfold.models.reference import ModelRef
from tenfold.models.vllm_folder import check_package, settled_formats, write_compressed_tensors
from tenfold.stage.context import Context, StageOutput


def run_export(config: ExportConfig, context: Context) -> StageOutput:
    """Write the model, adapters folded in, or its last adapter alone."""
    ref: ModelRef = context.model
    whole = ref.load is not None and config.form != "adapter"
    opened = (dataclasses.replace(ref, load=None) if whole else ref).open()
    adapted = hasattr(opened.model, "peft_config")
    attached: dict[str, Any] = {"form": config.form}
    notes = [f"The weights are those of the source, not those that load: {ref.load} packs."] if whole else []
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
        formats = _formats(config, model)
        if config.save_dtype is not None:
            model = model.to(getattr(torch, config.save_dtype))
        if compression(model.config) is not None:
            context.progress.begin("timing its layers")
            settle_layers(model)
        context.progress.begin("writing the model")
        if config.form == "compressed-tensors":
            notes += write_compressed_tensors(model, opened.tokenizer, folder, formats).notes
        else:
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
        notes=notes,
    )


def refuse_unwritable(model: Any, config: ExportConfig, tokenizer: Any) -> None:
    """Refuse formats that a model's layers cannot have in a folder for vLLM, and plans of other models.

    Args:
        model: with weights or without any.
        config: of the stage, in ``form: compressed-tensors``.
        tokenizer: not asked for.

    Raises:
        ConfigError, DataError, MissingDependencyError, ModelError: as `write_compressed_tensors`, and for the plan.
    """
    check_package()
    if config.plan is not None and config.plan.startswith("${"):  # an earlier stage makes it
        return
    settled_formats(model, config.format or _plan(str(config.plan)).by_module)


def _plan(path: str) -> Plan:
    plan = Plan.load(path)
    if plan.codec == "gguf":
        raise ConfigError(
            f"plan: {path} is of types of GGUF files, which vLLM's folders do not have",
            remedy="give a plan of `fpx.plan` with a palette of these: fp8_row, int8_row, int4_sym_g128",
        )
    return plan


def _formats(config: ExportConfig, model: Any) -> str | dict[str, str]:
    """What each layer is packed in."""
    if config.plan is None:
        return config.format or ""
    known = _plan(config.plan)
    if known.weights_hash != weights_digest(model):
        raise ConfigError(
            f"plan: {config.plan} was made for other weights ({known.model}) than these",
            remedy="give a plan of this very model, or a format",
        )
    return known.by_module
