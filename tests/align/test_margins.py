"""Margins: equal to the plainest computation, tokens as in TRL, resumed without a second pass, little in memory."""

from __future__ import annotations

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from tenfold.align import margins as scoring
from tenfold.align.margin_cache import tokenizer_hash
from tenfold.align.margins import Scored, cross_fit, folds_of, score_pairs, score_policy_pairs
from tenfold.data.groups import hash_share
from tenfold.data.read import read_rows
from tenfold.data.rows import Preference
from tenfold.errors import ConfigError, DataError, ModelError
from tenfold.models.tiny import tiny_model
from tests.tokenizers import TOKENIZERS, template_of_trl

ROWS = [
    Preference("sum", "What is 1 + 1? ", "It is 2.", "It is certainly 11, as anyone can see by looking at it."),
    Preference("é", "Wie heißt du? ", "Ich heiße Ärger.", "x"),
    Preference("poem", "Write a poem. " * 3, "Roses are red, and so on and so forth", "No"),
    Preference("same start", "Count: ", "one two three", "one two four"),
    *list(read_rows("step-audit:9:1")),
]
TURNS = Preference(
    "turns", "And 2 + 2? ", "It is 4.", "No idea.",
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1 + 1?"},
     {"role": "assistant", "content": "2"}),
)  # fmt: skip


@pytest.fixture
def reward():
    """A tiny reward model with its tokenizer, whose forward passes are counted."""
    opened = tiny_model("llama", task="reward")
    return _counted(opened)


@pytest.fixture
def policy():
    """A tiny language model with a random adapter, counted."""
    return _counted(_adapted(0))


def _adapted(seed):
    from peft import LoraConfig, get_peft_model

    opened = tiny_model("llama")
    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return SimpleNamespace(model=get_peft_model(opened.model, config), tokenizer=opened.tokenizer)


def _counted(opened):
    calls = []
    opened.model.register_forward_hook(lambda module, inputs, output: calls.append(1))
    return SimpleNamespace(model=opened.model, tokenizer=opened.tokenizer, calls=calls)


