"""R3M inside TRL's trainers: which pair is which, what stops a run, and that nothing of TRL is lost."""

import json
import math
import runpy
import sys

import pytest
import torch
from datasets import Dataset
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch.nn.functional import logsigmoid

from tenfold.align.r3m.losses import RunningKink, kink, lipschitz_envelope, pair_loss, perturbation, r3m_loss
from tenfold.config.r3m import R3MPaper, RobustFields
from tenfold.errors import ConfigError, DataError, MissingDependencyError, RunError
from tenfold.models.tiny import tiny_model

trl = pytest.importorskip("trl")

from tenfold.align import trainers  # noqa: E402
from tenfold.align.trainers import R3MDPOTrainer, R3MRewardTrainer  # noqa: E402

pytestmark = [
    # TRL's configurations set a field that transformers renamed.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]


def pairs(count=16):
    return [
        {"id": f"pair-{i}", "prompt": f"{i} + 1 = ", "chosen": f"{i + 1}", "rejected": "unknown"[: 2 + i % 5]}
        for i in range(count)
    ]


def arguments(make, folder, **more):
    common = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "bf16": False}
    given = {"output_dir": str(folder), "dataloader_pin_memory": False, "gradient_checkpointing": False}
    config = trl.RewardConfig if make is R3MRewardTrainer else trl.DPOConfig
    return config(**{**common, **quiet, **given, **more})


def trainer(make, folder, rows, robust=None, model=None, peft_config=None, streamed=False, reference=None, **more):
    """A trainer of a tiny model; its keyword arguments are those of the configuration."""
    reward = make is R3MRewardTrainer
    opened = tiny_model("llama", task="reward" if reward else "causal")
    reference = {} if reward or peft_config else {"ref_model": reference or tiny_model("llama").model}
    data = Dataset.from_list(rows)
    return make(
        model or opened.model,
        args=arguments(make, folder, **more),
        train_dataset=data.to_iterable_dataset() if streamed else data,
        processing_class=opened.tokenizer,
        robust=robust or RobustFields(),
        peft_config=peft_config,
        **reference,
    )


def steps(trainer):
    """What was logged of each step, but for the count of tokens, which TRL begins anew when it resumes."""
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return [{key: value for key, value in line.items() if key != "num_tokens"} for line in lines]


BOTH = pytest.mark.parametrize("make", [R3MRewardTrainer, R3MDPOTrainer])


@BOTH
# Without shrinking: a smaller example is not worth the minutes that many trainers take.
@settings(max_examples=20, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    lengths=st.lists(st.tuples(*[st.integers(1, 40)] * 3), min_size=4, max_size=24),
    named=st.booleans(),
    seed=st.integers(0, 100),
)
def test_ids_stay_with_their_pairs(tmp_path_factory, make, lengths, named, seed):
    rows = [
        {"id": f"pair {i}", "prompt": f"{i}:" + "p" * p, "chosen": "c" * c, "rejected": "r" * r}
        for i, (p, c, r) in enumerate(lengths)
    ]
    rows.append({"id": "short", "prompt": f"{len(lengths)}:", "chosen": "c", "rejected": "r"})
    texts = {row["id"] if named else i: row for i, row in enumerate(rows)}
    if not named:
        rows = [{key: value for key, value in row.items() if key != "id"} for row in rows]
    found = trainer(make, tmp_path_factory.mktemp("out"), rows, max_length=40, seed=seed, data_seed=seed)
    tokenizer, seen = found.processing_class, []
    for batch in found.get_train_dataloader():
        count = len(batch["id"])
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        for place, name in enumerate(batch["id"]):
            for side, at in (("chosen", place), ("rejected", place + count)):
                whole = texts[name]["prompt"] + texts[name][side] + tokenizer.eos_token
                assert tokenizer.decode(ids[at][mask[at]]) == tokenizer.decode(tokenizer(whole)["input_ids"][:40])
        seen += batch["id"]

    def fits(row):
        if make is R3MDPOTrainer:
            return len(row["prompt"]) < 40
        return all(len(row["prompt"]) + len(row[side]) + 1 <= 40 for side in ("chosen", "rejected"))

    assert sorted(seen, key=str) == sorted((name for name, row in texts.items() if fits(row)), key=str)


