"""Rows are chosen while a model trains: in a loop of one's own, in the Trainer, through kills, and never beyond."""

import gc
import itertools
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from tenfold.compress.losparse.handle import attach
from tenfold.compress.losparse.masked import LoSparseLinear
from tenfold.config.losparse import LoSparsePaper
from tenfold.errors import ConfigError, ModelError, RunError
from tenfold.models.layer_map import layer_map
from tenfold.models.tiny import tiny_model

STEPS, FINAL, ROWS = 12, 4, 4000
PHASES = {"tinit": 1, "tfinal": FINAL, "interval": 1}
IDS = torch.randint(5, 200, (2 * STEPS, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def names(model):
    return [slot.name for slot in layer_map(model).select(["all-linear"])]


def compressed(kind="llama", rows=ROWS, rank=4, steps=STEPS, phases=PHASES, **more):
    torch.manual_seed(0)
    model = tiny_model(kind).model
    config = LoSparsePaper(**phases)
    return attach(model, dict.fromkeys(names(model), rank), rows, config, total_steps=steps, **more)


def train(handle, steps=STEPS, after=lambda step: None, make=torch.optim.AdamW, lr=3e-3):
    model = handle.model.train()
    optimizer = make([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        batch = IDS[2 * step : 2 * step + 2]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        after(step)
        optimizer.zero_grad()
    return optimizer


def weights(handle):
    return {name: factors.dense() for name, factors in handle.finish().items()}


def masks(handle):
    return {name: layer.mask.tolist() for name, layer in handle.layers.items()}


# ---- start and end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_a_model_starts_as_it_was_and_detaches_bit_for_bit(kind):
    model = tiny_model(kind).model.eval()
    before, parameters = model(IDS[:2]).logits, dict(model.named_parameters())
    handle = attach(model, dict.fromkeys(names(model), 3), 2000)
    torch.testing.assert_close(model(IDS[:2]).logits, before, rtol=1e-4, atol=1e-5)
    assert all(isinstance(model.get_submodule(name), LoSparseLinear) for name in handle.layers)
    assert handle.detach() is model
    assert torch.equal(model(IDS[:2]).logits, before)
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("frozen", [False, True])
def test_what_it_comes_to_is_what_the_trained_model_computes(kind, frozen):
    handle = compressed(kind, frozen=frozen)
    train(handle)
    trained = handle.model.eval()
    with torch.no_grad():
        wanted = trained(IDS[:2]).logits
        for name, factors in handle.finish().items():
            dense = nn.Linear(*reversed(factors.dense().shape), bias=factors.bias is not None)
            dense.weight.copy_(factors.dense())
            if factors.bias is not None:
                dense.bias.copy_(factors.bias)
            parent, _, child = name.rpartition(".")
            setattr(trained.get_submodule(parent), child, dense)
        torch.testing.assert_close(trained(IDS[:2]).logits, wanted, rtol=1e-4, atol=1e-5)


def test_it_learns():
    handle, losses = compressed(rows=20000, rank=16, steps=60, phases={"tinit": 3, "tfinal": 20, "interval": 1}), []
    model = handle.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(input_ids=IDS[:4], labels=IDS[:4]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


# ---- the budget ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rows", [0, 63, 4000, 10**9])
def test_the_budget_is_never_exceeded(rows, frozen):
    handle = compressed(rows=rows, frozen=frozen)
    train(handle)
    report = handle.report()
    assert all(kept <= budget for _, budget, kept in report["budget"])
    held = sum(factors.rows.numel() for factors in handle.finish().values())
    assert held == handle.pruner.kept() == report["budget"][-1][2] <= rows
    assert held > rows - 128 or held == handle.pruner.all_rows
    budgets = [budget for _, budget, _ in report["budget"]]
    assert budgets == sorted(budgets, reverse=True)
    assert report["budget"][-1][0] == STEPS - FINAL


def test_costs_are_the_callers():
    handle = compressed(rows=500)
    costs = {name: layer.in_features - 4 for name, layer in handle.layers.items()}
    handle = compressed(rows=500, costs=costs)
    train(handle)
    spent = sum(int(layer.mask.sum()) * costs[name] for name, layer in handle.layers.items())
    assert 500 - 128 < spent <= 500


@pytest.mark.parametrize("steps", [1, 5])
def test_a_training_that_ends_early_comes_down_to_the_budget(steps):
    handle = compressed()
    train(handle, steps)
    assert handle.pruner.kept() > ROWS
    held = sum(factors.rows.numel() for factors in handle.finish().values())
    assert ROWS - 128 < held <= ROWS
    assert "before the final phase" in handle.report()["notes"][-1]


def test_an_untrained_handle_has_nothing_to_choose_by():
    with pytest.raises(RunError, match="never trained"):
        compressed().finish()


# ---- rows and what is remembered of them -----------------------------------------------------------------------------


def test_moments_of_dropped_rows_are_cleared_and_rows_may_return():
    handle, seen = compressed(), []

    def look(step):
        seen.append(masks(handle))
        if handle.pruner.history and handle.pruner.history[-1][0] == step < STEPS - FINAL:
            for layer in handle.layers.values():
                for key in ("exp_avg", "exp_avg_sq"):
                    moment = optimizer[0].state[layer.rest][key]
                    assert bool((moment[~layer.mask] == 0).all())
                    assert not layer.mask.any() or bool((moment[layer.mask] != 0).any())

    optimizer = []
    make = lambda *args, **kwargs: optimizer.append(torch.optim.AdamW(*args, **kwargs)) or optimizer[0]  # noqa: E731
    train(handle, after=look, make=make)
    returned = [
        name
        for before, now in itertools.pairwise(seen)
        for name in now
        for was, is_ in zip(before[name], now[name], strict=True)
        if is_ and not was
    ]
    assert returned, "rows that train on after a choice may come back before the final phase"


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_cutting_equals_masking(make, monkeypatch):
    handle = compressed()
    handle.model.double()
    optimizer = train(handle, make=make)
    assert any(layer.is_cut for layer in handle.layers.values())
    for layer in handle.layers.values():
        for value in optimizer.state[layer.rest].values():
            assert value is None or value.numel() == 1 or value.shape == layer.rest.shape
    monkeypatch.setattr("tenfold.compress.losparse.pruner.uncuttable", lambda *_: "it is held")
    whole = compressed()
    whole.model.double()
    train(whole, make=make)
    assert masks(whole) == masks(handle)
    assert "masked, not removed: it is held" in whole.report()["notes"][0]
    kept = weights(handle)
    for name, weight in weights(whole).items():
        torch.testing.assert_close(kept[name], weight, rtol=1e-4, atol=1e-5)


def test_no_dense_copies():
    """Beside the optimizer's two, each matrix is there twice: as the rest and its gradient."""
    before = {id(thing) for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)}
    handle = compressed()
    sizes = {layer.out_features * layer.in_features for layer in handle.layers.values()}
    found, optimizer = [], []

    def make(*args, **kwargs):
        optimizer.append(torch.optim.AdamW(*args, **kwargs))
        return optimizer[0]

    def look(step):
        if step != STEPS - FINAL - 1:
            return
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
        held = {
            tensor.data_ptr(): tensor
            for tensor in tensors
            if id(tensor) not in before and tensor.numel() in sizes and tensor.is_floating_point()
        }
        for parameter in handle.model.parameters():
            for tensor in (parameter, parameter.grad, *optimizer[0].state[parameter].values()):
                held.pop(tensor.data_ptr(), None)
        found.append([tuple(tensor.shape) for tensor in held.values()])

    train(handle, after=look, make=make)
    assert found == [[]]


def test_frozen_rows_have_neither_gradient_nor_moments():
    handle = compressed(frozen=True)
    before = {name: layer.rest.detach().clone() for name, layer in handle.layers.items()}
    learning = {name for name, parameter in handle.model.named_parameters() if parameter.requires_grad}

    def each_step_anew(step):
        assert all(layer.gate is None or layer.gate.grad is None for layer in handle.layers.values())

    assert {name.rpartition(".")[2] for name in learning} == {"left", "right", "weight"}
    assert all("norm" in name for name in learning if name.endswith("weight"))
    optimizer = train(handle, after=each_step_anew)
    for name, layer in handle.layers.items():
        assert layer.rest.grad is None
        assert layer.rest not in optimizer.state
        assert torch.equal(layer.rest, before[name][layer.kept])
        assert layer.is_cut
    assert "model.embed_tokens.weight" not in learning


def test_shared_steps_of_a_skipping_scaler_are_not_counted():
    """A step that a scaler skips because of an infinite gradient is no step."""
    handle = compressed()
    model = handle.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(3):
        loss = model(input_ids=IDS[:2], labels=IDS[:2]).loss
        scaler.scale(loss * (float("inf") if step == 1 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert handle.pruner.step == 2
    assert all(bool(score.isfinite().all()) for score in handle.pruner._importance.scores().values())


# ---- the Trainer -----------------------------------------------------------------------------------------------------

DATA = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in IDS]


class KilledError(Exception):
    """In place of a power cut."""


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KilledError


def with_trainer(handle, folder, callbacks=(), resume=None, **more):
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-3,
        "save_steps": 1,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **more,
    }
    args = TrainingArguments(output_dir=str(folder), **settings)
    trainer = Trainer(model=handle.model, args=args, train_dataset=DATA, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("at", [3, STEPS - FINAL + 1, STEPS - FINAL + 3], ids=["pruning", "just cut", "cut"])
def test_killed_and_resumed_it_comes_to_the_same(at, frozen, tmp_path):
    """With matrices of which no row is left, and no rank."""
    ranks = {"model.layers.1.mlp.down_proj": 0}

    def fresh():
        torch.manual_seed(0)
        model = tiny_model("llama").model
        config = LoSparsePaper(**PHASES)
        return attach(model, dict.fromkeys(names(model), 4) | ranks, 900, config, frozen=frozen)

    whole = fresh()
    trainer = with_trainer(whole, tmp_path / "whole")
    assert whole.pruner.step == STEPS
    assert any(not layer.mask.any() for layer in whole.layers.values())
    assert {"losparse/rows", "losparse/budget"} <= trainer.state.log_history[0].keys()
    shutil.rmtree(tmp_path / "whole")
    with pytest.raises(KilledError):
        with_trainer(fresh(), tmp_path / "killed", [KillAt(at)])
    resumed = fresh()
    with_trainer(resumed, tmp_path / "killed", resume=tmp_path / "killed" / f"checkpoint-{at - 1}")
    assert masks(resumed) == masks(whole)
    assert resumed.report()["budget"] == whole.report()["budget"]
    wanted = dict(whole.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, wanted[name]), name
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(resumed).items())


def test_another_configuration_does_not_go_on(tmp_path):
    with pytest.raises(KilledError):
        with_trainer(compressed(), tmp_path, [KillAt(4)])
    with pytest.raises(RunError, match="rows 4000, now 5000"):
        with_trainer(compressed(rows=5000), tmp_path, resume=tmp_path / "checkpoint-3")


def test_the_best_checkpoint_from_before_the_cut_comes_down_to_the_budget(tmp_path):
    handle = compressed()
    with_trainer(handle, tmp_path)
    handle.model.load_state_dict(load_file(tmp_path / "checkpoint-3" / "model.safetensors"), strict=False)
    assert handle.pruner.kept() > ROWS
    held = sum(factors.rows.numel() for factors in handle.finish().values())
    assert ROWS - 128 < held <= ROWS


def test_accumulation_in_the_trainer_is_one_observation(tmp_path):
    handle = compressed(steps=None)
    with_trainer(handle, tmp_path, gradient_accumulation_steps=2, save_strategy="no", max_grad_norm=0.5)
    assert handle.pruner.step == STEPS
    assert handle.pruner.history[-1][0] == STEPS - FINAL


@pytest.mark.parametrize("frozen", [False, True])
def test_accelerate_does_what_a_plain_loop_does(frozen):
    plain, prepared = compressed(frozen=frozen), compressed(frozen=frozen)
    train(plain)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    learning = [parameter for parameter in prepared.model.parameters() if parameter.requires_grad]
    model, optimizer = accelerator.prepare(prepared.model.train(), torch.optim.AdamW(learning, lr=3e-3))
    for row in IDS[:, None]:
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=row, labels=row).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert prepared.pruner.step == STEPS
    assert masks(prepared) == masks(plain)
    found = weights(prepared)
    for name, weight in weights(plain).items():
        torch.testing.assert_close(found[name], weight, rtol=1e-2, atol=1e-3)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"steps": 1}, ConfigError, "leave none of the 1 steps"),
        ({"steps": 5}, ConfigError, "leave none of the 5 steps"),
        ({"phases": {"interval": 50, "tinit": 1, "tfinal": 1}}, ConfigError, "interval: 50 steps"),
        ({"rows": -7}, ConfigError, "low-rank parts alone are above the budget"),
        ({"rank": 65}, ConfigError, "rank of .*must be in"),
    ],
)
def test_runs_that_cannot_be_are_refused(keys, error, message):
    with pytest.raises(error, match=message):
        compressed(**keys)


