"""Chat templates of real models: what is learned is what the model will be asked to write, whatever the tokenizer."""

from __future__ import annotations

import json

import pytest

from tenfold.data.encode import IGNORED, encode
from tenfold.data.read import read_rows
from tenfold.data.rows import Chat, Completion
from tenfold.data.templates import converse, render_chat
from tenfold.errors import DataError
from tenfold.models.tiny import tiny_tokenizer
from tests.tokenizers import TOKENIZERS, byte_level, metaspace, slow, template_of_trl

MISTRAL = (  # v0.3: the system message goes into the last message, where that is of the user
    "{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{% if loop.last and system is defined %}"
    "{{ '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' }}{% else %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% endif %}{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
WRITES = {
    # template, what two turns of the assistant are learned as; None for one that is context only
    "llama3": ("yes<|eot_id|>", "no yes<|eot_id|>"),
    "gemma": ("yes<end_of_turn>\n", "no yes<end_of_turn>\n"),
    "phi3": ("yes<|end|>\n", "no yes<|end|>\n<EOS>"),
    "qwen2_5": ("yes<|im_end|>\n", "no yes<|im_end|>\n"),
    "qwen3": (None, "<think>\n\n</think>\n\nno yes<|im_end|>\n"),
    "qwen3_5_think": (None, "\n</think>\n\nno yes<|im_end|>\n"),
    "deepseek_r1_distill": ("yes<｜end▁of▁sentence｜>", "no yes<｜end▁of▁sentence｜>"),
    "gptoss": ("<|channel|>final<|message|>yes", "<|channel|>final<|message|>no yes<|return|>"),
    "cohere": ("yes<|END_OF_TURN_TOKEN|>", "no yes<|END_OF_TURN_TOKEN|>"),
    "glm4moe": ("\n<think></think>\nyes", "\n<think></think>\nno yes"),
}
GENERATES = {
    "llama3_training": ("yes<|eot_id|>", "no yes<|eot_id|>"),
    "qwen3_training": ("<think>\n\n</think>\n\nyes<|im_end|>\n", "<think>\n\n</think>\n\nno yes<|im_end|>\n"),
    "phi3_training": ("yes<|end|>\n", "no yes<|end|>\n<EOS>"),
}
MARKERS = [
    *("<|return|>", "<|end|>", "<|user|>", "<|start|>", "<|message|>", "<|channel|>", "<think>", "</think>"),
    *("<|eot_id|>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|END_OF_TURN_TOKEN|>"),
    *("<｜Assistant｜>", "<｜User｜>", "<｜end▁of▁sentence｜>"),
]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TALK = (user("yes?"), assistant("yes"), user("yes or no yes?"), assistant("no yes"))


def having(tokenizer, template):
    tokenizer.add_special_tokens({"additional_special_tokens": MARKERS})
    tokenizer.chat_template = template
    return tokenizer


def runs(tokenizer, example):
    """The learned tokens, one list for each run of them."""
    found, before = [], False
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        if label != IGNORED:
            found = [*found, []] if not before else found
            found[-1].append(token)
        before = label != IGNORED
    return found


def encoded(tokenizer, messages):
    return encode([Chat("1", tuple(messages))], tokenizer, max_length=9999, packing=False)


def whole(tokenizer, messages):
    return tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True)["input_ids"]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", [*WRITES, *GENERATES])
def test_real_templates_with_real_kinds_of_tokenizers(name, kind):
    tokenizer = having(TOKENIZERS[kind](), template_of_trl(name))
    (example,) = encoded(tokenizer, TALK).examples
    assert example["input_ids"] == whole(tokenizer, TALK)
    expected = [text for text in {**WRITES, **GENERATES}[name] if text is not None]
    found = runs(tokenizer, example)
    assert len(found) == len(expected)
    for ids, text in zip(found, expected, strict=True):
        shown = tokenizer.decode(ids, skip_special_tokens=False)
        text = text.replace("<EOS>", tokenizer.eos_token)
        if kind == "words (BERT)":
            assert shown.split() == tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]).split()
            continue
        # Marks of a beginning, also behind special tokens, are shown as spaces.
        shown, text = shown.replace("> ", ">").strip(" "), text.replace("▁", " ").strip(" ")
        shown = shown.replace("▁", " ")
        assert shown.endswith(text)
        assert not shown.removesuffix(text).strip(), "no more than white space that merges with the answer's"


