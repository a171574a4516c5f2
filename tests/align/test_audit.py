"""The audit: flags by hand, probabilities that hold in simulated data, and what becomes of the rows."""

from __future__ import annotations

import csv
import math
import time
from dataclasses import fields

import pytest
import torch

from tenfold.align import margins as scoring
from tenfold.align.audit.judging import Verdict, audit, audit_groups, cleaned_rows, worst_pairs, write_csv
from tenfold.align.margins import score_pairs
from tenfold.align.r3m.losses import expected_flags, kink
from tenfold.data.read import read_rows
from tenfold.data.rows import Preference
from tenfold.errors import ConfigError, DataError
from tenfold.evaluate.ranking import precision_at, roc_auc
from tenfold.models.tiny import tiny_model


def sigma(x):
    return 1 / (1 + math.exp(-x))


def simulated(seed, share, count=4000, spread=3.0):
    """Margins of a perfect model on labels drawn by Bradley-Terry, of which a share was flipped; and which."""
    generator = torch.Generator().manual_seed(seed)
    better = torch.randn(count, generator=generator, dtype=torch.float64) * spread
    label = torch.rand(count, generator=generator, dtype=torch.float64) < torch.sigmoid(better)
    wrong = torch.rand(count, generator=generator, dtype=torch.float64) < share
    return torch.where(label ^ wrong, better, -better), wrong.tolist()


def ids(count):
    return [f"row {n}" for n in range(count)]


def test_every_figure_by_hand():
    margins = [2.0, -4.0, 0.1, -1.0, -4.0, -2.0]
    found = audit(margins, ["a", "c", "d", "e", "b", "f"], lam=0.85)
    c = math.log(0.15 / 0.85)
    assert [v.id for v in found.verdicts] == ["a", "c", "d", "e", "b", "f"]
    assert [v.margin for v in found.verdicts] == margins
    assert [v.rank for v in found.verdicts] == [6, 2, 5, 4, 1, 3], "equal margins by id"
    assert [v.flagged for v in found.verdicts] == [False, True, False, False, True, True]
    for verdict, m in zip(found.verdicts, margins, strict=True):
        assert verdict.p_label == pytest.approx(sigma(m))
        assert verdict.delta == pytest.approx(max(c - m, 0))
        assert verdict.flagged == (sigma(m) < 0.15)
    chances = [sigma(-2), sigma(-4), sigma(-4), sigma(-2)]
    assert found.flags == 3
    assert found.expected == pytest.approx(sum(chances))
    stderr = math.sqrt(sum(p * (1 - p) for p in chances))
    assert found.expected_stderr == pytest.approx(stderr)
    assert found.excess == pytest.approx(3 - sum(chances))
    assert found.interval == pytest.approx((found.excess - 1.96 * stderr, found.excess + 1.96 * stderr), rel=1e-4)
    assert (found.share_wrong, found.share_interval[0]) == (0.0, 0.0), "six pairs tell nothing"


def test_bayes_and_the_suggestions():
    # A sure model, and a few labels that contradict it.
    margins = [3.0, 6.0, 4.0, 5.0] * 40 + [0.5] * 12 + [-0.5] * 6 + [-6.0] * 8 + [-2.8, -1.9]
    found = audit(margins, ids(len(margins)), lam=0.85)
    e, t = found.share_wrong, found.temperature
    assert 0.01 < found.share_interval[0] < e < found.share_interval[1] < 0.12

    def nats(e, t):
        return -sum(math.log(e + (1 - 2 * e) * sigma(m / t)) for m in margins)

    near = [nats(e + de, t * dt) for de in (-0.005, 0, 0.005) for dt in (0.95, 1, 1.05)]
    assert nats(e, t) == min(near), "the most likely share and temperature"
    for verdict in found.verdicts:
        p = sigma(verdict.margin / t)
        assert verdict.p_wrong == pytest.approx(e * (1 - p) / (e * (1 - p) + (1 - e) * p))
        assert verdict.p_label == pytest.approx(sigma(verdict.margin))
        expected = "keep" if not verdict.flagged else "review"
        if verdict.p_wrong >= 0.5:
            expected = "flip" if verdict.p_wrong >= 0.9 else "drop"
        assert verdict.suggestion == expected
    assert {v.suggestion for v in found.verdicts if v.margin == -6.0} == {"flip"}
    assert {v.suggestion for v in found.verdicts if v.margin > 0} == {"keep"}


