"""The oracles of the R3M specification, section 7, by number."""

import math
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from tenfold.align.preferences import StepRewards, irrational, myopic, stochastic, true_rewards
from tenfold.align.r3m.losses import expected_flags, kink, pair_loss, perturbation, r3m_loss
from tenfold.data.read import read_rows
from tenfold.models.tiny import tiny_model

LAMS = [0.1, 0.25, 0.3, 0.5, 0.65, 0.75, 0.85, 0.95]


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def slope(margin, lam, loss=r3m_loss):
    margin = margin.clone().requires_grad_()
    loss(margin, lam).sum().backward()
    return margin.grad


def test_01_closed_form():
    m = torch.tensor([-4.0, -2, -1, 0, 2])
    assert perturbation(m, 0.5).tolist() == pytest.approx([4, 2, 1, 0, 0], abs=1e-6)
    assert r3m_loss(m, 0.5).tolist() == pytest.approx([2.693147, 1.693147, 1.193147, 0.693147, 0.126928], abs=1e-6)
    assert perturbation(m, 0.75).tolist() == pytest.approx([2.901388, 0.901388, 0, 0, 0], abs=1e-6)
    assert r3m_loss(m, 0.75).tolist() == pytest.approx([3.562335, 2.062335, 1.313262, 0.693147, 0.126928], abs=1e-6)
    for lam, value in {0.1: 2.1972, 0.25: 1.0986, 0.65: -0.6190, 0.8: -1.3863, 0.9: -2.1972, 0.95: -2.9444}.items():
        assert kink(lam) == pytest.approx(value, abs=5e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_02_gradient(dtype, tolerance):
    m = 4 * torch.randn(1000, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for lam in [*LAMS, 1.0]:
        torch.testing.assert_close(slope(m, lam), -torch.sigmoid(-m).clamp(max=lam), atol=tolerance, rtol=0)


def test_03_at_the_kink_the_gradient_is_whole():
    def with_maximum(margin, lam):
        c = torch.tensor(kink(lam), dtype=margin.dtype)
        return -logsigmoid(torch.maximum(margin, c)) + lam * (c - margin).relu()

    for lam in (0.25, 0.5, 0.75, 0.85):
        for dtype in (torch.float32, torch.float64):
            c = torch.tensor([kink(lam)], dtype=dtype)
            assert float(slope(c, lam)) == pytest.approx(-lam, abs=1e-6)
            assert float(slope(c, lam, with_maximum)) == pytest.approx(-lam / 2, abs=1e-6), (
                "this test must be able to fail"
            )


def test_04_seven_margins():
    m = torch.tensor([-3, -1.5, -0.5, 0, 0.5, 1.5, 3])
    for lam, loss, flags in [(0.5, 0.8566666, 3), (0.75, 0.9844246, 2), (0.85, 1.0093463, 1), (1, 1.0201861, 0)]:
        assert float(r3m_loss(m, lam).mean()) == pytest.approx(loss, abs=2e-7)
        assert int((perturbation(m, lam) > 0).sum()) == flags


def test_05_alternating_is_the_profile():
    def alternating(margin, lam):
        delta = perturbation(margin.detach(), lam)
        return -logsigmoid(margin + delta) + lam * delta

    flagged = []

    def weights(loss, steps):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).double()
        chosen, rejected = 3 * torch.randn(2, 32, 6, dtype=torch.float64)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            margin = 4 * (net(chosen) - net(rejected)).squeeze(-1)
            flagged.append(int((margin < kink(0.75)).sum()))
            loss(margin, 0.75).mean().backward()
            if steps > 1:
                optimizer.step()
        return [p.grad if steps == 1 else p.detach() for p in net.parameters()]

    for steps, tolerance in ((1, 1e-6), (50, 1e-5)):
        for ours, theirs in zip(weights(r3m_loss, steps), weights(alternating, steps), strict=True):
            torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)
    assert all(0 < count < 32 for count in flagged[:2]), "both branches must be seen"


def test_06_the_theory_is_about_the_plain_loss():
    m = 3 * torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grid = torch.arange(0, 15, 1e-3, dtype=torch.float64)

    def bent(lam_n):
        cost = -logsigmoid(m[:, None] + grid) / 50 + lam_n * grid
        return int((cost.argmin(1) > 0).sum())

    assert bent(1 / 50) == 0
    assert bent(0.75 / 50) == int((m < -1.0986).sum()) == 23


