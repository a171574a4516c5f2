"""Compressing while training, and training what is compressed, through the Trainer as stages call it."""

import copy

import pytest
import torch
from rich.console import Console
from safetensors import safe_open

from tenfold.adapt.distil import divergence
from tenfold.adapt.fitting import prepare
from tenfold.adapt.training import _Watch
from tenfold.compress.losparse.factors import Factors
from tenfold.compress.losparse.layer import LowRankRowsLinear, install
from tenfold.compress.losparse.mathematics import rank_for, split_off
from tenfold.compress.losparse.stage import run_losparse
from tenfold.compress.losparse.training import fit_compact, fit_compressed, uncompressed
from tenfold.config.losparse import LoSparseConfig
from tenfold.data.read import read_rows
from tenfold.errors import ConfigError
from tenfold.models.layer_map import layer_map
from tenfold.models.open import open_model
from tenfold.models.reference import ModelRef
from tenfold.stage.context import Context
from tenfold.stage.progress import Progress

KEYS = {"steps": 12, "max_length": 48, "batch_size": 2, "learning_rate": 3e-3, "save_every": 4, "log_every": 2}
IDS = torch.randint(10, 200, (2, 40), generator=torch.Generator().manual_seed(0))


def begun(folder, number_rows, source="tiny:llama", dtype=None, **keys):
    folder.mkdir(exist_ok=True)
    config = LoSparseConfig(data=str(number_rows), **{**KEYS, **keys})
    model = ModelRef(source, dtype=dtype, device="cpu")
    context = Context(folder, model, model, read_rows(str(number_rows)), 0, "", Progress(Console(quiet=True)))
    return config, context, *prepare(config, context)


def names(model):
    return [slot.name for slot in layer_map(model).select(["all-linear"])]


def compressed_while_training(folder, number_rows, rank=8, rows=6000, **keys):
    config, context, opened, encoded = begun(folder, number_rows, **keys)
    ranks = dict.fromkeys(names(opened.model), rank)
    handle, _, results = fit_compressed(opened, encoded, config, context, ranks, rows)
    return handle, {metric.name: metric.value for metric in results[0].metrics}


@pytest.mark.parametrize("pruning", ["schedule", "gates"])
@pytest.mark.parametrize("distil", [0.0, 0.5, 1.0])
def test_it_comes_to_compressed_layers_within_the_budget(pruning, distil, number_rows, tmp_path):
    handle, found = compressed_while_training(tmp_path, number_rows, pruning=pruning, distil=distil)
    layers = {name: m for name, m in handle.model.named_modules() if isinstance(m, LowRankRowsLinear)}
    assert list(layers) == list(handle.slots)
    assert 6000 - 128 < sum(layer.kept * layer.in_features for layer in layers.values()) <= 6000
    assert found["loss"] < found["first loss"] or pruning == "gates" or distil == 1
    report = handle.report()
    assert report["budget"][-1][1] == 6000
    assert report["steps"] == 12
    assert report["attached"]["share of the replaced matrices"] < 0.6


@pytest.mark.parametrize("pruning", ["schedule", "gates"])
def test_half_precision_is_trained_in_single(pruning, number_rows, tmp_path):
    handle, _ = compressed_while_training(tmp_path, number_rows, dtype="bfloat16", pruning=pruning, distil=0.5)
    assert {parameter.dtype for parameter in handle.model.parameters()} == {torch.float32}
    assert handle.model(IDS).logits.isfinite().all()


