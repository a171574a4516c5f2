"""Stages that steer, and the flags of `generate` that do."""

import json

import pytest
import torch
import yaml
from rich.console import Console

from tenfold import cli, gear, pasta
from tenfold.attend.autopasta.stage import Asked
from tenfold.attend.pasta import steer
from tenfold.attend.pasta.heads import batches_of, margins
from tenfold.attend.pasta.stage import starred
from tenfold.attend.pasta.tasks import items_of
from tenfold.data.read import read_rows
from tenfold.engines.requests import Reply
from tenfold.errors import ConfigError, DataError
from tenfold.evaluate.compare import paired_metric
from tenfold.models import tiny
from tenfold.models.generation import decoding
from tenfold.models.open import open_model
from tenfold.pipeline import run as runner
from tenfold.pipeline.recipe import resolve

QUIET = Console(quiet=True)
TEXT = "The library is on Main Street. It opens at nine in the morning. Cats are not allowed inside."


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(tiny._DECODER, "max_position_embeddings", 2048)
    (tmp_path / "heads.json").write_text(json.dumps({"0": [1], "1": [0, 2]}))
    (tmp_path / "notes.txt").write_text(TEXT)


@pytest.fixture
def tagged(tmp_path):
    rows = [
        {"prompt": f"It is {n}. <mark>Say {n + 1}.</mark> Say", "chosen": f" {n + 1}", "rejected": f" {n}"}
        for n in range(1, 30)
    ]
    path = tmp_path / "tagged.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def execute(*stages, out="run"):
    from pathlib import Path

    return runner.run(resolve({"model": "tiny:llama", "stages": list(stages)}, "test"), Path(out), QUIET)


def test_rows_of_ones_own_are_scored_as_they_are(tagged):
    (summary,) = execute({"use": "pasta", "data": str(tagged), "profile": "heads.json", "batch_size": 7})
    before, marked, after, difference = summary.results
    opened = open_model("tiny:llama")
    batches = batches_of(opened.model, opened.tokenizer, items_of(read_rows(str(tagged))))
    plain = margins(opened.model, batches)
    steered = margins(opened.model, batches, {0: [1], 1: [0, 2]})
    assert before.metric("margin").value == pytest.approx(float(plain.mean()), abs=1e-5)
    assert after.metric("accuracy").value == pytest.approx(float((steered > 0).float().mean()))
    assert difference.metric("margin_difference").value == pytest.approx(float((steered - plain).mean()), abs=1e-5)
    assert marked.subject == "marks in the text"
    assert before.metric("accuracy").count == 29


def test_heads_are_found_and_scored_on_different_rows(tagged):
    """The profile holds rows out, and the stage after it scores only those."""
    search = {"use": "profile", "tasks": [], "data": str(tagged), "holdout": 0.4, "sizes": [1], "min_fluency": 0}
    plan = resolve({"model": "tiny:llama", "stages": [search, {"use": "pasta"}]}, "test")
    assert plan.steps[1].config.split == "held-out"
    profile, pasta = execute(search, {"use": "pasta"})
    ranked, checked = profile.attached["tasks"], pasta.results[0].metric("accuracy").count
    assert ranked == ["data"]
    assert checked == len(read_rows(str(tagged)).split(0.4)[1])


def test_rows_without_a_tag_are_refused_before_the_model_is_opened(tagged, monkeypatch):
    tagged.write_text(tagged.read_text() + json.dumps({"prompt": "none", "chosen": "a", "rejected": "b"}) + "\n")
    monkeypatch.setattr("tenfold.models.reference.ModelRef.open", lambda *_, **__: pytest.fail("opened"))
    for stage in ({"use": "pasta"}, {"use": "profile"}):
        with pytest.raises(DataError, match="no <mark>"):
            execute({**stage, "data": str(tagged)})
    with pytest.raises(ConfigError, match="preference"):
        execute({"use": "pasta", "data": str(_questions(tagged.parent))})
    with pytest.raises(ConfigError, match="question"):
        execute({"use": "autopasta", "data": str(tagged)})


def _questions(folder, rows=3):
    path = folder / "questions.jsonl"
    row = {"question": "When does it open?", "context": ["Cats are out.", TEXT, "Dogs are in."], "answers": ["nine"]}
    path.write_text("".join(json.dumps({"id": str(n), **row}) + "\n" for n in range(rows)))
    return path


