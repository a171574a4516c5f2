"""Agents over engines: what the model is asked, what its words come to, what is remembered, who plans when."""

from dataclasses import dataclass, replace

import pytest

from tenfold.arena.agents import Action, Turn
from tenfold.arena.latency import Fixed, Measured, Tokens
from tenfold.arena.players import EnginePlayer, Timed, TwoThread, spoken_choice
from tenfold.engines.requests import Reply, Seconds
from tenfold.errors import ConfigError, RunError
from tenfold.stage.store import Store

MOVES = ("jab", "low guard", "guard", "wait")
ASKED = Turn("You fight.", "They are near.", MOVES, seed=5)


class Talker:
    """An engine that says the next of some texts to each request, and notes what it was asked."""

    name = "talker"

    def __init__(self, *texts, capabilities=("text", "messages", "seed")):
        self.texts, self.capabilities = list(texts), frozenset(capabilities)
        self.seen, self.calls = [], 0

    def generate(self, requests):
        self.calls += 1
        replies = []
        for request in requests:
            text = self.texts[len(self.seen) % len(self.texts)]
            self.seen.append(request)
            seconds = Seconds(0.1, 0.2, 0.3, 0.05)
            replies.append(Reply(text, tokens=len(text), prompt_tokens=40, seconds=seconds))
        return replies


def states(count):
    return [replace(ASKED, state=f"state {n}") for n in range(count)]


def test_the_constant_part_comes_first_and_chat_is_used_where_it_can_be():
    talker = Talker("jab")
    EnginePlayer(talker, "a").answer(states(2))
    contents = [request.messages[0]["content"] for request in talker.seen]
    assert [(request.messages[0]["role"], len(request.messages)) for request in talker.seen] == [("user", 1)] * 2
    assert contents == ["You fight.\n\nstate 0", "You fight.\n\nstate 1"]
    assert {request.max_new_tokens for request in talker.seen} == {12}
    plain = Talker("jab", capabilities=["text"])
    EnginePlayer(plain, "a").answer([ASKED])
    assert plain.seen[0].text == "You fight.\n\nThey are near.\n"

    going_on = Talker(" low guard", capabilities=["text", "choices"])
    answer = EnginePlayer(going_on, "a").answer([replace(ASKED, state="They are near.\nYour move:")])[0]
    assert going_on.seen[0].text.endswith("They are near.\nYour move:")
    assert going_on.seen[0].choices == (" jab", " low guard", " guard", " wait")
    assert answer.choice == "low guard"

    @dataclass
    class Tokenizer:
        chat_template: str | None

    for template in (None, "{{ messages }}"):
        session = Talker("jab")
        session.tokenizer = Tokenizer(template)
        EnginePlayer(session, "a").answer([ASKED])
        EnginePlayer(session, "b", chat=True).answer([ASKED])
        assert bool(session.seen[0].messages) == (template is not None)
        assert session.seen[1].messages


def test_the_model_is_held_to_the_answers_where_the_engine_can():
    can, cannot = Talker("jab", capabilities=["text", "choices"]), Talker("jab", capabilities=["text"])
    for talker in (can, cannot):
        EnginePlayer(talker, "a").answer([ASKED])
    assert (can.seen[0].choices, cannot.seen[0].choices) == (MOVES, ())


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("jab", "jab"),
        (" Jab!\n", "jab"),
        ("I will use low guard now", "low guard"),
        ("**Low-Guard**", "low guard"),
        ("low_guard", "low guard"),
        ("- Guard, then jab", "guard"),
        ("WAIT or jab", "wait"),
        ("<think>jab? no</think> wait", "wait"),
        ("<think>jab? maybe", None),
        ("jabbing", None),
        ("", None),
        ("uppercut", None),
    ],
)
def test_free_texts_are_read_leniently(text, choice):
    assert spoken_choice(text, MOVES) == choice


def test_numbers_keep_their_signs():
    assert [spoken_choice(text, ("3", "-3", "+3")) for text in ("I sell -3.", "+3", "so 3")] == ["-3", "+3", "3"]


