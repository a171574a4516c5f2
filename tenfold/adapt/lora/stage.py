"""The stage ``lora``."""

from __future__ import annotations

from tenfold.adapt import lora
from tenfold.adapt.fitting import base_of, fit, prepare
from tenfold.config.lora import LoraConfig
from tenfold.models.export import save_adapter
from tenfold.models.layer_map import layer_map
from tenfold.stage.context import Context, StageOutput


def run_lora(config: LoraConfig, context: Context) -> StageOutput:
    """The stage ``lora``."""
    opened, encoded = prepare(config, context)
    left_out = layer_map(opened.model).left_out(config.targets)
    model = lora.attach(opened.model, config, task=context.model.task)
    trained, results = fit(model, opened, encoded, config, context)
    save_adapter(model, opened.tokenizer, context.folder / "adapter", base=base_of(context.model))
    return StageOutput(
        results=results,
        attached=lora.attached(model),
        left_out=encoded.refused,
        notes=[*encoded.notes, *left_out],
        timings={"training": trained.seconds},
        artefact="adapter",
        continues_with="adapter",
    )