@pytest.mark.parametrize("kind", [kind for kind in TOKENIZERS if "BERT" not in kind])
def test_the_answer_follows_the_tokens_of_the_prompt_where_they_are_the_beginning_of_the_whole(kind):
    for name in WRITES:
        tokenizer = having(TOKENIZERS[kind](), template_of_trl(name))
        talk = TALK[:2]
        asked = tokenizer.apply_chat_template(list(talk[:1]), add_generation_prompt=True, return_dict=True)["input_ids"]
        (example,) = encoded(tokenizer, talk).examples
        if example["input_ids"][: len(asked)] == asked:
            assert [label == IGNORED for label in example["labels"]].index(False) == len(asked), name


def test_a_prompt_that_opens_a_thought_which_the_conversation_lacks():
    tokenizer = having(tiny_tokenizer(), template_of_trl("deepseek_r1_distill"))
    found = encoded(tokenizer, (user("q"), assistant("<b>yes")))  # its first character is also that of <think>
    assert tokenizer.decode(runs(tokenizer, found.examples[0])[0]) == "<b>yes<｜end▁of▁sentence｜>"
    assert found.notes == (
        "In 1 of 1 rows the chat template ends the prompt with '<think>\\n', which it leaves out of the conversation: "
        "the answer is learned without it.",
    )
    thought = encoded(tokenizer, (user("q"), assistant("<think>\nhm\n</think>\n\nyes")))
    assert any("leaves out or rewrites words of the assistant" in note for note in thought.notes)


def test_a_prompt_that_opens_a_thought_which_the_answer_goes_on_with():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    )
    found = encoded(tokenizer, (user("q"), assistant("<think>\nhm\n</think>\n\nyes")))
    assert tokenizer.decode(runs(tokenizer, found.examples[0])[0]) == "hm\n</think>\n\nyes<|im_end|>\n"
    assert found.notes == ()


def test_earlier_thoughts_are_context_and_a_note_says_so():
    tokenizer = having(tiny_tokenizer(), template_of_trl("qwen3"))
    thoughtful = (*TALK[:1], assistant("<think>\nhm\n</think>\n\nyes"), *TALK[2:])
    found = encode([Chat("1", thoughtful), Chat("2", TALK[:2])], tokenizer, max_length=999, packing=False)
    learned = [[tokenizer.decode(run) for run in runs(tokenizer, example)] for example in found.examples]
    assert learned == [["<think>\n\n</think>\n\nno yes<|im_end|>\n"], ["<think>\n\n</think>\n\nyes<|im_end|>\n"]]
    assert found.notes == (
        "1 earlier turns of the assistant, in 1 of 2 rows, are context only: the chat template writes them differently "
        "once others follow, as reasoning models drop earlier thoughts.",
    )


def test_what_follows_the_last_turn_does_not_make_history_of_it():
    tokenizer = having(tiny_tokenizer(), template_of_trl("qwen3"))
    (example,) = encoded(tokenizer, TALK[:3]).examples
    assert example["input_ids"] == whole(tokenizer, TALK[:2])
    plain = having(tiny_tokenizer(), template_of_trl("llama3"))
    (example,) = encoded(plain, TALK[:3]).examples
    assert example["input_ids"] == whole(plain, TALK[:3])


def test_a_system_message_that_moves_is_not_learned():
    tokenizer = having(metaspace("first"), MISTRAL)
    talk = ({"role": "system", "content": "be brief"}, user("yes?"), assistant("yes"))
    (example,) = encoded(tokenizer, talk).examples
    assert example["input_ids"] == whole(tokenizer, talk)
    assert tokenizer.decode(runs(tokenizer, example)[0]).strip() == "yes</s>"


