"""The oracles of section 7 of the specification, by number."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig as PeftAdaLoraConfig
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from tenfold.adapt.adalora import AdaLoraConfig, attach, open_adapter
from tenfold.adapt.adalora.mathematics import penalty
from tenfold.adapt.adalora.plan import make_plan, make_schedule
from tenfold.config.adalora import AdaLoraPaper
from tenfold.core.importance import Importance, ScoredPart, allocate
from tenfold.core.schedule import CubicSchedule
from tenfold.models.layer_map import Slot
from tenfold.models.tiny import tiny_model

# PEFT asks transformers for the name of an attribute that transformers renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


TASKS = {"llama": "causal", "gpt2": "causal", "t5": "seq2seq", "deberta-v2": "classification"}
IDS = torch.arange(5, 29).view(2, 12)


def fill(shape, a, c, m, den):
    values = [((a * i + c) % m - m // 2) / den for i in range(math.prod(shape))]
    return torch.tensor(values, dtype=torch.float64).view(shape)


def inputs(kind):
    if kind == "deberta-v2":
        return {"input_ids": IDS, "labels": torch.tensor([0, 1])}
    return {"input_ids": IDS, "labels": IDS}


def logits(model, kind="llama"):
    with torch.no_grad():
        return model.eval()(**inputs(kind)).logits.clone()


def randomise(adapter, seed=0):
    """Give every triplet values, so that the adapter changes the model."""
    generator = torch.Generator().manual_seed(seed)
    for matrix in adapter.matrices.values():
        for tensor in matrix.tensors:
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.3)
    return adapter


def optimizer_of(adapter, **settings):
    settings = {"lr": 1e-2, "weight_decay": 0.0} | settings
    return torch.optim.AdamW([p for p in adapter.model.parameters() if p.requires_grad], **settings)


def train(adapter, steps, optimizer=None):
    optimizer = optimizer or optimizer_of(adapter)
    adapter.model.train()
    for _ in range(steps):
        adapter.model(**inputs("llama")).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("kind", TASKS)
def test_01_zero_at_init(kind):
    model = tiny_model(kind).model
    base = logits(model, kind)
    for init in ("lora", "normal", "orthonormal"):
        with attach(model, AdaLoraConfig(rank=2, paper=AdaLoraPaper(init=init)), task=TASKS[kind]) as adapter:
            assert torch.equal(logits(adapter.model, kind), base)
        assert torch.equal(logits(model, kind), base)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "deberta-v2"])  # without bias, Conv1D, with bias
def test_02_forward(kind):
    model = tiny_model(kind).model
    adapter = randomise(attach(model, AdaLoraConfig(rank=2, initial_rank=3, alpha=5.0), task=TASKS[kind]))
    matrix = next(m for m in adapter.matrices.values() if m.slot.role in ("v", "fc1"))
    layer, base = matrix.layer, matrix.layer.get_base_layer()
    assert (getattr(base, "bias", None) is None) == (kind == "llama")
    x = torch.randn(4, 7, matrix.slot.in_features, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        W = base.weight if matrix.slot.layout == "linear" else base.weight.T
        bias = base.bias if base.bias is not None else torch.zeros(())
        update = 5.0 / 3 * matrix.P @ torch.diag(matrix.singular.flatten()) @ matrix.Q
        expected = (x.double() @ (W.double() + update.double()).T + bias.double()).float()
        plain = base(x)
        original = base.weight.clone()
        tolerance = {"rtol": 1e-6, "atol": 1e-6 * float(expected.abs().max())}
        torch.testing.assert_close(layer(x), expected, **tolerance)
        torch.testing.assert_close(layer(x) - plain, x @ update.T, rtol=1e-5, atol=3e-6 * float(expected.abs().max()))
        layer.merge()
        torch.testing.assert_close(layer(x), expected, **tolerance)
        layer.unmerge()
        ulp = torch.finfo(torch.float32).eps * (original.abs() + update.abs().max())
        assert ((base.weight - original).abs() <= 2 * ulp).all()
        base.weight.copy_(original)  # who kept the original has it back exactly
        assert torch.equal(base(x), plain)


def test_03_schedule():
    schedule = CubicSchedule(96, 64, total=100, warmup=10, cooldown=20, every=5)
    expected = {0: 96, 10: 96, 11: 94, 12: 93, 15: 89, 20: 84, 30: 75, 45: 68, 60: 64, 79: 64, 80: 64, 81: 64, 85: 64}
    expected |= {99: 64, 100: 64, 120: 64}
    due = {15, 20, 30, 45, 60, 80, 81, 85, 99, 100, 120}
    for step, count in expected.items():
        assert int(schedule.value(step)) == count
        assert schedule.due(step) == (step in due)
    assert int(CubicSchedule(1000, 0, total=100, warmup=10, cooldown=20).value(31)) == 342


def weights_of_oracle_4():
    shapes = {"a": [(2, 3), (2, 1), (2, 2)], "b": [(2, 2), (2, 1), (4, 2)]}
    index, tensors = 0, {}
    for group, members in shapes.items():
        tensors[group] = []
        for shape in members:
            index += 1
            tensors[group].append((index, fill(shape, 7, 3 * index, 11, 10)))
    return tensors


def scores_of_oracle_4(light=False, factor=1.0):
    tensors = weights_of_oracle_4()
    dims = (0, 0, 1)
    chosen = [1] if light else [0, 1, 2]
    parts = {group: [ScoredPart(members[i][1], dims[i]) for i in chosen] for group, members in tensors.items()}
    importance = Importance(parts, 0.85, 0.85)
    for update in (1, 2):
        for members in tensors.values():
            for index, tensor in members:
                tensor.grad = fill(tensor.shape, 5, 2 * index * update, 13, 20) * factor
        importance.observe(update)
    return importance.scores()


def test_04_scores():
    expected = {"a": [3.40071984375e-4, 5.31841546875e-4], "b": [2.8305657421875e-4, 1.25191831640625e-3]}
    scores = scores_of_oracle_4()
    for group, values in expected.items():
        torch.testing.assert_close(scores[group], torch.tensor(values, dtype=torch.float64), rtol=1e-12, atol=0)
    masks = allocate(scores, 2).masks
    singular = {group: members[1][1] for group, members in weights_of_oracle_4().items()}
    kept = {group: (singular[group].flatten() * masks[group]).tolist() for group in singular}
    assert kept == {"a": [0, -0.3], "b": [0, -0.5]}
    light = {"a": [6.0148125e-6, 2.98012921875e-4], "b": [7.99425e-6, 9.887625e-4]}
    for group, values in light.items():
        found = scores_of_oracle_4(light=True)[group]
        torch.testing.assert_close(found, torch.tensor(values, dtype=torch.float64), rtol=1e-12, atol=0)


def test_05_penalty():
    tensors = weights_of_oracle_4()
    Q, P = [[members[i][1] for members in tensors.values()] for i in (0, 2)]
    value, *_ = penalty(P, Q, "mean_norm")
    assert value.item() == pytest.approx(1.0502390200278684, rel=1e-12)
    value, EP, EQ = penalty(P, Q, "sum_squared")
    assert value.item() == pytest.approx(4.4468, rel=1e-12)
    for p, E in zip(P, EP, strict=True):
        torch.testing.assert_close(p @ E, 4 * p @ (p.T @ p - torch.eye(2)), rtol=1e-12, atol=1e-15)
    for q, E in zip(Q, EQ, strict=True):
        torch.testing.assert_close(E @ q, 4 * (q @ q.T - torch.eye(2)) @ q, rtol=1e-12, atol=1e-15)
    identity = torch.eye(5).double()
    for form in ("mean_norm", "sum_squared"):
        P, Q = identity[:, :3], identity[:2]
        value, (EP,), (EQ,) = penalty([P], [Q], form)
        assert value == 0
        assert torch.equal(P @ EP, torch.zeros(5, 3).double())
        assert torch.equal(EQ @ Q, torch.zeros(2, 5).double())


def test_06_penalty_at_init():
    n, r, sigma = 896, 12, 0.02
    expected = r * (1 - n * sigma**2) ** 2 + r * (r + 1) * n * sigma**4
    assert expected == pytest.approx(4.9622, abs=5e-5)
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(r, n, generator=generator) * sigma for _ in range(400)]
    squares = torch.tensor([float(penalty([], [q], "sum_squared")[0]) for q in draws])
    norms = torch.tensor([float(penalty([], [q], "mean_norm")[0]) for q in draws])
    assert squares.mean().item() == pytest.approx(expected, rel=0.005)
    assert norms.mean().item() == pytest.approx(2.2278, abs=0.004)
    assert norms.std().item() == pytest.approx(0.017, abs=0.003)
    assert 4096 * sigma**2 == pytest.approx(1.6384)
    assert 2500 * sigma**2 == pytest.approx(1)
    # What attach fills in has this distribution.
    adapter = attach(
        tiny_model("llama", hidden_size=896).model,
        AdaLoraConfig(rank=8, initial_rank=12, targets=("q",), paper=AdaLoraPaper(init="normal")),
    )
    for matrix in adapter.matrices.values():
        assert float(penalty([], [matrix.Q.detach()], "mean_norm")[0]) == pytest.approx(2.2278, abs=0.08)


def test_07_closed_form_of_a_steady_entry():
    expected = {1: 0.019125, 2: 0.060148125, 5: 0.185123181, 10: 0.237172310, 20: 0.111771690, 40: 0.009000266}
    weight = torch.ones(1).double()
    weight.grad = torch.ones(1).double()
    importance = Importance({"w": [ScoredPart(weight, 0)]}, 0.85, 0.85)
    for t in range(1, 41):
        importance.observe(t - 1)
        if t in expected:
            found = importance.scores()["w"].item()
            assert found == pytest.approx(expected[t], rel=1e-8)
            assert found == pytest.approx((1 - 0.85**t) * 0.15 * t * 0.85**t, rel=1e-12)


@pytest.mark.parametrize("kind", TASKS)
def test_08_euler_identity(kind):
    adapter = attach(tiny_model(kind).model.double(), AdaLoraConfig(rank=2, dropout=0.2), task=TASKS[kind])
    randomise(adapter)
    adapter.model.train()
    adapter.model(**inputs(kind)).loss.backward()
    for matrix in adapter.matrices.values():
        Q, singular, P = matrix.tensors
        by_singular = (singular * singular.grad).flatten()
        scale = by_singular.abs().max().clamp_min(1e-3).item()
        for other in ((P * P.grad).sum(0), (Q * Q.grad).sum(1)):
            torch.testing.assert_close(other, by_singular, rtol=1e-10, atol=1e-10 * scale)


def test_09_scale_invariance():
    plain, scaled = scores_of_oracle_4(), scores_of_oracle_4(factor=8.0)
    for group in plain:
        assert torch.equal(scaled[group], 64 * plain[group])
    for budget in range(5):
        masks, others = allocate(plain, budget).masks, allocate(scaled, budget).masks
        assert all(torch.equal(masks[group], others[group]) for group in masks)


@pytest.mark.parametrize(
    "scores",
    [
        {"a": torch.ones(4), "b": torch.ones(3)},
        {"a": torch.zeros(4), "b": torch.zeros(3)},
        {"a": torch.tensor([3.0, 1.0, 2.0, 2.0]), "b": torch.tensor([2.0, 2.0, 5.0])},
    ],
)
def test_10_exact_budget(scores):
    before = set()
    for budget in range(10):
        found = allocate(scores, budget)
        kept = {(group, i) for group, mask in found.masks.items() for i in mask.nonzero().flatten().tolist()}
        assert len(kept) == int(found.units) == min(budget, 7)
        assert before <= kept
        before = kept
    order = sorted(((g, i) for g in scores for i in range(len(scores[g]))), key=lambda at: (-scores[at[0]][at[1]], at))
    found = allocate(scores, 5).masks
    assert {(g, i) for g, mask in found.items() for i in mask.nonzero().flatten().tolist()} == set(order[:5])


def test_11_revival():
    config = AdaLoraConfig(rank=2, initial_rank=3, steps=20, tinit=2, tfinal=5, interval=3, shrink=False)
    adapter = attach(tiny_model("llama").model, config)
    controller, optimizer = adapter.controller, optimizer_of(adapter)
    train(adapter, 7, optimizer)  # allocated after the steps of index 3 and 6
    name, index = next((name, int(i)) for name, mask in controller.masks.items() for i in (~mask).nonzero()[:1])
    singular = adapter.matrices[name].singular
    assert singular[index] == 0
    train(adapter, 1, optimizer)
    assert singular[index] != 0  # between two allocations it moves again
    assert not controller.masks[name][index]

    def amplify(gradient):
        gradient = gradient.clone()
        gradient[index] *= 1e5
        return gradient

    handle = singular.register_hook(amplify)  # now the loss depends on it more than on any other
    train(adapter, 2, optimizer)
    handle.remove()
    assert controller.masks[name][index]  # and the allocation at index 9 gave it its place back
    assert singular[index] != 0
    train(adapter, 6, optimizer)
    fixed = {name: mask.clone() for name, mask in controller.masks.items()}
    for _ in range(4):
        train(adapter, 1, optimizer)
        for name, mask in controller.masks.items():
            assert torch.equal(mask, fixed[name])
            assert torch.equal(adapter.matrices[name].singular.flatten() != 0, mask)


ROWS = [{"input_ids": list(range(5 + i, 17 + i)), "labels": list(range(5 + i, 17 + i))} for i in range(40)]


def arguments(folder, **settings):
    defaults = {"max_steps": 20, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "seed": 0}
    plain = {"dataloader_pin_memory": False, "logging_nan_inf_filter": False}
    return TrainingArguments(output_dir=str(folder), **(defaults | quiet | plain | settings))


class Gradients(TrainerCallback):
    """What reaches the optimizer, before clipping and with the penalty."""

    def __init__(self, adapter):
        self.adapter, self.seen = adapter, []

    def on_optimizer_step(self, *_, **__):
        gradients = [t.grad.flatten().clone() for m in self.adapter.matrices.values() for t in m.tensors]
        self.seen.append(torch.cat(gradients))


def test_12_accumulation_invariance(tmp_path):
    found = {}
    for batch in (8, 1):
        adapter = randomise(attach(tiny_model("llama").model, AdaLoraConfig(rank=2, tinit=1, tfinal=1, gamma=0.5)))
        watch = Gradients(adapter)
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 8 // batch, "max_steps": 4}
        args = arguments(tmp_path, **settings, max_grad_norm=0.0)
        trainer = Trainer(model=adapter.model, args=args, train_dataset=ROWS, callbacks=[watch])
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found[batch] = (watch.seen[0], adapter.controller.step, losses[0])
    (whole, steps, loss), (pieces, others, logged) = found[8], found[1]
    assert steps == others == 4
    assert loss == pytest.approx(logged, rel=1e-5)
    assert float((whole - pieces).norm() / whole.norm()) < 1e-5


def test_13_evaluation(tmp_path):
    model = tiny_model("llama").model.eval()
    with torch.no_grad():
        base = model(**inputs("llama")).loss.item()
    adapter = attach(model, AdaLoraConfig(rank=2, gamma=0.5, tinit=1, tfinal=1))
    with torch.no_grad():
        assert adapter.model.eval()(**inputs("llama")).loss.item() == pytest.approx(base, abs=1e-6)
        randomise(adapter)
        with adapter.model.disable_adapter():
            assert adapter.model(**inputs("llama")).loss.item() == pytest.approx(base, abs=1e-6)
        for matrix in adapter.matrices.values():
            matrix.singular.zero_()
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in IDS]
    trainer = Trainer(model=adapter.model, args=arguments(tmp_path, max_steps=4), train_dataset=rows * 4)
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(base, abs=1e-6)
    trainer.train()
    first = trainer.state.log_history[1]
    assert first["loss"] == pytest.approx(base, abs=1e-3)  # a batch of two of these rows, in any order
    assert first["adalora/penalty"] > 0.5


RESUME = """
import sys
from safetensors.torch import save_file
from tests.oracles.test_adalora import resumable
trainer, adapter = resumable(sys.argv[1])
trainer.train(resume_from_checkpoint=sys.argv[1] + "/checkpoint-" + sys.argv[2])
from tests.oracles.test_adalora import outcome
save_file(outcome(adapter), sys.argv[1] + "/outcome.safetensors")
"""


def resumable(folder, stop=None, **settings):
    config = AdaLoraConfig(rank=2, initial_rank=3, tinit=2, tfinal=6, interval=2, **settings)
    adapter = attach(tiny_model("llama").model, config)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == stop

    args = arguments(folder, save_strategy="steps", save_steps=2)
    return Trainer(model=adapter.model, args=args, train_dataset=ROWS, callbacks=[Stop()]), adapter


def outcome(adapter):
    found = {}
    for name, matrix in adapter.matrices.items():
        found |= {f"{name}.Q": matrix.Q, f"{name}.singular": matrix.singular, f"{name}.P": matrix.P}
        found |= {f"{name}.mask": adapter.controller.masks[name], f"{name}.score": adapter.controller.scores[name]}
    return {key: value.detach().clone().contiguous() for key, value in found.items()}


@pytest.mark.parametrize("at", [8, 16])  # while the budget shrinks, and after triplets were removed
def test_14_resume(tmp_path, at):
    from safetensors.torch import load_file

    torch.manual_seed(0)
    trainer, whole = resumable(tmp_path / "whole")
    trainer.train()
    torch.manual_seed(0)
    trainer, _ = resumable(tmp_path / "parts", stop=at)
    trainer.train()
    command = [sys.executable, "-W", "ignore", "-c", RESUME, str(tmp_path / "parts"), str(at)]
    subprocess.run(command, check=True, capture_output=True, timeout=240, cwd=Path(__file__).parents[2])
    expected, found = outcome(whole), load_file(tmp_path / "parts" / "outcome.safetensors")
    assert expected.keys() == found.keys()
    differ = [key for key, value in expected.items() if not torch.equal(value, found[key])]
    assert differ == []
    assert sum(int(mask.sum()) for key, mask in found.items() if key.endswith(".mask")) == whole.plan.end == 28


def check_exported(folder, adapter, kept):
    expected = logits(adapter.model)
    opened = PeftModel.from_pretrained(tiny_model("llama").model, folder)
    found = logits(opened)
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.max() - expected.min())
    layers = {name: m for name, m in opened.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert all(layer.scaling["default"] == 1.0 for layer in layers.values())
    assert set(layers) == {name for name, rank in kept.items() if rank > 0}
    assert any(rank == 0 for rank in kept.values())


@pytest.mark.parametrize("shrink", [True, False])
def test_15_export(tmp_path, shrink):
    adapter = attach(tiny_model("llama").model, AdaLoraConfig(rank=1, initial_rank=4, steps=12, shrink=shrink))
    train(adapter, 12, optimizer_of(adapter, lr=3e-2))
    for layout in ("padded", "compact"):
        folder = adapter.export(tmp_path / layout, layout=layout)
        check_exported(folder, adapter, adapter.ranks())


@pytest.mark.filterwarnings("ignore:Adapter 'default':peft.utils.warning.PeftWarning")
@pytest.mark.filterwarnings("ignore:.*did not match any targeted module")
def test_15_export_of_an_adapter_that_peft_trained(tmp_path):
    settings = {"init_r": 4, "target_r": 1, "tinit": 1, "tfinal": 2, "total_step": 10, "lora_alpha": 8}
    config = PeftAdaLoraConfig(target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM", **settings)
    model = get_peft_model(tiny_model("llama").model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    for step in range(10):
        model(**inputs("llama")).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    expected = logits(model)
    model.save_pretrained(tmp_path / "peft")
    adapter = open_adapter(tiny_model("llama").model, tmp_path / "peft")
    assert float((logits(adapter.model) - expected).abs().max()) < 1e-5 * float(expected.max() - expected.min())
    folder = adapter.export(tmp_path / "plain")
    opened = PeftModel.from_pretrained(tiny_model("llama").model, folder)
    assert float((logits(opened) - expected).abs().max()) < 1e-5 * float(expected.max() - expected.min())
    layers = [m for m in opened.modules() if hasattr(m, "lora_A")]
    assert layers
    assert all(layer.scaling["default"] == 1.0 for layer in layers)


@pytest.mark.parametrize("fused", [True, False])
def test_16_skipped_step(fused):
    adapter = attach(tiny_model("llama").model, AdaLoraConfig(rank=2, initial_rank=3, steps=20, tinit=1, tfinal=2))
    optimizer = optimizer_of(adapter, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def step(factor):
        scaler.scale(adapter.model(**inputs("llama")).loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    def state():
        held = adapter.controller.state_dict()
        importance = {key: torch.as_tensor(value).clone() for key, value in held["importance"].items()}
        return held["step"], importance, {name: mask.clone() for name, mask in held["masks"].items()}

    for _ in range(5):
        step(1.0)
    steps, importance, masks = state()
    step(math.inf)
    later = state()
    assert later[0] == steps == 5
    assert all(torch.equal(value, later[1][key]) for key, value in importance.items())
    assert all(torch.equal(mask, later[2][name]) for name, mask in masks.items())
    step(1.0)
    assert state()[0] == 6


def test_17_counting():
    sizes = {"q": (576, 576), "k": (576, 192), "v": (576, 192), "o": (576, 576)}
    sizes |= {"gate": (576, 1536), "up": (576, 1536), "down": (1536, 576)}
    slots = [
        Slot(f"{layer}.{role}", role, layer, *size, "linear", "decoder")
        for layer in range(30)
        for role, size in sizes.items()
    ]
    config = AdaLoraConfig(rank=4, tinit=5, tfinal=5, interval=1)
    plan = make_plan(config, slots, parameters=134_515_008)
    assert (len(slots), set(plan.ranks.values()), plan.start, plan.end) == (210, {6}, 1260, 840)
    schedule = make_schedule(config, plan, total=24)
    assert [int(schedule.value(step)) for step in (6, 10, 14, 19)] == [1176, 951, 859, 840]
