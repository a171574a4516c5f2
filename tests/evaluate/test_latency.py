"""Timed calls: what is counted, what is refused."""

import itertools

import pytest
import torch

from tenfold import fpx
from tenfold.errors import ConfigError, ModelError
from tenfold.evaluate.latency import time_calls
from tenfold.models.tiny import tiny_model


def test_every_prompt_with_every_answer_and_the_tokens_that_were_asked_for():
    model, read = tiny_model("llama").model, []
    model.register_forward_pre_hook(lambda _, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    calls = time_calls(model, (1, 8), (0, 3, 1), rounds=2)
    assert read == [1, 1, 1, 1, 8, 1, 1, 1] * 3  # one round to warm up
    assert [(call.n_in, call.n_out) for call in calls] == [(n_in, n_out) for n_in in (1, 8) for n_out in (0, 1, 3)] * 2
    for shorter, longer in itertools.pairwise(calls):
        assert shorter.seconds > 0
        assert longer.n_out == 0 or shorter.seconds < longer.seconds


def test_what_cannot_be_timed_is_refused():
    with pytest.raises(ModelError, match="cache"):
        time_calls(tiny_model("deberta-v2").model)
    with pytest.raises(ModelError, match="cache"):
        time_calls(tiny_model("t5").model)
    model = tiny_model("llama").model
    fpx.apply(model, fpx.plan(model, [torch.arange(6, 40)], budget="6bits"))
    with pytest.raises(ConfigError, match="latency: the model simulates"):
        time_calls(model)