@pytest.mark.parametrize(
    ("q", "lam", "margin"),
    [
        (0.8, 0.5, 1.945910),
        (0.8, 0.25, 2.708050),
        (0.8, 0.9, 1.386294),
        (0.6, 0.5, 0.693147),
        (0.95, 0.75, 3.191847),
        (0.7, 0.1, 3.106080),
    ],
)
def test_07_two_arms(q, lam, margin):
    found = torch.zeros(1, dtype=torch.float64)
    fit(lambda m: q * r3m_loss(m, lam).sum() + (1 - q) * r3m_loss(-m, lam).sum(), found)
    assert float(found) == pytest.approx(margin, abs=1e-4)
    closed = math.log((q - (1 - q) * lam) / ((1 - q) * lam)) if lam < q else math.log(q / (1 - q))
    assert closed == pytest.approx(margin, abs=1e-6)


def fit(objective, start):
    """Minimise in place with L-BFGS."""
    start.requires_grad_()
    optimizer = torch.optim.LBFGS([start], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def closure():
        optimizer.zero_grad()
        value = objective(start)
        value.backward()
        return value

    optimizer.step(closure)
    return start.requires_grad_(False)


def test_08_dpo():
    policy, reference = numbers(-12, -20, -8) - numbers(-10, -25, -30), numbers(-11, -19, -9) - numbers(-14, -24, -12)
    margin = 0.1 * (policy - reference)
    assert margin.tolist() == pytest.approx([-0.5, 0, 1.9])
    for lam, loss in {0.25: 0.4630190, 0.5: 0.5918937, 0.75: 0.6022036, 1: 0.6022036}.items():
        assert float(r3m_loss(margin, lam).mean()) == pytest.approx(loss, abs=1e-7)
    margin = 0.5 * (policy - reference)
    assert margin.tolist() == pytest.approx([-2.5, 0, 9.5])
    assert perturbation(margin, 0.75).tolist() == pytest.approx([1.401388, 0, 0], abs=1e-6)
    assert r3m_loss(margin, 0.75).tolist() == pytest.approx([2.437335, 0.693147, 7.4849e-5], abs=1e-6)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("keys", [{"lam": 1.0}, {"loss": "bt"}])
@pytest.mark.parametrize("margin_column", [False, True])
def test_09_off_the_reward_trainer_is_trls(tmp_path, keys, margin_column):
    trl = pytest.importorskip("trl")
    from tenfold.align.trainers import R3MRewardTrainer

    rows = [row | ({"margin": 0.1 * i} if margin_column else {}) for i, row in enumerate(PAIRS)]
    extra = {"center_rewards_coefficient": 0.01} if margin_column else {}

    def run(make, **more):
        opened = tiny_model("llama", task="reward")
        return trained(make, opened, trl.RewardConfig(**settings(tmp_path), **extra), rows, **more)

    same(run(R3MRewardTrainer, robust=robust(**keys)), run(trl.RewardTrainer))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("keys", [{"lam": 1.0}, {"loss": "bt"}])
@pytest.mark.parametrize("precomputed", [False, True])
def test_09_off_the_dpo_trainer_is_trls(tmp_path, keys, precomputed):
    trl = pytest.importorskip("trl")
    from tenfold.align.trainers import R3MDPOTrainer

    def run(make, **more):
        args = trl.DPOConfig(**settings(tmp_path), beta=0.5, precompute_ref_log_probs=precomputed)
        reference = None if precomputed else tiny_model("llama").model
        return trained(make, tiny_model("llama"), args, PAIRS, ref_model=reference, **more)

    same(run(R3MDPOTrainer, robust=robust(**keys)), run(trl.DPOTrainer))


PAIRS = [{"id": f"p{i}", "prompt": f"{i}+1=", "chosen": f"{i + 1}", "rejected": "no idea" * (i % 3)} for i in range(20)]


def robust(**keys):
    from tenfold.config.r3m import RobustFields

    return RobustFields(**keys)


def settings(folder):
    steps = {"max_steps": 5, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "seed": 3}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "bf16": False}
    return {
        "output_dir": str(folder),
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
        **steps,
        **quiet,
    }


def trained(make, opened, args, rows, **more):
    from datasets import Dataset

    trainer = make(
        opened.model, args=args, train_dataset=Dataset.from_list(rows), processing_class=opened.tokenizer, **more
    )
    trainer.train()
    return trainer


def same(ours, theirs):
    """Equal bits: what was logged, apart from durations and what we add, and the weights."""

    def figures(trainer):
        return [
            {
                key: value
                for key, value in line.items()
                if "r3m/" not in key and "runtime" not in key and "_per_" not in key
            }
            for line in trainer.state.log_history
        ]

    assert figures(ours) == figures(theirs)
    assert len({line["loss"] for line in figures(ours) if "loss" in line}) == 5
    weights = ours.model.state_dict()
    for name, weight in theirs.model.state_dict().items():
        assert torch.equal(weights[name], weight), name
    assert all(line["r3m/flagged_frac"] == 0 for line in ours.state.log_history if "loss" in line)


