"""The stage `evaluate` on models that keep no keys and values."""

import pytest
from rich.console import Console

from tenfold.models.tiny import tiny_tokenizer
from tenfold.pipeline import run as runner
from tenfold.pipeline.recipe import resolve


@pytest.fixture
def mamba(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    tokenizer = tiny_tokenizer()
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=32, state_size=4, num_hidden_layers=2, time_step_rank=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    return tmp_path / "mamba"


def test_mamba_keeps_its_perplexity_and_a_note_says_what_is_left_out(mamba, number_rows, tmp_path):
    keys = {"prompt_tokens": 16, "new_tokens": 3, "repeats": 2, "limit": 8}
    stage = {"use": "evaluate", "data": str(number_rows), "tasks": ["perplexity", "speed", "memory"], **keys}
    plan = resolve({"model": str(mamba), "stages": [stage]}, "test")
    (summary,) = runner.run(plan, tmp_path / "run", Console(quiet=True))
    found = {result.task: {metric.name for metric in result.metrics} for result in summary.results}
    assert "perplexity" in found["perplexity"]
    assert found["speed"] == {"prefill", "time_to_first_token"}
    assert found["memory"] == {"weights", "prefill_growth"}
    assert [note for note in summary.notes if "keeps no past_key_values" in note]
