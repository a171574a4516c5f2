"""Curves of reward: intervals that know what is paired, and points that are measured once."""

import numpy as np
import pytest
from scipy import stats

from tenfold.arena.curves import RewardCurve, curves_figure, curves_table, reward_curve
from tenfold.core.statistics import wilson
from tenfold.errors import ConfigError
from tenfold.report.plots import draw
from tenfold.stage.store import Store

SEEDS = range(30)


def market(latency, seed):
    """A day is good or bad for everyone; each second of latency costs a little."""
    rng = np.random.default_rng(seed)
    return 10 * rng.standard_normal() - latency + 0.1 * rng.standard_normal()


def test_points_share_their_seeds_so_that_a_difference_is_sure_where_a_level_is_not():
    curve = reward_curve("bot", [0.0, 0.5, 1.0], market, SEEDS)
    assert curve.rewards[1][4] == market(0.5, 4)
    for values, mean, (low, high) in zip(curve.rewards, curve.means, curve.intervals, strict=True):
        right = stats.t.interval(0.95, 29, np.mean(values), stats.sem(values))
        assert (mean, low, high) == pytest.approx((np.mean(values), *right))
    assert curve.intervals[0][0] < curve.means[2]  # by themselves the points cannot be told apart
    change, (low, high) = curve.change(2, 0)
    assert change == pytest.approx(-1)
    assert high - low < 0.01
    assert curve.best == (0,)


def test_the_best_point_comes_with_those_that_may_be_as_good():
    rng = np.random.default_rng(2)
    noise = rng.standard_normal((3, 40))
    rewards = tuple(tuple(row) for row in np.array([[0.0], [0.1], [-3.0]]) + noise)
    curve = RewardCurve("bot", (0.1, 0.2, 0.4), rewards)
    assert set(curve.best) == {0, 1}
    figure = curves_figure([curve], title="t", x_label="latency, s", y_label="yield")
    first, other = (curve.x[at] for at in curve.best)
    assert figure.caption == f"bot is best at {first}; cannot separate from {other}."


def test_scores_have_intervals_to_whom_winning_all_is_no_certainty():
    curve = reward_curve(
        "bot", [1.0, 2.0], lambda point, seed: 1.0 if point == 1 else seed % 2 / 2, SEEDS, bounded=True
    )
    assert curve.intervals == (wilson(30, 30), wilson(7.5, 30))
    assert curve.intervals[0][0] < 0.9


def test_each_point_is_measured_once(tmp_path):
    seen = []

    def measure(latency, seed):
        if len(seen) == 7:
            raise KeyboardInterrupt
        seen.append((latency, seed))
        return market(latency, seed)

    store = tmp_path / "store.jsonl"
    with pytest.raises(KeyboardInterrupt):
        reward_curve("bot", [0.0, 1.0], measure, range(5), store=Store(store))
    done, seen[:] = list(seen), []
    curve = reward_curve("bot", [0.0, 1.0], measure, range(5), store=Store(store))
    assert len(done + seen) == len(set(done + seen)) == 10
    assert curve == reward_curve("bot", [0.0, 1.0], market, range(5))
    told = []
    reward_curve("other", ["q4", "q8"], lambda name, seed: 0.0, range(2), tell=lambda *now: told.append(now))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_curves_as_data_for_the_report():
    curves = [reward_curve(name, [0.0, 0.5], market, range(5)) for name in ("one", "other")]
    figure = curves_figure(curves, title="Reward over latency", x_label="latency, s", y_label="yield")
    assert [series.name for series in figure.series] == ["one", "other"]
    assert figure.series[0].x == (0.0, 0.5)
    assert figure.series[0].y == curves[0].means
    assert figure.series[0].low[1] == curves[0].intervals[1][0]
    assert draw(figure).startswith("<svg")
    table = curves_table(curves, title="Reward over latency", x_label="latency, s")
    assert [row[:2] for row in table.rows] == [("one", 0.0), ("one", 0.5), ("other", 0.0), ("other", 0.5)]
    assert table.rows[0][4] == ""
    assert table.rows[1][4].startswith("-0.5000 [-0.5000")
    single = curves_figure([reward_curve("one", [0.0], market, [1])], title="t", x_label="x", y_label="y")
    assert single.series[0].low is None  # one seed says nothing of the spread
    assert table.columns[3:] == (
        "95 % interval (Student's t, over seeds)", "change from the first (Student's t, paired by seed)",
    )  # fmt: skip


def test_one_seed_is_not_judged():
    """Of a recorded day, or of a single pair of games: there are no intervals, and no point is the best."""
    for bounded in (False, True):
        curve = RewardCurve("bot", (0.0, 1.0), ((0.5,), (0.25,)), bounded)
        assert curves_figure([curve], title="t", x_label="x", y_label="y").caption == ""
        table = curves_table([curve], title="t", x_label="x")
        assert table.rows[1][4] == "-0.2500 –"
        assert (table.rows[0][3] == "–") is not bounded  # Wilson's holds for one game as well
        assert table.columns[3].startswith("95 % interval (Wilson" if bounded else "95 % interval (Student")
        assert "inf" not in str(table.rows)


@pytest.mark.parametrize(
    ("x", "seeds", "message"), [([], [1], "points"), ([1.0, 1.0], [1], "points"), ([1.0], [], "seeds")]
)
def test_what_cannot_be_meant(x, seeds, message):
    with pytest.raises(ConfigError, match=f"bot: {message}"):
        reward_curve("bot", x, market, seeds)