@BOTH
def test_margins_are_those_of_their_ids(tmp_path, make):
    torch.manual_seed(3)
    other = tiny_model("llama").model
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.02 * torch.randn_like(weight)
    keys = {"learning_rate": 0.0} if make is R3MRewardTrainer else {"learning_rate": 0.0, "reference": other}
    found = trainer(make, tmp_path, pairs(), max_steps=4, **keys)
    found.train()
    margins = found.margins()
    assert sorted(margins) == sorted(row["id"] for row in pairs())
    assert len({round(margin, 6) for margin in margins.values()}) == 16
    for row in pairs()[5:9]:
        alone = trainer(make, tmp_path, [row], max_steps=1, **keys)
        alone.train()
        assert alone.margins() == {row["id"]: pytest.approx(margins[row["id"]], abs=1e-5)}


@BOTH
@pytest.mark.parametrize(("ids", "said"), [(["a", "b", "a"], "row 2: the id 'a' comes twice"), ([None] * 3, "row 0"),
                                           ([[1], [2], [3]], "is not a name")])  # fmt: skip
def test_ids_that_tell_no_pairs_apart_are_refused(tmp_path, make, ids, said):
    with pytest.raises(DataError, match=said):
        trainer(make, tmp_path, [{**row, "id": id} for row, id in zip(pairs(3), ids, strict=True)])


@BOTH
def test_a_template_that_refuses_a_pair_names_it(tmp_path, make):
    rows = [
        {
            "id": row["id"],
            "prompt": [{"role": "system" if number == 3 else "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for number, row in enumerate(pairs())
    ]
    opened = tiny_model("llama", task="reward" if make is R3MRewardTrainer else "causal")
    opened.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"train_dataset, id 'pair-3': .* no system messages"):
        make(
            opened.model,
            args=arguments(make, tmp_path),
            train_dataset=Dataset.from_list(rows),
            processing_class=opened.tokenizer,
        )


def test_by_default_it_is_r3m(tmp_path):
    opened = tiny_model("llama", task="reward")
    args = arguments(R3MRewardTrainer, tmp_path)
    found = R3MRewardTrainer(opened.model, args, train_dataset=Dataset.from_list(pairs()),
                             processing_class=opened.tokenizer)  # fmt: skip
    assert found.robust == RobustFields()


@BOTH
def test_no_batch_moves_the_kink_that_it_is_judged_by(tmp_path, make):
    found = trainer(make, tmp_path, pairs(40), RobustFields(budget="40%"), max_steps=12)
    seen, original = [], found._pair_losses

    def spy(margin, ids):
        losses = original(margin, ids)
        seen.append((margin.detach().float(), losses.detach()))
        return losses

    found._pair_losses = spy
    found.train()
    kinks = RunningKink(0.4)
    for (margin, losses), line in zip(seen, steps(found), strict=True):
        assert line["r3m/lam"] == pytest.approx(kinks.lam)
        torch.testing.assert_close(losses, r3m_loss(margin, kinks.lam))
        kinks.observe(margin.tolist())
    assert kinks.lam < 1


@BOTH
def test_the_mean_over_epochs(tmp_path, make):
    found = trainer(make, tmp_path, pairs(8), num_train_epochs=3, max_steps=-1)
    seen, original = {}, found._pair_losses

    def spy(margin, ids):
        for id, value in zip(ids, margin.tolist(), strict=True):
            seen.setdefault(id, []).append(value)
        return original(margin, ids)

    found._pair_losses = spy
    found.train()
    assert all(len(values) == 3 for values in seen.values())
    assert found.margins() == {id: pytest.approx(values[-1]) for id, values in seen.items()}
    assert found.epoch_margins() == {id: pytest.approx(sum(values) / 3) for id, values in seen.items()}


@BOTH
def test_a_budget_that_too_few_pairs_could_show_is_refused(tmp_path, make):
    found = trainer(make, tmp_path, pairs(), RobustFields(budget="1%"))
    with pytest.raises(ConfigError, match=r"budget: 0.01 of 24 pairs are too few"):
        found.train()


@BOTH
@pytest.mark.parametrize("named", [True, False])
def test_a_stream(tmp_path, make, named):
    rows = [row if named else {key: row[key] for key in ("prompt", "chosen", "rejected")} for row in pairs()]
    found = trainer(make, tmp_path, rows, max_steps=4, streamed=True)
    found.train()
    assert list(found.margins()) == [row["id"] if named else i for i, row in enumerate(pairs())]


@BOTH
def test_a_margin_that_is_not_finite_stops_with_its_id(tmp_path, make):
    rows = pairs()
    rows[9]["chosen"] = "~"
    model = tiny_model("llama", task="reward" if make is R3MRewardTrainer else "causal").model
    token = tiny_model("llama").tokenizer("~")["input_ids"][0]
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = math.nan
    found = trainer(make, tmp_path, rows, model=model, train_sampling_strategy="sequential")
    with pytest.raises(RunError, match=r"not finite at step 3 of 6, of id 'pair-9'\n"):
        found.train()
    assert found.state.global_step == 2
    others = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    assert others == ["model.embed_tokens.weight"], "no step may be made with it"
    assert "pair-9" not in found.margins()


@BOTH
def test_resumed_it_ends_as_if_it_never_stopped(tmp_path, make):
    keys = {
        "robust": RobustFields(budget="40%", paper=R3MPaper(lam_warmup=0.2)),
        "max_steps": 12,
        "save_strategy": "steps",
    }
    whole = trainer(make, tmp_path, pairs(40), save_steps=5, **keys)
    whole.train()
    again = trainer(make, tmp_path, pairs(40), save_steps=5, **keys)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    lams = [line["r3m/lam"] for line in steps(whole)]
    assert lams[:3] == [1, 1, 1]
    assert 0 < lams[-1] < 1
    assert len(set(lams)) == 3  # no cap yet, and two moves, of which the second comes after the checkpoint
    for line, expected in zip(steps(again), steps(whole), strict=True):
        assert line == expected
    assert again.margins() == whole.margins()
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], weight), name


