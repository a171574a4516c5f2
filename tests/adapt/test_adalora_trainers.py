"""The same adapter, unchanged and with nothing to call, in the ecosystem's trainers."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import Trainer, TrainingArguments

from tenfold.adapt.adalora import AdaLoraConfig, attach
from tenfold.errors import ConfigError, RunError
from tenfold.models.open import attach_adapter
from tenfold.models.tiny import tiny_model

pytestmark = [
    # PEFT asks transformers for the name of an attribute that transformers renamed.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    # TRL's configurations set a field that transformers renamed.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]

STEPS = 12
ROWS = [{"input_ids": list(range(5 + i, 17 + i)), "labels": list(range(5 + i, 17 + i))} for i in range(2 * STEPS)]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def llama(**settings):
    config = {"rank": 1, "initial_rank": 3, "tinit": 1, "tfinal": 4, "interval": 1, **settings}
    return attach(tiny_model("llama").model, AdaLoraConfig(**config))


def settings(folder, **more):
    common = {"max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "bf16": False}
    order = {"lr_scheduler_type": "constant", "train_sampling_strategy": "sequential", "max_grad_norm": 1.0}
    return {"output_dir": str(folder), "dataloader_pin_memory": False, **common, **quiet, **order, **more}


def plain_loop(adapter):
    optimizer = torch.optim.AdamW([p for p in adapter.model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    adapter.model.train()
    for step in range(STEPS):
        ids = torch.tensor([row["input_ids"] for row in ROWS[2 * step : 2 * step + 2]])
        adapter.model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return adapter


def test_trainer_and_sft_trainer_do_what_a_plain_loop_does(tmp_path):
    trl = pytest.importorskip("trl")
    expected = plain_loop(attach_with_steps())
    with_trainer, with_sft = seeded(llama), seeded(llama)
    trainer = Trainer(
        model=with_trainer.model, args=TrainingArguments(**settings(tmp_path)), train_dataset=Dataset.from_list(ROWS)
    )
    trainer.train()
    args = trl.SFTConfig(**settings(tmp_path), gradient_checkpointing=False, shuffle_dataset=False)
    tokenizer = tiny_model("llama").tokenizer
    sft = trl.SFTTrainer(
        model=with_sft.model, args=args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer
    )
    sft.train()
    for adapter in (with_trainer, with_sft):
        assert adapter.controller.step == STEPS
        assert adapter.report()["budget"] == expected.report()["budget"]
        assert adapter.ranks() == expected.ranks()
        for name, matrix in adapter.matrices.items():
            torch.testing.assert_close(matrix.singular, expected.matrices[name].singular, rtol=1e-3, atol=1e-5)
    logged = [entry for entry in sft.state.log_history if "loss" in entry]
    assert all({"adalora/penalty", "adalora/budget", "adalora/triplets"} <= entry.keys() for entry in logged)
    assert logged[-1]["adalora/triplets"] == logged[-1]["adalora/budget"] == 14


def seeded(build):
    torch.manual_seed(0)
    return build()


def attach_with_steps():
    return seeded(lambda: llama(steps=STEPS))


PREFERENCES = [{"prompt": f"say {i} ", "chosen": "yes", "rejected": "no way"} for i in range(2 * STEPS)]


def dpo(adapter, folder, **more):
    trl = pytest.importorskip("trl")
    args = trl.DPOConfig(**settings(folder, **more), gradient_checkpointing=False)
    tokenizer = tiny_model("llama").tokenizer
    return trl.DPOTrainer(
        model=adapter.model, args=args, train_dataset=Dataset.from_list(PREFERENCES), processing_class=tokenizer
    )


def test_dpo_trainer(tmp_path):
    adapter = llama()
    trainer = dpo(adapter, tmp_path, save_strategy="steps", save_steps=10)
    trainer.train()
    assert adapter.controller.step == STEPS
    assert sum(adapter.ranks().values()) == 14
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0]["loss"] == pytest.approx(0.6931, abs=1e-4)  # the reference is the model itself, and no penalty
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert logged[-1]["adalora/penalty"] < logged[0]["adalora/penalty"]
    folder = adapter.export(tmp_path / "out")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        found = PeftModel.from_pretrained(tiny_model("llama").model, folder).eval()(input_ids=ids).logits
        torch.testing.assert_close(found, adapter.model.eval()(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_dpo_refers_to_the_adapter_that_it_starts_from(tmp_path):
    """TRL copies an adapter that is already trained; the copy must have our layers and all of their tensors."""
    adapter = plain_loop(attach_with_steps())
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        start = adapter.model.eval()(input_ids=ids).logits
        trainer = dpo(adapter, tmp_path)
        trainer.model.set_adapter("ref")
        assert torch.equal(trainer.model.eval()(input_ids=ids).logits, start)
        trainer.model.set_adapter("default")
        for matrix in adapter.matrices.values():
            matrix.singular.data *= 2  # trained further: the reference stays
        found = attach_adapter(tiny_model("llama").model, adapter.export(tmp_path / "out"), "causal").eval()
        assert found.active_adapters == ["default"]
        assert not torch.allclose(found(input_ids=ids).logits, start, atol=1e-3)
        found.set_adapter("ref")
        torch.testing.assert_close(found(input_ids=ids).logits, start, rtol=1e-5, atol=1e-5)


def test_resuming_with_another_configuration_is_refused(tmp_path):
    def run(resume=None, **more):
        adapter = llama(**more)
        args = TrainingArguments(**settings(tmp_path, save_strategy="steps", save_steps=4))
        Trainer(model=adapter.model, args=args, train_dataset=ROWS).train(resume_from_checkpoint=resume)

    run()
    with pytest.raises(RunError, match=r"tinit 1, now 2"):
        run(resume=str(tmp_path / "checkpoint-4"), tinit=2)


def test_total_steps_that_are_not_the_trainers(tmp_path):
    config = AdaLoraConfig(rank=1, tinit=1, tfinal=4)
    adapter = attach(tiny_model("llama").model, config, total_steps=50)
    trainer = Trainer(model=adapter.model, args=TrainingArguments(**settings(tmp_path)), train_dataset=ROWS)
    with pytest.raises(ConfigError, match="total_steps: 50, but the Trainer makes 12 steps"):
        trainer.train()


@pytest.mark.parametrize(("kind", "task"), [("gpt2", "causal"), ("t5", "seq2seq"), ("deberta-v2", "classification")])
def test_other_architectures_in_the_trainer(tmp_path, kind, task):
    model = tiny_model(kind).model
    config = AdaLoraConfig(rank=1, initial_rank=3, tinit=1, tfinal=4, interval=1)
    adapter = attach(model, config, task=task)
    rows = ROWS if task != "classification" else [{**row, "labels": i % 2} for i, row in enumerate(ROWS)]
    trainer = Trainer(model=adapter.model, args=TrainingArguments(**settings(tmp_path)), train_dataset=rows)
    trainer.train()
    assert sum(adapter.ranks().values()) == len(adapter.matrices)
    folder = adapter.export(tmp_path / "out", layout="compact")
    ids = {"input_ids": torch.arange(5, 25)[None]} | ({"labels": torch.arange(5, 25)[None]} if kind == "t5" else {})
    with torch.no_grad():
        opened = PeftModel.from_pretrained(tiny_model(kind).model, folder).eval()
        torch.testing.assert_close(opened(**ids).logits, adapter.model.eval()(**ids).logits, rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing(tmp_path):
    found = []
    for checkpointing in (False, True):
        adapter = seeded(llama)
        args = TrainingArguments(**settings(tmp_path), gradient_checkpointing=checkpointing)
        Trainer(model=adapter.model, args=args, train_dataset=ROWS).train()
        found.append({name: matrix.singular.detach().clone() for name, matrix in adapter.matrices.items()})
    for name, singular in found[0].items():
        torch.testing.assert_close(found[1][name], singular, rtol=1e-3, atol=1e-5)