def plain_text(tokenizer, row, answer, chat):
    if chat:
        turns = [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": answer}]
        return tokenizer.apply_chat_template(turns, tokenize=False)
    return row.prompt + answer + tokenizer.eos_token


def test_a_policy_that_started_from_an_adapter_is_measured_against_it(policy, tmp_path):
    """As TRL trains it: ``ref`` is a copy of the start. Margins begin at 0, and are then those to a copied model."""
    from tenfold.models.export import save_adapter
    from tenfold.models.open import open_model

    model, tokenizer = policy.model, policy.tokenizer
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    start = copy.deepcopy(model)
    free = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    zero = score_policy_pairs(model, tokenizer, ROWS, beta=0.1).margins
    torch.testing.assert_close(zero, torch.zeros(len(ROWS)), atol=1e-6, rtol=0)
    assert model.active_adapter == "default"
    assert model.active_adapters == ["default"]
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == free
    for name, parameter in model.named_parameters():
        if "lora_B.default" in name:
            parameter.data *= 1.5
    found = score_policy_pairs(model, tokenizer, ROWS, beta=0.1).margins
    assert found.abs().max() > 1e-3
    by_hand = score_policy_pairs(model, tokenizer, ROWS, beta=0.1, reference=start).margins
    torch.testing.assert_close(found, by_hand, atol=1e-6, rtol=0)
    folder = save_adapter(model, tokenizer, tmp_path / "dpo", base="tiny:llama")
    again = open_model(folder, device="cpu")
    assert again.model.active_adapters == ["default"]
    reopened = score_policy_pairs(again.model, again.tokenizer, ROWS, beta=0.1).margins
    torch.testing.assert_close(reopened, found, atol=1e-6, rtol=0)


def test_a_reward_adapter_opened_again_gives_the_margins_of_its_training(tmp_path):
    """The base names another pad token than its tokenizer does, and answers end with the tokenizer's."""
    from peft import LoraConfig, get_peft_model

    from tenfold.models.export import save_adapter, save_model
    from tenfold.models.open import open_model

    opened = tiny_model("llama")
    opened.tokenizer.pad_token = "<eos>"
    opened.model.config.pad_token_id = 0
    base = save_model(opened.model, opened.tokenizer, tmp_path / "base")
    torch.manual_seed(0)
    opened = open_model(base, "reward", device="cpu")
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(opened.model, config).eval()
    model.config.pad_token_id = opened.tokenizer.pad_token_id  # as TRL's RewardTrainer does
    expected = score_pairs(model, opened.tokenizer, ROWS, chat=False).margins
    folder = save_adapter(model, opened.tokenizer, tmp_path / "adapter", base=str(base))
    again = open_model(folder, "reward", device="cpu")
    found = score_pairs(again.model, again.tokenizer, ROWS, chat=False).margins
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_margins_are_those_of_one_text_at_a_time(reward, chat, batch_size):
    expected = []
    with torch.no_grad():
        for row in ROWS:
            scores = []
            for answer in (row.chosen, row.rejected):
                ids = reward.tokenizer(plain_text(reward.tokenizer, row, answer, chat), return_tensors="pt")[
                    "input_ids"
                ]
                scores.append(reward.model(input_ids=ids).logits.item())
            expected.append(scores[0] - scores[1])
    found = score_pairs(reward.model, reward.tokenizer, ROWS, batch_size=batch_size, chat=chat)
    assert found.ids == tuple(row.id for row in ROWS)
    assert found.margins.dtype == torch.float32
    torch.testing.assert_close(found.margins, torch.tensor(expected), atol=1e-5, rtol=0)
    assert found.margins.std() > 1e-3


@pytest.mark.parametrize("chat", [True, False])
def test_policy_margins_are_beta_times_the_difference_of_log_ratios(policy, chat):
    def log_likelihood(row, answer):
        text = plain_text(policy.tokenizer, row, answer, chat)
        prompt = row.prompt
        if chat:
            turns = [{"role": "user", "content": row.prompt}]
            prompt = policy.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor(policy.tokenizer(text)["input_ids"])
        start = len(policy.tokenizer(prompt)["input_ids"])
        logs = policy.model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        return sum(logs[at - 1, ids[at]] for at in range(start, len(ids)))

    expected = []
    with torch.no_grad():
        for row in ROWS:
            ours = log_likelihood(row, row.chosen) - log_likelihood(row, row.rejected)
            with policy.model.disable_adapter():
                theirs = log_likelihood(row, row.chosen) - log_likelihood(row, row.rejected)
            expected.append(0.3 * (ours - theirs))
    kwargs = {"beta": 0.3, "batch_size": 4, "chat": chat}
    found = score_policy_pairs(policy.model, policy.tokenizer, ROWS, **kwargs)
    torch.testing.assert_close(found.margins, torch.stack(expected).float(), atol=1e-5, rtol=0)
    other = score_policy_pairs(policy.model, policy.tokenizer, ROWS, reference=tiny_model("llama").model, **kwargs)
    torch.testing.assert_close(other.margins, found.margins, atol=1e-5, rtol=0)
    assert found.margins.abs().min() > 1e-6
    assert (
        score_policy_pairs(policy.model, policy.tokenizer, ROWS, reference=policy.model, **kwargs).margins.abs().max()
        == 0
    )


def test_tokens_are_those_of_trl(reward):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    for chat in (False, True):
        rows = [*ROWS, TURNS] if chat else ROWS
        lines = [row.conversations() if chat else row.columns() for row in rows]
        args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
        host = SimpleNamespace(_tokenizer=reward.tokenizer)
        data = datasets.Dataset.from_list(lines)
        theirs = trl.RewardTrainer._prepare_dataset(host, data, reward.tokenizer, args, "train")
        dpo = trl.DPOTrainer._prepare_dataset(host, data, reward.tokenizer, args, "train")
        for row, line, split in zip(rows, theirs, dpo, strict=True):
            pair = scoring._tokenised("key", row, reward.tokenizer, chat)
            assert (pair.chosen, pair.rejected) == (line["chosen_ids"], line["rejected_ids"])
            start = scoring._prompt_length(pair, reward.tokenizer, chat)
            assert (pair.chosen[:start], pair.chosen[start:]) == (split["prompt_ids"], split["chosen_ids"])
            assert pair.rejected[start:] == split["rejected_ids"]


@pytest.mark.parametrize("kind", ["prepend (Llama 2)", "first (Mistral)", "bytes, offsets trimmed (Llama 3)", "slow"])
@pytest.mark.parametrize("name", ["llama3", "qwen3", "qwen3_5_think", "deepseek_r1_distill", None])
def test_tokens_are_those_of_trl_with_real_kinds_of_tokenizers(kind, name):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizer = TOKENIZERS[kind]()
    tokenizer.chat_template = name and template_of_trl(name)
    row = Preference("1", "no: a+b=", "c", "d")
    line = {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
    if name:
        line = {"prompt": [{"role": "user", "content": row.prompt}]}
        line |= {part: [{"role": "assistant", "content": getattr(row, part)}] for part in ("chosen", "rejected")}
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    host = SimpleNamespace(_tokenizer=tokenizer)
    (split,) = trl.DPOTrainer._prepare_dataset(host, datasets.Dataset.from_list([line]), tokenizer, args, "train")
    pair = scoring._tokenised("key", row, tokenizer, bool(name))
    start = scoring._prompt_length(pair, tokenizer, bool(name))
    assert (pair.chosen[:start], pair.chosen[start:]) == (split["prompt_ids"], split["chosen_ids"])
    assert (pair.rejected[:start], pair.rejected[start:]) == (split["prompt_ids"], split["rejected_ids"])
    counts = [split["prompt_ids"], pair.chosen, pair.rejected]
    assert scoring.pair_lengths(row, tokenizer) == tuple(map(len, counts))
    if name:
        talk = [*line["prompt"], *line["chosen"]]
        assert pair.chosen == tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"]


def test_a_template_that_refuses_a_pair_names_it(reward):
    reward.tokenizer.chat_template = (
        "{% if 'du' in messages[0].content %}{{ raise_exception('not so familiar') }}{% endif %}x"
    )
    with pytest.raises(DataError, match="row 'é': the chat template refuses these messages: not so familiar"):
        score_pairs(reward.model, reward.tokenizer, ROWS)


def test_several_turns_need_a_chat_template(reward):
    with pytest.raises(DataError, match="row 'turns': has a system message, several turns or tools"):
        score_pairs(reward.model, reward.tokenizer, [*ROWS, TURNS], chat=False)


def test_the_chat_template_is_used_where_there_is_one(reward):
    default = score_pairs(reward.model, reward.tokenizer, ROWS).margins
    assert torch.equal(default, score_pairs(reward.model, reward.tokenizer, ROWS, chat=True).margins)
    plain = score_pairs(reward.model, reward.tokenizer, ROWS, chat=False).margins
    assert not torch.allclose(default, plain)
    reward.tokenizer.chat_template = None
    assert torch.equal(plain, score_pairs(reward.model, reward.tokenizer, ROWS).margins)
    with pytest.raises(ModelError, match="no chat template"):
        score_pairs(reward.model, reward.tokenizer, ROWS, chat=True)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "deberta-v2"])
