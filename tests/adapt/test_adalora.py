import gc
import weakref

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import nn
from torch.optim import optimizer as torch_optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import tenfold.core.importance as module
from tenfold.adapt.adalora import AdaLoraConfig, attach, open_adapter
from tenfold.adapt.adalora.mathematics import decompose, penalty
from tenfold.errors import ConfigError, ModelError, RunError
from tenfold.models.tiny import tiny_model

# PEFT asks transformers for the name of an attribute that transformers renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

IDS = torch.arange(5, 53).view(4, 12)
FAST = {"steps": 12, "tinit": 1, "tfinal": 4, "interval": 1}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def llama(**settings):
    return attach(tiny_model("llama").model, AdaLoraConfig(**{"rank": 1, "initial_rank": 3, **FAST, **settings}))


def trainable(adapter):
    return [p for p in adapter.model.parameters() if p.requires_grad]


def adamw(adapter, **settings):
    return torch.optim.AdamW(trainable(adapter), **{"lr": 1e-2, "weight_decay": 0.0, **settings})


def train(adapter, steps=12, optimizer=None, clip=None):
    optimizer = optimizer or adamw(adapter)
    adapter.model.train()
    for _ in range(steps):
        loss = adapter.model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(adapter.model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.clone()


def tensors(adapter):
    return {f"{name}.{i}": t.detach().clone() for name, m in adapter.matrices.items() for i, t in enumerate(m.tensors)}


# ------------------------------------------------------------------ training


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"importance": "light"},
        {"paper": {"sensitivity_at": "before"}},
        {"paper": {"orthogonality": "sum_squared"}, "gamma": 0.01},
        {"paper": {"init": "orthonormal"}, "gamma": 0.0},
        {"beta2": None},
        {"shrink": False},
        {"dropout": 0.1},
        {"rank": None, "budget": "2.5%"},
        {"allocate_by": "parameters"},
        {"min_rank": 1, "rank": 2},
        {"max_rank": 2, "rank": 1.5},
    ],
    ids=str,
)
def test_the_final_budget_is_met_and_the_model_learns(settings):
    adapter = llama(**settings)
    before = adapter.model(input_ids=IDS, labels=IDS).loss.item()
    train(adapter, clip=1.0)
    kept, plan = adapter.ranks(), adapter.plan
    spent = sum(rank * plan.unit_costs[name] for name, rank in kept.items())
    assert plan.end - max(plan.unit_costs.values()) < spent <= plan.end
    assert adapter.model(input_ids=IDS, labels=IDS).loss.item() < before
    assert min(kept.values()) >= settings.get("min_rank", 0)
    assert max(kept.values()) <= settings.get("max_rank", 3)
    alive = {name: int((matrix.singular != 0).sum()) for name, matrix in adapter.matrices.items()}
    assert alive == kept


@pytest.mark.parametrize("build", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adafactor])
def test_any_torch_optimizer(build):
    adapter = llama()
    optimizer = build(trainable(adapter), lr=1e-2)
    train(adapter, optimizer=optimizer)
    assert sum(adapter.ranks().values()) == 14
    assert bool(adapter.controller.notes) == (build is torch.optim.Adafactor)  # its moments are factored: masks only


@pytest.mark.parametrize("settings", [{"foreach": True}, {"fused": True}, {"foreach": False}])
def test_removed_triplets_are_gone_everywhere(settings):
    adapter = llama()
    held = trainable(adapter)
    optimizer = adamw(adapter, **settings)
    train(adapter, optimizer=optimizer)
    for name, matrix in adapter.matrices.items():
        rank = max(adapter.ranks()[name], 1)
        out, into = matrix.slot.out_features, matrix.slot.in_features
        assert [tuple(t.shape) for t in matrix.tensors] == [(rank, into), (rank, 1), (out, rank)]
        assert matrix.layer.r["default"] == rank
        for tensor in matrix.tensors:
            assert optimizer.state[tensor]["exp_avg"].shape == tensor.shape
    assert trainable(adapter) == held  # the same objects, for whoever kept a list of them
    train(adapter, 3, optimizer)
    assert sum(adapter.ranks().values()) == 14


