"""Memory: growth that is known beforehand, and bytes counted storage by storage."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tenfold.evaluate.memory import memory
from tenfold.evaluate.speed import speed
from tenfold.models import memory as module
from tenfold.models.memory import measure_growth, peak_growth, stored_bytes, weight_bytes

MIB = 2**20


@pytest.fixture(params=["kernel", "sampled"])
def method(request, monkeypatch):
    """Both ways to measure."""
    if request.param == "sampled":
        monkeypatch.setattr(module, "_reset_high_water_mark", lambda: False)
    elif sys.platform != "linux":
        pytest.skip("the kernel's high-water mark exists on Linux only")
    return {"kernel": "VmHWM", "sampled": "sampled"}[request.param]


def busy(mib: int) -> None:
    """Hold this much for long enough that a sampler sees it."""
    import time

    block = torch.ones(mib, MIB // 4)
    time.sleep(0.05)
    del block


def test_growth_is_the_peak_and_not_what_remains(method):
    found = peak_growth(lambda: busy(96))
    assert found.method == method
    assert 90 * MIB < found.growth < 120 * MIB


def test_earlier_peaks_and_freed_memory_do_not_count(method):
    busy(200)
    many_small = [torch.ones(MIB // 64) for _ in range(1000)]
    del many_small
    found = peak_growth(lambda: busy(64))
    assert 58 * MIB < found.growth < 90 * MIB


def test_what_stays_counts_too(method):
    kept = []
    with measure_growth() as found:
        kept.append(torch.ones(48, MIB // 4))
    assert 44 * MIB < found.growth < 80 * MIB


def test_weights_count_tied_parameters_once(model):
    expected = sum(p.numel() * p.element_size() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert weight_bytes(model) == expected + buffers
    before = weight_bytes(model)
    model.lm_head.weight = model.model.embed_tokens.weight
    assert weight_bytes(model) == before - model.lm_head.weight.numel() * 4


def test_cache_bytes_of_dynamic_and_static_caches(model):
    ids = torch.arange(10)[None]
    with torch.no_grad():
        dynamic = model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True).past_key_values
        static = StaticCache(config=model.config, max_cache_len=64)
        model(input_ids=ids, past_key_values=static, use_cache=True)
    per_token = 2 * 2 * 2 * 16 * 4
    assert stored_bytes(dynamic) == 10 * per_token
    assert 64 * per_token <= stored_bytes(static) <= 64 * per_token + 64


def test_stored_bytes_follow_views_cycles_and_nested_objects(model):
    class Layer:
        def __init__(self):
            self.parts = [(torch.zeros(3), {"scale": torch.zeros(2, dtype=torch.float16)})]
            self.owner, self.model = self, model

    whole = torch.zeros(1000)
    layer = Layer()
    layer.tail = whole[-1:]
    assert stored_bytes(layer) == 12 + 4 + 4000
    assert stored_bytes([whole, whole.view(10, 100)]) == 4000
    assert stored_bytes(None) == 0


def test_a_model_that_takes_no_cache_has_the_other_figures(tokenizer):
    import transformers as hf

    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2}
    griffin = {"intermediate_size": 64, "num_attention_heads": 4, "lru_width": 32, "head_dim": 8}
    gpt = {"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    models = [
        hf.MambaForCausalLM(hf.MambaConfig(**size, state_size=4, time_step_rank=4)),
        hf.RwkvForCausalLM(hf.RwkvConfig(**size, attention_hidden_size=32, context_length=64)),
        hf.RecurrentGemmaForCausalLM(hf.RecurrentGemmaConfig(**{**size, "num_hidden_layers": 3}, **griffin)),
        hf.OpenAIGPTLMHeadModel(hf.OpenAIGPTConfig(**gpt)),
    ]
    for model in models:
        found = memory(model, tokenizer, tokens=32)
        assert [metric.name for metric in found.metrics] == ["weights", "prefill_growth"]
        assert found.metric("weights").value == weight_bytes(model)
        (found,) = speed({"model": model}, tokenizer, prompt_tokens=16, new_tokens=3, repeats=2)
        assert [metric.name for metric in found.metrics] == ["prefill", "time_to_first_token"]
        assert found.settings["repeats"] == 2


def test_hybrids_keep_states_beside_keys_and_all_of_them_count(tokenizer):
    from transformers import Lfm2Config, Lfm2ForCausalLM

    config = Lfm2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, conv_L_cache=3, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    found = memory(Lfm2ForCausalLM(config).eval(), tokenizer, tokens=64)
    # Keys and values of 2 heads of 8 channels, and a state of 32 channels of 3 tokens, in float32.
    assert found.metric("cache").value * 64 == 64 * 2 * 2 * 8 * 4 + 32 * 3 * 4


def test_memory_reports_weights_cache_and_growth(model, tokenizer):
    found = memory(model, tokenizer, tokens=128, batch_size=2)
    assert found.metric("weights").value == weight_bytes(model)
    assert found.metric("cache").value == 2 * 2 * 2 * 16 * 4
    assert found.metric("prefill_growth").kind == "memory"
    assert found.settings["measured_by"] in ("VmHWM", "sampled")
