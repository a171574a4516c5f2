"""Configurations of several parts, and pad tokens that differ: a field is written where it is read."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from tenfold.errors import ModelError
from tenfold.models.export import merge, save_adapter, save_model
from tenfold.models.layer_map import layer_map
from tenfold.models.open import open_model
from tenfold.models.opened import settle_padding
from tenfold.models.tiny import tiny_model, tiny_tokenizer
from tests.architectures import TABLE, save
from tests.runs import execute

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]


def composite():
    """A Gemma 3 of a text and a vision part; the fields of words are in the text part alone."""
    tokenizer = tiny_tokenizer("gemma3")
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 32}
    text = {"vocab_size": len(tokenizer), "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 3, **layers}
    vision = {"image_size": 28, "patch_size": 14, **layers}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Gemma3ForConditionalGeneration(config).float().eval(), tokenizer


def logits(model, tokenizer, text="hello"):
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits


def test_the_pad_token_goes_into_the_text_part(tmp_path):
    model, tokenizer = composite()
    assert not hasattr(model.config, "pad_token_id")
    opened = open_model(save_model(model, tokenizer, tmp_path / "model"), device="cpu")
    assert opened.model.config.get_text_config().pad_token_id == opened.tokenizer.pad_token_id == 0


def test_an_adapter_that_added_tokens(tmp_path):
    model, tokenizer = composite()
    base = save_model(model, tokenizer, tmp_path / "base")
    opened = open_model(base, device="cpu")
    opened.tokenizer.add_tokens(["<tool>", "</tool>"])
    opened.model.resize_token_embeddings(len(opened.tokenizer), mean_resizing=False)
    config = peft.LoraConfig(target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    adapted = peft.get_peft_model(opened.model, config).eval()
    folder = save_adapter(adapted, opened.tokenizer, tmp_path / "adapter", base=str(base))
    found = open_model(folder, device="cpu")
    assert found.notes == ()
    assert found.model.config.get_text_config().vocab_size == len(tokenizer) + 2
    assert torch.equal(logits(found.model, found.tokenizer, "<tool>x"), logits(adapted, opened.tokenizer, "<tool>x"))


def test_an_adapter_on_the_tied_head(tmp_path):
    model, tokenizer = composite()
    config = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    expected = logits(adapted, tokenizer)
    folder = save_model(merge(adapted), tokenizer, tmp_path / "merged")
    torch.testing.assert_close(
        logits(open_model(folder, device="cpu").model, tokenizer), expected, atol=1e-5, rtol=1e-5
    )
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


def of_pictures(model_type, folder):
    """A folder of a model for pictures and text, as people have one."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    row = next((row for row in TABLE if row.model_type == model_type), None)
    if row is not None:
        return save(row, folder)
    fields = next(row for row in TABLE if row.model_type == "llava").fields
    text = {**fields["text_config"], "model_type": "gemma", "head_dim": 8}
    vision = {**fields["vision_config"], "model_type": "siglip_vision_model", "projection_dim": 32}
    config = AutoConfig.for_model(model_type, text_config=text, vision_config=vision, image_token_index=261)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "smolvlm"])
def test_a_model_of_pictures_reads_text_from_left_to_right_and_its_tower_stays(model_type, tmp_path):
    opened = open_model(of_pictures(model_type, tmp_path), device="cpu")
    whole, part = logits(opened.model, opened.tokenizer, "hello you"), logits(opened.model, opened.tokenizer, "hello")
    torch.testing.assert_close(whole[:, :5], part, atol=1e-5, rtol=0)
    assert (whole[:, 1:] - whole[:, :-1]).abs().max() > 1e-3
    chosen = [slot.name for slot in layer_map(opened.model).select(["all-linear"])]
    assert len(chosen) == 14
    assert all("visual" not in name and "vision" not in name for name in chosen)


def test_models_of_pictures_that_see_the_text_ahead_or_have_no_reward_head_are_refused(tmp_path):
    with pytest.raises(ModelError, match="paligemma reads a text in both directions") as caught:
        open_model(of_pictures("paligemma", tmp_path / "one"), device="cpu")
    assert "Qwen2.5-VL" in caught.value.remedy
    with pytest.raises(ModelError, match="have no head for task 'reward'; they have causal") as caught:
        open_model(of_pictures("llava", tmp_path / "two"), "reward", device="cpu")
    assert "target dpo" in caught.value.remedy


def test_the_card_of_an_adapter_names_the_class_that_opens_its_base(tmp_path):
    base = of_pictures("llava", tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{n} and {n + 1}"}) + "\n" for n in range(9)))
    stage = {"use": "lora", "data": str(rows), "steps": 1, "max_length": 16, "rank": 2}
    execute({"model": str(base), "device": "cpu", "stages": [stage]}, tmp_path / "run")
    card = (tmp_path / "run/01-lora/adapter/README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card
    assert "AutoModelForCausalLM" not in card


@pytest.mark.parametrize("named", [None, 0, 5])
def test_a_reward_reads_the_tokenizers_pad_token(tmp_path, named):
    """Equal to the reward of the text alone, which needs no pad token: its last token is the last."""
    opened = tiny_model("llama", task="reward")
    opened.tokenizer.pad_token = "<|im_end|>"
    opened.model.config.pad_token_id = named
    folder = save_model(opened.model, opened.tokenizer, tmp_path / "model")
    again = open_model(folder, "reward", device="cpu")
    again.tokenizer.padding_side = "right"
    texts = ["hello", "a longer text <pad>"]
    batch = again.tokenizer(texts, return_tensors="pt", padding=True)
    hidden = again.model.model(**batch).last_hidden_state
    lasts = batch["attention_mask"].sum(dim=1) - 1
    expected = again.model.score(hidden[torch.arange(2), lasts])
    torch.testing.assert_close(again.model(**batch).logits, expected)


def test_settling_takes_the_tokenizers(monkeypatch):
    opened = tiny_model("qwen2")
    opened.tokenizer.pad_token = "<eos>"
    settle_padding(opened.model, opened.tokenizer)
    eos = opened.tokenizer.eos_token_id
    assert opened.model.config.pad_token_id == opened.model.generation_config.pad_token_id == eos
