"""Agents over engines: a question becomes a prompt, what the model says becomes an answer.

>>> from tenfold.arena.latency import Fixed
>>> from tenfold.engines.requests import Reply
>>> class Echo:
...     name, capabilities = "echo", frozenset({"text"})
...     def generate(self, requests):
...         return [Reply("I would jab!", tokens=4, prompt_tokens=9) for _ in requests]
>>> player = Timed(EnginePlayer(Echo(), "echo"), Fixed(0.2))
>>> player.answer([Turn("You fight.", "They are near.", ("jab", "wait"))])
[Action(text='I would jab!', choice='jab', seconds=0.2, prompt_tokens=9, tokens=4)]
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

from tenfold.arena.agents import Action, Agent, Turn
from tenfold.arena.latency import Latency
from tenfold.engines.requests import Engine, Request
from tenfold.errors import ConfigError, RunError
from tenfold.models.simulated import refuse_simulated
from tenfold.stage.store import Store

MOST_TOKENS = 12
"""Longest answer of a model."""


class EnginePlayer:
    """A model as an agent.

    The prompt is the rules and then the state, so that what a cache holds of the rules is used again: as what a user
    says where there is a chat template, else as text. Where the engine can, the model writes exactly one of the answers
    (``choices``); elsewhere what it writes is read leniently (`spoken_choice`), and may be no answer at all.

    Answers are remembered by prompt: a question that comes again, under another latency for instance, costs nothing.

    Args:
        engine: any; it may be shared with others.
        name: of the player. Remembered answers are kept under it, so that two models need two names.
        chat: whether prompts go through the chat template; None is where there is one.
        temperature: of the sampling, by the question's seed; 0 takes the most probable answer.
        memory: where answers are remembered, such as a stage's ``context.store``; by default in this object.

    Raises:
        ConfigError: a temperature without an engine that takes seeds.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        *,
        chat: bool | None = None,
        temperature: float = 0.0,
        memory: Store | None = None,
    ) -> None:
        if temperature and "seed" not in engine.capabilities:
            raise ConfigError(f"{name}: temperature: {engine.name} takes no seed", remedy="leave temperature at 0")
        self.engine, self.name, self.temperature = engine, name, temperature
        self.chat = _has_template(engine) if chat is None else chat
        self.memory = Store(None) if memory is None else memory
        self.asked = self.inferred = self.invalid = 0
        """Questions, those of them that the engine was asked, and answers that were none."""

    def answer(self, questions: Sequence[Turn]) -> list[Action]:
        """One answer for each question; their ``seconds`` are those that the engine took when it was first asked.

        Raises:
            RunError: the engine failed; nothing is remembered of it.
        """
        keys = [self._key(question) for question in questions]
        new = {key: question for key, question in zip(keys, questions, strict=True) if key not in self.memory.entries}
        if new:
            replies = self.engine.generate([self._request(question) for question in new.values()])
            found = {}
            for (key, question), reply in zip(new.items(), replies, strict=True):
                if reply.error is not None:
                    raise RunError(
                        f"{self.name}: the engine {self.engine.name} failed: {reply.error}",
                        remedy="run the same command again: what is finished is kept",
                    )
                said = reply.text.strip()
                choice = said if said in question.answers else spoken_choice(said, question.answers)
                seconds = sum(astuple(reply.seconds))
                found[key] = [reply.text, choice, seconds, reply.prompt_tokens, reply.tokens]
            self.memory.add(found)
        answers = [Action(*self.memory.entries[key]) for key in keys]
        self.asked += len(answers)
        self.inferred += len(new)
        self.invalid += sum(answer.choice is None for answer in answers)
        return answers

    def _request(self, question: Turn) -> Request:
        prompt = f"{question.rules}\n\n{question.state}"
        # A text goes on behind "Your move:", else on a line of its own.
        space = " " if prompt.endswith(":") and not self.chat else ""
        fields: dict[str, Any] = {"max_new_tokens": MOST_TOKENS, "temperature": self.temperature, "seed": question.seed}
        if "choices" in self.engine.capabilities:
            fields["choices"] = tuple(space + answer for answer in question.answers)
        if self.chat:
            return Request(messages=[{"role": "user", "content": prompt}], **fields)
        return Request(prompt if space else prompt + "\n", **fields)

    def _key(self, question: Turn) -> str:
        drawn = (self.temperature, question.seed) if self.temperature else ()
        parts = [self.name, self.chat, *drawn, question.rules, question.state, question.answers]
        return "answer " + hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _has_template(engine: Engine) -> bool:
    """Whether messages can be sent: a session's tokenizer has a chat template or not; servers have one."""
    if hasattr(engine, "tokenizer"):
        return getattr(engine.tokenizer, "chat_template", None) is not None
    return "messages" in engine.capabilities