def test_accumulation_in_a_plain_loop_and_in_accelerate():
    found = []
    for accelerate in (False, True):
        torch.manual_seed(0)
        adapter = llama()
        optimizer = adamw(adapter)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model, wrapped = accelerator.prepare(adapter.model, optimizer) if accelerate else (adapter.model, optimizer)
        for step in range(24):
            half = IDS[2 * (step % 2) : 2 * (step % 2) + 2]
            with accelerator.accumulate(model):
                loss = model(input_ids=half, labels=half).loss
                if accelerate:
                    accelerator.backward(loss)
                else:
                    (loss / 2).backward()
                if accelerate or step % 2:
                    wrapped.step()
                    wrapped.zero_grad()
        found.append((adapter.controller.step, tensors(adapter)))
    torch.manual_seed(0)
    whole = llama()
    train(whole)
    assert [steps for steps, _ in found] == [12, 12]
    for _, values in found:
        for key, value in tensors(whole).items():
            torch.testing.assert_close(values[key], value, rtol=2e-3, atol=2e-4)


def test_autocast_and_low_precision_bases_keep_the_adapter_in_float32():
    adapter = attach(tiny_model("llama").model.bfloat16(), AdaLoraConfig(rank=1, initial_rank=3, **FAST))
    optimizer = adamw(adapter)
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            loss = adapter.model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {tensor.dtype for tensor in tensors(adapter).values()} == {torch.float32}
    assert sum(adapter.ranks().values()) == 14


class Int8Linear(nn.Module):
    """Stands for any quantised layer: integers, a scale, and a forward."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.step = linear.weight.abs().max().item() / 127
        self.weight = nn.Parameter((linear.weight / self.step).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return x @ (self.weight * self.step).T


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_a_quantised_base():
    model = tiny_model("llama").model
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(block.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(block, name, Int8Linear(child))
    base = logits(model)
    adapter = attach(model, AdaLoraConfig(rank=1, initial_rank=3, **FAST))
    assert torch.equal(logits(adapter.model), base)
    train(adapter)
    assert sum(adapter.ranks().values()) == 14
    with pytest.raises(ModelError, match="Int8Linear: its weight is quantised"):
        adapter.model.merge_adapter()
    assert torch.equal(logits(adapter.detach()), base)


def test_missing_gradients_are_skipped_and_counted():
    adapter = llama(targets=("q", "up"))
    optimizer = adamw(adapter)
    name, unreached = next(iter(adapter.matrices.items()))
    before = unreached.Q.detach().clone()
    for step in range(12):
        adapter.model(input_ids=IDS, labels=IDS).loss.backward()
        if step < 3:
            for tensor in unreached.tensors:
                tensor.grad = None
        optimizer.step()
        optimizer.zero_grad()
        if step == 2:
            assert torch.equal(unreached.Q, before)  # the penalty does not move what the loss did not reach
            assert adapter.controller.numbers()["adalora/missing_gradients"] == 9
    assert sum(adapter.ranks().values()) == 4
    assert name in adapter.ranks()
    assert "9 gradients were missing" in adapter.report()["notes"][0]


class NoWaiting(TorchDispatchMode):
    """Fails on whatever brings a number from the device to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.item,
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("importance", ["full", "light"])
def test_no_step_waits_for_the_device(monkeypatch, importance):
    initialise = module._Block.__init__

    def on_a_device(self, parts, per_unit):
        initialise(self, parts, per_unit)
        self._may_look = False  # on a CPU it may

    monkeypatch.setattr(module._Block, "__init__", on_a_device)
    adapter = llama(importance=importance, min_rank=1, rank=2, shrink=False)
    optimizer = torch.optim.SGD(trainable(adapter), lr=1e-2)  # torch's Adam on a CPU looks at its step count
    for step in range(12):
        adapter.model(input_ids=IDS, labels=IDS).loss.backward()
        if step == 8:  # the one step at which the mask is fixed may
            optimizer.step()
        else:
            with NoWaiting():
                optimizer.step()
        optimizer.zero_grad()
    assert sum(adapter.ranks().values()) == 28