@pytest.mark.parametrize("scale", [0.3, 5.0])
def test_suggestions_do_not_depend_on_how_sure_the_model_is(scale):
    margins, wrong = simulated(1, 0.15)
    first, second = audit(margins, ids(4000), 0.85), audit(margins * scale, ids(4000), 0.85)
    assert second.share_wrong == pytest.approx(first.share_wrong, abs=1e-3)
    assert second.temperature == pytest.approx(scale * first.temperature, rel=1e-2)
    suspects = [[v.suggestion in ("drop", "flip") for v in found.verdicts] for found in (first, second)]
    assert sum(a != b for a, b in zip(*suspects, strict=True)) < 10
    assert sum(w for w, s in zip(wrong, suspects[0], strict=True) if s) > 0.75 * sum(suspects[0]) > 0
    assert abs(first.flags - second.flags) > 50, "flags do"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
def test_the_interval_of_the_share_covers_it_as_often_as_it_says(share):
    found = [audit(simulated(seed, share, 800)[0], ids(800), 0.85).share_interval for seed in range(60)]
    assert sum(low <= share <= high for low, high in found) >= 53
    assert sum(high - low for low, high in found) / 60 < 0.25


def test_where_the_flags_may_be_chance_nothing_is_taken_out():
    found = [audit(simulated(seed, share=0.0)[0], ids(4000), lam=0.85) for seed in range(10)]
    assert all(one.flags > 50 for one in found)
    clean = [one for one in found if one.share_interval[0] == 0]
    assert len(clean) >= 8, "an interval of 95 % leaves 0 out in one of forty, at this end"
    for one in clean:
        assert one.share_wrong == 0
        assert {v.suggestion for v in one.verdicts} == {"keep", "review"}
    assert all(one.count("drop") + one.count("flip") < 20 for one in found)


def test_a_label_that_the_model_agrees_with_is_kept_though_flagged():
    # Below lam 0.5 the kink is above 0.
    found = audit([0.5, -9.0, 5.0, 6.0], ids(4), lam=0.25)
    assert [v.flagged for v in found.verdicts] == [True, True, False, False]
    assert found.verdicts[0].suggestion == "keep"


@pytest.mark.parametrize("lam", [0.35, 0.65, 0.85, 0.95])
def test_the_interval_covers_clean_data_as_often_as_it_says(lam):
    covered = 0
    for seed in range(200):
        margins, _ = simulated(seed, 0.0, 1500)
        expected, stderr = expected_flags(margins, lam)
        covered += abs(int((margins < kink(lam)).sum()) - expected) <= 1.96 * stderr
    assert 180 <= covered <= 198


@pytest.mark.parametrize("share", [0.03, 0.1, 0.25])
def test_estimates_and_probabilities_hold_where_the_model_is_right(share):
    margins, wrong = simulated(7, share, count=20_000)
    found = audit(margins, ids(len(margins)), lam=0.85)
    assert found.share_wrong == pytest.approx(share, abs=0.01)
    p_wrong = [v.p_wrong for v in found.verdicts]
    assert sum(p_wrong) == pytest.approx(sum(wrong), rel=0.1)
    for low, high in ((0.0, 0.1), (0.1, 0.5), (0.5, 0.9), (0.9, 1.01)):
        bin_ = [(p, w) for p, w in zip(p_wrong, wrong, strict=True) if low <= p < high]
        mean, truth = sum(p for p, _ in bin_) / len(bin_), sum(w for _, w in bin_) / len(bin_)
        assert truth == pytest.approx(mean, abs=0.06)
    flips = [w for v, w in zip(found.verdicts, wrong, strict=True) if v.suggestion == "flip"]
    assert sum(flips) > 0.9 * len(flips) > 0
    # delta, and the rank behind it, find the wrong labels.
    delta = [v.delta for v in found.verdicts]
    assert roc_auc(delta, wrong) > 0.7
    worst = sorted(found.verdicts, key=lambda v: v.rank)[:200]
    expected = sum(v.p_wrong for v in worst) / 200
    assert precision_at([-v.rank for v in found.verdicts], wrong, 200) == pytest.approx(expected, abs=0.08)


