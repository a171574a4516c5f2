"""Noise models: who is flipped, how many, and that nothing but seed and ids decides."""

from __future__ import annotations

import json
import math
import random

import pytest

from tenfold.align.preferences import (
    StepRewards,
    corrupt,
    flip_mask,
    irrational,
    myopic,
    stochastic,
    true_rewards,
    uniform,
    write_corrupted,
)
from tenfold.data.read import read_rows
from tenfold.errors import ConfigError, DataError

ROWS = read_rows("step-audit:1280:5")
IDS = [row.id for row in ROWS]
REWARDS = list(true_rewards(read_rows("step-audit:1280:5")).values())
GAPS = [pair.gap for pair in REWARDS]


def turned(rewards, index):
    """The pair with chosen and rejected exchanged: its label is the wrong one."""
    pair = rewards[index]
    return StepRewards(pair.rejected, pair.chosen) if index % 3 == 0 else pair


def test_irrational_flips_the_largest_of_each_batch_among_ties_too():
    small = IDS[:64]
    for seed in range(5):
        mask = irrational(small, REWARDS[:64], 0.5, seed=seed)
        flipped_gaps = [gap for gap, flip in zip(GAPS[:64], mask, strict=True) if flip]
        kept = [gap for gap, flip in zip(GAPS[:64], mask, strict=True) if not flip]
        assert min(flipped_gaps) >= max(kept)
        assert sorted(flipped_gaps) == sorted(GAPS[:64])[-8:]
    masks = {tuple(irrational(small, REWARDS[:64], 1 / 3, seed=seed)) for seed in range(5)}
    assert len(masks) > 1, "the seed decides among equal gaps"


def test_irrational_counts_of_other_batches():
    # The last batch is smaller: 100 = 64 + 36, 8 + 6 flips.
    assert sum(irrational(IDS[:100], REWARDS[:100], 0.5, seed=0)) == 14
    assert sum(irrational(IDS[:100], REWARDS[:100], 0.5, seed=0, batch=25)) == 20
    assert sum(irrational(IDS[:100], REWARDS[:100], 1.0, seed=0)) == 100


def test_stochastic_errs_as_often_as_it_says():
    for tau in (1.0, 3.0):
        flips = [0.0] * 7
        for seed in range(20):
            for gap, flip in zip(GAPS, stochastic(IDS, REWARDS, tau, seed=seed), strict=True):
                flips[int(gap)] += flip
        for gap in range(1, 7):
            n = 20 * GAPS.count(float(gap))
            p = 1 / (1 + math.exp(gap / tau))
            assert flips[gap] == pytest.approx(n * p, abs=4 * math.sqrt(n * p * (1 - p)))


