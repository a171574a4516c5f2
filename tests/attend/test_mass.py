"""The attention mass that is shown against the attention weights of eager models."""

import pytest
import torch

from tenfold.attend.pasta import steer
from tenfold.attend.pasta.attention_share import attention_mass
from tenfold.attend.text_marks import encode, from_tags
from tenfold.errors import ConfigError
from tenfold.models.tiny import tiny_model

PROMPTS = ["It was <mark>red</mark>, she said.", "A <mark>very</mark> long sentence with <mark>two</mark> marks in it."]


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_mass_is_that_of_the_attention_weights(kind, implementation):
    opened = tiny_model(kind)
    opened.model.set_attn_implementation(implementation)
    marks = encode(opened.tokenizer, [from_tags(prompt) for prompt in PROMPTS])
    mass = attention_mass(opened.model, marks)
    opened.model.set_attn_implementation("eager")
    weights = opened.model(**marks.inputs, output_attentions=True).attentions
    for layer, values in enumerate(weights):
        wanted = (values[:, :, -1] * marks.marked[:, None, :]).sum(-1).mean(0)
        torch.testing.assert_close(mass[layer], wanted.detach(), atol=1e-6, rtol=1e-5)


def test_mass_shows_what_steering_does():
    """m becomes m / (m + alpha (1 - m)) in the first layer that is steered; other heads of that layer stay."""
    opened = tiny_model("llama")
    marks = encode(opened.tokenizer, [from_tags(PROMPTS[0])])
    plain = attention_mass(opened.model, marks)
    with steer(opened.model, marks, heads={0: [1], 1: [2]}, alpha=0.1):
        steered = attention_mass(opened.model, marks)
    share = plain[0, 1]
    assert float(steered[0, 1]) == pytest.approx(float(share / (share + 0.1 * (1 - share))), rel=1e-5)
    torch.testing.assert_close(steered[0, [0, 2, 3]], plain[0, [0, 2, 3]])
    assert not any(module._forward_pre_hooks for module in opened.model.modules())
    assert opened.model.config._attn_implementation == "sdpa"


def test_without_marks_there_is_nothing_to_see():
    opened = tiny_model("llama")
    with pytest.raises(ConfigError, match="mark"):
        attention_mass(opened.model, encode(opened.tokenizer, ["plain"]))