def test_merging_and_unloading_through_peft():
    adapter = llama()
    train(adapter)
    expected = logits(adapter.model)
    adapter.model.merge_adapter()
    torch.testing.assert_close(logits(adapter.model), expected, rtol=1e-4, atol=1e-5)
    adapter.model.unmerge_adapter()
    torch.testing.assert_close(logits(adapter.model), expected, rtol=1e-4, atol=1e-5)
    merged = adapter.model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


def test_other_optimizers_in_the_process_are_left_alone():
    adapter, other = llama(), nn.Linear(3, 3)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(3)).sum().backward()
    optimizer.step()
    assert adapter.controller.step == 0


def test_detaching_leaves_no_trace():
    model = tiny_model("llama").model
    model.model.embed_tokens.weight.requires_grad_(False)
    base, names = logits(model), list(model.state_dict())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    gc.collect()
    hooks = len(torch_optimizer._global_optimizer_pre_hooks), len(torch_optimizer._global_optimizer_post_hooks)
    with attach(model, AdaLoraConfig(rank=1, initial_rank=3, **FAST)) as adapter:
        train(adapter)
        assert not torch.equal(logits(adapter.model), base)
    assert torch.equal(logits(model), base)
    assert list(model.state_dict()) == names
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert (
        len(torch_optimizer._global_optimizer_pre_hooks),
        len(torch_optimizer._global_optimizer_post_hooks),
    ) == hooks
    assert not hasattr(model, "peft_config")


def test_a_forgotten_adapter_takes_its_hooks_along():
    gc.collect()
    hooks = len(torch_optimizer._global_optimizer_pre_hooks)
    adapter = llama()
    model = weakref.ref(adapter.model)
    train(adapter, 2)
    del adapter
    gc.collect()
    assert model() is None
    assert len(torch_optimizer._global_optimizer_pre_hooks) == hooks


def test_a_dropped_handle_does_not_stop_the_training():
    model = llama().model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(12):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    singular = [p for name, p in model.named_parameters() if name.endswith("singular")]
    assert sum(int((p != 0).sum()) for p in singular) == 14


# ------------------------------------------------------------------ what is reported


def test_the_report_is_plain_data():
    adapter = llama()
    train(adapter)
    report = adapter.report()
    assert set(report["ranks"]) == {"q", "k", "v", "o", "gate", "up", "down"}
    assert sum(rank for row in report["ranks"].values() for rank in row) == 14
    assert report["budget"][0] == (0, 42, 42)
    assert report["budget"][-1] == (8, 14, 14)
    assert all(kept == budget for _, budget, kept in report["budget"])
    assert report["steps"] == 12
    attached = report["attached"]
    assert attached["matrices"] == 14
    assert attached["triplets"] == 14
    assert attached["exported bytes"] == 4 * attached["exported parameters"]


def test_roles_of_two_stacks_are_told_apart():
    adapter = attach(tiny_model("t5").model, AdaLoraConfig(rank=2, targets=("q", "cross_v")), task="seq2seq")
    assert {row: len(ranks) for row, ranks in adapter.report()["ranks"].items()} == {
        "encoder.q": 2,
        "decoder.q": 2,
        "decoder.cross_v": 2,
    }


# ------------------------------------------------------------------ saving, exporting, opening


@pytest.mark.parametrize("steps", [5, 12])  # before and after triplets are removed
def test_what_peft_saves_opens_in_plain_peft_and_goes_on_here(tmp_path, steps):
    adapter = llama()
    train(adapter, steps)
    expected = logits(adapter.model)
    adapter.model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(tiny_model("llama").model, tmp_path)
    torch.testing.assert_close(logits(plain), expected, rtol=1e-5, atol=1e-5)
    opened = open_adapter(tiny_model("llama").model, tmp_path)
    torch.testing.assert_close(logits(opened.model), expected, rtol=1e-5, atol=1e-5)


def test_state_dicts_load_strictly():
    adapter, other = llama(), llama()
    train(adapter, 5)
    other.model.load_state_dict(adapter.model.state_dict())
    assert torch.equal(logits(other.model), logits(adapter.model))


