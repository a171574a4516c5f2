"""Plans: never above the budget, the same for the same input, read strictly."""

import copy
import json
from itertools import product

import pytest
import torch

from tenfold.compress import fpx
from tenfold.compress.fpx.apply import apply, remove
from tenfold.compress.fpx.plan import Plan, plan
from tenfold.errors import ConfigError, DataError
from tenfold.models.gguf_types import gguf_format
from tenfold.models.gguf_write import write_gguf
from tenfold.models.tiny import KINDS, tiny_model

IDS = [torch.randint(6, 262, (40,), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


@pytest.fixture(scope="module")
def found():
    return plan(tiny_model("llama", tie_word_embeddings=True).model, IDS, budget="6bits")


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_is_stored_counts_and_the_budget_holds(kind):
    model = tiny_model(kind).model
    made = plan(model, IDS, budget="20bits", palette=["fp8_row", "nvfp4", "int4_g64", "bf16"])
    fixed = sum(each.bytes for each in made.kept)
    least = 8 * (fixed + sum(min(each.bytes for each in unit.candidates) for unit in made.units)) / made.numbers
    losses = []
    for bits in (least + more for more in (0.01, 0.3, 1, 2, 3, 5, 12)):
        for text in (f"{bits}bits", f"{int(bits * made.numbers / 8)}B"):
            again = made.replan(text)
            assert again.bits <= bits
            assert again.bytes == fixed + sum(unit.chosen.bytes for unit in again.units)
            assert again.budget == text
        losses.append(again.loss)
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


def test_the_plan_is_the_best_of_all():
    model = tiny_model("llama", num_hidden_layers=1, tie_word_embeddings=True).model
    made = plan(model, IDS, budget="6bits")
    for bits in (5.3, 6, 7, 8.1):
        again = made.replan(f"{bits}bits")
        fixed = sum(each.bytes for each in again.kept)
        best = min(
            sum(each.loss for each in choice)
            for choice in product(*(unit.candidates for unit in again.units))
            if 8 * (fixed + sum(each.bytes for each in choice)) <= bits * again.numbers
        )
        assert again.loss == pytest.approx(best, rel=1e-9)


def test_a_replan_is_the_plan_for_that_budget_and_text_is_the_same_for_the_same_input(found):
    model = tiny_model("llama", tie_word_embeddings=True).model
    assert plan(model, IDS, budget="6bits").to_json() == found.to_json()
    assert plan(model, IDS, budget="7.5bits") == found.replan("7.5bits")
    assert found.replan("7.5bits").replan("6bits") == found
    assert plan(model, IDS[:1], budget="6bits").calibration_hash != found.calibration_hash
    other = tiny_model("llama", tie_word_embeddings=True, seed=1).model
    assert plan(other, IDS, budget="6bits").weights_hash != found.weights_hash
    assert plan(model.bfloat16().float(), IDS, budget="6bits").weights_hash == (
        plan(model.bfloat16(), IDS, budget="6bits").weights_hash
    )


def test_a_share_of_units_is_nested_and_counted(found):
    before = set()
    for gamma in (0, 0.2, 0.5, 1):
        now = found.replan(gamma=gamma)
        low = {name for name, form in now.formats.items() if form == "nvfp4"}
        assert len(low) == int(gamma * 15 + 1e-9)
        assert before <= low
        assert now.budget == f"gamma={gamma:g}"
        before = low


def test_the_published_algorithm_sorts_by_the_error_of_the_low_format_and_leaves_the_head():
    made = plan(tiny_model("llama").model, IDS, gamma=0.3, paper=True)
    assert made.metric == "relative_l2"
    assert made.palette == ("fp8_tensor", "fp4_tensor")
    assert all(".layers." in unit.name for unit in made.units)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= {each.name for each in made.kept}
    order = sorted(made.units, key=lambda unit: unit.candidates[1].loss)
    assert {unit.name for unit in order[:4]} == {name for name, form in made.formats.items() if form == "fp4_tensor"}


def test_the_package_offers_the_functions_and_not_the_files():
    assert (fpx.plan, fpx.apply, fpx.Plan) == (plan, apply, Plan)


def test_files(found, tmp_path):
    found.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == found
    with pytest.raises(DataError, match=r"nothing\.json"):
        Plan.load(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda fields: fields.update(fpx_plan=2), "version 2"),
        (lambda fields: fields.pop("fpx_plan"), "no plan of FPX"),
        (lambda fields: fields.update(more=1), "more"),
        (lambda fields: fields.pop("metric"), "metric"),
        (lambda fields: fields.update(metric="guess"), "metric"),
        (lambda fields: fields.update(tokens="80"), "tokens"),
        (lambda fields: fields["units"][3].update(format="fp2"), "fp2"),
        (lambda fields: fields["units"][3]["candidates"][0].update(loss=-1.0), r"units.3.candidates.0.loss"),
        (lambda fields: fields["units"][3]["candidates"][0].update(loss=float("nan")), r"units.3.candidates.0.loss"),
        (lambda fields: fields["units"][3]["candidates"].reverse(), "palette"),
        (lambda fields: fields["units"].append(fields["units"][0]), "two of one name"),
        (lambda fields: [unit.update(format="nvfp4") for unit in fields["units"]], "not by hand"),
    ],
)
def test_what_is_not_a_plan_is_refused_with_the_place(found, change, said):
    fields = json.loads(found.to_json())
    change(fields)
    with pytest.raises(DataError, match=said):
        Plan.from_json(json.dumps(fields), "p.json")