def test_every_mode_answers_the_same_questions(tmp_path):
    stage = {
        "use": "autopasta",
        "profile": "heads.json",
        "max_answer_tokens": 2,
        "max_quote_tokens": 2,
        "batch_size": 2,
    }
    modes = ["direct", "iterative", "autopasta", "gold", "whole"]
    (summary,) = execute({**stage, "data": str(_questions(tmp_path)), "modes": modes})
    subjects = {result.subject: result for result in summary.results}
    assert set(subjects) == {"before", "iterative", "after", "gold", "whole", "after - before"}
    probabilities = {name: result.metric("probability").value for name, result in subjects.items() if " - " not in name}
    assert probabilities["gold"] != probabilities["before"] != probabilities["whole"]
    assert subjects["gold"].metric("evidence").value == 1
    assert subjects["gold"].metric("probability").count == 3


def test_a_resumed_run_tells_of_its_packed_cache(tmp_path, monkeypatch):
    """All was measured when the run was killed: what the caches came to is told by the one that goes on."""
    from tenfold.attend.autopasta import stage as module

    stage = {"use": "autopasta", "profile": "heads.json", "max_answer_tokens": 2, "max_quote_tokens": 2}
    stage |= {"data": str(_questions(tmp_path)), "modes": ["direct", "gold"], "kv": "gear:4,buffer=16,kernel=torch"}
    right = execute(stage, out="whole")[0].notes
    assert any("tokens are packed" in note for note in right)
    table = module._table

    def killed(found):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_table", killed)
    with pytest.raises(KeyboardInterrupt):
        execute(stage)
    monkeypatch.setattr(module, "_table", table)
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("measured again"))
    assert execute(stage)[0].notes == right


def test_passages_without_an_answer_go_first(tmp_path):
    from tenfold.attend.autopasta.answering import AutoPasta
    from tenfold.data.rows import Question

    opened = open_model("tiny:llama")
    ask = AutoPasta(opened.model, opened.tokenizer, heads={1: [0]})
    row = Question("1", "When?", ("A. " * 30, "It opens at nine. It is big.", "B. " * 30), ("nine",))
    bare = len(opened.tokenizer(ask.identifying(row.question, row.context[1]).text)["input_ids"])
    kept = Asked.of(row, ask, 10_000)
    assert kept.dropped == 0
    assert [kept.context[lo:hi] for lo, hi in kept.gold] == ["It opens at nine."]
    one = Asked.of(row, ask, bare + 100)
    assert (one.dropped, one.context.startswith("A.")) == (1, True)
    assert [one.context[lo:hi] for lo, hi in one.gold] == ["It opens at nine."]
    assert Asked.of(row, ask, bare).context == row.context[1]
    with pytest.raises(DataError, match="longer than"):
        Asked.of(row, ask, bare - 1)


def test_emphasised_generation_shows_both_texts(tmp_path):
    keys = {"prompts": ["Be brief. Why? Be brief.", "Nothing here"], "emphasise": ["Be brief."], "max_new_tokens": 5}
    (summary,) = execute({"use": "generate", "profile": "heads.json", **keys})
    first, second = summary.samples
    assert set(first.outputs) == {"model", "model, emphasised"}
    assert second.outputs["model"] == second.outputs["model, emphasised"]  # nothing of it is marked


