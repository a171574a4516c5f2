"""Distillation of hidden states: who the teacher is, what the loss is, and that a converted model learns by it."""

import json

import pytest
import torch
from rich.console import Console
from transformers import TrainingArguments

from tenfold.adapt.distil import DistilTrainer, by_model, distance, divergence, states_to_match, unconverted
from tenfold.adapt.lora import LoraConfig, attach
from tenfold.attend import masformer
from tenfold.attend.spans import NAME
from tenfold.data.encode import collate
from tenfold.errors import ConfigError
from tenfold.kernels.local import AttentionWindow
from tenfold.models.open import open_model
from tenfold.models.tiny import tiny_model
from tenfold.pipeline import run as runner
from tenfold.pipeline.recipe import resolve

IDS = torch.randint(10, 200, (2, 40), generator=torch.Generator().manual_seed(0))
SPAN = AttentionWindow("sliding", 6)


def converted(kind="llama"):
    model = tiny_model(kind).model.eval()
    before = states_to_match(model, {"input_ids": IDS})
    masformer.convert(model, full_layers=[1], span=SPAN)
    return model, before


def same(states, wanted):
    assert len(states) == len(wanted) == 2
    return all(torch.equal(state, target) for state, target in zip(states, wanted, strict=True))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_the_teacher_is_the_unconverted_model_without_its_adapter(kind):
    model, before = converted(kind)
    adapted = attach(model, LoraConfig(rank=2))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    teacher = unconverted(adapted)
    changed = states_to_match(adapted, {"input_ids": IDS})
    states = teacher({"input_ids": IDS}).states
    assert same(states, before)
    assert not any(state.requires_grad for state in states)
    assert adapted.config._attn_implementation == NAME
    assert same(states_to_match(adapted, {"input_ids": IDS}), changed), "the teacher must leave the student as it was"
    assert not same(changed, before)


def test_where_all_weights_are_trained_the_teacher_is_a_copy():
    model, before = converted()
    teacher = unconverted(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert same(teacher({"input_ids": IDS}).states, before)


def test_a_model_without_spans_is_refused():
    with pytest.raises(ConfigError, match="distil"):
        unconverted(tiny_model("llama").model)


def test_the_distance_is_relative_and_leaves_padding_out():
    wanted = [torch.randn(2, 5, 8, dtype=torch.float64), 100 * torch.randn(2, 5, 8, dtype=torch.float64)]
    states = [wanted[0].clone(), wanted[1] * 1.5]
    seen = torch.ones(2, 5, dtype=torch.bool)
    assert float(distance(states, wanted, seen)) == pytest.approx(0.125)
    states[0][1, 3:] = 1e6
    seen[1, 3:] = False
    assert float(distance(states, wanted, seen)) == pytest.approx(0.125)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_two_accumulated_batches_are_one_batch(share, tmp_path):
    examples = [{"input_ids": row, "labels": row} for row in IDS.tolist()]

    def gradient(batch, accumulate):
        model, _ = converted()
        adapted = attach(model, LoraConfig(rank=2))
        torch.manual_seed(1)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        keys = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate, "max_steps": 1}
        keys |= {"learning_rate": 1.0, "optim": "sgd", "max_grad_norm": 1e9, "report_to": "none", "use_cpu": True}
        keys |= {"warmup_steps": 0, "lr_scheduler_type": "constant", "disable_tqdm": True, "save_strategy": "no"}
        before = {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}
        DistilTrainer(
            model=adapted,
            args=TrainingArguments(output_dir=str(tmp_path), remove_unused_columns=False, **keys),
            train_dataset=examples,
            data_collator=lambda found: collate(found, 0),
            teacher=unconverted(adapted),
            share=share,
        ).train()
        return {name: before[name] - p.detach() for name, p in adapted.named_parameters() if p.requires_grad}

    together, apart = gradient(2, 1), gradient(1, 2)
    assert max(float(value.abs().max()) for value in together.values()) > 1e-4
    for name, value in together.items():
        torch.testing.assert_close(apart[name], value, atol=1e-6, rtol=1e-4)


def batch_of(padded):
    rows = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in (IDS[0].tolist(), IDS[1, :30].tolist())]
    if not padded:
        rows = [{**row, "position_ids": list(range(len(row["input_ids"])))} for row in rows]
    return collate(rows, 0)


def distiller(share, folder):
    model, _ = converted()
    adapted = attach(model, LoraConfig(rank=2))
    arguments = TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True)
    return DistilTrainer(model=adapted, args=arguments, teacher=unconverted(adapted), share=share)


