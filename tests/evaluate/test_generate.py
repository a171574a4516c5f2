"""Texts of a session: the same for every batch size, greedy by definition, without traces."""

from __future__ import annotations

import pytest
import torch

from tenfold.engines.requests import Request
from tenfold.engines.session import Session
from tenfold.errors import ConfigError, DataError, ModelError

PROMPTS = ["a", "a much longer prompt than the first", "bb"]


def generate(model, tokenizer, prompts, *, chat=None, batch_size=8, **how):
    """What a user says continued, through the chat template where there is one and it is wanted."""
    chat = tokenizer.chat_template is not None if chat is None else chat
    asked = [{"messages": [{"role": "user", "content": text}]} if chat else {"text": text} for text in prompts]
    replies = Session(model, tokenizer, batch_size=batch_size).generate([Request(**each, **how) for each in asked])
    return [reply.text for reply in replies]


def greedy(model, tokenizer, prompt: str, tokens: int, special: bool = True) -> str:
    """By a full forward pass for every token."""
    ids = tokenizer(prompt, add_special_tokens=special)["input_ids"]
    start = len(ids)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_greedy_equals_the_most_likely_token_each_time(model, tokenizer):
    model.double()
    expected = [greedy(model, tokenizer, prompt, 8) for prompt in PROMPTS]
    for batch_size in (1, 2, 3):
        found = generate(model, tokenizer, PROMPTS, max_new_tokens=8, chat=False, batch_size=batch_size)
        assert found == expected


def test_chat_is_used_where_the_tokenizer_has_a_template(model, tokenizer):
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    model.double()
    assert generate(model, tokenizer, ["hi"], max_new_tokens=6) == [greedy(model, tokenizer, rendered, 6)]
    tokenizer.chat_template = None
    assert generate(model, tokenizer, ["hi"], max_new_tokens=6) == [greedy(model, tokenizer, "hi", 6)]
    with pytest.raises(ModelError, match="no chat template"):
        generate(model, tokenizer, ["hi"], chat=True)


def test_the_models_own_penalties_are_not_used(model, tokenizer):
    plain = generate(model, tokenizer, PROMPTS, max_new_tokens=8)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    model.generation_config.temperature = 3.0
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8) == plain


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_global_random_state_and_modes_are_left_alone(model, tokenizer, temperature):
    model.train()
    state = torch.random.get_rng_state()
    first = generate(model, tokenizer, PROMPTS, max_new_tokens=4, temperature=temperature, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert tokenizer.padding_side == "right"
    torch.rand(3)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=4, temperature=temperature, seed=3) == first


def test_bad_settings(model, tokenizer):
    with pytest.raises(ConfigError, match="temperature"):
        generate(model, tokenizer, ["a"], temperature=-1)
    with pytest.raises(ConfigError, match="empty prompt"):
        generate(model, tokenizer, [""], chat=False)


def test_a_template_that_refuses_a_prompt_says_which_and_why(model, tokenizer):
    tokenizer.chat_template = "{% if 'bb' in messages[0].content %}{{ raise_exception('no b, please') }}{% endif %}x"
    with pytest.raises(DataError, match="prompt 3: the chat template refuses these messages: no b, please") as caught:
        generate(model, tokenizer, PROMPTS)
    assert caught.value.exit_code == 2


def test_the_template_writes_the_only_token_of_the_beginning(model, bos_tokenizer):
    model.double()
    bos_tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}:"
    expected = greedy(model, bos_tokenizer, "<bos>bb:", 8, special=False)
    assert generate(model, bos_tokenizer, ["bb"], max_new_tokens=8) == [expected]