def test_an_answer_that_is_none_is_counted_and_costs_its_time():
    player = EnginePlayer(Talker("jab", "what?", "wait"), "a")
    answers = Timed(player, Tokens(100, 10)).answer(states(3))
    assert [answer.choice for answer in answers] == ["jab", None, "wait"]
    assert answers[1].text == "what?"
    assert [answer.seconds for answer in answers] == pytest.approx([0.4 + 0.3, 0.4 + 0.5, 0.4 + 0.4])
    assert (player.asked, player.invalid) == (3, 1)


def test_a_sweep_over_latencies_asks_the_engine_once(tmp_path):
    talker, file = Talker("jab", "wait", "guard"), tmp_path / "store.jsonl"
    player = EnginePlayer(talker, "a", memory=Store(file))
    first = player.answer(states(6) + states(3))  # some twice in one call
    assert len(talker.seen) == 6
    assert first[6:] == first[:3]
    for latency in range(10):
        answers = Timed(player, Fixed(latency / 10)).answer(states(6))
        assert [answer.choice for answer in answers] == [answer.choice for answer in first[:6]]
        assert {answer.seconds for answer in answers} == {latency / 10}
    again = EnginePlayer(Talker("never"), "a", memory=Store(file))  # another process, or a resumed run
    assert again.answer(states(6)) == first[:6]
    assert (player.inferred, again.inferred, talker.calls) == (6, 0, 1)
    assert first[0].seconds == pytest.approx(0.65)


def test_what_decides_an_answer_is_what_it_is_remembered_by():
    memory, talker = Store(None), Talker("jab")
    asked = [
        ASKED,
        replace(ASKED, rules="Other rules."),
        replace(ASKED, state="They are far."),
        replace(ASKED, answers=("jab", "wait")),
    ]
    EnginePlayer(talker, "a", memory=memory).answer(asked)
    assert len(talker.seen) == 4
    EnginePlayer(talker, "a", memory=memory).answer([replace(ASKED, seed=6, time=3.0, game="x", view=object())])
    assert len(talker.seen) == 4  # greedy: the seed plays no part
    EnginePlayer(talker, "b", memory=memory).answer([ASKED])
    warm = EnginePlayer(talker, "a", memory=memory, temperature=1.0)
    warm.answer([ASKED, replace(ASKED, seed=6), ASKED])
    assert len(talker.seen) == 7
    assert [(request.temperature, request.seed) for request in talker.seen[5:]] == [(1.0, 5), (1.0, 6)]
    with pytest.raises(ConfigError, match="a: temperature"):
        EnginePlayer(Talker("jab", capabilities=["text"]), "a", temperature=1.0)


def test_an_engine_that_fails_is_no_invalid_answer():
    class Broken(Talker):
        def generate(self, requests):
            return [Reply("jab"), *(Reply(finish="error", error="HTTP 503") for _ in requests[1:])]

    player = EnginePlayer(Broken("jab"), "a")
    with pytest.raises(RunError, match="a: the engine talker failed: HTTP 503"):
        player.answer(states(2))
    assert (player.invalid, player.memory.entries) == (0, {})


def test_what_is_measured_is_asked_alone(tmp_path):
    talker = Talker("jab")
    measured = Measured(tmp_path / "trace.jsonl")
    answers = Timed(EnginePlayer(talker, "a"), measured).answer(states(3))
    assert talker.calls == 3
    assert [answer.seconds for answer in answers] == pytest.approx([0.65] * 3)
    Timed(EnginePlayer(talker, "b"), Fixed(0)).answer(states(3))
    assert talker.calls == 4


class Scripted:
    """Answers with a function of the question, after some seconds."""

    def __init__(self, name, decide, seconds):
        self.name, self.decide, self.seconds, self.seen = name, decide, seconds, []

    def answer(self, questions):
        self.seen += questions
        return [Action("", self.decide(question), self.seconds) for question in questions]


def two_threads(slow_seconds, decide=lambda question: question.state):
    fast = Scripted("fast", lambda question: "jab", 0.1)
    slow = Scripted("slow", decide, slow_seconds)
    return TwoThread(fast, slow, ("attack", "keep away")), fast, slow


