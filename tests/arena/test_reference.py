"""The arena's own models: what they are, where they play, and that they know what is said of them."""

import pytest

from tenfold.arena.labelled import labelled_questions
from tenfold.arena.players import EnginePlayer
from tenfold.arena.reference import FOLDER, open_reference, taught
from tenfold.arena.trading.synthetic import MarketRules
from tenfold.config.arena import parse_agent
from tenfold.engines.session import Session
from tenfold.errors import ConfigError
from tenfold.models.embedded import demo_file

from ..runs import execute

needs_demo = pytest.mark.skipif(demo_file() is None, reason="the demo model is not installed")
SHIPPED = [(folder.name.partition("-")[0], folder) for folder in sorted(FOLDER.iterdir())]


@pytest.mark.parametrize(("arena", "folder"), SHIPPED, ids=[folder.name for _, folder in SHIPPED])
def test_what_is_shipped_is_small_and_says_what_it_is(arena, folder):
    name = folder.name.replace(arena, "reference").replace("-", ":")
    found, agent = taught(arena, name)
    assert found == folder
    assert agent.arena == arena
    assert 0.5 < agent.quality <= 1
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2 * 2**20


@needs_demo
@pytest.mark.slow
@pytest.mark.parametrize(("arena", "folder"), SHIPPED, ids=[folder.name for _, folder in SHIPPED])
def test_it_answers_as_well_as_it_says(arena, folder):
    """On questions that it was not taught by, through the engine that plays: at most four standard errors below."""
    name = folder.name.replace(arena, "reference").replace("-", ":")
    agent = taught(arena, name)[1]
    asked = labelled_questions(arena, 30_000_000, 16, MarketRules(easy=agent.easy))
    player = EnginePlayer(Session(open_reference(arena, name, dtype="float32", device="cpu")), name)
    actions = player.answer([question.turn for question in asked])
    right = sum(action.choice in question.good for action, question in zip(actions, asked, strict=True))
    spread = (agent.quality * (1 - agent.quality) / 16) ** 0.5 + 0.01
    assert right / 16 > agent.quality - 4 * spread


def test_who_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"agents: reference:third does not play trading"):
        taught("trading", "reference:third")
    with pytest.raises(ValueError, match="reference:half"):
        parse_agent("reference:third")


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"use": "trading", "agents": ["reference"]}, "synthetic.easy: true"),
        ({"use": "choose", "agents": ["reference", "random"]}, "synthetic.easy: true"),
    ],
)
def test_another_market_is_refused(stage, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        execute({"stages": [stage]}, tmp_path / "out")


@needs_demo
@pytest.mark.slow
def test_it_trades(tmp_path):
    stage = {"use": "trading", "agents": ["reference", "random"], "days": 1, "synthetic": {"events": 6, "easy": True}}
    summary = execute({"stages": [stage]}, tmp_path / "out")[0]
    shares = {result.subject: result.metrics for result in summary.results}
    right = next(metric for metric in shares["reference"] if metric.name == "right_readings")
    assert right.value >= 5 / 6