def test_a_checkpoint_of_before_there_were_means_is_resumed(tmp_path):
    keys = {"robust": RobustFields(budget="40%"), "max_steps": 8, "save_strategy": "steps", "save_steps": 5}
    whole = trainer(R3MRewardTrainer, tmp_path, pairs(40), **keys)
    whole.train()
    path = tmp_path / "checkpoint-5/trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["R3MMemory"]["attributes"]["saved"]["sums"]
    path.write_text(json.dumps(state))
    again = trainer(R3MRewardTrainer, tmp_path, pairs(40), **keys)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert again.margins() == whole.margins()


def test_transformers_may_restore_the_callback_itself(tmp_path):
    keys = {"robust": RobustFields(budget="40%"), "max_steps": 8, "save_strategy": "steps", "save_steps": 5}
    whole = trainer(R3MRewardTrainer, tmp_path, pairs(40), **keys)
    whole.train()
    again = trainer(R3MRewardTrainer, tmp_path, pairs(40), restore_callback_states_from_checkpoint=True, **keys)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert steps(again) == steps(whole)
    assert again.margins() == whole.margins()


def test_a_checkpoint_of_trls_own_trainer_can_be_resumed(tmp_path):
    opened = tiny_model("llama", task="reward")
    args = arguments(R3MRewardTrainer, tmp_path, max_steps=4, save_strategy="steps", save_steps=1)
    rows = Dataset.from_list(pairs())
    trl.RewardTrainer(opened.model, args=args, train_dataset=rows, processing_class=opened.tokenizer).train()
    again = trainer(R3MRewardTrainer, tmp_path, pairs(), max_steps=4, save_strategy="steps", save_steps=1)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    saved = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert len(saved["stateful_callbacks"]["R3MMemory"]["attributes"]["saved"]["ids"]) == 4


@BOTH
def test_two_accumulated_batches_are_one(tmp_path, make):
    def weights(batch, accumulate):
        sgd = {"optim": "sgd", "max_grad_norm": 1e9, "lr_scheduler_type": "constant", "max_steps": 2}
        plan = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
        found = trainer(make, tmp_path, pairs(), train_sampling_strategy="sequential", **sgd, **plan)
        before = {name: weight.clone() for name, weight in found.model.state_dict().items()}
        found.train()
        return {name: weight - before[name] for name, weight in found.model.state_dict().items()}

    together, apart = weights(4, 1), weights(2, 2)
    assert max(float(moved.abs().max()) for moved in together.values()) > 1e-4
    for name, moved in together.items():
        torch.testing.assert_close(apart[name], moved, atol=1e-6, rtol=1e-3)


