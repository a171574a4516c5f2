"""Multiple choice against a dense computation."""

from __future__ import annotations

import pytest
import torch

from tenfold.data.rows import Choice
from tenfold.errors import DataError
from tenfold.evaluate.choice import multiple_choice, share
from tenfold.models.tiny import tiny_model, tiny_tokenizer
from tests.tokenizers import byte_level

ITEMS = [
    Choice("1", "The sky is", ("blue", "a fish with a very long tail"), 0),
    Choice("2", "One and one make ", ("two", "three", "a hundred"), 1),
    Choice("3", "Say", (" yes", " no"), 1),
]


def dense(model, tokenizer, prompt: str, option: str) -> float:
    context, ids = (tokenizer(text)["input_ids"] for text in (prompt, prompt + option))
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logs[i - 1, ids[i]].item() for i in range(len(context), len(ids)))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_equals_a_dense_computation(model, tokenizer, batch_size):
    model.double()
    found = multiple_choice(model, tokenizer, ITEMS, batch_size=batch_size)
    for item, logs, right, normalised in zip(
        ITEMS, found.log_likelihoods, found.correct, found.correct_normalised, strict=True
    ):
        expected = [dense(model, tokenizer, item.prompt.strip(), f" {option.strip()}") for option in item.options]
        assert logs.tolist() == pytest.approx(expected, rel=1e-9)
        per_byte = [log / len(option.strip()) for log, option in zip(expected, item.options, strict=True)]
        assert right == (expected.index(max(expected)) == item.answer)
        assert normalised == (per_byte.index(max(per_byte)) == item.answer)
    assert found.result.metric("accuracy").value == sum(found.correct) / 3


def test_a_beginning_token_is_context(model, bos_tokenizer):
    model.double()
    found = multiple_choice(model, bos_tokenizer, ITEMS[:1])
    assert found.log_likelihoods[0][0].item() == pytest.approx(dense(model, bos_tokenizer, "The sky is", " blue"))


def test_options_that_merge_with_the_prompt_are_scored_from_the_same_token():
    opened = tiny_model()
    tokenizer = byte_level()
    opened.model.resize_token_embeddings(len(tokenizer))
    opened.model.double()
    ids = [tokenizer("the answer is" + option)["input_ids"] for option in (" yes", "\nno")]
    assert [tokenizer.convert_ids_to_tokens(row[4:]) for row in ids] == [
        ["ĠisĠ", "y", "e", "s"],
        ["Ġ", "i", "s", "Ċ", "n", "o"],
    ]
    expected = []
    for row in ids:
        with torch.no_grad():
            logs = opened.model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
        expected.append(sum(logs[at - 1, row[at]].item() for at in range(4, len(row))))
    found = multiple_choice(opened.model, tokenizer, [Choice("1", "the answer is", ("yes", "\nno"), 0)])
    assert found.log_likelihoods[0].tolist() == pytest.approx(expected, rel=1e-9)


def test_a_token_that_ends_each_text_is_no_part_of_an_option(model):
    ending = tiny_tokenizer("deberta-v2")  # <bos> $A <eos>
    found = multiple_choice(model.double(), ending, ITEMS[:1]).log_likelihoods[0][0].item()
    ids = ending("The sky is blue")["input_ids"][:-1]
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = sum(logs[at - 1, ids[at]].item() for at in range(len("The sky is") + 1, len(ids)))
    assert found == pytest.approx(expected, rel=1e-9)


def test_share_is_the_sample_standard_error():
    metric = share("accuracy", [True, True, True, False])
    assert (metric.value, metric.count) == (0.75, 4)
    assert metric.stderr == pytest.approx((0.75 * 0.25 / 3) ** 0.5)
    assert share("accuracy", [True]).stderr is None


def test_nothing_to_choose(model, tokenizer):
    with pytest.raises(DataError, match="no items"):
        multiple_choice(model, tokenizer, [])
    with pytest.raises(DataError, match=r"row '9'.*no token of its own"):
        multiple_choice(model, tokenizer, [Choice("9", " ", ("a", "b"), 0)])