@pytest.mark.parametrize("tied", [True, False])
def test_the_bytes_of_a_gguf_plan_are_those_of_the_file(tied, tmp_path):
    opened = tiny_model("llama", tie_word_embeddings=tied, hidden_size=96)
    model = opened.model.bfloat16()  # norms are float32 in the file
    made = plan(
        model, IDS, budget="60bits", palette=["q8_0", "q4_0", "mxfp4"], codec="gguf", tokenizer=opened.tokenizer
    )
    for number, size in enumerate((made.bytes, made.bytes - 10_000, made.bytes - 20_000)):
        again = made.replan(f"{size}B")
        written = write_gguf(model, opened.tokenizer, tmp_path / f"{number}.gguf", again.by_module)
        assert (tmp_path / f"{number}.gguf").stat().st_size == written.total == again.bytes <= size
        apply(model, again)
        plain = copy.deepcopy(model)
        remove(plain)
        for unit in again.units:
            own = plain.get_parameter(unit.weights[0].name)
            assert torch.equal(model.get_parameter(unit.weights[0].name), gguf_format(unit.format).weight(own))
        remove(model)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "give one of them"),
        ({"budget": "6bits", "gamma": 0.3}, "give one of them"),
        ({"budget": "200ms"}, "kernels"),
        ({"budget": "50%"}, "bytes, bits or a time"),
        ({"budget": "many"}, "cannot be read"),
        ({"budget": "3bits"}, "the smallest plan"),
        ({"budget": "6bits", "palette": ["fp8_row", "fp8_row"]}, "twice"),
        ({"budget": "6bits", "palette": ["fp3"]}, "fp3"),
        ({"budget": "6bits", "codec": "onnx"}, "codec"),
        ({"gamma": 0.3, "palette": ["fp8_row"]}, "two formats"),
        ({"gamma": 1.5}, "1.5"),
        ({"budget": "6bits", "paper": True}, "paper"),
        ({"gamma": 0.3, "paper": True, "metric": "fisher"}, "paper"),
    ],
)
def test_what_cannot_be_meant_is_refused(keys, said):
    with pytest.raises(ConfigError, match=said):
        plan(tiny_model("llama").model, IDS, **keys)


def test_the_smallest_budget_that_an_error_names_is_enough(found):
    with pytest.raises(ConfigError) as caught:
        found.replan("2bits")
    found.replan(caught.value.remedy.split()[1])