def test_the_template_writes_the_only_token_of_the_beginning():
    for tokenizer in (metaspace("prepend"), byte_level()):
        assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        having(tokenizer, template_of_trl("gemma"))
        (example,) = encoded(tokenizer, TALK).examples
        assert example["input_ids"].count(tokenizer.bos_token_id) == 1


def test_content_that_templates_trim_and_words_that_the_question_has_too():
    tokenizer = having(byte_level(), template_of_trl("llama3"))
    (example,) = encoded(tokenizer, (user("  yes<|eot_id|> yes\n"), assistant("\n yes \n"))).examples
    assert tokenizer.decode(runs(tokenizer, example)[0]) == "yes<|eot_id|>"


def test_calls_of_tools_are_learned_and_their_results_are_not():
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    talk = (user("q"), {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "name": "f", "content": "2"}, assistant("it is 2"))  # fmt: skip
    tokenizer = having(tiny_tokenizer(), template_of_trl("qwen2_5"))
    (example,) = encoded(tokenizer, talk).examples
    assert [tokenizer.decode(run) for run in runs(tokenizer, example)] == [
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>\n',
        "it is 2<|im_end|>\n",
    ]


def test_a_conversation_that_the_assistant_begins():
    tokenizer = having(tiny_tokenizer(), template_of_trl("llama3"))
    (example,) = encoded(tokenizer, (assistant("hi"), *TALK[:2])).examples
    assert [tokenizer.decode(run) for run in runs(tokenizer, example)] == ["hi<|eot_id|>", "yes<|eot_id|>"]


def test_turns_that_the_template_would_not_ask_for_are_context():
    tokenizer = having(tiny_tokenizer(), template_of_trl("qwen3_5_think"))  # wants a question in front
    found = encoded(tokenizer, ({"role": "system", "content": "be"}, assistant("hi"), user("q"), assistant("yes")))
    assert [tokenizer.decode(run) for run in runs(tokenizer, found.examples[0])] == ["\n</think>\n\nyes<|im_end|>\n"]
    assert "1 earlier turns" in found.notes[0]


def test_marks_of_generation_hold_for_characters_of_several_tokens_and_slow_tokenizers():
    """The mask of transformers 5.23 has the first byte of the last character only, and none for slow tokenizers."""
    template = (
        "{% for m in messages %}{{ m['role'] }}:{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %};{% endfor %}"
    )
    tokenizer = having(byte_level(), template)
    (example,) = encoded(tokenizer, (user("q"), assistant("yes 🙂"))).examples
    assert tokenizer.decode(runs(tokenizer, example)[0]).lstrip(":") == "yes 🙂"
    python = having(slow(), template)
    (example,) = encoded(python, TALK).examples
    assert example["input_ids"] == whole(python, TALK)
    assert [python.decode(run) for run in runs(python, example)] == ["yes", "no yes"]


@pytest.mark.parametrize("kind", [kind for kind in TOKENIZERS if "BERT" not in kind])
@pytest.mark.parametrize(
    ("prompt", "completion"), [("no: a+b=", "c"), ("the answer is", " yes"), ("x:\n", "    return x")]
)
def test_completions_are_one_text(kind, prompt, completion):
    tokenizer = TOKENIZERS[kind]()
    rows = [Completion("1", prompt, completion)]
    (example,) = encode(rows, tokenizer, max_length=99, packing=False, chat=False).examples
    assert example["input_ids"] == [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]
    labels = [label for label in example["labels"] if label != IGNORED]
    assert labels == example["input_ids"][-len(labels) :]
    asked = tokenizer(prompt)["input_ids"]
    if example["input_ids"][: len(asked)] == asked:
        assert len(labels) == len(example["input_ids"]) - len(asked)
    else:
        assert tokenizer.decode(labels).removesuffix(tokenizer.eos_token).endswith(completion)