def test_models_that_cannot_be_compressed_are_refused():
    llama = lambda **more: tiny_model("llama", **more).model  # noqa: E731
    q = "model.layers.0.self_attn.q_proj"
    with pytest.raises(ConfigError, match="'nonsense' is not a matrix"):
        attach(llama(), {"nonsense": 2}, 10)
    with pytest.raises(ConfigError, match="ranks: empty"):
        attach(llama(), {}, 10)
    with pytest.raises(ModelError, match="lm_head cannot be compressed"):
        attach(llama(tie_word_embeddings=True), {"lm_head": 2}, 10)
    with pytest.raises(ModelError, match="has an adapter"):
        attach(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])), {q: 2}, 10)
    model = llama()
    attach(model, {q: 2}, 10)
    with pytest.raises(ModelError, match="LoSparseLinear, not a plain matrix"):
        attach(model, {"model.layers.0.self_attn.k_proj": 2}, 10)
    model = llama()
    model.get_submodule("model.layers.1.self_attn").q_proj.weight = model.get_submodule(q).weight
    with pytest.raises(ModelError, match="share the weight"):
        attach(model, {q: 2}, 10)
    model = llama()
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="awq"))
    with pytest.raises(ModelError, match=r"the weights are quantised \(awq\)"):
        attach(model, {q: 2}, 10)