@pytest.mark.parametrize("padded", [True, False])
def test_the_loss_is_the_distance_and_the_rest_the_labels(padded, tmp_path):
    """By hand, and for packed rows, which have no mask, what the rows give alone."""
    batch = batch_of(padded)
    trainer = distiller(0.25, tmp_path)
    found = trainer.compute_loss(trainer.model, dict(batch)).detach()
    apart = both = 0.0
    student = trainer.model
    with torch.no_grad():
        for ids in (IDS[:1], IDS[1:, :30]):
            wanted = trainer.teacher({"input_ids": ids}).states
            mine = states_to_match(student, {"input_ids": ids})
            # A first token has no label, and where there is no mask that is all that is known of it.
            seen = torch.ones_like(ids, dtype=torch.bool)
            seen[0, 0] = padded
            apart += float(distance(mine, wanted, seen)) * int(seen.sum())
            both += int(seen.sum())
        labels = float(student(**batch, use_cache=False).loss)
    assert float(found) == pytest.approx(0.25 * apart / both + 0.75 * labels, rel=1e-4)


@pytest.mark.parametrize(("states", "logits"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_any_model_can_be_the_teacher_of_what_is_thought_and_said(states, logits, share, tmp_path):
    student, model = tiny_model("llama").model, tiny_model("llama").model
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.2)
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    teacher = by_model(model, states=states, logits=logits)
    trainer = DistilTrainer(model=student, args=arguments, teacher=teacher, share=share)
    batch = batch_of(True)
    found = trainer.compute_loss(student, dict(batch))
    found.backward()
    with torch.no_grad():
        mine, his = (one(**batch, output_hidden_states=True) for one in (student, model))
    seen, apart = batch["attention_mask"].bool(), 0.0
    if states:
        apart += float(distance(mine.hidden_states[1:], his.hidden_states[1:], seen))
    if logits:
        apart += float(divergence(mine.logits, his.logits, seen))
    assert apart > 1e-3
    assert float(found.detach()) == pytest.approx(share * apart + (1 - share) * float(mine.loss), rel=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in student.model.layers.parameters())


def test_a_teacher_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="neither"):
        by_model(tiny_model("llama").model, states=False, logits=False)


def test_it_evaluates_and_needs_no_labels(tmp_path):
    trainer = distiller(1.0, tmp_path)
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS.tolist()]
    trainer.data_collator = lambda found: collate([{k: row[k] for k in ("input_ids", "labels")} for row in found], 0)
    assert trainer.evaluate(rows)["eval_loss"] > 0
    labelled = trainer.compute_loss(trainer.model, batch_of(True))
    bare = trainer.compute_loss(trainer.model, {"input_ids": IDS})
    assert torch.isfinite(bare)
    assert labelled.shape == bare.shape


@pytest.fixture
def recipe(number_rows):
    convert = {"use": "masformer", "data": str(number_rows), "window": 8, "passages": 1, "passage": 16, "between": 16}
    train = {"steps": 24, "max_length": 48, "learning_rate": 0.01, "save_every": 4, "log_every": 4, "distil": 1.0}
    train |= {"boundaries": True, "batch_size": 2}
    return lambda use, **keys: {
        "model": "tiny:llama",
        "stages": [{**convert, "budget": "1"}, {"use": use, **train, **keys}],
    }


def execute(recipe, out):
    return runner.run(resolve(recipe, "distil"), out, Console(quiet=True))


def test_all_weights_learn_what_the_model_thought_before(recipe, number_rows, tmp_path):
    _, trained = execute(recipe("full", learning_rate=1e-4, steps=40), tmp_path)
    assert trained.attached["share of the model"] == 1
    figures = {metric.name: metric.value for result in trained.results for metric in result.metrics}
    assert figures["loss"] < figures["first loss"]
    opened = open_model("tiny:llama")
    text = " ".join(json.loads(line)["text"] for line in number_rows.read_text().splitlines())
    inputs = {"input_ids": opened.tokenizer(text, return_tensors="pt")["input_ids"][:, :48]}
    seen = torch.ones(1, 48, dtype=torch.bool)

    @torch.no_grad()
    def gap(folder):
        wanted = states_to_match(opened.model.eval(), inputs)
        return float(distance(states_to_match(open_model(folder).model.eval(), inputs), wanted, seen))

    assert gap(tmp_path / "02-full/model") < 0.9 * gap(tmp_path / "01-masformer/model")


@pytest.mark.parametrize(("use", "rank"), [("lora", {"rank": 4}), ("adalora", {"rank": 4}), ("full", {})])
def test_interrupted_halfway_it_ends_as_if_it_never_was(recipe, use, rank, tmp_path, monkeypatch):
    keys = recipe(use, **rank, steps=12)
    whole = execute(keys, tmp_path / "whole")
    from tenfold.adapt.training import _Watch

    def stop(self, args, state, control, **_):
        if state.global_step == 9:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_Watch, "on_step_begin", stop)
        with pytest.raises(KeyboardInterrupt):
            execute(keys, tmp_path / "cut")
    again = execute(keys, tmp_path / "cut")
    figures = [
        [(m.name, m.value) for s in run for r in s.results for m in r.metrics if m.kind == "figure"]
        for run in (whole, again)
    ]
    assert figures[0] == figures[1]
