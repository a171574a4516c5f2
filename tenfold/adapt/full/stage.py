"""The stage ``full``."""

from __future__ import annotations

from tenfold.adapt import full
from tenfold.adapt.fitting import fit, prepare
from tenfold.config.full import FullConfig
from tenfold.models.changes import settle_layers
from tenfold.models.export import save_model
from tenfold.stage.context import Context, StageOutput


def run_full(config: FullConfig, context: Context) -> StageOutput:
    """The stage ``full``; the artefact is a model in the type that it came in."""
    opened, encoded = prepare(config, context)
    dtype = opened.model.dtype
    model = full.attach(opened.model, config, task=context.model.task)
    trained, results = fit(model, opened, encoded, config, context)
    settle_layers(model.to(dtype))
    save_model(model, opened.tokenizer, context.folder / "model")
    count = sum(parameter.numel() for parameter in model.parameters())
    return StageOutput(
        results=results,
        attached={"method": "all weights", "trainable parameters": count, "share of the model": 1.0},
        left_out=encoded.refused,
        notes=encoded.notes,
        timings={"training": trained.seconds},
        artefact="model",
        continues_with="model",
    )