@BOTH
def test_an_adapter(tmp_path, make):
    head = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    config = LoraConfig(r=2, **(head if make is R3MRewardTrainer else {"task_type": "CAUSAL_LM"}))
    found = trainer(make, tmp_path, pairs(), peft_config=config)
    before = {name: weight.clone() for name, weight in found.model.state_dict().items()}
    found.train()
    moved = {name for name, weight in found.model.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved
    assert all("lora_" in name or "modules_to_save" in name for name in moved)
    if make is R3MDPOTrainer:
        assert steps(found)[0]["loss"] == pytest.approx(math.log(2)), "the reference is the model without the adapter"
    assert steps(found)[-1]["loss"] < steps(found)[0]["loss"]


@BOTH
def test_warm_up_trusts_every_label(tmp_path, make):
    found = trainer(make, tmp_path, pairs(), RobustFields(lam=0.3, paper=R3MPaper(lam_warmup=0.5)))
    found.train()
    assert [line["r3m/lam"] for line in steps(found)] == [1, 1, 1, 0.3, 0.3, 0.3]
    assert all(line["r3m/flagged_frac"] == line["r3m/delta_max"] == 0 for line in steps(found)[:3])
    assert any(line["r3m/flagged_frac"] > 0 for line in steps(found)[3:])


@BOTH
def test_trimmed_starts_with_a_small_cap(tmp_path, make):
    found = trainer(make, tmp_path, pairs(), RobustFields(loss="trimmed", lam=0.8, paper=R3MPaper(lam_warmup=0.5)))
    seen, original = [], found._pair_losses

    def spy(margin, ids):
        losses = original(margin, ids)
        seen.append((margin.detach(), losses.detach()))
        return losses

    found._pair_losses = spy
    found.train()
    assert [line["r3m/lam"] for line in steps(found)] == [0.1, 0.1, 0.1, 0.8, 0.8, 0.8]
    for number, (margin, losses) in enumerate(seen):
        expected = r3m_loss(margin, 0.1) if number < 3 else r3m_loss(margin.clamp(min=kink(0.8)), 1)
        torch.testing.assert_close(losses, expected)


@BOTH
def test_evaluation_flags_and_learns_nothing(tmp_path, make):
    found = trainer(make, tmp_path, pairs(), RobustFields(lam=0.3), learning_rate=0.0, max_steps=4)
    found.train()
    known = found.margins()
    first = found.evaluate(Dataset.from_list(pairs()))
    flagged = [margin < kink(0.3) for margin in known.values()]
    assert first["eval_r3m/flagged_frac"] == pytest.approx(sum(flagged) / 16)
    losses = r3m_loss(torch.tensor(list(known.values())), 0.3)
    assert first["eval_loss"] == pytest.approx(float(losses.mean()), abs=1e-5)
    assert found.margins() == known


@BOTH
@pytest.mark.parametrize("loss", ["cdpo", "rdpo", "trimmed"])
def test_every_loss_trains(tmp_path, make, loss):
    found = trainer(make, tmp_path, pairs(), RobustFields(loss=loss), max_steps=2)
    found.train()
    assert all(math.isfinite(line["loss"]) for line in steps(found))


def test_trls_own_robust_loss_is_rdpo(tmp_path):
    ours = trainer(R3MDPOTrainer, tmp_path, pairs(), RobustFields(loss="rdpo", paper=R3MPaper(smoothing=0.2)))
    ours.train()
    opened = tiny_model("llama")
    args = arguments(R3MDPOTrainer, tmp_path, loss_type="robust", label_smoothing=0.2)
    theirs = trl.DPOTrainer(
        opened.model,
        ref_model=tiny_model("llama").model,
        args=args,
        train_dataset=Dataset.from_list(pairs()),
        processing_class=opened.tokenizer,
    )
    theirs.train()
    for line, expected in zip(steps(ours), steps(theirs), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss_type", ["ipo"]),
        ("loss_type", ["sigmoid", "sft"]),
        ("f_divergence_type", "js_divergence"),
        ("ld_alpha", 0.5),
        ("use_weighting", True),
        ("label_smoothing", 0.1),
        ("loss_weights", [2.0]),
    ],
)
def test_options_that_make_another_loss_are_refused(tmp_path, name, value):
    with pytest.raises(ConfigError, match=f"^{name}: "):
        trainer(R3MDPOTrainer, tmp_path, pairs(), **{name: value})


@pytest.mark.parametrize("loss", ["cdpo", "rdpo"])
def test_a_margin_column_does_not_fit_smoothed_losses(tmp_path, loss):
    rows = [{**row, "margin": 0.5} for row in pairs()]
    with pytest.raises(ConfigError, match=r"^margin: "):
        trainer(R3MRewardTrainer, tmp_path, rows, RobustFields(loss=loss)).train()