def test_what_is_compact_is_trained_further(number_rows, tmp_path):
    config, context, opened, encoded = begun(tmp_path, number_rows, steps=20, distil=0.5)
    teacher = uncompressed(opened.model, names(opened.model))
    before = opened.model(IDS).logits.detach()
    factors = {}
    for name in names(opened.model):
        left, right, rest = split_off(opened.model.get_submodule(name).weight.detach(), 16)
        kept = rest.norm(dim=1).argsort(descending=True)[:8]
        factors[name] = Factors(left, right, kept, (left @ right + rest)[kept])
    model = install(opened.model, factors)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    _, results = fit_compact(opened, encoded, config, context, teacher=teacher)
    found = {metric.name: metric.value for metric in results[0].metrics}
    assert found["loss"] < found["first loss"]
    learnt = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, start[name])}
    assert learnt == set(start)
    assert torch.equal(teacher({"input_ids": IDS}).logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_teacher_is_the_model_before_and_shares_what_is_replaced(dtype):
    opened = ModelRef("tiny:llama", device="cpu").open()
    model = opened.model.to(dtype)
    untouched = copy.deepcopy(model)
    teacher = uncompressed(model, names(model))
    held = {tensor.data_ptr() for tensor in model.parameters()}
    shared = [cell.cell_contents for cell in teacher.__closure__ if isinstance(cell.cell_contents, torch.nn.Module)]
    weights = dict(shared[0].named_parameters())
    assert all((weights[f"{name}.weight"].data_ptr() in held) for name in names(model))
    assert (weights["model.embed_tokens.weight"].data_ptr() in held) == (dtype == torch.bfloat16)
    install(model, {n: Factors(*small(model.get_submodule(n).weight.detach())) for n in names(model)})
    model.float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    wanted = untouched(IDS, output_hidden_states=True)
    target = teacher({"input_ids": IDS, "labels": IDS})
    assert torch.equal(target.logits, wanted.logits)
    assert all(torch.equal(mine, his) for mine, his in zip(target.states, wanted.hidden_states[1:], strict=True))


def small(weight):
    return weight[:, :1], weight[:1], torch.tensor([0]), weight[:1]


def test_the_divergence_is_that_of_the_predictions():
    generator = torch.Generator().manual_seed(0)
    logits, wanted = (torch.randn(2, 3, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    seen = torch.tensor([[True, True, False], [True, False, False]])
    total = 0.0
    for row, column in seen.nonzero().tolist():
        p, q = ((x[row, column] / 2).softmax(-1) for x in (wanted, logits))
        total += 4 * float((p * (p / q).log()).sum())
    assert float(divergence(logits, wanted, seen)) == pytest.approx(total / 3, rel=1e-5)
    logits[~seen] = 1e6
    assert float(divergence(logits, wanted, seen)) == pytest.approx(total / 3, rel=1e-5)


def test_killed_while_pruning_it_comes_to_the_same(number_rows, tmp_path, monkeypatch):
    whole, _ = compressed_while_training(tmp_path / "whole", number_rows, distil=0.5, pruning="schedule")
    step = _Watch.on_step_end

    def stop(self, args, state, control, **more):
        step(self, args, state, control, **more)
        if state.global_step == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(_Watch, "on_step_end", stop)
    with pytest.raises(KeyboardInterrupt):
        compressed_while_training(tmp_path / "killed", number_rows, distil=0.5, pruning="schedule")
    monkeypatch.setattr(_Watch, "on_step_end", step)
    again, _ = compressed_while_training(tmp_path / "killed", number_rows, distil=0.5, pruning="schedule")
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "killed")]
    assert logs[0] == logs[1]
    for mine, his in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, his)


def test_the_papers_share_of_low_rank_is_that_of_every_matrix_and_rows_have_the_rest(number_rows, tmp_path):
    config, context, _, _ = begun(tmp_path, number_rows, budget="40%", pruning="schedule", paper={"low_rank": 0.1})
    output = run_losparse(config, context)
    model = open_model(tmp_path / "model").model
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LowRankRowsLinear)}
    assert list(layers) == names(open_model("tiny:llama").model)
    for layer in layers.values():
        assert layer.rank <= rank_for(0.1, layer.out_features, layer.in_features)
    assert 0.37 < output.attached["share of the replaced matrices"] <= 0.4
    with pytest.raises(ConfigError, match="low_rank"):
        LoSparseConfig.parse({"paper": {"low_rank": 0.1}}, "test")


@pytest.mark.parametrize("keys", [{"pruning": "schedule"}, {"steps": None}])
def test_what_an_elastic_folder_holds_is_what_was_asked_for_and_reported(keys, number_rows, tmp_path):
    config, context, opened, _ = begun(tmp_path, number_rows, budget="45%", elastic=True, layout="small", **keys)
    output = run_losparse(config, context)
    matrices = [f"{name}." for name in names(opened.model)]
    dense = sum(opened.model.get_submodule(name).weight.numel() for name in names(opened.model))
    inside = total = 0
    with safe_open(tmp_path / "model/model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dictionary
            if not name.endswith(".place"):
                total += file.get_tensor(name).numel()
                inside += file.get_tensor(name).numel() * name.startswith(tuple(matrices))
    assert 0.4 * dense < inside <= 0.45 * dense
    assert output.attached["share of the replaced matrices"] == pytest.approx(inside / dense)
    assert output.tables[0].rows[1][2] == pytest.approx(total / 1e6)
    layers = [one for one in open_model(tmp_path / "model").model.modules() if isinstance(one, LowRankRowsLinear)]
    assert all(layer.spare is not None for layer in layers)
