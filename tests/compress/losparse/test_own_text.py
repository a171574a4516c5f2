"""What a model writes for its own calibration."""

import pytest
import torch

from tenfold.compress.losparse import stage
from tenfold.compress.losparse.own_text import own_text
from tenfold.config.losparse import LoSparseConfig
from tenfold.data.encode import encode
from tenfold.data.rows import Text
from tenfold.errors import ConfigError
from tenfold.models.tiny import tiny_model


def test_texts_are_drawn_from_the_model():
    """The second token of texts with one beginning, against the probabilities of a dense pass in float64."""
    opened = tiny_model("llama")
    model = opened.model.double()
    torch.manual_seed(0)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # tiny models know nothing: far from uniform
    plain = [token for token in range(len(opened.tokenizer)) if token not in opened.tokenizer.all_special_ids]
    texts = torch.stack(own_text(model, opened.tokenizer, 8000, length=4, seed=3))
    assert texts.shape == (2000, 4)
    assert set(texts[:, 0].tolist()) <= set(plain)
    assert len(set(texts[:, 0].tolist())) > 0.9 * len(plain) * (1 - (1 - 1 / len(plain)) ** 2000)
    with torch.no_grad():
        said = model(input_ids=texts[:, :-1]).logits.double().log_softmax(-1)
    said[..., opened.tokenizer.eos_token_id] = -torch.inf  # texts do not end early
    said = said.log_softmax(-1)
    found = said.gather(-1, texts[:, 1:, None])[..., 0]
    expected = (said.exp() * said.clamp(min=-1e9)).sum(-1)  # minus the entropy: the mean of what is drawn
    spread = ((said.exp() * said.clamp(min=-1e9) ** 2).sum(-1) - expected**2).mean() / found.numel()
    assert abs(found.mean() - expected.mean()) < 4 * spread**0.5
    assert expected.mean() < -0.5
    assert found.mean() < said.max(-1).values.mean() - 0.2, "not the likeliest each time"


def test_seeds_decide_and_nothing_else_changes():
    opened = tiny_model("llama")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (own_text(opened.model, opened.tokenizer, 40, length=16, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(ids) for ids in first] == [16, 16, 16]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_shares_of_the_calibration():
    """Half and half, also where the user's texts are few; and the user's alone on request."""
    opened = tiny_model("llama")
    encoded = encode(
        [Text(str(n), "one two three " * 40) for n in range(9)], opened.tokenizer, max_length=32, packing=True
    )
    context = type("Context", (), {"seed": 0, "progress": staticmethod(lambda *_: None)})()
    for share, calibration in ((0.5, 256), (0.0, 256), (0.75, 10**6)):
        config = LoSparseConfig(own_text=share, calibration=calibration, max_length=32)
        passages = stage._passages(config, context, opened, encoded)
        given = {tuple(example["input_ids"]) for example in encoded.examples}
        users = sum(len(ids) for ids in passages if tuple(ids.tolist()) in given)
        own = sum(map(len, passages)) - users
        assert abs(users - min((1 - share) * calibration, encoded.tokens)) <= 64
        assert abs(own - users * share / (1 - share)) <= 32


@pytest.mark.parametrize(
    ("keys", "why"), [({"tokens": 0}, "tokens: must be 1"), ({"tokens": 9, "length": 1}, "length")]
)
def test_no_text_is_refused(keys, why):
    opened = tiny_model("llama")
    with pytest.raises(ConfigError, match=why):
        own_text(opened.model, opened.tokenizer, **keys)
