"""What every artefact is, by its kind: whatever makes one makes one that others can use."""

import csv
import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tenfold.attend.pasta.profiles import load_profile
from tenfold.compress.fpx.plan import Plan
from tenfold.compress.fpx.units import units_of
from tenfold.data.read import read_rows
from tenfold.models.layer_map import layer_map
from tenfold.models.open import open_model
from tenfold.pipeline.recipe import resolve

from ..runs import execute
from .rows import ROWS

IDS = torch.arange(5, 85).reshape(2, 40)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def is_adapter(row, folder):
    """It needs no tenfold, only itself was trained, and it says on what."""
    task = row.config.task_after("causal")
    base, adapted = open_model(row.start, task=task).model, open_model(folder, task=task).model
    before, after = logits(base), logits(adapted)
    assert not torch.allclose(after, before, atol=1e-3), "training must change the outputs"
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, folder)), after, atol=1e-6, rtol=0)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == row.start
    assert (folder / "README.md").exists()


def is_model(row, folder):
    """Of the same shape outwards, and another one; plain transformers opens it unless its card says otherwise."""
    base, made = open_model(row.start).model, open_model(folder).model
    assert layer_map(made).slots == layer_map(base).slots
    assert not torch.allclose(logits(made), logits(base), atol=1e-4)
    card = (folder / "README.md").read_text()
    if "It needs tenfold" in card:
        assert "No tenfold needed" not in card
    else:
        file = next((found.name for found in folder.glob("*.gguf")), None)
        by_peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, gguf_file=file)
        torch.testing.assert_close(logits(by_peer), logits(made), atol=1e-6, rtol=0)


def is_plan(row, path):
    """Of the model that the row begins with, within its budget."""
    plan = Plan.load(path)
    assert plan.replan("99bits").loss < plan.loss
    assert set(plan.formats) == {unit.name for unit in units_of(open_model(row.start).model)}


def is_profile(row, path):
    """Plain JSON with heads that the model has."""
    heads = json.loads(path.read_text())["heads"]
    profile = load_profile(path)
    assert profile.size == sum(map(len, heads.values())) > 0
    profile.check_model(open_model(row.start).model)


def is_rows(row, path):
    """Rows of a kind that the method reads."""
    rows = read_rows(str(path))
    assert rows.kind in row.config.reads
    assert len(rows) > 0


def is_table(row, path):
    """A head, and lines that fit it."""
    with path.open(newline="") as file:
        head, *lines = csv.reader(file)
    assert lines
    assert {len(line) for line in lines} == {len(head)}


def is_traces(row, path):
    """A line of JSON for each game, all with the same keys."""
    games = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({frozenset(game) for game in games}) == 1


IS = {
    "adapter": is_adapter,
    "model": is_model,
    "plan": is_plan,
    "profile": is_profile,
    "rows": is_rows,
    "table": is_table,
    "traces": is_traces,
}
MADE = [pytest.param(row, name, kind, id=f"{row.name}-{name}") for row in ROWS for name, kind in row.makes.items()]
TAKEN = [
    pytest.param(maker, name, taker, key, id=f"{maker.name}-{taker.name}")
    for maker in ROWS
    for name, kind in maker.makes.items()
    for taker in ROWS
    for key, takes in taker.config.takes().items()
    if takes.inherits and kind in takes.kinds
]


SAYS = {"profile": lambda path: {"heads": load_profile(path).size}}
"""By an artefact's kind, what a stage that takes one says of it."""


@pytest.mark.parametrize(("row", "name", "kind"), MADE)
def test_it_is_there_and_of_its_kind(row, name, kind, whole):
    IS[kind](row, whole(row).artefact(name))


@pytest.mark.parametrize(("maker", "name", "taker", "key"), TAKEN)
def test_a_later_stage_takes_it(maker, name, taker, key, whole, tmp_path):
    recipe = maker.recipe()
    then = {"use": taker.use, **{other: value for other, value in taker.keys.items() if other != key}}
    recipe["stages"].append(then)
    plan = resolve(recipe, "contract")
    assert getattr(plan.steps[-1].config, key) == f"${{01-{maker.use}.{name}}}"
    artefact = whole(maker).artefact(name)
    named = execute({**taker.recipe(), "stages": [{**then, key: str(artefact)}]}, tmp_path / "named")
    taken = execute(recipe, tmp_path / "taken")
    assert taken[-1].attached == named[-1].attached
    assert taken[-1].attached.items() >= SAYS[maker.makes[name]](artefact).items()