def test_a_plan_counts_from_when_it_arrives_and_the_next_one_is_made_then():
    """Asked at 0, 0.4, ... with a plan a second: each plan is made of what stood when the last one was there."""
    agent, fast, slow = two_threads(1.0)
    times = [0.4 * n for n in range(8)]
    for n, time in enumerate(times):
        answer = agent.answer([Turn("r", f"s{n}", MOVES, time=time, game="g")])[0]
        assert (answer.choice, answer.seconds) == ("jab", 0.1)
    assert [(question.state, question.answers) for question in slow.seen] == [
        (state, ("attack", "keep away")) for state in ("s0", "s3", "s6")
    ]
    assert [question.state for question in fast.seen[:4]] == ["s0", "s1", "s2", "Your plan: s0.\ns3"]
    plans = [question.state.removesuffix(f"s{n}") for n, question in enumerate(fast.seen)]
    assert plans[3:] == ["Your plan: s0.\n"] * 3 + ["Your plan: s3.\n"] * 2
    assert all(question.rules == "r" for question in fast.seen)
    assert slow.seen[0].rules.startswith("r\n\nDo not act now")
    assert slow.seen[0].rules.endswith("one of: attack; keep away.")
    assert agent.name == "fast with plans of slow"


def test_a_plan_without_delay_counts_at_once_and_an_invalid_one_never():
    agent, fast, slow = two_threads(0.0)
    agent.answer([Turn("r", "s0", MOVES, game="g")])
    assert fast.seen[0].state == "Your plan: s0.\ns0"
    agent, fast, slow = two_threads(0.5, lambda question: "attack" if question.state == "s0" else None)
    for n in range(4):
        agent.answer([Turn("r", f"s{n}", MOVES, time=float(n), game="g")])
    assert len(slow.seen) == 4
    assert ["attack" in question.state for question in fast.seen] == [False, True, True, True]


def test_a_day_that_is_asked_at_once_is_planned_as_it_goes():
    """Questions of one game in one batch give what they give one after the other."""
    turns = [Turn("r", f"s{n}", MOVES, time=0.4 * n, game="g") for n in range(8)]
    (together, fast, slow), (alone, fast_alone, slow_alone) = two_threads(1.0), two_threads(1.0)
    assert together.answer(turns) == [alone.answer([turn])[0] for turn in turns]
    assert [one.state for one in fast.seen] == [one.state for one in fast_alone.seen]
    assert [one.state for one in slow.seen] == [one.state for one in slow_alone.seen] == ["s0", "s3", "s6"]


def test_games_do_not_share_plans_and_a_new_one_begins_without():
    agent, fast, slow = two_threads(1.0)
    for time in (0.0, 2.0):
        agent.answer([Turn("r", f"{game} {time}", MOVES, time=time, game=game) for game in "ab"])
    assert [question.state for question in fast.seen[2:]] == [
        "Your plan: a 0.0.\na 2.0",
        "Your plan: b 0.0.\nb 2.0",
    ]
    agent.answer([Turn("r", "again", MOVES, time=0.0, game="a")])
    assert fast.seen[-1].state == "again"
    assert slow.seen[-1].state == "again"
    with pytest.raises(ConfigError, match="plans"):
        TwoThread(fast, slow, ())


def test_a_model_of_transformers_plays():
    """Constrained, in batches, and the same however the questions are asked."""
    from tenfold.engines.session import Session
    from tenfold.models.tiny import tiny_model

    asked = [replace(ASKED, state=f"They are {n} px away.\nYour move:") for n in range(6)]
    opened = tiny_model("llama")
    player = EnginePlayer(Session(opened, batch_size=4), "tiny")
    assert player.chat
    answers = player.answer(asked)
    assert {answer.choice for answer in answers} <= set(MOVES)
    assert player.invalid == 0
    assert all(0 < answer.tokens <= 12 < answer.prompt_tokens and answer.seconds > 0 for answer in answers)
    alone = EnginePlayer(Session(opened), "tiny")
    assert [alone.answer([question])[0].choice for question in asked] == [answer.choice for answer in answers]
    opened.tokenizer.chat_template = None
    plain = EnginePlayer(Session(opened), "tiny")
    assert not plain.chat
    assert plain.answer(asked[:1])[0].choice in MOVES