def test_other_architectures(kind):
    opened = tiny_model(kind, task="reward")
    several = score_pairs(opened.model, opened.tokenizer, ROWS, batch_size=5).margins
    torch.testing.assert_close(
        several, score_pairs(opened.model, opened.tokenizer, ROWS, batch_size=1).margins, atol=1e-5, rtol=0
    )


class KilledError(Exception):
    pass


def kill_after(batches):
    left = [batches]

    def progress(done, total):
        left[0] -= 1
        if not left[0]:
            raise KilledError

    return progress


def test_a_killed_run_resumes_with_the_same_margins_and_scores_nothing_twice(reward, tmp_path):
    whole = score_pairs(reward.model, reward.tokenizer, ROWS, batch_size=2)
    in_all = len(reward.calls)
    assert in_all == 7
    cache = tmp_path / "margins.jsonl"
    kwargs = {"batch_size": 2, "cache": cache}
    reward.calls.clear()
    with pytest.raises(KilledError):
        score_pairs(reward.model, reward.tokenizer, ROWS, progress=kill_after(3), **kwargs)
    assert len(reward.calls) == 3
    # The fourth line was being written.
    with cache.open("a") as file:
        file.write('{"store": {"sum": "abc')
    with pytest.raises(KilledError):
        score_pairs(reward.model, reward.tokenizer, ROWS, progress=kill_after(5), **kwargs)
    assert len(reward.calls) == 5
    resumed = score_pairs(reward.model, reward.tokenizer, ROWS, **kwargs)
    assert len(reward.calls) == in_all
    assert torch.equal(resumed.margins, whole.margins)
    again = score_pairs(reward.model, reward.tokenizer, ROWS, **kwargs)
    assert len(reward.calls) == in_all
    assert torch.equal(again.margins, whole.margins)
    assert again.ids == whole.ids