def test_emphasis_and_a_packed_cache_go_together(tmp_path, monkeypatch):
    """What is emphasised is also continued on the packed cache, as it is from Python."""
    from tenfold.engines import session

    made = []
    note = session.cache_note
    monkeypatch.setattr(session, "cache_note", lambda kv, caches: (made.extend(caches), note(kv, caches))[1])
    prompt, kv = "It was red, she said, and nobody believed that the mill had ever been painted.", "gear:2,buffer=16"
    keys = {"prompts": [prompt], "emphasise": ["red"], "max_new_tokens": 20, "alpha": 0.001, "chat": "no"}
    (summary,) = execute({"use": "generate", "profile": "heads.json", "kv": kv, **keys})
    (sample,) = summary.samples
    names = ["model", "model, emphasised", f"model, {kv}", f"model, emphasised, {kv}"]
    assert set(sample.outputs) == set(names)
    assert [cache.report()["packed tokens"] > 60 for cache in made]

    opened = open_model("tiny:llama")
    marks = pasta.encode(opened.tokenizer, [pasta.from_substrings(prompt, ["red"], "all")])
    config = decoding(opened.model, opened.tokenizer, 20)
    steered = pasta.steer(opened.model, marks, heads={0: [1], 1: [0, 2]}, alpha=0.001)
    with gear.attach(opened.model, kv) as cache, steered:
        ids = opened.model.generate(**marks.inputs, past_key_values=cache, generation_config=config)
    text = opened.tokenizer.decode(ids[0, marks.inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert sample.outputs[names[3]] == text
    assert text != sample.outputs[names[2]]  # the same cache without emphasis


def test_the_dose_of_chats_is_another_one_than_that_of_completions(monkeypatch):
    """`auto` is gentle in a chat; the paper's dose, numbers and a target stay reachable from recipes and flags."""
    seen = []

    def watched(model, marks, **settings):
        seen.append({key: settings[key] for key in ("alpha", "target_mass") if key in settings})
        return steer(model, marks, **settings)

    monkeypatch.setattr("tenfold.engines.session.steer", watched)
    keys = {"use": "generate", "profile": "heads.json", "prompts": ["Be brief."], "emphasise": ["brief"]}
    cases = [{}, {"chat": "no"}, {"alpha": "paper"}, {"alpha": 0.2}, {"target_mass": 0.4}]
    for number, case in enumerate(cases):
        execute({**keys, "max_new_tokens": 2, **case}, out=f"run{number}")
    assert seen == [{"target_mass": 0.15}, {"alpha": 0.01}, {"alpha": 0.01}, {"alpha": 0.2}, {"target_mass": 0.4}]
    seen.clear()
    execute({"use": "pasta", "profile": "heads.json", "prompts": ["<mark>b</mark>"], "max_new_tokens": 2}, out="last")
    # What would be scored; the prompt as it is written, and as it is looked at.
    assert seen == [{"alpha": 0.01}, {"target_mass": 0.15}, {"target_mass": 0.15}]
    seen.clear()
    keys = {"profile": "heads.json", "prompts": ["<mark>b</mark>"], "max_new_tokens": 2, "keep_sink": True}
    execute({"use": "pasta", **keys}, out="sink")
    assert seen == [{"alpha": 0.01}, {"alpha": 0.3}, {"alpha": 0.3}]  # a target mass has no sink to keep


def test_a_steered_text_that_goes_round_in_circles_is_noted(monkeypatch):
    replies = [Reply("It is noon. " * 4), Reply("Fine.")]
    monkeypatch.setattr("tenfold.engines.session.Session.generate", lambda *_: replies)
    keys = {"prompts": ["Be brief.", "Be kind."], "emphasise": ["Be"], "max_new_tokens": 2}
    (summary,) = execute({"use": "generate", "profile": "heads.json", **keys})
    assert summary.notes[0].startswith("model, the steered text of prompt 1 repeats itself; a gentler dose")
    assert len(summary.notes) == 1


def test_an_answer_without_evidence_says_so(monkeypatch):
    from tenfold.attend.autopasta.answering import AutoPasta

    quote = "The film was shot in the north of the country and it is one of the best."
    monkeypatch.setattr(AutoPasta, "_identify", lambda self, rows: ([quote] * len(rows), None))
    keys = {"context": "notes.txt", "question": "When does it open?", "find_evidence": True, "max_new_tokens": 3}
    ((sample,),) = (summary.samples for summary in execute({"use": "generate", "profile": "heads.json", **keys}))
    assert "no sentence supports" in sample.outputs["model, evidence"]
    assert sample.outputs["model, with evidence"] == sample.outputs["model"]


def test_a_profile_goes_to_the_stages_that_steer(tmp_path):
    """A resolved recipe can be read again, also where its defaults are spelled out for a stage that steers nothing."""
    emphasis = {"prompts": ["Be brief."], "emphasise": ["brief"]}
    stages = [{"use": "profile"}, {"use": "generate"}, {"use": "generate", **emphasis}, {"use": "autopasta"}]
    plan = resolve({"model": "tiny:llama", "stages": stages}, "test")
    assert [step.config.profile for step in plan.steps[1:]] == [None, "${01-profile.profile}", "${01-profile.profile}"]
    assert resolve(yaml.safe_load(plan.to_yaml()), "test").steps == plan.steps


def test_the_answer_from_a_file_shows_its_evidence(tmp_path, monkeypatch):
    from tenfold.attend.autopasta.answering import AutoPasta

    quote = "It opens at nine in the morning."
    monkeypatch.setattr(AutoPasta, "_identify", lambda self, rows: ([quote] * len(rows), None))
    keys = {"context": "notes.txt", "question": "When does it open?", "find_evidence": True, "max_new_tokens": 3}
    stage = {"use": "generate", "profile": "heads.json", **keys}
    (summary,) = execute(stage)
    (sample,) = summary.samples
    start = TEXT.index(quote)
    assert f"{quote} [characters {start} to {start + len(quote)}, exact, 1.00]" in sample.outputs["model, evidence"]
    assert set(sample.outputs) == {"model", "model, with evidence", "model, evidence"}
    first = summary.fingerprint
    (tmp_path / "notes.txt").write_text(TEXT.replace("nine", "ten"))
    assert execute(stage)[0].fingerprint != first


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--context", "nowhere.txt", "--question", "Who?"], "nowhere.txt"),
        (["--context", "notes.txt"], "belong together"),
        (["--find-evidence"], "context"),
        (["--prompts", "Hello", "--emphasise", "Bye"], "Bye"),
        (["--context", "empty.txt", "--question", "Who?"], "empty"),
        (["--context", "notes.txt", "--question", " "], "blank"),
        (["--context", "notes.txt", "--question", "Who?", "--find-evidence", "--kv", "gear:5"], "gear:5"),
        (["--prompts", "Hello", "--kv", "gear:5"], "gear:5"),
        (["--prompts", "Hello", "--emphasise", "Hello", "--profile", "nowhere.json"], "nowhere.json"),
        (["--prompts", "Hello", "--alpha", "0.1"], "alpha: 0.1, but nothing is emphasised"),
        (["--prompts", "Hello", "--profile", "heads.json"], "profile: 'heads.json', but nothing is emphasised"),
        (["--context", "notes.txt", "--question", "Who?", "--alpha", "0.1"], "alpha: 0.1, but nothing is emphasised"),
    ],
)
def test_bad_flags_of_generate_are_one_clear_error(flags, message, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text(" \n")
    assert cli.main(["generate", "tiny:llama", *flags, "--out", "run"]) == 2
    found = capsys.readouterr()
    assert message in found.err + found.out
    assert "Traceback" not in found.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "prompts"),
        (["--prompts", "no tag"], "<mark>"),
        (["--prompts", "a <mark>b"], "not closed"),
        (["--prompts", "<mark>b</mark>", "--profile", "nonexistent"], "nonexistent"),
        (["--prompts", "<mark>b</mark>"], "profile"),  # the embedded model's profile on another model
        (["--prompts", "<mark>b</mark>", "--profile", "heads.json", "--alpha", "-1"], "alpha: must be a number of 0"),
        (["--prompts", "<mark>b</mark>", "--alpha", "0.1", "--target-mass", "0.3"], "takes the place of alpha"),
        (["--prompts", "<mark>b</mark>", "--target-mass", "1"], "--target-mass: must be below"),
        (["--prompts", "<mark>b</mark>", "--profile", "list.json"], "a list instead of a dictionary"),
    ],
)
def test_bad_flags_of_steer_are_one_clear_error(flags, message, tmp_path, capsys):
    (tmp_path / "list.json").write_text("[1, 2]")
    assert cli.main(["steer", "tiny:llama", *flags, "--out", "run"]) == 2
    found = capsys.readouterr().err
    assert message in found
    assert "  -> " in found
    assert "validation error" not in found


