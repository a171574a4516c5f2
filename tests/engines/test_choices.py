"""One of some texts: the same as walking their tokens by hand, whatever the tokenizer."""

import itertools
import re

import pytest
import torch

from tenfold.attend.pasta.likelihood import continuation
from tenfold.attend.text_marks import Marked
from tenfold.engines.choices import ChoiceTokens, choices_grammar, choices_pattern, decisive
from tenfold.engines.openai import OpenAIEngine
from tenfold.engines.requests import Request
from tenfold.engines.session import Session, _since_special
from tenfold.errors import ConfigError
from tenfold.models.tiny import tiny_model
from tests.tokenizers import TOKENIZERS

from .stub import Stub, serving

WORDS = ("yes", "yes and no", "no", "the answer is blue", "the answer is x", "The sky", "0 1")
PROMPTS = ("The sky is", "is it so? ", "a+b=", "the answer is yes or ")


@pytest.fixture(params=TOKENIZERS)
def session(request):
    """A model in float64 whose tokens are those of a tokenizer of some shape."""
    tokenizer = TOKENIZERS[request.param]()
    opened = tiny_model("llama", vocab_size=len(tokenizer))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    opened.model.generation_config.eos_token_id = tokenizer.eos_token_id
    return Session(opened.model.double(), tokenizer, batch_size=4)


@torch.no_grad()
def logits(session, prompt, written):
    """Of the next token, from a whole pass without a cache."""
    ids = session.tokenizer(prompt)["input_ids"] + list(written)
    return session.model(input_ids=torch.tensor([ids])).logits[0, -1]


def different(session, prompt, words=WORDS):
    """Those of the words that the tokenizer can tell apart, with their tokens after the prompt."""
    found = {}
    for word in words:
        ids = tuple(continuation(session.tokenizer, Marked(prompt), word))
        if ids not in found.values():
            found[word] = ids
    return found


def walked(session, prompt, tokens):
    """The most probable way through the tokens of the texts, and where it ends."""
    end, left, written = session.tokenizer.eos_token_id, dict(tokens), []
    while len(left) > 1:
        now = len(written)
        allowed = {ids[now] if len(ids) > now else end for ids in left.values()}
        values = logits(session, prompt, written)
        best = max(allowed, key=lambda token: float(values[token]))
        left = {word: ids for word, ids in left.items() if (ids[now] if len(ids) > now else end) == best}
        written.append(best)
    return next(iter(left)), tuple(written)


def test_the_greedy_choice_is_that_of_walking_by_hand(session):
    asked = {prompt: different(session, prompt) for prompt in PROMPTS}
    requests = [Request(prompt, choices=tuple(tokens), max_new_tokens=30) for prompt, tokens in asked.items()]
    requests.insert(1, Request(PROMPTS[0], max_new_tokens=6))  # writes what it likes, beside the others
    replies = session.generate(requests)
    assert replies.pop(1).text == session.generate([Request(PROMPTS[0], max_new_tokens=6)])[0].text
    for reply, (prompt, tokens) in zip(replies, asked.items(), strict=True):
        assert len(tokens) >= 5
        assert (reply.text, reply.token_ids) == walked(session, prompt, tokens)
        assert reply.finish == "stop"


def test_only_the_end_of_a_chat_is_read_for_each_choice(session):
    chat = "<|im_start|>user\nis the sky blue? " + "yes or no, " * 30 + "<|im_end|>\n<|im_start|>assistant\n"
    assert _since_special(session.tokenizer, chat) == "<|im_start|>assistant\n"
    assert _since_special(session.tokenizer, "no mark") == "no mark"
    words = tuple(different(session, chat))
    choices = session._choices(Request(chat, choices=words), 0, [0])
    assert choices.sequences == [continuation(session.tokenizer, Marked(chat), word) for word in words]


@pytest.mark.parametrize("session", ["prepend (Llama 2)", "bytes (Qwen)"], indirect=True)
def test_draws_follow_the_model_among_what_may_come(session):
    prompt, temperature = PROMPTS[0], 0.3
    tokens = different(session, prompt, ("yes", "yes and no", "no", "0 1"))
    end = session.tokenizer.eos_token_id

    def chances(left, written):
        if len(left) == 1:
            return {next(iter(left)): 1.0}
        now = len(written)
        steps = {word: ids[now] if len(ids) > now else end for word, ids in left.items()}
        allowed = sorted(set(steps.values()))
        shares = (logits(session, prompt, written)[allowed] / temperature).softmax(-1).tolist()
        found = {}
        for token, share in zip(allowed, shares, strict=True):
            further = {word: ids for word, ids in left.items() if steps[word] == token}
            found |= {word: share * chance for word, chance in chances(further, [*written, token]).items()}
        return found

    right = chances(tokens, [])
    count = 300
    asked = [
        Request(prompt, choices=tuple(tokens), temperature=temperature, seed=seed, max_new_tokens=30)
        for seed in range(count)
    ]
    session.batch_size = count
    texts = [reply.text for reply in session.generate(asked)]
    for word, chance in right.items():
        assert abs(texts.count(word) / count - chance) < 4 * (chance * (1 - chance) / count) ** 0.5 + 0.005, word
    assert sum(chance > 0.02 for chance in right.values()) >= 3  # else there is little to see