def test_the_cache_is_by_row_and_by_what_scores(reward, policy, tmp_path):
    kwargs = {"batch_size": 100, "cache": tmp_path / "margins.jsonl"}

    def calls(model, tokenizer, rows, count=reward.calls, **more):
        count.clear()
        score_pairs(model, tokenizer, rows, **{**kwargs, **more})
        return len(count)

    assert calls(reward.model, reward.tokenizer, ROWS[1:]) == 1
    assert calls(reward.model, reward.tokenizer, ROWS) == 1, "one new row"
    assert calls(reward.model, reward.tokenizer, list(reversed(ROWS))) == 0
    other = Preference(ROWS[0].id, ROWS[0].prompt, ROWS[0].rejected, ROWS[0].chosen)
    assert calls(reward.model, reward.tokenizer, [other]) == 1, "same id, other label"
    assert calls(reward.model, reward.tokenizer, ROWS, chat=False) == 1
    assert calls(reward.model, reward.tokenizer, ROWS, max_length=500) == 1
    with torch.no_grad():
        reward.model.score.weight.mul_(2)
    assert calls(reward.model, reward.tokenizer, ROWS) == 1, "trained further"
    policy_calls = []
    for beta, expected in ((0.1, 2), (0.1, 0), (0.2, 2)):
        policy.calls.clear()
        score_policy_pairs(policy.model, policy.tokenizer, ROWS, beta=beta, **kwargs)
        policy_calls.append((len(policy.calls), expected))
    assert all(found == expected for found, expected in policy_calls)
    policy.model.add_adapter("second", policy.model.peft_config["default"])
    policy.model.set_adapter("second")
    policy.calls.clear()
    score_policy_pairs(policy.model, policy.tokenizer, ROWS, beta=0.1, **kwargs)
    assert len(policy.calls) == 2, "another adapter is active"

    def again(**more):
        policy.calls.clear()
        score_policy_pairs(policy.model, policy.tokenizer, ROWS, beta=0.1, **kwargs, **more)
        return len(policy.calls)

    assert again() == 0
    layer = next(module for module in policy.model.modules() if hasattr(module, "lora_A"))
    layer.scaling["second"] *= 4
    assert again() == 2, "the same adapter, scaled"
    reference = tiny_model("llama").model
    with policy.model.disable_adapter():
        assert again(reference=reference) == 1
    assert again(reference=reference) == 1, "switched on again"
    assert again(reference=reference) == 0
    policy.model.to(torch.bfloat16)
    assert again(reference=reference) == 1, "in another type"
    policy.model.float()
    assert again(reference=reference) == 1, "rounded"
    with torch.no_grad():
        layer.get_base_layer().weight[1, 1] += 1e-3
    assert again(reference=reference) == 1, "one number of one matrix"
    before = tokenizer_hash(policy.tokenizer)
    policy.tokenizer.add_tokens(["Start"])
    assert tokenizer_hash(policy.tokenizer) != before