@pytest.mark.parametrize("at", [5, 9])
def test_a_plain_loop_resumes_from_the_two_usual_state_dicts(at, tmp_path):
    whole = llama()
    start = {key: value.clone() for key, value in whole.model.state_dict().items()}
    train(whole)
    first = llama()
    first.model.load_state_dict(start)
    optimizer = train(first, at)
    torch.save({"model": first.model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    second = llama()
    optimizer = adamw(second)
    second.model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(second, 12 - at, optimizer)
    assert second.ranks() == whole.ranks()
    assert all(torch.equal(value, tensors(second)[key]) for key, value in tensors(whole).items())
    assert second.report()["budget"] == whole.report()["budget"]
    assert not any(isinstance(key, str) for key in optimizer.state)


def test_another_configuration_is_not_resumed():
    first = llama()
    saved = train(first, 5).state_dict()
    second = llama(interval=2, gamma=0.3)
    optimizer = adamw(second)
    optimizer.load_state_dict(saved)
    with pytest.raises(RunError, match=r"gamma 0\.1, now 0\.3; interval 1, now 2"):
        train(second, 1, optimizer)


@pytest.mark.parametrize("order", ["score", "singular_value"])
def test_any_smaller_rank_is_a_prefix_of_the_exported_one(tmp_path, order):
    adapter = llama(rank=2, shrink=False)
    train(adapter)
    whole = PeftModel.from_pretrained(tiny_model("llama").model, adapter.export(tmp_path / "all", order=order))
    part = PeftModel.from_pretrained(
        tiny_model("llama").model, adapter.export(tmp_path / "part", order=order, layout="compact", triplets=9)
    )
    layers = [
        {name: module for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
        for model in (whole, part)
    ]
    total = 0
    for name, small in layers[1].items():
        rank = small.r["default"]
        total += rank
        for side, dim in (("lora_A", 0), ("lora_B", 1)):
            large = getattr(layers[0][name], side)["default"].weight
            assert torch.equal(large.narrow(dim, 0, rank), getattr(small, side)["default"].weight)
    assert total == 9


def test_exporting_replaces_its_own_folder_whole_and_no_other(tmp_path):
    adapter = llama()
    train(adapter)
    adapter.export(tmp_path / "out")
    (tmp_path / "out" / "old.txt").write_text("old")
    adapter.export(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tenfold.json",
    ]
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(RunError, match="not written by tenfold"):
        adapter.export(tmp_path / "foreign")
    assert (tmp_path / "foreign" / "thesis.txt").read_text() == "irreplaceable"


def test_a_trained_head_is_exported_with_the_adapter(tmp_path):
    model = tiny_model("deberta-v2").model
    adapter = attach(model, AdaLoraConfig(rank=1, initial_rank=3, **FAST), task="classification")
    optimizer = adamw(adapter)
    for _ in range(12):
        adapter.model(input_ids=IDS, labels=torch.tensor([0, 1, 1, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    opened = PeftModel.from_pretrained(tiny_model("deberta-v2").model, adapter.export(tmp_path / "out"))
    torch.testing.assert_close(logits(opened), logits(adapter.model), rtol=1e-5, atol=1e-5)
    again = open_adapter(tiny_model("deberta-v2").model, tmp_path / "out", task="classification")
    torch.testing.assert_close(logits(again.model), logits(adapter.model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2}}], ids=str)
def test_a_lora_adapter_goes_on_under_a_budget(tmp_path, settings):
    config = PeftLoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings)
    model = get_peft_model(tiny_model("llama").model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "lora")
    adapter = open_adapter(tiny_model("llama").model, tmp_path / "lora", AdaLoraConfig(rank=1, **FAST))
    torch.testing.assert_close(logits(adapter.model), logits(model), rtol=1e-5, atol=1e-5)
    train(adapter)
    assert sum(adapter.ranks().values()) == 4
    opened = PeftModel.from_pretrained(tiny_model("llama").model, adapter.export(tmp_path / "out"))
    torch.testing.assert_close(logits(opened), logits(adapter.model), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ bad input


def test_training_that_nobody_saw_is_an_error(tmp_path):
    adapter = llama()
    with pytest.raises(RunError, match="never trained"):
        adapter.export(tmp_path / "out")
    adapter.model.save_pretrained(tmp_path / "fresh")  # nothing wrong with that
    for matrix in adapter.matrices.values():
        for factor in (matrix.P, matrix.singular):
            factor.data += 0.1  # as an optimizer would that steps copies
    for act in (
        adapter.report,
        lambda: adapter.model.save_pretrained(tmp_path / "trained"),
        lambda: adapter.export("x"),
    ):
        with pytest.raises(RunError, match="AdaLoRA saw no optimizer step"):
            act()


def test_unknown_length_of_the_run():
    adapter = llama(steps=None)
    with pytest.raises(RunError, match=r"attach\(model, config, total_steps"):
        train(adapter, 1)


def test_an_optimizer_of_some_of_the_tensors():
    adapter = llama()
    some = trainable(adapter)[:5]
    optimizer = torch.optim.AdamW(some)
    with pytest.raises(RunError, match="AdamW holds 5 of the adapter's 42 tensors"):
        train(adapter, 1, optimizer)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"targets": ("q", "nothing")}, "'nothing' matches nothing"),
        ({"rank": None, "budget": "90%"}, "above the"),
        ({"rank": None, "budget": "10"}, r"less than one triplet \(96\)"),
        ({"rank": 0.01, "initial_rank": 1}, "less than one triplet"),
        ({"rank": 60, "initial_rank": 64}, "rank: 60 is 840 triplets, above the 768"),
        ({"rank": None, "budget": "20k", "initial_rank": 2}, "raise initial_rank"),
        ({"rank": 1.5, "min_rank": 1, "max_rank": 1}, "max_rank: 1"),
        ({"rank": None, "budget": "2%", "min_rank": 2}, "min_rank: 2 for 14 matrices"),
    ],
    ids=str,
)
def test_budgets_and_targets_that_do_not_fit(settings, says):
    with pytest.raises((ConfigError, ValueError), match=says):
        llama(**settings)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"rank": 4, "budget": "1%"}, "give one"),
        ({"budget": "1%", "allocate_by": "count"}, "cannot keep a budget"),
        ({"budget": "3ms"}, "is a time, which does not fit here"),
        ({"tinit": 1.0}, "a share of the steps is below 1"),
        ({"tinit": -1}, "0 or more"),
        ({"tfinal": 0}, "would end training above the budget"),
        ({"tinit": 0.5, "tfinal": 0.5}, "no steps to shrink in"),
        ({"beta1": 1.0}, "must be below 1"),
        ({"gamma": -0.1}, "must be at least 0"),
        ({"rank": 4, "initial_rank": 3}, "above initial_rank 3"),
        ({"rank": 4, "min_rank": 5}, "min_rank: 5"),
        ({"rank": 4, "max_rank": 3}, "max_rank: 3"),
        ({"iterval": 3}, "did you mean 'interval'"),
    ],
    ids=str,
)
def test_configurations_that_cannot_be_meant(values, says):
    with pytest.raises(ConfigError, match=says):
        AdaLoraConfig.parse(values, where="stage 1")


