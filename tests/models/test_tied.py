"""Adapters on one of two layers that share a weight: merged, saved and opened with the logits from before."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BertConfig, RobertaConfig

from tenfold import adalora
from tenfold.adapt import lora
from tenfold.config.adalora import AdaLoraConfig
from tenfold.config.lora import LoraConfig
from tenfold.errors import ModelError
from tenfold.models.export import merge, save_adapter, save_model
from tenfold.models.open import open_model
from tenfold.models.tied import untie
from tenfold.models.tiny import tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT's own, where a test attaches or saves without tenfold.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

ADAPTERS = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "both, tied by PEFT": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "copies of both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "copy of the head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [7, 104]},
}


def tied(kind="llama"):
    return tiny_model(kind, tie_word_embeddings=True) if kind == "llama" else tiny_model(kind)


def logits(model, tokenizer):
    with torch.no_grad():
        inputs = tokenizer("hello world", return_tensors="pt")
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"]
        return model(**inputs).logits


def moved(model):
    """The model with random numbers added to all that an adapter trains."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture
def base(tmp_path):
    opened = tied()
    return save_model(opened.model, opened.tokenizer, tmp_path / "base")


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_made_with_peft(base, tmp_path, name):
    opened = open_model(base, device="cpu")
    made = moved(peft.get_peft_model(opened.model, peft.LoraConfig(task_type="CAUSAL_LM", **ADAPTERS[name])))
    expected = logits(made, opened.tokenizer)
    with made.disable_adapter():
        assert not torch.allclose(logits(made, opened.tokenizer), expected, atol=1e-2)
    made.save_pretrained(tmp_path / "adapter")

    found = open_model(tmp_path / "adapter", device="cpu")
    assert torch.equal(logits(found.model, found.tokenizer), expected)
    merged = merge(found.model)
    folder = save_model(merged, found.tokenizer, tmp_path / "merged")
    by_peft = open_model(tmp_path / "adapter", device="cpu").model.merge_and_unload()
    never_ours = merge(made)
    for model in (merged, open_model(folder, device="cpu").model, by_peft, never_ours):
        torch.testing.assert_close(logits(model, opened.tokenizer), expected, atol=1e-5, rtol=1e-5)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(stock, opened.tokenizer), expected, atol=1e-5, rtol=1e-5)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is (name == "tokens")


@pytest.mark.parametrize("targets", [("lm_head",), ("q", "head"), ("all-linear",)])
@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_an_adapter_of_ours(base, tmp_path, method, targets):
    """Also another on top of it: the first is merged when the second is trained, and when it is opened."""
    opened = open_model(base, device="cpu")
    if method == "lora":
        model = moved(lora.attach(opened.model, LoraConfig(rank=2, targets=targets)))
        folder = save_adapter(model, opened.tokenizer, tmp_path / "one", base=str(base))
    else:
        # As many triplets as the budget from the start: nothing is left out of the export.
        handle = adalora.attach(opened.model, AdaLoraConfig(rank=2, initial_rank=2, targets=targets, steps=10))
        model = moved(handle.model)
        handle.controller.trained = True
        folder = handle.export(tmp_path / "one", base=str(base))
    expected = logits(model, opened.tokenizer)
    again = open_model(folder, device="cpu")
    torch.testing.assert_close(logits(again.model, opened.tokenizer), expected, atol=1e-5, rtol=1e-5)
    second = moved(lora.attach(merge(again.model), LoraConfig(rank=2, targets=targets)))
    save_adapter(second, opened.tokenizer, tmp_path / "two", base=str(folder))
    torch.testing.assert_close(
        logits(merge(open_model(tmp_path / "two", device="cpu").model), opened.tokenizer),
        logits(second, opened.tokenizer),
        atol=1e-5,
        rtol=1e-5,
    )
    by_peft = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(by_peft, opened.tokenizer), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "gemma3"])
def test_other_names_of_the_tied_pair(tmp_path, kind):
    opened = tied(kind)
    before = logits(opened.model, opened.tokenizer)
    model = moved(lora.attach(opened.model, LoraConfig(rank=2, targets=("lm_head",))))
    expected = logits(model, opened.tokenizer)
    assert not torch.allclose(expected, before, atol=1e-2)
    folder = save_model(merge(model), opened.tokenizer, tmp_path / "merged")
    torch.testing.assert_close(
        logits(open_model(folder, device="cpu").model, opened.tokenizer), expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("keys", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_an_encoder_decoder_keeps_what_t5_scales_its_output_by(tmp_path, keys):
    """transformers 5.23 reads ``tie_word_embeddings: false`` of T5 as "do not scale", and ties what is equal anyway."""
    opened = tied("t5")
    config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", **{"target_modules": ["q"], **keys})
    model = moved(peft.get_peft_model(opened.model, config))
    expected = logits(model, opened.tokenizer)
    folder = save_model(merge(model), opened.tokenizer, tmp_path / "merged")
    for again in (open_model(folder, "seq2seq", device="cpu").model, AutoModelForSeq2SeqLM.from_pretrained(folder)):
        torch.testing.assert_close(logits(again, opened.tokenizer), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", ["query", "decoder", "word_embeddings"])
@pytest.mark.parametrize("kind", [BertConfig, RobertaConfig])
def test_heads_that_list_their_bias_among_what_is_tied(tmp_path, kind, layer):
    """BERT's kin name what is tied by patterns, and their head has a bias that the module around it holds, too."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = kind(**sizes, intermediate_size=32, max_position_embeddings=64, is_decoder=True)
    base = AutoModelForCausalLM.from_config(config).eval()
    base.get_output_embeddings().bias.data.normal_()
    model = moved(peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=[layer])))
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        merged = merge(model)
        merged.save_pretrained(tmp_path)
        for found in (merged, AutoModelForCausalLM.from_pretrained(tmp_path)):
            torch.testing.assert_close(found(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_what_is_not_adapted_stays_tied():
    opened = tied()
    model = lora.attach(opened.model, LoraConfig(rank=2, targets=("q", "v")))
    assert not untie(model)
    merged = merge(model)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings


def test_detaching_ties_again():
    opened = tied()
    before = {name: value.clone() for name, value in opened.model.state_dict().items()}
    with adalora.attach(opened.model, AdaLoraConfig(rank=2, targets=("lm_head",), steps=10)):
        assert not opened.model.config.tie_word_embeddings
    assert opened.model.lm_head.weight is opened.model.model.embed_tokens.weight
    assert opened.model.config.tie_word_embeddings
    assert opened.model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
    assert all(torch.equal(value, before[name]) for name, value in opened.model.state_dict().items())


def test_a_second_adapter_does_not_replace_the_first():
    model = lora.attach(tied().model, LoraConfig(rank=2))
    with pytest.raises(ModelError, match="already has an adapter"):
        lora.attach(model, LoraConfig(rank=2))


def test_an_untied_model_stays_untied_when_its_embedding_grows(base):
    model = moved(lora.attach(open_model(base, device="cpu").model, LoraConfig(rank=2, targets=("lm_head",))))
    merged = merge(model)
    merged.resize_token_embeddings(300, mean_resizing=False)
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