@pytest.mark.parametrize("text", ['{"prompt": "p"}', '{"margins": 3}', '{"store": [[1]]}', "id,prompt"], ids=repr)
def test_another_kind_of_file_is_no_cache(reward, tmp_path, text):
    path = tmp_path / "data.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(DataError, match="line 1: not written by a run"):
        score_pairs(reward.model, reward.tokenizer, ROWS, cache=path)
    assert path.read_text() == text + "\n"


def test_over_long_pairs_are_named_and_not_scored(reward, tmp_path):
    long = Preference("too long", "p", "x" * 100, "y")
    late = Preference("long, too", "p", "x", "y" * 100)
    rows = [ROWS[3], long, ROWS[1], late]
    kwargs = {"max_length": 60, "chat": False, "cache": tmp_path / "c.jsonl"}
    found = score_pairs(reward.model, reward.tokenizer, rows, **kwargs)
    assert (found.ids, found.over_long) == (("same start", "é"), ("too long", "long, too"))
    assert len(found.margins) == 2
    fits = len(reward.tokenizer("p" + "x" * 100 + "<eos>")["input_ids"])
    assert score_pairs(reward.model, reward.tokenizer, [long], max_length=fits, chat=False).over_long == ()
    assert score_pairs(reward.model, reward.tokenizer, [long], max_length=fits - 1, chat=False).ids == ()
    reward.calls.clear()
    again = score_pairs(reward.model, reward.tokenizer, rows, **kwargs)
    assert (again.ids, again.over_long) == (found.ids, found.over_long)
    assert not reward.calls


def test_rows_are_a_stream_of_which_little_is_held(reward, monkeypatch):
    monkeypatch.setattr(scoring, "_AHEAD", 3)
    held = weakref.WeakSet()
    most = []

    class Tokens(list):
        __hash__ = object.__hash__

    real = scoring.tokens

    def tokens(*args, **keys):
        made = Tokens(real(*args, **keys))
        held.add(made)
        return made

    monkeypatch.setattr(scoring, "tokens", tokens)
    given = [0]

    def rows():
        for row in read_rows("step-audit:36"):
            given[0] += 1
            yield row

    def progress(done, total):
        gc.collect()
        most.append(len(held))
        assert given[0] - done <= 3 * 4
        assert total == 0

    found = score_pairs(reward.model, reward.tokenizer, rows(), batch_size=4, progress=progress)
    assert len(found.ids) == 36
    assert 0 < max(most) <= 2 * 2 * 3 * 4, "tokens of one window, of two for a moment"


def test_progress_counts_rows(reward):
    seen = []
    score_pairs(reward.model, reward.tokenizer, ROWS, batch_size=5, progress=lambda *at: seen.append(at))
    assert seen == [(5, 13), (10, 13), (13, 13)]


def test_training_mode_and_gradients_are_as_before(reward):
    reward.model.train()
    found = score_pairs(reward.model, reward.tokenizer, ROWS)
    assert not found.margins.requires_grad
    assert reward.model.training


def test_bad_models_and_numbers(reward, policy):
    with pytest.raises(ModelError, match="the model has 2 classes"):
        score_pairs(tiny_model("llama", task="classification").model, reward.tokenizer, ROWS)
    with pytest.raises(ConfigError, match="batch_size: 0 is below 1"):
        score_pairs(reward.model, reward.tokenizer, ROWS, batch_size=0)
    with pytest.raises(ConfigError, match="max_length: 0 is below 1"):
        score_pairs(reward.model, reward.tokenizer, ROWS, max_length=0)
    with pytest.raises(ConfigError, match="beta: 0 is not above 0"):
        score_policy_pairs(policy.model, policy.tokenizer, ROWS, beta=0)
    with pytest.raises(ModelError, match="no adapter to switch off"):
        score_policy_pairs(tiny_model("llama").model, policy.tokenizer, ROWS, beta=0.1)
    with torch.no_grad():
        reward.model.score.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"the margin of row '.*' is not finite"):
        score_pairs(reward.model, reward.tokenizer, ROWS)
    reward.model.config.pad_token_id = None
    with pytest.raises(ModelError, match="no pad token"):
        score_pairs(reward.model, reward.tokenizer, ROWS)