def test_weight_decay_on_the_adapter_is_noted():
    adapter = llama()
    train(adapter, 2, adamw(adapter, weight_decay=0.01))
    assert "weight decay of 0.01 acts on the adapter" in adapter.report()["notes"][0]


def best_by_norm(adapter, count):
    """What an export should keep of an adapter without scores, by densely computed norms: updates by name."""
    dense = [
        (matrix.P[:, i : i + 1] * matrix.singular[i] @ matrix.Q[i : i + 1] * adapter.plan.scale).detach()
        for matrix in adapter.matrices.values()
        for i in range(matrix.rank)
    ]
    order = torch.stack([one.norm() for one in dense]).sort(descending=True).indices[:count].tolist()
    rank = next(iter(adapter.matrices.values())).rank
    return {
        name: sum(dense[i] for i in range(at * rank, (at + 1) * rank) if i in order)
        for at, name in enumerate(adapter.matrices)
    }


def exported_updates(folder):
    model = PeftModel.from_pretrained(tiny_model("llama").model, folder).get_base_model()
    return {name: m.get_delta_weight("default") for name, m in model.named_modules() if hasattr(m, "get_delta_weight")}


@pytest.mark.parametrize("shrink", [True, False])
def test_weights_loaded_over_the_adapter_are_exported_within_the_budget(tmp_path, shrink):
    """As after ``load_best_model_at_end``, where the best checkpoint is older than the final phase."""
    adapter = llama(shrink=shrink)
    optimizer = train(adapter, 5)
    adapter.model.save_pretrained(tmp_path / "best")
    expected = logits(adapter.model)
    train(adapter, 7, optimizer)
    assert adapter.report()["notes"] == []
    adapter.model.load_adapter(tmp_path / "best", "default", is_trainable=True)
    assert torch.equal(logits(adapter.model), expected)
    assert "and the budget pays for 14: an export keeps the best" in adapter.report()["notes"][0]
    found = exported_updates(adapter.export(tmp_path / "out", layout="compact"))
    if shrink:  # what was chosen is gone with the triplets that were removed, so the norms decide
        right = {name: update for name, update in best_by_norm(adapter, 14).items() if not isinstance(update, int)}
        assert set(found) == set(right)
        for name, update in right.items():
            torch.testing.assert_close(found[name], update, rtol=1e-4, atol=1e-6)
    else:
        assert adapter.attached()["exported parameters"] == sum(
            rank * adapter.plan.costs[name] for name, rank in adapter.ranks().items()
        )


