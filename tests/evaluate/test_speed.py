"""Speed: what is run, how often, in which order, and what is counted."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from tenfold.errors import ConfigError
from tenfold.evaluate.speed import quantile, speed
from tenfold.models.tiny import tiny_model


def test_models_take_turns_and_every_step_is_counted(model, tokenizer):
    order = []

    def enter(name):
        @contextmanager
        def context():
            order.append(name)
            yield

        return context

    models = {"before": (model, enter("before")), "after": (model, enter("after"))}
    before, after = speed(models, tokenizer, prompt_tokens=20, new_tokens=4, repeats=3, warmup=1, batch_size=2)
    assert order == ["before", "after", "after", "before"] * 2
    assert (before.subject, after.subject) == ("before", "after")
    assert before.metric("decode").count == 3 * 3
    assert before.metric("prefill").count == 3
    # 2 layers x keys and values x 2 heads x 16 x float32, for 2 rows of 20 + 3 tokens: the last is never fed back.
    assert before.metric("cache").value == 2 * 2 * 2 * 16 * 4 * 2 * 23
    assert all(metric.value > 0 for metric in before.metrics)
    assert before.metric("decode_p95").value >= before.metric("decode").value


def test_a_delay_shows_where_it_happens(model, tokenizer):
    import time

    def slow(module, args, kwargs):
        time.sleep(0.02 if kwargs["input_ids"].shape[1] == 1 else 0.1)

    handle = model.register_forward_pre_hook(slow, with_kwargs=True)
    (found,) = speed({"slow": model}, tokenizer, prompt_tokens=16, new_tokens=5, repeats=2)
    handle.remove()
    assert found.metric("time_to_first_token").value >= 100
    assert found.metric("prefill").value <= 160
    assert found.metric("decode").value >= 20
    assert found.metric("generation").value <= 5 / 0.18


def test_an_adapter_can_be_switched_off_within_one_model(tokenizer):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model().model, LoraConfig(r=2, target_modules=["q_proj"]))
    seen = []
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda *_: seen.append(layer.disable_adapters))
    speed(
        {"before": (model, model.disable_adapter), "after": model}, tokenizer, prompt_tokens=8, new_tokens=2, repeats=1
    )
    assert set(seen) == {True, False}
    assert not layer.disable_adapters


def test_gradients_and_modes_are_left_alone(model, tokenizer):
    model.train()
    speed({"model": model}, tokenizer, prompt_tokens=4, new_tokens=2, repeats=1, warmup=0)
    assert model.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens", "repeats", "batch_size"])
def test_impossible_settings(model, tokenizer, name):
    with pytest.raises(ConfigError, match=name):
        speed({"model": model}, tokenizer, **{name: 0})


def test_quantile_agrees_with_torch():
    values = sorted(torch.rand(17, generator=torch.Generator().manual_seed(0)).double().tolist())
    for share in (0.0, 0.5, 0.95, 1.0):
        expected = torch.tensor(values, dtype=torch.float64).quantile(share).item()
        assert quantile(values, share) == pytest.approx(expected)


def test_the_interval_of_a_few_repeats_is_students(model, tokenizer):
    (found,) = speed({"model": model}, tokenizer, prompt_tokens=8, new_tokens=3, repeats=3)
    metric = found.metric("prefill")
    low, high = metric.interval
    assert (high - low) / 2 == pytest.approx(4.302653 * metric.stderr, rel=1e-5)  # t(2) at 97.5 %
    (once,) = speed({"model": model}, tokenizer, prompt_tokens=8, new_tokens=3, repeats=1)
    assert once.metric("prefill").interval is None