def test_myopic_by_hand_and_the_smaller_gamma_the_noisier():
    # 0.5: rewards 1, 1, 0 against 0, 0, 1: 0.25 + 0.5 = 0.75 against 1.
    pair = StepRewards((1.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    assert myopic([pair], 0.5) == [True]
    assert myopic([pair], 0.7) == [False]  # 0.49 + 0.7 = 1.19
    # The last step of each answer weighs 1, whatever their lengths.
    assert myopic([StepRewards((1.0,), (1.0, 0.0, 0.0, 0.9))], 0.5) == [True]  # 0.125 + 0.9 = 1.025
    assert myopic([StepRewards((1.0,), (1.0, 0.0, 0.0, 0.8))], 0.5) == [False]
    assert myopic([StepRewards((1.0,), (1.0,))], 0.3) == [False]
    counts = [sum(myopic(REWARDS, gamma)) for gamma in (0.3, 0.5, 0.7, 1.0)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0
    assert counts[0] > 0.05 * len(REWARDS)


def test_uniform_share_is_exact_and_grows_by_adding():
    ten, thirty = uniform(IDS, 0.1, seed=0), uniform(IDS, 0.3, seed=0)
    assert (sum(ten), sum(thirty)) == (128, 384)
    assert all(more or not few for few, more in zip(ten, thirty, strict=True))
    assert sum(uniform(IDS, 0.0, seed=0)) == 0
    assert sum(uniform(IDS, 1.0, seed=0)) == len(IDS)
    assert uniform(IDS, 0.1, seed=1) != ten


NOISES = {
    "stochastic": lambda ids, rewards, seed: stochastic(ids, rewards, 2.0, seed=seed),
    "irrational": lambda ids, rewards, seed: irrational(ids, rewards, 0.5, seed=seed),
    "uniform": lambda ids, rewards, seed: uniform(ids, 0.2, seed=seed),
}


@pytest.mark.parametrize("name", NOISES)
def test_seed_and_ids_decide_not_the_order_of_rows(name):
    noise = NOISES[name]
    mask = noise(IDS, REWARDS, 0)
    assert mask == noise(IDS, REWARDS, 0)
    assert mask != noise(IDS, REWARDS, 1)
    order = random.Random(0).sample(range(len(IDS)), len(IDS))
    shuffled = noise([IDS[n] for n in order], [REWARDS[n] for n in order], 0)
    assert shuffled == [mask[n] for n in order]


def test_stochastic_of_a_pair_does_not_depend_on_the_others():
    assert stochastic(IDS[:7], REWARDS[:7], 2.0, seed=0) == stochastic(IDS, REWARDS, 2.0, seed=0)[:7]


def test_corrupt_exchanges_the_answers_and_nothing_else():
    mask = uniform(IDS, 0.5, seed=0)
    noisy = corrupt(ROWS, mask)
    for row, other, flip in zip(ROWS, noisy, mask, strict=True):
        assert (other.id, other.prompt) == (row.id, row.prompt)
        answers = (row.rejected, row.chosen) if flip else (row.chosen, row.rejected)
        assert (other.chosen, other.rejected) == answers
    assert corrupt(noisy, mask) == list(ROWS)


def test_the_mask_is_stored_with_the_data(tmp_path):
    mask = uniform(IDS, 0.25, seed=0)
    write_corrupted(tmp_path / "noisy.jsonl", ROWS, mask)
    assert list(read_rows(str(tmp_path / "noisy.jsonl"))) == corrupt(ROWS, mask)
    assert flip_mask(read_rows(str(tmp_path / "noisy.jsonl"))) == dict(zip(IDS, mask, strict=True))


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"id": "a"}, ["d.jsonl, row 'a', column 'chosen_rewards'", "None, expected a list of numbers"]),
        ({"id": "a", "chosen_rewards": [1, "x"]}, ["column 'chosen_rewards'", "'x'"]),
        ({"id": "a", "chosen_rewards": [1], "rejected_rewards": []}, ["column 'rejected_rewards'", "uniform"]),
        ({"id": "a", "chosen_rewards": [True]}, ["column 'chosen_rewards'"]),
    ],
)
def test_rewards_that_are_not_there(tmp_path, values, parts):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"prompt": "p", "chosen": "x", "rejected": "y", **values}) + "\n")
    with pytest.raises(DataError) as caught:
        true_rewards(read_rows(str(path)))
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_mask_that_is_not_there(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"id": "a", "prompt": "p", "chosen": "x", "rejected": "y", "flipped": 3}) + "\n")
    with pytest.raises(DataError, match="row 'a', column 'flipped': 3, expected true or false"):
        flip_mask(read_rows(str(path)))


def test_what_is_known_of_pairs_is_read_under_the_columns_of_the_user(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("uid,question,chosen,rejected,flipped\na,p,x,y,True\nb,q,x,y,0\n")
    rows = read_rows(str(path), columns={"id": "uid", "prompt": "question"}, limit=2)
    assert flip_mask(rows) == {"a": True, "b": False}
    assert flip_mask(rows[1:]) == {"b": False}
    unnamed = tmp_path / "e.jsonl"
    row = {"prompt": "p", "chosen": "x", "rejected": "y", "chosen_rewards": [1], "rejected_rewards": [0]}
    unnamed.write_text(json.dumps(row) + "\n")
    found = read_rows(str(unnamed))
    assert true_rewards(found) == {found[0].id: StepRewards((1.0,), (0.0,))}


def test_bad_numbers():
    pair = [StepRewards((1.0,), (0.0,))]
    for tau in (0, -1.0, math.nan):
        with pytest.raises(ConfigError, match=r"tau: .* is not above 0"):
            stochastic(["a"], pair, tau, seed=0)
    for gamma in (0, 1.01, math.nan):
        with pytest.raises(ConfigError, match=r"gamma: .* is not above 0 and at most 1"):
            myopic(pair, gamma)
    for p in (0, 1.5):
        with pytest.raises(ConfigError, match=r"p: .* is not above 0 and at most 1"):
            irrational(["a"], pair, p, seed=0)
    with pytest.raises(ConfigError, match="batch: 0 is below 1"):
        irrational(["a"], pair, 0.5, seed=0, batch=0)
    for share in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match=r"share: .* is not between 0 and 1"):
            uniform(["a"], share, seed=0)
    with pytest.raises(DataError, match="id 'a' comes twice"):
        uniform(["a", "b", "a"], 0.5, seed=0)
    with pytest.raises(DataError, match="2 pairs and 1 rewards"):
        stochastic(["a", "b"], pair, 1.0, seed=0)
    with pytest.raises(DataError, match="1280 pairs and 1 flags"):
        corrupt(ROWS, [True])