def test_a_first_word_that_is_no_method_is_named(capsys):
    assert cli.main(["steer", "profil", "tiny:llama"]) == 2
    assert "unknown method 'profil' of steer; did you mean 'profile'?\n  -> methods: pasta" in capsys.readouterr().err


def test_the_method_may_be_the_first_word(monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "_execute", lambda plan, out: seen.append(plan) or 0)
    assert cli.main(["steer", "profile", "tiny:llama", "--samples", "5"]) == 0
    assert cli.main(["steer", "tiny:llama", "--method", "profile", "--samples", "5"]) == 0
    assert seen[0].to_yaml() == seen[1].to_yaml()
    assert seen[0].steps[0].name == "profile"


def test_stars_stand_where_marks_were(tagged):
    item = items_of(read_rows(str(tagged)))[0]
    plain = starred(item)
    assert plain.prompt.text.replace("*", "") == item.prompt.text
    assert plain.prompt.text.count("*") == 2
    assert not plain.prompt.spans


def test_paired_intervals_are_those_of_students_t():
    found = paired_metric("x", torch.tensor([1.0, 2.0, 4.0, 5.0], dtype=torch.float64))
    # mean 3, sd 1.8257, t(3) = 3.1824
    assert found.interval == pytest.approx((0.0949, 5.9051), abs=1e-3)
