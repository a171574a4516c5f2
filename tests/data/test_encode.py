"""Encoding: no token lost in packing, every cut counted, only what should be learned is learned."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tenfold.data.encode import IGNORED, collate, encode, pad_id
from tenfold.data.rows import Chat, Classification, Completion, Text
from tenfold.errors import DataError, ModelError
from tenfold.models.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
WORDS = st.lists(st.text(alphabet="abc é", min_size=1, max_size=40).filter(str.strip), min_size=1, max_size=8)


def texts(*values: str) -> list[Text]:
    return [Text(str(i), value) for i, value in enumerate(values)]


def learned(example) -> str:
    return TOKENIZER.decode([label for label in example["labels"] if label != IGNORED])


@given(WORDS, st.integers(3, 50))
def test_packing_conserves_every_token_in_order(values, max_length):
    encoded = encode(texts(*values), TOKENIZER, max_length=max_length, packing=True)
    stream = [token for example in encoded.examples for token in example["input_ids"]]
    expected = [token for value in values for token in [*TOKENIZER(value)["input_ids"], TOKENIZER.eos_token_id]]
    assert stream == expected
    lengths = [len(example["input_ids"]) for example in encoded.examples]
    assert min(lengths) >= 2
    assert max(lengths) <= max_length
    assert all(length >= max_length - 1 for length in lengths[:-1])
    assert encoded.tokens == len(expected)
    assert encoded.trained_tokens == len(expected) - encoded.sequences
    assert (encoded.truncated_rows, encoded.tokens_cut, encoded.left_out) == (0, 0, 0)


@given(WORDS, st.integers(3, 50))
def test_without_packing_what_is_cut_is_counted(values, max_length):
    encoded = encode(texts(*values), TOKENIZER, max_length=max_length, packing=False)
    lengths = [len(value.encode()) + 1 for value in values]
    assert encoded.sequences == encoded.rows == len(values)
    assert encoded.truncated_rows == sum(length > max_length for length in lengths)
    assert encoded.tokens + encoded.tokens_cut == sum(lengths)
    assert bool(encoded.notes) == bool(encoded.truncated_rows)


def test_the_first_token_is_never_learned():
    (example,) = encode(texts("abc"), TOKENIZER, max_length=8, packing=False).examples
    assert example["labels"] == [IGNORED, *example["input_ids"][1:]]


def test_trained_tokens_are_those_the_loss_of_the_model_averages_over():
    model = tiny_model().model
    encoded = encode(texts("some text", "more"), TOKENIZER, max_length=6, packing=True)
    batch = collate(encoded.examples, pad_id(TOKENIZER))
    with torch.no_grad():
        output = model(**batch)
    shifted = batch["labels"][:, 1:]
    total = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), shifted.flatten(), reduction="sum")
    torch.testing.assert_close(output.loss, total / encoded.trained_tokens)


def test_completions_learn_the_completion_and_its_end():
    rows = [Completion("1", "1+1=", "2")]
    (example,) = encode(rows, TOKENIZER, max_length=16, packing=True, chat=False).examples
    assert TOKENIZER.decode(example["input_ids"]) == "1+1=2<eos>"
    assert learned(example) == "2<eos>"


def test_completions_use_the_chat_template_where_there_is_one():
    rows = [Completion("1", "1+1=", "2")]
    (example,) = encode(rows, TOKENIZER, max_length=99, packing=True).examples
    whole = "<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
    assert TOKENIZER.decode(example["input_ids"]) == whole
    assert learned(example) == "2<|im_end|>\n"


CONVERSATION = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "a?"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c?"},
    {"role": "assistant", "content": "d"},
)


def test_chat_learns_every_turn_of_the_assistant_and_nothing_else():
    (example,) = encode([Chat("1", CONVERSATION)], TOKENIZER, max_length=500, packing=False).examples
    assert example["input_ids"] == TOKENIZER.apply_chat_template(list(CONVERSATION))["input_ids"]
    assert learned(example) == "b<|im_end|>\nd<|im_end|>\n"


def test_generation_keyword_of_the_template_decides_where_there_is_one():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %};{% endfor %}"
    )
    (example,) = encode([Chat("1", CONVERSATION)], tokenizer, max_length=500, packing=False).examples
    assert learned(example) == "bd"


def test_of_a_template_that_rewrites_history_the_last_turn_is_learned():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}{% if loop.last %}!{% endif %}{{ m['content'] }}{% endfor %}"
    )
    encoded = encode([Chat("1", CONVERSATION)], tokenizer, max_length=500, packing=False)
    assert learned(encoded.examples[0]) == "d"
    assert "1 earlier turns of the assistant, in 1 of 1 rows, are context only" in encoded.notes[0]


def test_rows_with_nothing_left_to_learn_are_left_out_and_counted():
    rows = [Completion("1", "p" * 20, "c"), Completion("2", "p", "c")]
    encoded = encode(rows, TOKENIZER, max_length=10, packing=False, chat=False)
    assert (encoded.sequences, encoded.left_out, encoded.truncated_rows, encoded.tokens_cut) == (1, 1, 1, 12)
    with pytest.raises(DataError, match="none of the 1 rows"):
        encode(rows[:1], TOKENIZER, max_length=10, packing=False, chat=False)


def test_what_cannot_be_encoded_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        encode([Chat("1", CONVERSATION)], tokenizer, max_length=10, packing=False)
    with pytest.raises(DataError, match="classification row"):
        encode([Classification("1", "a", 1)], TOKENIZER, max_length=10, packing=False)
    with pytest.raises(DataError, match="no rows"):
        encode([], TOKENIZER, max_length=10, packing=False)


def test_a_tokenizer_that_adds_its_own_ends_gets_no_second_ones():
    (example,) = encode(texts("ab"), tiny_tokenizer("deberta-v2"), max_length=9, packing=False).examples
    assert TOKENIZER.decode(example["input_ids"]) == "<bos>ab<eos>"


def test_collate_pads_on_the_right_and_masks_padding():
    examples = encode(texts("abcd", "a"), TOKENIZER, max_length=9, packing=False).examples
    batch = functools.partial(collate, pad_id=pad_id(TOKENIZER))(examples)
    assert batch["input_ids"].shape == (2, 5)
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert batch["labels"][1].tolist() == [IGNORED, TOKENIZER.eos_token_id, IGNORED, IGNORED, IGNORED]


def test_padding_falls_back_to_the_end_of_text():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    assert pad_id(tokenizer) == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gemma3"])
def test_rows_kept_apart_give_the_loss_of_each_alone(kind):
    opened = tiny_model(kind)
    rows = texts("first of the rows", "and a second one, which is cut where the sequence ends", "x")
    encoded = encode(rows, opened.tokenizer, max_length=32, packing=True, boundaries=True)
    assert [token for example in encoded.examples for token in example["input_ids"]] == [
        token
        for example in encode(rows, opened.tokenizer, max_length=32, packing=True).examples
        for token in example["input_ids"]
    ]
    batch = collate(encoded.examples, pad_id(opened.tokenizer))
    assert "attention_mask" not in batch
    total = 0.0
    for example in encoded.examples:
        positions = example["position_ids"]
        starts = [index for index, position in enumerate(positions) if position == 0]
        for start, end in itertools.pairwise([*starts, len(positions)]):
            ids = torch.tensor([example["input_ids"][start:end]])
            if end - start > 1:
                total += opened.model(input_ids=ids, labels=ids).loss.item() * (end - start - 1)
    loss = opened.model(**batch, use_cache=False).loss.item()
    assert loss == pytest.approx(total / encoded.trained_tokens, rel=1e-5)


def test_conversations_without_an_answer_are_told_from_those_that_were_cut(tokenizer):
    asked, answered = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    rows = [Chat("1", (asked,)), Chat("2", (asked, answered)), Chat("3", ({**asked, "content": "q" * 99}, answered))]
    found = encode(rows, tokenizer, max_length=60, packing=False)
    assert (found.sequences, found.left_out) == (1, 2)
    assert "1 of 3 rows were left out: they have no answer of the assistant to learn." in found.notes
    assert "1 of 3 rows were left out: nothing to learn stood within max_length." in found.notes
    with pytest.raises(DataError, match="none of the 1 rows has an answer of the assistant"):
        encode(rows[:1], tokenizer, max_length=60, packing=False)
