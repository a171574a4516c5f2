"""The benchmark that teaches the arena's agents: it asks, learns and scores what an engine's player would be asked."""

from __future__ import annotations

import pytest
import torch

from benchmarks import arena_agents as agents
from tenfold.adapt import adalora
from tenfold.arena.players import EnginePlayer
from tenfold.config.adalora import AdaLoraConfig
from tenfold.engines.session import Session


@pytest.fixture(scope="module")
def cut() -> tuple[object, object]:
    """The embedded model's first two layers; its answers are senseless, and differ from question to question."""
    return agents.embedded("cpu", 2)


@pytest.mark.parametrize("arena", agents.ARENAS)
def test_choices_are_those_of_an_engine(arena: str, cut: tuple[object, object]) -> None:
    asked = agents.questions(arena, "test", 5)
    chosen = agents.choose(cut[0], *agents.encode(asked, cut[1]))
    player = EnginePlayer(Session(*cut), "cut")
    said = [action.choice for action in player.answer([question.turn for question in asked])]
    assert [question.turn.answers[place] for question, place in zip(asked, chosen, strict=True)] == said


def test_the_loss_and_its_gradient_are_those_of_whole_rows() -> None:
    model, tokenizer = agents.embedded("cpu", 2)
    adapter = adalora.attach(model, AdaLoraConfig(budget="20k", paper={"init": "orthonormal"}), total_steps=10)
    for matrix in adapter.matrices.values():
        matrix.singular.data.fill_(0.3)
    weights = [parameter for parameter in adapter.model.parameters() if parameter.requires_grad]
    common, tokens = agents.encode(agents.questions("trading", "train", 2), tokenizer)
    loss = agents.loss_of(adapter.model, torch.tensor(common), tokens, any_good=False)
    found = torch.autograd.grad(loss, weights)
    count = sum(len(one.target) for one in tokens)
    expected = torch.zeros(())
    for one in tokens:
        ids = torch.tensor([[*common, *one.state, *one.target]])
        labels = ids.clone()
        labels[:, : -len(one.target)] = -100
        expected = expected + adapter.model(input_ids=ids, labels=labels).loss * len(one.target) / count
    torch.testing.assert_close(loss, expected)
    for one, other in zip(found, torch.autograd.grad(expected, weights), strict=True):
        assert (one - other).norm() < 1e-3 * other.norm()


def test_any_good_answer_counts() -> None:
    model, tokenizer = agents.embedded("cpu", 2)
    asked = [one for one in agents.questions("fighting", "train", 40) if len(one.good) > 1][:2]
    common, tokens = agents.encode(asked, tokenizer)
    with torch.no_grad():
        one, many = (
            agents.loss_of(model, torch.tensor(common), tokens, any_good=any_good) for any_good in (False, True)
        )
    assert many < one


def test_no_state_of_one_share_is_in_another() -> None:
    shares = [{question.turn.state for question in agents.questions("trading", share, 150)} for share in agents.SHARES]
    assert not shares[0] & shares[1] | shares[0] & shares[2] | shares[1] & shares[2]
    assert all(len(share) == 150 for share in shares)


def test_the_rate_falls_to_zero_by_steps_or_by_time() -> None:
    assert agents.rate(0, 100, 0.0) == pytest.approx(0.2)
    assert agents.rate(5, 100, 0.0) == 1
    assert agents.rate(99, 100, 0.0) < 0.01
    assert agents.rate(50, 100, 1.0) == 0