def test_10_extreme_values():
    infinite = numbers(-math.inf, math.inf)
    assert r3m_loss(infinite, 0.75).tolist() == [math.inf, 0]
    assert slope(infinite, 0.75).tolist() == [-0.75, 0]
    assert float(r3m_loss(torch.tensor(-1e4), 0.75)) == pytest.approx(7500.562, abs=1e-3)
    bad = torch.tensor([math.nan])
    assert r3m_loss(bad, 0.75).isnan().all()
    assert slope(bad, 0.75).isfinite().all()  # so the trainers look at the margins: tests/align/test_trainers.py


def test_11_dtype():
    m = torch.linspace(-8, 8, 33)
    for lam, error in {0.75: 1.6e-2, 0.85: 2.3e-2}.items():
        exact = r3m_loss(m.double(), lam)
        assert exact.dtype == torch.float64
        half, c = m.bfloat16(), kink(lam)
        in_half = -logsigmoid(half.clamp(min=c)) + lam * (c - half).relu()
        assert float((in_half.double() - exact).abs().max()) == pytest.approx(error, rel=0.05)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            found = r3m_loss(m.to(dtype), lam)
            assert found.dtype == torch.float32
            assert float((found.double() - exact).abs().max()) < 1e-6
            assert perturbation(m.to(dtype), lam).dtype == torch.float32


def test_12_monotonicity():
    m = 3 * torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    lams = [0.05, *LAMS, 0.999, 1.0]
    for less, more in pairwise(lams):
        assert (r3m_loss(m, less) <= r3m_loss(m, more)).all()
        assert (perturbation(m, less) >= perturbation(m, more)).all()
    assert (r3m_loss(m, 0.5) <= -logsigmoid(m)).all()


def test_13_order_and_accumulation():
    m = 3 * torch.randn(8, generator=torch.Generator().manual_seed(2))
    whole = r3m_loss(m, 0.75).mean()
    assert torch.allclose(r3m_loss(m[torch.randperm(8)], 0.75).mean(), whole, atol=1e-7)
    assert torch.allclose((r3m_loss(m[:4], 0.75).mean() + r3m_loss(m[4:], 0.75).mean()) / 2, whole, atol=1e-7)


# The table of section 8.1. None: the specification names no figure, or the method does not apply.
TABLE = [
    # noise, wrong labels, BT, cDPO .1, rDPO (true rate), R3M (lam), filter, R3M -> trimmed
    ("none", 0, 0.9803, 0.9803, None, (0.9806, 0.65), 0.9799, 0.9797),
    ("uniform", 200, 0.9696, 0.9694, 0.9698, (0.9710, 0.5), 0.9706, 0.9692),
    ("uniform", 400, 0.9413, 0.9414, 0.9407, (0.9474, 0.25), 0.9446, None),
    ("uniform", 600, 0.9270, 0.9270, 0.9259, (0.9362, 0.1), 0.9280, 0.9270),
    ("irrational", 125, 0.9562, 0.9557, 0.9567, (0.9698, 0.1), 0.9745, 0.9797),
    ("irrational", 250, 0.9062, 0.9061, 0.9064, (0.9556, 0.1), 0.9058, 0.9794),
    ("irrational", 400, 0.499, 0.499, 0.499, (0.502, 0.1), 0.499, 0.499),
]
SEEDS = range(5)


