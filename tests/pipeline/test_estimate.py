"""Predictions from the configuration alone, against what a real model and a real run need."""

import pytest
import torch

from tenfold.adapt import lora
from tenfold.config.evaluate import EvaluateConfig
from tenfold.config.lora import LoraConfig
from tenfold.models.memory import stored_bytes
from tenfold.models.reference import ModelRef
from tenfold.models.tiny import tiny_model
from tenfold.pipeline.estimate import estimate, inference_needs, training_needs
from tenfold.pipeline.recipe import resolve

KINDS = ["llama", "qwen3", "gemma3", "gpt2"]


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_those_of_the_real_model(kind):
    config = LoraConfig(rank=3)
    model = tiny_model(kind).model
    needs = training_needs(lora.attach, config, ModelRef(f"tiny:{kind}"))
    adapted = lora.attach(model, config)
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    assert needs["trainable parameters"] == sum(p.numel() for p in trainable)
    assert needs["adapter"] == sum(p.numel() * p.element_size() for p in trainable)
    optimizer = torch.optim.AdamW(trainable)
    adapted(**_batch()).loss.backward()
    optimizer.step()
    moments = sum(state[key].nbytes for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
    assert needs["optimizer"] == moments


def _batch():
    ids = torch.arange(4, 36).reshape(2, 16)
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("kind", KINDS)
def test_cache_bytes_are_those_of_a_real_cache(kind):
    model = tiny_model(kind).model.eval()
    tokens = 64
    with torch.no_grad():
        cache = model(input_ids=torch.full((1, tokens), 5), use_cache=True).past_key_values
    needs = inference_needs(EvaluateConfig(prompt_tokens=tokens), ModelRef(f"tiny:{kind}"))
    # The forward pass also leaves a few small tensors that the cache does not hold.
    assert stored_bytes(cache) <= needs["cache"] <= stored_bytes(cache) + 64 * tokens


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing():
    ref = ModelRef("tiny:llama")
    small, large, light = (
        training_needs(
            lora.attach, LoraConfig(rank=2, max_length=128, batch_size=batch, gradient_checkpointing=light), ref
        )
        for batch, light in ((2, False), (8, False), (8, True))
    )
    assert large["activations"] == pytest.approx(4 * small["activations"], rel=0.1)
    assert light["activations"] < 0.7 * large["activations"]


def test_saved_activations_are_those_that_autograd_saves():
    """An independent count: what the real backward graph holds on to, by torch's own hooks."""
    config = LoraConfig(rank=2, max_length=64, batch_size=4)
    model = lora.attach(tiny_model("llama").model, config).train()
    parameters = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = (storage.nbytes(), storage)  # keeping it alive keeps its address its own
        return tensor

    ids = torch.zeros((4, 64), dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    saved = sum(size for size, _ in held.values())
    needs = training_needs(lora.attach, config, ModelRef("tiny:llama"))
    assert loss.requires_grad
    assert needs["activations"] == pytest.approx(saved, rel=0.02)


def test_every_stage_of_a_plan_is_estimated_or_named():
    stages = [{"use": "lora", "data": "python-reference", "rank": 2}, {"use": "evaluate"}, {"use": "generate"}]
    found = estimate(resolve({"model": "tiny:llama", "stages": stages}, "test"))
    assert [one.title for one in found] == ["model: tiny:llama", "01-lora", "02-evaluate", "03-generate"]
    assert [bool(one.rows) for one in found] == [True, True, True, False]


def test_a_model_trained_whole_has_no_adapter():
    stages = [{"use": "full", "data": "python-reference"}]
    found = estimate(resolve({"model": "tiny:llama", "stages": stages}, "test"))
    assert "adapter" not in found[1].amounts
    assert found[1].amounts["trainable parameters"] > 0


@pytest.mark.slow
def test_the_quickstart_needs_what_was_predicted(tmp_path):
    from pathlib import Path

    from rich.console import Console

    from tenfold.pipeline import run as runner
    from tenfold.pipeline.recipe import read_recipe

    recipe = Path(__file__).parents[2] / "recipes/quickstart.yaml"
    whole = read_recipe(recipe)
    name = whole.steps[0].name
    predicted = estimate(whole)[1].amounts
    short = read_recipe(recipe, [f"{name}.tokens=null", f"{name}.steps=3"])
    plan = type(short)(short.recipe, short.steps[:1], short.made)
    summary = runner.run(plan, tmp_path, Console(quiet=True))[0]
    measured = summary.results[0].metric("peak memory growth").value
    assert predicted["trainable parameters"] >= summary.attached["trainable parameters"]  # triplets were dropped
    assert predicted["peak growth"] == pytest.approx(measured, rel=0.2)