def test_table(tmp_path):
    found = audit([1.0, -4.0, 2.0], ["a", 'b, "x"', "é\n"], lam=0.85)
    write_csv(tmp_path / "audit.csv", found)
    with (tmp_path / "audit.csv").open(encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file)
    assert header == [field.name for field in fields(Verdict)]
    assert header[:7] == ["id", "margin", "p_label", "delta", "rank", "flagged", "p_wrong"]
    assert [line[0] for line in lines] == ['b, "x"', "a", "é\n"], "most doubtful first"
    assert [float(line[1]) for line in lines] == [-4.0, 1.0, 2.0]
    assert [line[5] for line in lines] == ["True", "False", "False"]


def test_bad_annotators_come_first():
    """A crowd of fifty of whom five turn over every third label, the others every fiftieth."""
    found = []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        better = torch.randn(5000, generator=generator, dtype=torch.float64) * 3
        label = torch.rand(5000, generator=generator, dtype=torch.float64) < torch.sigmoid(better)
        who = torch.randint(50, (5000,), generator=generator)
        rate = torch.where(who < 5, 1 / 3, 0.02)
        wrong = torch.rand(5000, generator=generator, dtype=torch.float64) < rate
        margins = torch.where(label ^ wrong, better, -better)
        groups = audit_groups(
            audit(margins, ids(5000), 0.85), dict(zip(ids(5000), map(str, who.tolist()), strict=True))
        )
        assert sum(group.pairs for group in groups) == 5000
        found.append(roc_auc([group.doubt for group in groups], [int(group.name) < 5 for group in groups]))
    assert sum(found) / 5 > 0.97


def test_groups_add_up():
    margins, names = [2.0, -4.0, 0.1, -1.0, -4.0, -2.0], ["a", "c", "d", "e", "b", "f"]
    whole = audit(margins, names, lam=0.85)
    one = audit_groups(whole, dict.fromkeys(names, "all"))[0]
    assert (one.pairs, one.flags) == (6, whole.flags)
    assert (one.expected, one.stderr, one.excess) == pytest.approx(
        (whole.expected, whole.expected_stderr, whole.excess)
    )
    assert one.doubt == pytest.approx(whole.excess / whole.expected_stderr)
    assert audit_groups(whole, {"a": "x", "d": "x"})[0].doubt <= 0
    assert [group.pairs for group in audit_groups(whole, {"a": "x", "b": "y"})] == [1, 1]


