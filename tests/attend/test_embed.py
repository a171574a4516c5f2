"""The model's own hidden states as embeddings."""

from __future__ import annotations

import pytest
import torch

from tenfold.attend.autopasta.embed import hidden_states
from tenfold.attend.autopasta.quote_matching import cosine, locate_quote
from tenfold.data.encode import pad_id
from tenfold.models.tiny import tiny_model

TEXTS = ["The Nile is long.", "x", "", "A longer text than the others, by a good many of its bytes.", "Rome"] * 4


def alone(opened, text):
    """The mean last hidden state of one text without padding, from all states that the model reports."""
    ids = opened.tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        if opened.model.config.is_encoder_decoder:
            states = opened.model.encoder(**ids).last_hidden_state
        else:
            allowed = {name: ids[name] for name in ("input_ids", "attention_mask")}
            states = opened.model(**allowed, output_hidden_states=True).hidden_states[-1]
    return states[0].mean(0)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2", "t5", "deberta-v2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_embeds_as_each_text_by_itself(kind, side):
    opened = tiny_model(kind)
    opened.tokenizer.padding_side = side
    rows = hidden_states(opened.model, opened.tokenizer)(TEXTS)
    assert rows.shape == (20, 64)
    assert rows.dtype == torch.float32
    assert not rows.requires_grad
    for text, row in zip(TEXTS, rows, strict=True):
        ids = opened.tokenizer(text)["input_ids"]
        expected = alone(opened, text) if ids else torch.zeros(64)
        torch.testing.assert_close(row, expected, atol=2e-5, rtol=1e-4)


def test_texts_go_through_the_body_in_batches_of_sixteen_without_the_head(monkeypatch):
    opened = tiny_model(attention_dropout=0.5)
    opened.model.train()
    embed = hidden_states(opened.model, opened.tokenizer)
    monkeypatch.setattr(opened.model.lm_head, "forward", None)
    shapes = []
    hook = opened.model.model.register_forward_hook(lambda module, args, output: shapes.append(tuple(output[0].shape)))
    rows = embed(TEXTS * 2)
    hook.remove()
    assert shapes == [(16, 59, 64), (16, 4, 64)]  # longest first; the empty texts need no pass
    assert torch.equal(rows, embed(TEXTS * 2))  # no dropout
    assert opened.model.training
    assert embed([]).shape == (0, 64)
    assert embed([""]).tolist() == [[0.0] * 64]


def test_texts_beyond_the_window_are_cut():
    opened = tiny_model("gpt2", n_positions=32)
    rows = hidden_states(opened.model, opened.tokenizer)(["a" * 32 + "b" * 50, "a" * 32])
    torch.testing.assert_close(rows[0], rows[1])


def test_low_precision_is_averaged_in_float32_and_a_missing_pad_token_does_not_matter():
    opened = tiny_model()
    full = hidden_states(opened.model, opened.tokenizer)(TEXTS)
    opened.tokenizer.pad_token = None
    assert pad_id(opened.tokenizer) == opened.tokenizer.eos_token_id
    torch.testing.assert_close(hidden_states(opened.model, opened.tokenizer)(TEXTS), full)
    rows = hidden_states(opened.model.to(torch.bfloat16), opened.tokenizer)(TEXTS)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, full, atol=0.1, rtol=0.1)


def test_adapters_take_part():
    from peft import LoraConfig, get_peft_model

    opened = tiny_model()
    plain = hidden_states(opened.model, opened.tokenizer)(["Rome is old."])
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(opened.model, config)
    rows = hidden_states(adapted, opened.tokenizer)(["Rome is old."])
    assert (rows - plain).abs().max() > 1e-4
    ids = opened.tokenizer("Rome is old.", return_tensors="pt")
    with torch.no_grad():
        states = adapted(**ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(rows, states.mean(1))


def test_locate_with_the_models_own_embeddings():
    rivers = [
        "The Amazon River is in South America.",
        "It is the largest river by discharge.",
        "Its length is about 6,650 km.",
    ]
    opened = tiny_model()
    quote = "A length of 6650 km, this is about its."
    embed = hidden_states(opened.model, opened.tokenizer)
    rows = embed([quote, *rivers]).double()
    scores = cosine(rows[0], rows[1:])
    context = " ".join(rivers)
    hit = locate_quote(quote, context, embed=embed, min_similarity=-1)[0]
    assert context[hit.start : hit.end] == rivers[int(scores.argmax())]
    assert hit.score == pytest.approx(float(scores.max()), abs=1e-5)