class Corrupted:
    """Pairs of a linear reward, some of them with the wrong label, in the order of draws of the specification."""

    def __init__(self, seed, noise, wrong, n=2000, d=10):
        rng = np.random.default_rng(seed)
        w = rng.normal(size=d)
        w *= 3 / np.linalg.norm(w)
        x = rng.normal(size=(n, d))
        true = x @ w
        label = np.where(rng.random(n) < 1 / (1 + np.exp(-true)), 1.0, -1.0)
        self.flipped = np.zeros(n, dtype=bool)
        if noise == "uniform":
            self.flipped[rng.choice(n, wrong, replace=False)] = True
        elif noise == "irrational":
            self.flipped[np.argsort(-np.abs(true))[:wrong]] = True
        label[self.flipped] *= -1
        self.pairs = torch.from_numpy(x * label[:, None])
        fresh = rng.normal(size=(20_000, d))
        self.fresh, self.better = torch.from_numpy(fresh), torch.from_numpy(fresh @ w > 0)

    def fit(self, loss, lam=1.0, smoothing=0.0, start=None, keep=slice(None)):
        def objective(theta):
            margins = self.pairs[keep] @ theta
            return pair_loss(margins, loss, lam=lam, smoothing=smoothing).mean() + 5e-4 * theta.square().sum()

        return fit(objective, torch.zeros(10, dtype=torch.float64) if start is None else start.clone())

    def accuracy(self, theta):
        return float(((self.fresh @ theta > 0) == self.better).double().mean())

    def at_once(self):
        """From R3M to the last cap without the one between, as the trainers do it (`lam_warmup` of `trimmed`)."""
        return self.fit("trimmed", 0.95, start=self.fit("r3m", 0.1))

    def continued(self, last=0.95):
        theta = self.fit("r3m", 0.1)
        for lam in (0.85, 0.95):
            if lam <= last:
                theta = self.fit("trimmed", lam, start=theta)
        return theta


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]}-{row[1]}")
def test_15_robustness(row):
    noise, wrong, bt, cdpo, rdpo, (robust, lam), filtered, continued = row
    found = {name: [] for name in ("bt", "cdpo", "rdpo", "r3m", "filtered", "continued", "stopped", "at once")}
    for seed in SEEDS:
        data = Corrupted(seed, noise, wrong)
        plain = data.fit("bt")
        found["bt"].append(data.accuracy(plain))
        found["cdpo"].append(data.accuracy(data.fit("cdpo", smoothing=0.1)))
        found["rdpo"].append(data.accuracy(data.fit("rdpo", smoothing=wrong / 2000)))
        found["r3m"].append(data.accuracy(data.fit("r3m", lam)))
        kept = data.pairs @ plain > kink(0.85)
        found["filtered"].append(data.accuracy(data.fit("bt", keep=kept)))
        found["continued"].append(data.accuracy(data.continued()))
        found["stopped"].append(data.accuracy(data.continued(0.85)))
        found["at once"].append(data.accuracy(data.at_once()))
    mean = {name: float(np.mean(values)) for name, values in found.items()}
    wanted = {"bt": bt, "cdpo": cdpo, "rdpo": rdpo, "r3m": robust, "filtered": filtered, "continued": continued}
    if (noise, wrong) == ("uniform", 400):
        wanted["stopped"] = 0.9502
    for name, value in wanted.items():
        if value is not None:
            assert mean[name] == pytest.approx(value, abs=0.01), (name, mean)
    if noise == "irrational" and wrong < 400:
        assert mean["bt"] < mean["r3m"] < mean["continued"], mean
        assert mean["at once"] == pytest.approx(mean["continued"], abs=0.002), mean


def test_15_flags_beyond_what_right_labels_give():
    """Section 8.4: flags, expected flags and caught flips of the continued fit, at lam .95."""
    for (noise, wrong), flags, caught in [
        (("irrational", 125), 141.6, 124.6),
        (("irrational", 250), 265.6, 249.2),
        (("none", 0), 17.4, 0),
    ]:
        found = []
        for seed in SEEDS:
            data = Corrupted(seed, noise, wrong)
            margins = data.pairs @ data.continued()
            flagged = (perturbation(margins, 0.95) > 0).numpy()
            found.append([flagged.sum(), expected_flags(margins, 0.95)[0], (flagged & data.flipped).sum()])
        assert np.mean(found, axis=0) == pytest.approx([flags, 12.6, caught], abs=1.0)


def test_14_noise_generators():
    known = true_rewards(read_rows("step-audit:1280:5"))
    ids_, rewards_ = list(known), list(known.values())
    gaps = [float(n) for n in random.Random(0).sample(range(1000), 64)]
    rewards = [StepRewards((gap, 0.0), (0.0, 0.0)) for gap in gaps]
    ids = [f"pair {n}" for n in range(64)]
    largest = sorted(range(64), key=lambda index: -gaps[index])
    for p, count in ((1 / 3, 4), (1 / 2, 8), (2 / 3, 16)):
        for seed in range(3):
            mask = irrational(ids, rewards, p, seed=seed)
            assert {index for index, flip in enumerate(mask) if flip} == set(largest[:count])
            assert sum(irrational(ids_, rewards_, p, seed=seed)) == 20 * count, "per batch of 64"
    # Where some labels are wrong to begin with, the true label is what comes out.
    mixed = [StepRewards(*pair[::-1]) if index % 3 == 0 else pair for index, pair in enumerate(rewards_)]
    truth = [pair.gap < 0 for pair in mixed]
    assert any(truth)
    assert myopic(mixed, 1.0) == truth
    assert stochastic(ids_, mixed, 1e-9, seed=0) == truth
    assert stochastic(ids_, mixed, 1e-320, seed=0) == truth