def test_a_merge_across_the_border_is_learned():
    tokenizer = byte_level()
    rows = [Completion("1", "no: a+b=", "c")]
    (example,) = encode(rows, tokenizer, max_length=99, packing=False, chat=False).examples
    learned = [label for label in example["labels"] if label != IGNORED]
    assert tokenizer.convert_ids_to_tokens(learned) == ["a+b=c", "<|eot_id|>"]


def test_a_template_that_refuses_names_the_row_and_says_why():
    tokenizer = having(tiny_tokenizer(), template_of_trl("gemma"))
    talk = ({"role": "system", "content": "be"}, *TALK)
    with pytest.raises(DataError, match="row '7': the chat template refuses these messages: System role not supported"):
        encode([Chat("6", TALK), Chat("7", talk)], tokenizer, max_length=99, packing=False)
    with pytest.raises(DataError, match=r"prompt 0: .*must alternate"):
        render_chat(tokenizer, [user("a"), user("b")], "prompt 0")
    tokenizer.chat_template = "{{ messages[0]['content'] + none }}"
    with pytest.raises(DataError, match=r"row 1: .*NoneType") as caught:
        converse(tokenizer, TALK, "row 1")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("unwanted", [{"weight": 0}, {"train": False}])
@pytest.mark.parametrize("name", ["qwen2_5", "llama3_training"])
def test_messages_that_say_so_are_context(name, unwanted):
    """OpenAI's weight and axolotl's train; the tokens stay those of the whole conversation."""
    tokenizer = having(tiny_tokenizer(), template_of_trl(name))
    talk = (user("q"), assistant("bad") | unwanted, user("r"), assistant("good") | {"weight": 1, "train": True})
    (example,) = encoded(tokenizer, talk).examples
    assert example["input_ids"] == whole(tokenizer, (user("q"), assistant("bad"), user("r"), assistant("good")))
    (learned,) = [tokenizer.decode(run) for run in runs(tokenizer, example)]
    assert "good" in learned
    assert "bad" not in learned
    with pytest.raises(DataError, match="none of the 1 rows has an answer of the assistant to learn"):
        encoded(tokenizer, talk[:2])


def test_a_call_that_the_template_drops_is_not_learned_as_an_empty_answer():
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    talk = (user("q"), {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "2"}, assistant("it is 2"))  # fmt: skip
    tokenizer = tiny_tokenizer()
    found = encoded(tokenizer, talk)
    assert [tokenizer.decode(run) for run in runs(tokenizer, found.examples[0])] == ["it is 2<|im_end|>\n"]
    assert "calls of tools: they are not learned" in found.notes[0]
    talk[1]["content"] = "Let me see."
    found = encoded(tokenizer, talk)
    assert tokenizer.decode(runs(tokenizer, found.examples[0])[0]) == "Let me see.<|im_end|>\n"
    assert "calls of tools: they are not learned" in found.notes[0]


def test_what_a_template_refuses_is_named_by_its_line_and_can_be_skipped(tmp_path):
    talks = [[user(f"q{n}"), assistant("yes")] for n in range(3)]
    talks[1].insert(0, {"role": "system", "content": "be"})
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    tokenizer = having(tiny_tokenizer(), template_of_trl("gemma"))
    given = {"max_length": 99, "packing": False}
    with pytest.raises(DataError, match=r"d\.jsonl, line 2: the chat template refuses .*System role"):
        encode(read_rows(str(path)), tokenizer, **given)
    found = encode(read_rows(str(path)), tokenizer, **given, on_bad_row="skip")
    assert len(found.examples) == 2
    assert "1 rows cannot be written as the model reads them and were left out (on_bad_row: skip)" in found.notes[0]
    assert "line 2: the chat template refuses" in found.notes[0]
    (one,) = found.refused
    assert one.place == f"{path}, line 2"
    assert one.reason.startswith("the chat template refuses these messages")
    with pytest.raises(DataError, match="line 2"):
        encode(read_rows(str(path))[1:2], tokenizer, **given, on_bad_row="skip")