class TestCrossFit:
    ROWS = list(read_rows("step-audit:200:2"))

    def run(self, rows, folds=5):
        trained = []

        def fit(train, fold):
            trained.append({row.id for row in train})
            return fold

        def score(fold, held):
            assert not {row.id for row in held} & trained[fold]
            assert len(held) + len(trained[fold]) == len(rows)
            ids = tuple(row.id for row in reversed(held) if not row.id.endswith("7"))
            margins = torch.tensor([float(id.rsplit("-")[-1]) for id in ids])
            return Scored(ids, margins, tuple(row.id for row in held if row.id.endswith("7")))

        return cross_fit(rows, folds, fit, score), trained

    def test_each_pair_is_scored_by_a_model_that_has_not_seen_it(self):
        found, trained = self.run(self.ROWS)
        assert len(trained) == 5
        assert found.ids == tuple(row.id for row in self.ROWS if not row.id.endswith("7"))
        assert found.margins.tolist() == [float(id.rsplit("-")[-1]) for id in found.ids]
        assert found.over_long == tuple(row.id for row in self.ROWS if row.id.endswith("7"))

    def test_folds_stay_when_rows_come_and_go(self):
        _, trained = self.run(self.ROWS)
        _, fewer = self.run(self.ROWS[:150])
        kept = {row.id for row in self.ROWS[:150]}
        assert [ids & kept for ids in trained] == fewer

    def test_folds_are_even_also_on_the_rows_that_were_not_held_out(self):
        training = [row for row in read_rows("step-audit:2000") if hash_share(row.id) >= 0.5]
        _, trained = self.run(training)
        assert all(0.75 < len(ids) / len(training) < 0.85 for ids in trained)

    def test_the_same_pair_under_another_id_or_label_is_in_the_same_fold(self):
        copies = [Preference(f"copy-{row.id}", row.prompt, row.rejected, row.chosen) for row in self.ROWS]
        _, trained = self.run(self.ROWS + copies)
        for ids in trained:
            assert all((row.id in ids) == (f"copy-{row.id}" in ids) for row in self.ROWS)

    def test_pairs_of_one_prompt_share_a_fold_unless_it_has_more_than_its_share(self):
        rows = [Preference(str(n), f"prompt {n // 4}", str(n), "-") for n in range(200)]
        fold_of = folds_of(rows, 5)
        assert set(fold_of.values()) == set(range(5))
        assert all(len({fold_of[str(n)] for n in range(first, first + 4)}) == 1 for first in range(0, 200, 4))
        few = [Preference(str(n), f"prompt {n % 6}", str(n), "-") for n in range(120)]
        for folds in (2, 5):
            fold_of = folds_of(few, folds)
            assert set(fold_of.values()) == set(range(folds)), "six prompts can fill folds"
            assert all(fold_of[str(n)] == fold_of[str(n % 6)] for n in range(120))
        alone = [Preference(str(n), "the only prompt", str(n // 2), "-") for n in range(200)]
        fold_of = folds_of(alone, 5)
        assert set(fold_of.values()) == set(range(5))
        assert all(fold_of[str(n)] == fold_of[str(n + 1)] for n in range(0, 200, 2)), "equal pairs still do"

    def test_one_model_lives_at_a_time(self):
        class Weights:
            pass

        alive = weakref.WeakSet()

        def fit(train, fold):
            gc.collect()
            assert not alive
            model = Weights()
            alive.add(model)
            return model

        cross_fit(self.ROWS, 3, fit, lambda model, held: Scored(tuple(r.id for r in held), torch.zeros(len(held))))

    def test_bad_input(self):
        with pytest.raises(ConfigError, match="folds: 1 leaves nothing"):
            self.run(self.ROWS, 1)
        with pytest.raises(DataError, match="has none of the 3 rows"):
            cross_fit(self.ROWS[:3], 50, None, None)  # before anything is trained
        with pytest.raises(DataError, match="comes twice"):
            self.run([*self.ROWS, self.ROWS[0]])