def test_gates_of_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr("tenfold.compress.losparse.pruner._processes", lambda: 2)
    train(compressed(), 1)
    with pytest.raises(RunError, match="there are 2"):
        train(compressed(frozen=True), 1)


def test_after_training_there_is_nothing_to_detach_to():
    handle = compressed()
    train(handle, 1)
    for gone in (handle, compressed(frozen=True)):
        with pytest.raises(RunError, match="weights before compressing are gone"):
            gone.detach()


def test_a_refused_run_leaves_the_model_as_it_was():
    model = tiny_model("llama").model
    before = dict(model.named_modules())
    with pytest.raises(ConfigError, match="leave none"):
        attach(model, dict.fromkeys(names(model), 2), 100, total_steps=1)
    assert all(before[name] is module for name, module in model.named_modules())


def test_it_begins_with_low_rank_parts_that_were_found_before():
    model = tiny_model("llama").model.eval()
    before, chosen = model(IDS[:2]).logits, names(model)
    starts = {}
    for name in chosen[1:]:
        out, inner = model.get_submodule(name).weight.shape
        starts[name] = 100 * torch.randn(out, 3), torch.randn(3, inner) / 1000
    handle = attach(model, dict.fromkeys(chosen, 3), 2000, starts=starts)
    torch.testing.assert_close(model(IDS[:2]).logits, before, rtol=1e-4, atol=1e-4)
    for name, (left, right) in starts.items():
        layer = handle.layers[name]
        torch.testing.assert_close(layer.left @ layer.right, left @ right, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.left.T @ layer.left, layer.right @ layer.right.T, rtol=1e-3, atol=1e-4)