@pytest.mark.parametrize("session", ["bytes (Qwen)"], indirect=True)
def test_what_the_tokens_do_not_tell(session):
    """Too few tokens leave a beginning; texts of the same tokens, and a model that cannot end, are refused by name."""
    alike = ("the answer is x", "the answer is blue")
    reply = session.generate([Request(PROMPTS[0], choices=alike, max_new_tokens=1)])[0]
    assert reply.finish == "length"
    assert reply.text not in alike
    assert alike[0].startswith(reply.text)
    with pytest.raises(ConfigError, match="'a' and 'b' are the same tokens"):
        ChoiceTokens(("a", "b"), ([1], [1]), [0])
    with pytest.raises(ConfigError, match="'a' and 'ab' begin alike"):
        ChoiceTokens(("ab", "a"), ([1, 2], [1]), [])
    assert ChoiceTokens(("ab", "a"), ([1, 2], [3]), []).chosen([3]) == "a"


def test_tokens_that_may_follow_are_those_of_the_texts_that_remain():
    tokens = ChoiceTokens(("a", "ab", "abc", "d"), ([1], [1, 2], [1, 2, 3], [4]), [0, 9])
    assert tokens.following([]) == {1, 4}
    assert tokens.following([1]) == {0, 9, 2}
    assert tokens.following([1, 2]) == {0, 9, 3}
    assert tokens.following([1, 3]) == set()
    assert tokens.following([4, 0, 0]) == set()  # a row that is done and filled up
    assert [tokens.chosen(ids) for ids in ([], [1], [1, 2], [1, 0], [1, 2, 9], [1, 2, 3], [4], [1, 0, 7])] == [
        *(None, None, None),
        *("a", "ab", "abc", "d", "a"),
    ]
    assert tokens.chosen([5]) is tokens.chosen([0]) is None


AWKWARD = ("a.b", "a*b", "(x|y)[z]{2}", "^$?+", "back\\slash", 'qu"ote', "two words-dash #1", "line\nbreak", "é🙂")


def test_an_expression_matches_the_texts_and_nothing_else():
    pattern = re.compile(choices_pattern(AWKWARD))
    for text in AWKWARD:
        assert pattern.fullmatch(text)
        assert not pattern.fullmatch(text + "x")
    assert not any(pattern.fullmatch(text) for text in ("aXb", "aab", "x", "", "a"))


def test_a_grammar_writes_each_character_as_llama_cpp_reads_it():
    grammar = choices_grammar(['a"b\\', "\n\t\x7f", "é🙂[x]", "\u2028"])
    assert grammar == r'root ::= "a\"b\\" | "\x0A\x09\x7F" | "é🙂[x]" | "\u2028"'


@pytest.mark.parametrize("texts", [WORDS, AWKWARD, ("low", "low guard", "guard", "stand guard"), ("aa", "a", "aaa")])
def test_a_decisive_beginning_ends_no_other_text(texts):
    found = decisive(texts)
    for (part, text), other in itertools.product(found.items(), texts):
        assert text.startswith(part)
        assert (part in other) == (other == text)
    for text in set(texts) - set(found.values()):
        assert any(text in other for other in texts if other != text)


@pytest.mark.parametrize(
    ("accepts", "field", "value"),
    [
        (["structured_outputs"], "structured_outputs", {"choice": ["a.b", "c"]}),
        (["regex"], "regex", r"(a\.b|c)"),
        (["grammar", "prefill"], "grammar", 'root ::= "a.b" | "c"'),
    ],
)
def test_choices_are_sent_in_the_field_that_the_server_has(accepts, field, value):
    stub = Stub()
    with serving(stub) as url:
        engine = OpenAIEngine(url, "tiny", accepts=accepts)
        assert "choices" in engine.capabilities
        reply = engine.generate([Request("q", choices=("a.b", "c"))])[0]
        assert stub.seen[0][2][field] == value
        if field == "structured_outputs":
            assert (reply.text in ("a.b", "c"), reply.error) == (True, None)
        else:  # this server does not know the field
            assert "did not keep to the choices" in reply.error
        with pytest.raises(ConfigError, match="openai has no choices"):
            OpenAIEngine(url, "tiny", accepts=["prefill"]).generate([Request("q", choices=("a", "b"))])
