"""Adapters that bring a tokenizer, a chat template, tokens and rows of their own, as trainers save them."""

from __future__ import annotations

import json

import peft
import pytest
import torch

from tenfold.errors import ModelError
from tenfold.models.export import merge, save_adapter, save_model
from tenfold.models.open import open_model
from tenfold.models.tiny import tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
TURN = [{"role": "user", "content": "x"}]


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path):
    opened = tiny_model("llama", tie_word_embeddings=request.param)
    return save_model(opened.model, opened.tokenizer, tmp_path / "base")


def grown(base, tokens, rows=None, **keys):
    """An adapter on a base with further tokens; everything that it may train is moved."""
    opened = open_model(base, device="cpu")
    opened.tokenizer.add_tokens(tokens)
    opened.model.resize_token_embeddings(rows or len(opened.tokenizer), mean_resizing=False)
    config = {"target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM", **keys}
    model = peft.get_peft_model(opened.model, peft.LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            parameter.data += torch.randn(parameter.shape, generator=generator)
    return model, opened.tokenizer


def logits(model, tokenizer, text="<tool>x</tool>"):
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits


STORED = {
    "copies of both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "resized, as PEFT finds out": {},
    "low rank on both": {"target_modules": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("rows", [None, 320], ids=["one row a token", "padded"])
@pytest.mark.parametrize("name", STORED)
def test_added_tokens_and_their_rows(base, tmp_path, name, rows):
    model, tokenizer = grown(base, ["<tool>", "</tool>"], rows, **STORED[name])
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    found = open_model(tmp_path / "adapter", device="cpu")
    assert found.tokenizer("<tool>x</tool>")["input_ids"] == tokenizer("<tool>x</tool>")["input_ids"]
    assert found.model.get_input_embeddings().weight.shape[0] == (rows or len(tokenizer))
    assert found.notes == ()
    assert torch.equal(logits(found.model, found.tokenizer), logits(model, tokenizer))
    again = open_model(save_model(merge(found.model), found.tokenizer, tmp_path / "merged"), device="cpu")
    torch.testing.assert_close(logits(again.model, again.tokenizer), logits(model, tokenizer), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*adds 2 tokens")
def test_tokens_that_were_trained_alone(base, tmp_path):
    new = tiny_model("llama").tokenizer.vocab_size
    model, tokenizer = grown(base, ["<tool>", "</tool>"], trainable_token_indices=[new, new + 1])
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    tokenizer.save_pretrained(tmp_path / "adapter")
    found = open_model(tmp_path / "adapter", device="cpu")
    tied = found.model.config.tie_word_embeddings
    assert tied or len(found.notes) == 1  # PEFT trains the rows of an untied head only where they are asked for
    inside = found.model.get_input_embeddings()(torch.tensor([new, new + 1]))
    assert torch.equal(inside, model.get_input_embeddings()(torch.tensor([new, new + 1])))


def test_rows_that_nothing_holds_are_the_mean_and_noted(base, tmp_path):
    model, tokenizer = grown(base, ["<tool>"])
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    tokenizer.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match=r"adds 1 tokens to the base \('<tool>'\), .*input embedding and head"):
        found = open_model(tmp_path / "adapter", device="cpu")
    assert len(found.notes) == 1
    assert found.tokenizer("<tool>")["input_ids"] == [len(tokenizer) - 1]
    rows = found.model.get_input_embeddings().weight
    torch.testing.assert_close(rows[-1], rows[:-1].mean(dim=0))
    # The other tokens answer as they were trained; a head that is not stored tells them apart as before.
    torch.testing.assert_close(
        logits(found.model, found.tokenizer, "hello")[..., :-1], logits(model, tokenizer, "hello")[..., :-1]
    )


def test_tokens_within_the_rows_that_the_base_has(tmp_path):
    opened = tiny_model("llama", vocab_size=300)
    base = save_model(opened.model, opened.tokenizer, tmp_path / "base")
    model, tokenizer = grown(base, ["<tool>", "</tool>"], 300)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    found = open_model(tmp_path / "adapter", device="cpu")
    assert found.notes == ()
    assert torch.equal(logits(found.model, found.tokenizer), logits(model, tokenizer))


def test_the_template_beside_the_adapter(base, tmp_path):
    model, tokenizer = grown(base, [])
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "alone")
    (tmp_path / "alone" / "chat_template.jinja").write_text(TEMPLATE)
    model.save_pretrained(tmp_path / "none")
    for name, said in (("adapter", "[user]x"), ("alone", "[user]x"), ("none", "<|im_start|>user\nx<|im_end|>\n")):
        opened = open_model(tmp_path / name, device="cpu")
        assert opened.tokenizer.apply_chat_template(TURN, tokenize=False) == said
    on_top = open_model(base, device="cpu", adapters=[tmp_path / "adapter", tmp_path / "none"])
    assert on_top.tokenizer.apply_chat_template(TURN, tokenize=False) == "[user]x"


def test_a_pad_token_of_its_own(base, tmp_path):
    model, tokenizer = grown(base, [])
    tokenizer.pad_token = "<eos>"
    save_adapter(model, tokenizer, tmp_path / "adapter")
    opened = open_model(tmp_path / "adapter", device="cpu")
    assert opened.tokenizer.pad_token == "<eos>"
    assert opened.model.config.pad_token_id == tokenizer.eos_token_id
    assert opened.model.generation_config.pad_token_id == tokenizer.eos_token_id


def test_a_tokenizer_that_cannot_be_read(base, tmp_path):
    model, _ = grown(base, [])
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer.json").write_text("{")
    (tmp_path / "adapter" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizerFast"}))
    with pytest.raises(ModelError, match="its tokenizer cannot be read"):
        open_model(tmp_path / "adapter", device="cpu")


def test_tokens_without_a_row_are_refused_on_opening(tmp_path):
    base = tiny_model("llama")
    base.model.resize_token_embeddings(200)
    save_model(base.model, base.tokenizer, tmp_path / "small")
    with pytest.raises(ModelError, match=r"small: its tokenizer has 262 tokens, and its embedding has rows for 200"):
        open_model(tmp_path / "small", device="cpu")
    base = tiny_model("llama")
    base.tokenizer.add_special_tokens({"pad_token": "<fill>"})
    save_model(base.model, base.tokenizer, tmp_path / "pad")
    with pytest.raises(ModelError, match=r"pad_token has the number 262, and its embedding 262 rows"):
        open_model(tmp_path / "pad", device="cpu")