@pytest.mark.parametrize(
    "settings", [{}, {"rank": None, "budget": "2.5%"}, {"min_rank": 1}, {"importance": "light"}], ids=str
)
@pytest.mark.parametrize("steps", [1, 3, 6])
def test_training_that_ends_early_is_exported_within_the_budget(tmp_path, steps, settings):
    adapter = llama(**settings)
    train(adapter, steps)
    plan = adapter.plan
    report = adapter.report()
    assert f"after step {steps} of 12, before the final phase, and the budget pays for" in report["notes"][0]
    found = exported_updates(adapter.export(tmp_path / "out", layout="compact"))
    ranks = {name: int(torch.linalg.matrix_rank(update, rtol=1e-5)) for name, update in found.items()}
    spent = sum(rank * plan.unit_costs[name] for name, rank in ranks.items())
    assert plan.end - max(plan.unit_costs.values()) < spent <= plan.end
    assert report["attached"]["exported parameters"] == sum(rank * plan.costs[name] for name, rank in ranks.items())
    assert min(ranks.get(name, 0) for name in adapter.matrices) >= settings.get("min_rank", 0)
    scores = torch.cat(list(adapter.controller.latest_scores().values()))
    kept = torch.cat(list(adapter._exported().values()))
    if not settings:
        assert float(scores[kept].min()) >= float(scores[~kept].max())


def test_an_opened_adapter_is_exported_within_the_budget_without_training(tmp_path):
    adapter = llama()
    train(adapter, 5)
    adapter.model.save_pretrained(tmp_path / "first")
    opened = open_adapter(tiny_model("llama").model, tmp_path / "first", AdaLoraConfig(rank=1))
    whole = sum(int((matrix.singular != 0).sum()) for matrix in opened.matrices.values())
    assert f"the adapter holds {whole} triplets and the budget pays for 14" in opened.report()["notes"][0]
    found = exported_updates(opened.export(tmp_path / "out", layout="compact"))
    right = {name: update for name, update in best_by_norm(opened, 14).items() if not isinstance(update, int)}
    assert set(found) == set(right)
    for name, update in right.items():
        torch.testing.assert_close(found[name], update, rtol=1e-4, atol=1e-6)


def test_runs_too_short_for_their_phases_say_so():
    """The default beta of 0.85 has settled after 20 steps; half of the run is the final phase."""
    for steps, says in ((30, "30 optimizer steps are few for AdaLoRA: the ranks are decided after 15"), (40, None)):
        adapter = attach(tiny_model("llama").model, AdaLoraConfig(rank=1, steps=steps))
        train(adapter, 1)
        notes = adapter.controller.notes
        assert adapter.too_short(steps) == (notes[0] if notes else None)
        assert (says in notes[0] and "train for 40 steps or more" in notes[0]) if says else notes == []