def spoken_choice(text: str, answers: Sequence[str]) -> str | None:
    """The answer that a free text names: the first one in it, as whole words, whatever case, marks and thoughts.

    >>> spoken_choice("<think>Not a jab.</think> **Low-Guard**, then jab.", ("jab", "low guard"))
    'low guard'
    >>> spoken_choice("jabbing", ("jab",)) is None
    True
    """
    said = _words(re.sub(r"<think>.*?(</think>|$)", " ", text, flags=re.DOTALL))
    places = [(said.find(f" {words} "), -len(words), answer) for answer in answers if (words := _words(answer).strip())]
    return min((place for place in places if place[0] >= 0), default=(0, 0, None))[2]


def _words(text: str) -> str:
    """Lower-case words with one space around each; a sign before a number belongs to it, a dash between letters not."""
    plain = re.sub(r"(?<=[^\W\d])-(?=[^\W\d])", " ", text.lower())
    return " " + " ".join(re.findall(r"[+-]?[^\W_]+", plain)) + " "


class Timed:
    """An agent whose answers take what a latency says.

    Args:
        agent: any. With a latency that measures, it is asked one question at a time.
        latency: what to charge.
    """

    def __init__(self, agent: Agent, latency: Latency) -> None:
        self.agent, self.latency, self.name = agent, latency, agent.name

    def answer(self, questions: Sequence[Turn]) -> list[Action]:
        """The agent's answers, with the latency's seconds.

        Raises:
            ConfigError: seconds are measured of a model that simulates its number formats.
        """
        if self.latency.measures:
            if (model := getattr(getattr(self.agent, "engine", None), "model", None)) is not None:
                remedy = "charge tokens, or play what runs in these formats, such as the exported file (llama.cpp:FILE)"
                refuse_simulated(model, f"latency: measured: {self.name}", remedy)
            answers = [self.agent.answer([question])[0] for question in questions]
        else:
            answers = self.agent.answer(questions)
        pairs = zip(questions, answers, strict=True)
        return [replace(answer, seconds=self.latency.seconds(question, answer)) for question, answer in pairs]


def at_latency(agent: Agent, latency: Latency) -> Agent:
    """The same agent with answers that take something else; of two threads, those of the fast one."""
    if isinstance(agent, TwoThread):
        return TwoThread(at_latency(agent.fast, latency), agent.slow, agent.plans, name=agent.name)
    found = Timed(agent.agent if isinstance(agent, Timed) else agent, latency)
    found.name = agent.name
    return found


@dataclass
class _Thread:
    """What a slow agent does in one game: the plan that is there, and the one that it is making."""

    time: float
    plan: str | None = None
    coming: str | None = None
    arrives: float | None = None

    def arrive(self, time: float) -> None:
        self.time = time
        if self.arrives is not None and self.arrives <= time:
            self.plan, self.coming, self.arrives = self.coming or self.plan, None, None


class TwoThread:
    """A fast agent that acts, and a slow one that plans meanwhile, all on the game's clock.

    The slow agent is asked for a plan at the first question of a game, and for the next one at the first question after
    its plan has arrived, each time by what stands then. The fast one is asked everything, with the last plan that has
    arrived between rules and state; its answers alone are charged.

    Args:
        fast: acts.
        slow: plans; its seconds say when a plan arrives.
        plans: what may be planned, each a short text.
        name: by default made of both.

    Raises:
        ConfigError: no plans.
    """

    def __init__(self, fast: Agent, slow: Agent, plans: Sequence[str], *, name: str = "") -> None:
        if not plans:
            raise ConfigError("plans: none are given", remedy="give the plans that the slow agent may choose from")
        self.fast, self.slow, self.plans = fast, slow, tuple(plans)
        self.name = name or f"{fast.name} with plans of {slow.name}"
        self._threads: dict[str, _Thread] = {}

    def answer(self, questions: Sequence[Turn]) -> list[Action]:
        """The fast agent's answers; questions of one game and side are answered one after the other."""
        if len({question.game for question in questions}) < len(questions):
            return [self.answer([question])[0] for question in questions]
        idle = {}
        for question in questions:
            thread = self._threads.get(question.game)
            if thread is None or question.time < thread.time:  # a new game
                thread = self._threads[question.game] = _Thread(question.time)
            thread.arrive(question.time)
            if thread.arrives is None:
                idle[question.game] = question
        ask = f"Do not act now. Answer with the plan to act by from now on, one of: {'; '.join(self.plans)}."
        asked = [
            replace(question, rules=f"{question.rules}\n\n{ask}", answers=self.plans) for question in idle.values()
        ]
        for question, plan in zip(asked, self.slow.answer(asked) if asked else [], strict=True):
            thread = self._threads[question.game]
            thread.coming, thread.arrives = plan.choice, question.time + plan.seconds
            thread.arrive(question.time)
        return self.fast.answer([self._with_plan(question) for question in questions])

    def _with_plan(self, question: Turn) -> Turn:
        plan = self._threads[question.game].plan
        return question if plan is None else replace(question, state=f"Your plan: {plan}.\n{question.state}")