def test_without_trl_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(MissingDependencyError, match="pip install"):
        runpy.run_path(trainers.__file__)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lam": 0.5, "budget": "10%"}, "lam and budget"),
        ({"lam": 0.0}, "lam"),
        ({"budget": "300"}, "budget: '300' is a count, which does not fit here"),
        ({"budget": "60%"}, "budget: 60% is not a share"),
        ({"loss": "bt", "lam": 0.5}, "lam: the loss bt has no use for it"),
        ({"loss": "cdpo", "budget": "5%"}, "budget: the loss cdpo"),
        ({"loss": "r3m", "paper": {"smoothing": 0.2}}, "paper.smoothing: the loss r3m"),
    ],
)
def test_settings_that_cannot_be_meant(keys, message):
    with pytest.raises(ConfigError, match=message):
        RobustFields.parse(keys, "test")
    assert RobustFields.parse(RobustFields().model_dump(mode="json"), "test").fixed_lam == 0.75


def test_baselines_by_their_formulas():
    m = torch.linspace(-6, 6, 41, dtype=torch.float64)
    right, wrong = -torch.log(torch.sigmoid(m)), -torch.log(torch.sigmoid(-m))
    expected = {
        "bt": right,
        "cdpo": 0.8 * right + 0.2 * wrong,
        "rdpo": (0.8 * right - 0.2 * wrong) / 0.6,
        "trimmed": right.clamp(max=-math.log(0.25)),
        "r3m": torch.where(m < kink(0.75), -math.log(0.25) + 0.75 * (kink(0.75) - m), right),
    }
    for name, value in expected.items():
        torch.testing.assert_close(pair_loss(m, name, lam=0.75, smoothing=0.2), value)
    m.requires_grad_()
    pair_loss(m, "trimmed", lam=0.75, smoothing=0).sum().backward()
    assert (m.grad[m < kink(0.75)] == 0).all()
    torch.testing.assert_close(m.grad[m > kink(0.75)], -torch.sigmoid(-m.detach())[m > kink(0.75)])


def test_off_every_capped_loss_is_the_plain_one_to_the_bit():
    m = 5 * torch.randn(100, generator=torch.Generator().manual_seed(0))
    for name in ("r3m", "trimmed", "bt"):
        assert torch.equal(pair_loss(m, name, lam=1.0, smoothing=0.0), -logsigmoid(m))
    assert not perturbation(m, 1.0).any()


def test_the_envelope_is_the_infimum():
    m = torch.linspace(-4, 4, 33, dtype=torch.float64)
    grid = torch.arange(0, 12, 1e-3, dtype=torch.float64)
    squared, hinge = (lambda x: (x - 0.5) ** 2), (lambda x: (1 - x).relu())
    for loss, lam, threshold in [
        (squared, 0.7, 0.5 - 0.35),
        (hinge, 0.7, 1.0),
        (lambda x: -logsigmoid(x), 0.7, kink(0.7)),
    ]:
        infimum = (loss(m[:, None] + grid) + lam * grid).min(1).values
        torch.testing.assert_close(lipschitz_envelope(loss, m, lam, threshold), infimum, atol=1e-5, rtol=0)


@BOTH
def test_an_adapter_under_a_budget_trains_under_a_robust_loss(tmp_path, make):
    from tenfold.adapt import adalora

    reward = make is R3MRewardTrainer
    opened = tiny_model("llama", task="reward" if reward else "causal")
    adapter = adalora.attach(
        opened.model,
        adalora.AdaLoraConfig(rank=2, initial_rank=4, tinit=0.1, tfinal=0.2),
        task="reward" if reward else "causal",
    )
    keys = {} if reward else {"ref_model": tiny_model("llama").model}
    found = make(
        adapter.model,
        args=arguments(make, tmp_path, max_steps=20),
        train_dataset=Dataset.from_list(pairs()),
        processing_class=opened.tokenizer,
        robust=RobustFields(lam=0.4),
        **keys,
    )
    found.train()
    ranks = adapter.ranks()
    assert sum(ranks.values()) <= 2 * len(ranks)
    assert len(set(ranks.values())) > 1, "capacity went where it matters"
    assert len(found.margins()) == 16
    assert any(line["r3m/flagged_frac"] > 0 for line in steps(found))
