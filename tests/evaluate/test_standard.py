"""Standard tasks through lm-evaluation-harness, offline, on a task of our own."""

from __future__ import annotations

import builtins
import json

import pytest
import torch

from tenfold.data.rows import Choice
from tenfold.engines.session import Session
from tenfold.errors import ConfigError, DataError, MissingDependencyError
from tenfold.evaluate.choice import multiple_choice
from tenfold.evaluate.standard import lm_eval_task

TASK = """
task: tenfold_toy
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A task folder; the harness's own 10,000 task files, which take seconds to list, are left out."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'tenfold[eval]'")
    import lm_eval.tasks

    monkeypatch.setattr(
        lm_eval.tasks.TaskManager.__init__,
        "__defaults__",
        tuple(False if value is True else value for value in lm_eval.tasks.TaskManager.__init__.__defaults__),
    )
    docs = [{"question": f"The sky {i} is", "choices": ["blue", "a fish"], "answer": i % 2} for i in range(5)]
    (tmp_path / "data.json").write_text(json.dumps(docs))
    (tmp_path / "toy.yaml").write_text(TASK.format(data=tmp_path / "data.json"))
    (tmp_path / "gone.yaml").write_text(
        TASK.format(data=tmp_path / "no.json").replace("tenfold_toy", "tenfold_gone"),
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return str(tmp_path)


def test_agrees_with_our_own_multiple_choice(folder, model, tokenizer):
    model.train()
    tokenizer.pad_token = None
    state = torch.random.get_rng_state()
    (found,) = lm_eval_task(Session(model, tokenizer, batch_size=2), "tenfold_toy", task_folder=folder, subject="after")
    items = [Choice(str(i), f"The sky {i} is", ("blue", "a fish"), i % 2) for i in range(5)]
    ours = multiple_choice(model, tokenizer, items).result
    for theirs, name in (("acc", "accuracy"), ("acc_norm", "accuracy_normalised")):
        metric = found.metric(theirs)
        assert metric.value == pytest.approx(ours.metric(name).value)
        assert metric.stderr == pytest.approx(ours.metric(name).stderr)
        assert (metric.count, metric.better) == (5, "higher")
    assert (found.task, found.subject) == ("lm_eval:tenfold_toy", "after")
    assert model.training
    assert tokenizer.pad_token is None
    assert torch.equal(torch.random.get_rng_state(), state)


def test_limit(folder, model, tokenizer):
    (found,) = lm_eval_task(Session(model, tokenizer), "tenfold_toy", task_folder=folder, limit=2)
    assert found.metric("acc").count == 2


def test_unknown_task_and_missing_data(folder, model, tokenizer):
    with pytest.raises(ConfigError, match="did you mean lm_eval:tenfold_toy"):
        lm_eval_task(Session(model, tokenizer), "tenfold_tyo", task_folder=folder)
    with pytest.raises(DataError, match="lm_eval:tenfold_gone: its data cannot be loaded"):
        lm_eval_task(Session(model, tokenizer), "tenfold_gone", task_folder=folder)


def test_without_the_harness_the_remedy_is_one_command(monkeypatch, model, tokenizer):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("lm_eval"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependencyError, match=r"pip install 'tenfold\[eval\]'"):
        lm_eval_task(Session(model, tokenizer), "arc_easy")