def test_a_run_of_one_step_is_exported_within_the_budget(tmp_path):
    """A few short rows, packed, are one step: nothing can shrink in it, and the export keeps the best triplets."""
    adapter = attach(tiny_model("llama").model, AdaLoraConfig(rank=1, steps=1))
    train(adapter, 1)
    assert "1 optimizer step is few for AdaLoRA" in adapter.controller.notes[0]
    assert "epochs: 40 times as many" in adapter.controller.notes[0]
    kept = exported_updates(adapter.export(tmp_path / "out", layout="compact"))
    triplets = sum(torch.linalg.matrix_rank(update).item() for update in kept.values())
    assert 0 < triplets <= adapter.plan.end


def test_phases_that_do_not_fit_the_run():
    adapter = llama(tinit=8, tfinal=4)
    with pytest.raises(ConfigError, match=r"tinit \(8 steps\) and tfinal \(4 steps\) leave none of the 12 steps"):
        train(adapter, 1)


def test_a_second_adapter_is_refused():
    adapter = llama()
    with pytest.raises(ModelError, match="already has an adapter"):
        attach(adapter.model, AdaLoraConfig(rank=1))


def test_folders_that_are_no_adapter_of_this_model(tmp_path):
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        open_adapter(tiny_model("llama").model, tmp_path)
    adapter = llama()
    train(adapter)
    adapter.export(tmp_path / "out")
    with pytest.raises(ModelError, match="in this model 48 x"):
        open_adapter(tiny_model("llama", hidden_size=48).model, tmp_path / "out")
    config = tmp_path / "out" / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": false', '"use_dora": true'))
    with pytest.raises(ModelError, match="LORA with use_dora"):
        open_adapter(tiny_model("llama").model, tmp_path / "out")


# ------------------------------------------------------------------ mathematics


@pytest.mark.parametrize("form", ["mean_norm", "sum_squared"])
def test_the_penalty_gradient_is_that_of_autograd(form):
    shapes = [(6, 3, 5), (6, 3, 5), (4, 2, 7), (5, 3, 5)]
    P = [torch.randn(out, rank, dtype=torch.float64, requires_grad=True) for out, rank, _ in shapes]
    Q = [torch.randn(rank, into, dtype=torch.float64, requires_grad=True) for _, rank, into in shapes]
    grams = [p.T @ p for p in P] + [q @ q.T for q in Q]
    errors = [gram - torch.eye(len(gram), dtype=torch.float64) for gram in grams]
    terms = [error.square().sum() for error in errors]
    expected = sum(terms) if form == "sum_squared" else sum(term.sqrt() for term in terms) / len(terms)
    gradients = torch.autograd.grad(expected, [*P, *Q])
    value, EP, EQ = penalty(P, Q, form)
    torch.testing.assert_close(value, expected.detach())
    found = [p @ E for p, E in zip(P, EP, strict=True)] + [E @ q for q, E in zip(Q, EQ, strict=True)]
    for product, gradient in zip(found, gradients, strict=True):
        torch.testing.assert_close(product, gradient)


def test_decomposition_is_exact():
    B, A = torch.randn(20, 4), torch.randn(4, 30)
    P, values, Q = decompose(B, A)
    torch.testing.assert_close(P @ torch.diag(values) @ Q, B @ A, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(P.T @ P, torch.eye(4), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values, torch.linalg.svdvals(B @ A)[:4], rtol=1e-5, atol=1e-5)
    B, A = torch.randn(6, 8), torch.randn(8, 30)  # a PiSSA adapter of rank 4 on a matrix with 6 outputs
    P, values, Q = decompose(B, A)
    assert (P.shape, values.shape, Q.shape) == ((6, 6), (6,), (6, 30))
    torch.testing.assert_close(P @ torch.diag(values) @ Q, B @ A, rtol=1e-5, atol=1e-5)
