"""The way to a server: tried again, within rates, several at once; a failure of one request spoils no other."""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tenfold.engines.openai import OpenAIEngine
from tenfold.engines.requests import Request
from tenfold.engines.transport import Rate
from tenfold.errors import ConfigError

from .stub import Stub, serving

ASK = Request("The sky is", max_new_tokens=3)


@pytest.fixture
def stub():
    return Stub()


@pytest.fixture
def client(stub):
    with serving(stub) as url:
        yield lambda **keys: OpenAIEngine(url, "tiny", **{"pause": 0.01, **keys})


@pytest.mark.parametrize("first", [(429, {}), (500, {}), (503, {}), "drop", "garbage"], ids=str)
def test_what_may_pass_is_tried_again(stub, client, first):
    right = client().generate([ASK])[0].text
    stub.script, before = [first, first], len(stub.seen)
    reply = client().generate([ASK])[0]
    assert (reply.text, reply.error, reply.finish) == (right, None, "length")
    assert len(stub.seen) - before == 3


def test_an_error_is_no_empty_text_and_spoils_no_other_reply(stub, client):
    stub.script = [(503, {})] * 3
    first, second = client(retries=2, concurrency=1).generate([ASK, ASK])
    assert (first.finish, first.text, second.error) == ("error", "", None)
    assert "HTTP 503" in first.error
    assert "tried 3 times" in first.error
    assert second.text
    stub.script = [(400, {})]
    before = len(stub.seen)
    assert "HTTP 400" in client().generate([ASK])[0].error
    assert len(stub.seen) - before == 1  # the same request would be refused again


def test_pauses_grow_and_the_server_may_name_them(stub, client):
    stub.script = [(503, {})] * 3
    client(pause=0.1).generate([ASK])
    times = [seen[0] for seen in stub.seen]
    gaps = [second - first for first, second in itertools.pairwise(times)]
    assert [gap >= least for gap, least in zip(gaps, (0.05, 0.1, 0.2), strict=True)] == [True] * 3
    stub.seen.clear()
    stub.script = [(429, {"Retry-After": "0.4"})]
    client().generate([ASK])
    assert stub.seen[1][0] - stub.seen[0][0] >= 0.4


def test_silence_and_no_server_are_errors_of_the_reply(stub, client):
    stub.delay = 0.5
    reply = client(timeout=0.1, retries=1).generate([ASK])[0]
    assert reply.error == "no answer within 0.1 s, tried 2 times"
    assert reply.seconds.queue >= 0.2
    gone = OpenAIEngine("http://127.0.0.1:9/v1", "tiny", retries=0).generate([ASK])[0]
    assert gone.error.startswith("no connection")


def test_no_more_at_once_than_asked_for(stub, client):
    stub.delay = 0.05
    client(concurrency=3).generate([ASK] * 9)
    assert stub.most == 3
    engine = client(concurrency=2)
    stub.most = 0
    with ThreadPoolExecutor(3) as pool:  # as agents and judges share an engine
        list(pool.map(engine.generate, [[ASK] * 3] * 3))
    assert stub.most == 2


class NotedRate(Rate):
    """Remembers when each request was let through: when it reaches the server is the machine's business."""

    def take(self, amount):
        entry = super().take(amount)
        self.times = [*getattr(self, "times", []), entry[0]]
        return entry


def test_rates_are_kept(stub, client):
    engine = client(concurrency=4)
    engine.sender.requests = rate = NotedRate(2, window=0.4)
    engine.generate([ASK] * 5)
    times = sorted(rate.times)
    assert len(times) == 5
    assert all(later - earlier >= 0.4 for earlier, later in zip(times, times[2:], strict=False))
    engine = client(concurrency=1)
    engine.sender.tokens = Rate(15, window=0.4)  # each costs 13, as the server says: 10 read, 3 written
    began = time.monotonic()
    engine.generate([ASK] * 3)
    assert time.monotonic() - began >= 0.8
    assert [round(entry[1]) for entry in engine.sender.tokens._taken] == [13]


def test_what_is_sent(stub, client):
    talk = [{"role": "user", "content": "Hi"}]
    engine = client(key="secret", accepts=["prefill", "grammar"], options={"top_k": 5})
    engine.generate([Request(messages=talk, prefill="He", grammar="root ::= [a-z]+", stop=("\n",), seed=4)])
    _, path, body, authorised = stub.seen[0]
    assert (path, authorised) == ("/v1/chat/completions", "Bearer secret")
    assert body["messages"] == [*talk, {"role": "assistant", "content": "He"}]
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    assert (body["grammar"], body["stop"], body["seed"], body["top_k"]) == ("root ::= [a-z]+", ["\n"], 4, 5)
    assert "secret" not in repr(engine.sender)


def test_scores_that_a_server_does_not_give_are_refused(stub, client):
    stub.scores = False
    for request in (ASK, Request(messages=[{"role": "user", "content": "Hi"}])):
        with pytest.raises(ConfigError, match="gives no log-probabilities"):
            client().score([request], ["a"])


def test_a_choice_that_a_chat_server_does_not_name_is_an_error_of_the_reply(client):
    reply = client().score([Request(messages=[{"role": "user", "content": "Hi"}])], ["two words"])[0]
    assert reply.finish == "error"
    assert "'two words' is not among the 20" in reply.error


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"concurrency": 0}, "concurrency"),
        ({"retries": -1}, "retries"),
        ({"timeout": 0}, "timeout"),
        ({"accepts": ["x"]}, "accepts"),
    ],
)
def test_settings_that_cannot_be_meant(client, keys, message):
    with pytest.raises(ConfigError, match=message):
        client(**keys)