class TestRows:
    MARGINS = [3.0, 6.0, 4.0, 5.0] * 40 + [-6.0] * 8 + [-2.8, -1.5]
    ROWS = [Preference(f"row {n}", "p", f"good {n}", f"bad {n}") for n in range(172)]

    def audit(self):
        found = audit(self.MARGINS, ids(170), lam=0.8)  # rows 170 and 171 were over-long
        assert [found.count(s) for s in ("keep", "review", "drop", "flip")] == [160, 1, 1, 8]
        return found

    def test_drop(self):
        rows = list(cleaned_rows(iter(self.ROWS), self.audit(), "drop"))
        assert [row["id"] for row in rows] == [f"row {n}" for n in range(172) if not 160 <= n < 169]
        assert rows[0] == {"id": "row 0", "prompt": "p", "chosen": "good 0", "rejected": "bad 0"}

    def test_flip(self):
        rows = {row["id"]: row for row in cleaned_rows(self.ROWS, self.audit(), "flip")}
        assert set(rows) == {row.id for row in self.ROWS} - {"row 168"}
        for number in range(172):
            if number != 168:
                flip = 160 <= number < 168
                assert rows[f"row {number}"]["chosen"] == f"{'bad' if flip else 'good'} {number}"
                assert rows[f"row {number}"]["rejected"] == f"{'good' if flip else 'bad'} {number}"

    def test_weights(self):
        found = self.audit()
        rows = list(cleaned_rows(self.ROWS, found, "weights"))
        assert [row["chosen"] for row in rows] == [row.chosen for row in self.ROWS]
        expected = [1 - v.p_wrong for v in found.verdicts] + [1.0, 1.0]
        assert [row["weight"] for row in rows] == pytest.approx(expected)

    def test_other_columns_stay_and_those_of_answers_change_places_with_them(self):
        further = {"split": "dev", "chosen_rewards": [1], "rejected_rewards": [0], "chosen_by": "me", "flipped": True}
        others = {row.id: further for row in self.ROWS}
        rows = {row["id"]: row for row in cleaned_rows(self.ROWS, self.audit(), "flip", others)}
        assert {key: rows["row 0"][key] for key in further} == further
        turned = {**further, "chosen_rewards": [0], "rejected_rewards": [1], "flipped": False}
        assert {key: rows["row 161"][key] for key in further} == turned
        for flag, other in (("True", False), ("0", True), (1, False), ("maybe", "maybe")):
            more = {"score_chosen": 4, "score_rejected": 2, "flipped": flag}
            (row,) = cleaned_rows([self.ROWS[161]], self.audit(), "flip", {"row 161": more})
            assert (row["score_chosen"], row["score_rejected"], row["flipped"]) == (2, 4, other)

    def test_unknown_action(self):
        with pytest.raises(ConfigError, match="clean: 'burn' is unknown"):
            cleaned_rows(self.ROWS, self.audit(), "burn")

    def test_worst_pairs(self):
        pairs = worst_pairs(iter(self.ROWS), self.audit(), 10)
        assert [verdict.rank for verdict, _ in pairs] == list(range(1, 11))
        assert all(verdict.id == row.id for verdict, row in pairs)
        assert [verdict.margin for verdict, _ in pairs] == [-6.0] * 8 + [-2.8, -1.5]
        assert len(worst_pairs(self.ROWS, self.audit(), 10_000)) == 170
        with pytest.raises(ConfigError, match="count: 0 is below 1"):
            worst_pairs(self.ROWS, self.audit(), 0)


def test_bad_input():
    for lam in (0, 1, 1.5, math.nan):
        with pytest.raises(ConfigError, match=r"lam: .* is not above 0 and below 1"):
            audit([1.0], ["a"], lam)
    with pytest.raises(DataError, match=r"margins of shape \[2\] for 1 ids"):
        audit([1.0, 2.0], ["a"], 0.85)
    with pytest.raises(DataError, match="for 0 ids"):
        audit([], [], 0.85)
    with pytest.raises(DataError, match="1 ids come more than once"):
        audit([1.0, 2.0], ["a", "a"], 0.85)
    with pytest.raises(DataError, match=r"1 pairs are not finite .first: 'b'"):
        audit([1.0, math.nan], ["a", "b"], 0.85)


@pytest.mark.timing
def test_twenty_thousand_rows_with_cached_margins_take_seconds(tmp_path, monkeypatch):
    opened = tiny_model("llama", task="reward")
    rows = read_rows("step-audit:20000")
    kwargs = {"batch_size": 256, "cache": tmp_path / "margins.jsonl"}
    monkeypatch.setattr(
        scoring,
        "_reward_margins",
        lambda model, pad, pairs: torch.tensor([len(pair.chosen) % 17 - 8.0 for pair in pairs]),
    )
    monkeypatch.setattr(
        scoring, "_whole", lambda prompt, answer, tokenizer, chat: [hash(answer) % 99] * (hash(answer) % 99)
    )
    score_pairs(opened.model, opened.tokenizer, rows, **kwargs)
    monkeypatch.setattr(scoring, "_reward_margins", lambda *_: pytest.fail("scored a second time"))
    start = time.process_time()
    scored = score_pairs(opened.model, opened.tokenizer, rows, **kwargs)
    found = audit(scored.margins, scored.ids, lam=0.85)
    write_csv(tmp_path / "audit.csv", found)
    assert len(list(cleaned_rows(rows, found, "flip"))) <= 20_000
    assert time.process_time() - start < 6
    assert len(found.verdicts) == 20_000
