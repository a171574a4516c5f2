"""Tiny models behave like real ones and disturb nothing."""

from __future__ import annotations

import pytest
import torch

from tenfold.errors import ConfigError, ModelError
from tenfold.models.tiny import tiny_identity, tiny_model, tiny_tokenizer

KINDS = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2", "t5", "deberta-v2"]


@pytest.mark.parametrize("kind", KINDS)
def test_forward_with_padding(kind):
    opened = tiny_model(kind)
    batch = opened.tokenizer(["a longer text", "short"], padding=True, return_tensors="pt")
    if kind == "t5":
        batch["labels"] = batch["input_ids"]
    logits = opened.model(**batch).logits
    assert logits.shape[0] == 2
    assert torch.isfinite(logits).all()


def test_same_seed_same_weights_and_the_global_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (tiny_model("llama", seed=seed).model for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_identity_tells_models_apart():
    hashes = {tiny_identity("llama"), tiny_identity("llama", seed=1), tiny_identity("llama", num_hidden_layers=3)}
    assert len(hashes) == 3


@pytest.mark.parametrize("text", ["plain", "naïve 漢字 🙂", "  spaces\n\ttabs ", ""])
def test_tokenizer_round_trips(text):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_chat_template():
    tokenizer = tiny_tokenizer()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(text)["input_ids"].count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2


def test_generation():
    opened = tiny_model("qwen3")
    batch = opened.tokenizer("hello", return_tensors="pt")
    assert opened.model.generate(**batch, max_new_tokens=3, do_sample=False).shape[1] <= 8


def test_reward_and_classification_heads():
    assert tiny_model("llama", task="reward").model.config.num_labels == 1
    assert tiny_model("gpt2", task="classification", num_labels=5).model.score.out_features == 5


def test_wrong_kind_and_task():
    with pytest.raises(ConfigError, match="give one of: llama"):
        tiny_model("lama")
    with pytest.raises(ConfigError, match="unknown task"):
        tiny_model("llama", task="casual")
    with pytest.raises(ModelError, match="task='seq2seq'"):
        tiny_model("t5", task="causal")
