"""The oracles of section 7 of the specification, by number."""

import copy
import math
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tenfold.compress.losparse.factors import Factors
from tenfold.compress.losparse.handle import attach
from tenfold.compress.losparse.layer import LowRankRowsLinear
from tenfold.compress.losparse.masked import LoSparseLinear
from tenfold.compress.losparse.mathematics import rank_for, split_off
from tenfold.compress.losparse.oneshot import OneShot, Replaced
from tenfold.compress.losparse.plan import RankAndRows
from tenfold.compress.losparse.pruner import Pruner, pruning_schedule
from tenfold.config.losparse import LoSparsePaper
from tenfold.core.importance import Importance, ScoredPart
from tenfold.errors import ConfigError
from tenfold.models.layer_map import layer_map
from tenfold.models.tiny import tiny_model


def fill(shape, a, c, m, den):
    values = [((a * i + c) % m - m // 2) / den for i in range(math.prod(shape))]
    return torch.tensor(values, dtype=torch.float64).view(shape)


IDS = torch.arange(5, 29).view(2, 12)


class _SplitLayer(torch.nn.Module):
    """The forward of the paper: y = L (R x) + S x + c."""

    def __init__(self, layer, rank):
        super().__init__()
        self.parts, self.bias = split_off(layer.weight, rank), layer.bias

    def forward(self, x):
        left, right, rest = self.parts
        y = x @ right.T @ left.T + x @ rest.T
        return y if self.bias is None else y + self.bias


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_01_exact_start(dtype, tolerance):
    model = tiny_model("llama", tie_word_embeddings=True).model.to(dtype)
    replaced = copy.deepcopy(model)
    for slot in layer_map(model).select(["all-linear"]):
        parent, _, name = slot.name.rpartition(".")
        layer = getattr(replaced.get_submodule(parent), name)
        ours = _SplitLayer(layer, rank_for(0.3, slot.out_features, slot.in_features))
        x = torch.randn(3, slot.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
        dense = layer(x)
        assert (ours(x) - dense).abs().max() <= tolerance * dense.abs().max()
        setattr(replaced.get_submodule(parent), name, ours)
    with torch.no_grad():
        dense, compressed = model(IDS).logits, replaced(IDS).logits
    span = dense.max() - dense.min()
    # transformers computes the norms of a float64 model in float32: there the layers above are the check.
    assert (dense - compressed).abs().max() <= max(tolerance, 1e-6) * span
    assert replaced.lm_head.weight is replaced.model.embed_tokens.weight


def test_02_rank():
    ranks = {
        0.05: "768x768 20, 3072x768 31, 896x896 23, 128x896 6, 4864x896 38, 896x4864 38, 576x576 15, 192x576 8, "
        "1536x576 21, 192x960 8, 192x320 6",
        0.10: "768x768 39",
        0.15: "768x3072 93",
        0.35: "1024x1024 180, 4096x1024 287",
    }
    for share, shapes in ranks.items():
        for entry in shapes.split(", "):
            shape, rank = entry.split()
            out, inner = map(int, shape.split("x"))
            assert rank_for(share, out, inner) == rank_for(share, inner, out) == int(rank), entry
    assert [rank_for(share, 2, 3) for share in (0, 0.5, 1)] == [0, 1, 1]  # the official code: 2, of 167 %
    assert rank_for(1.0, 4, 4) == 2
    with pytest.raises(ConfigError, match="must be in"):
        rank_for(1.1, 4, 4)


W3 = torch.tensor([[((7 * i + 3 * j) % 11 - 5) / 10 for j in range(4)] for i in range(6)], dtype=torch.float64)


def test_03_svd_split():
    assert rank_for(0.5, 6, 4) == 2
    left, right, rest = split_off(W3, 2)
    values = torch.tensor(
        [1.0567822023651727, 0.9288763553644787, 0.6243940512731958, 0.2013260091087697], dtype=torch.float64
    )
    torch.testing.assert_close(torch.linalg.svdvals(W3), values, rtol=1e-12, atol=0)
    assert abs(rest.norm() - 0.6560488497124423) < 1e-12
    assert abs(rest.norm() - values[2:].square().sum().sqrt()) < 1e-12
    row = [-0.327407268038277, 0.171211632580720, -0.137762555170547, 0.214056602846282]
    torch.testing.assert_close(rest[0], torch.tensor(row, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(left.T @ left, torch.diag(values[:2]), rtol=0, atol=1e-12)
    torch.testing.assert_close(right @ right.T, torch.diag(values[:2]), rtol=0, atol=1e-12)
    torch.testing.assert_close(left @ right + rest, W3, rtol=0, atol=1e-15)


def test_03_rounding_of_the_factors_goes_into_the_rest():
    weight = W3.to(torch.bfloat16)
    left, right, rest = split_off(weight, 2)
    error = (left.double() @ right.double() + rest.double() - weight.double()).abs().max()
    assert error <= rest.abs().max() * 2**-8  # one rounding of the rest, none of the factors


def test_04_optimality():
    left, right, rest = split_off(W3, 2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        scale = 10 ** -(4 * torch.rand((), generator=generator, dtype=torch.float64))
        noise = [torch.randn(part.shape, generator=generator, dtype=part.dtype) for part in (left, right)]
        assert (W3 - (left + scale * noise[0]) @ (right + scale * noise[1])).norm() >= rest.norm()
    zeros = split_off(torch.zeros(6, 4), 2)
    assert all(not part.any() and part.isfinite().all() for part in zeros)
    assert split_off(torch.outer(W3[:, 0], W3[0]), 1).rest.abs().max() < 1e-14
    assert split_off(torch.outer(W3[:, 0], W3[0]), 3).rest.isfinite().all()
    with pytest.raises(ConfigError, match=r"rank: must be in \[0, 4\]"):
        split_off(W3, 5)


def test_11_budget_report():
    layer = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
    layer |= {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}
    ranks = {role: rank_for(0.05, *shape) for role, shape in layer.items()}
    assert list(ranks.values()) == [15, 8, 8, 15, 21, 21, 21]
    low_rank = 30 * sum(ranks[role] * sum(shape) for role, shape in layer.items())
    assert low_rank == 5_397_120
    dense = 30 * sum(out * inner for out, inner in layer.values())
    assert dense == 106_168_320
    assert round(100 * low_rank / dense, 4) == 5.0836
    kept = {role: int(0.15 * out) for role, (out, _) in layer.items()}  # rows of each, never above 15 %
    assert 30 * sum(kept[role] * layer[role][1] for role in layer) <= 15_925_248
    matrices = tuple(
        Replaced(f"{index}.{role}", shape, RankAndRows(ranks[role], kept[role]), bytes=0)
        for index in range(30)
        for role, shape in layer.items()
    )
    norms = 61 * 576
    report = OneShot({}, matrices, dense + 49152 * 576 + norms, 0, ())
    assert report.dense == dense
    shared = 30 * sum(ranks[role] * (ranks[role] + kept[role]) for role in layer)  # what pivots save
    assert report.numbers == low_rank + 30 * sum(kept[role] * layer[role][1] for role in layer) - shared
    assert report.share < 0.2009
    assert report.share_of_model < 0.369


W15 = fill((8, 6), 7, 3, 11, 10)
X15 = fill((6, 20), 5, 2, 13, 20) * torch.tensor([10, 3, 1, 0.3, 0.1, 0.03], dtype=torch.float64)[:, None]


def test_15_whitened_split():
    gram = X15 @ X15.T
    plain, whitened = split_off(W15, 2), split_off(W15, 2, gram, ridge=0)
    assert abs((plain.rest @ X15).norm() - 4.502554206194) < 1e-9
    assert abs((whitened.rest @ X15).norm() - 0.468592539741) < 1e-9
    cholesky = torch.linalg.cholesky(gram)
    u, s, vh = torch.linalg.svd(W15 @ cholesky)
    assert abs((whitened.rest @ X15).norm() - s[2:].norm()) < 1e-9
    product = (u[:, :2] * s[:2]) @ torch.linalg.solve_triangular(cholesky, vh[:2], upper=False, left=False)
    torch.testing.assert_close(whitened.left @ whitened.right, product, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        whitened.left.T @ whitened.left, whitened.right @ whitened.right.T, rtol=0, atol=1e-9
    )  # balanced
    for rank in range(7):
        error = (split_off(W15, rank, gram, ridge=0).rest @ X15).norm()
        assert error <= (split_off(W15, rank).rest @ X15).norm() + 1e-12


def test_15_fewer_tokens_than_inputs():
    few = X15[:, :3]
    for ridge in (0, 1e-6):
        parts = split_off(W15, 3, few @ few.T, ridge=ridge)
        assert all(part.isfinite().all() for part in parts)
        assert (parts.rest @ few).norm() < 1e-4
    assert all(part.isfinite().all() for part in split_off(W15, 2, torch.zeros(6, 6)))


SHAPES_10 = [(12,), (5, 12), (2, 3, 12), (2, 1, 4, 12), (1, 1, 1, 12), (0, 12)]


class _Masked(torch.nn.Module):
    """The forward of the paper with the mask of its kept rows: y = L (R x) + (mask S) x + c, dense."""

    def __init__(self, left, right, sparse, mask, bias):
        super().__init__()
        self.left, self.right, self.sparse, self.bias = map(torch.nn.Parameter, (left, right, sparse, bias))
        self.mask = mask

    def forward(self, x):
        return x @ self.right.T @ self.left.T + x @ (self.sparse * self.mask[:, None]).T + self.bias


def _masked_10(kept, dtype=torch.float32):
    torch.manual_seed(10)
    parts = torch.randn(10, 3), torch.randn(3, 12), torch.randn(10, 12), torch.arange(10) % 7 < kept, torch.randn(10)
    return _Masked(*[part.to(dtype) if part.is_floating_point() else part for part in parts])


def _compact_10(masked):
    kept = masked.mask.nonzero()[:, 0].flip(0)
    rows = (masked.left @ masked.right + masked.sparse)[kept]
    factors = Factors(masked.left.detach(), masked.right.detach(), kept, rows.detach())
    return LowRankRowsLinear.from_factors(factors, masked.bias.detach())


@pytest.mark.parametrize("kept", [0, 2, 7])  # none, some, all
def test_10_compact_equals_masked(kept):
    masked, autocast = _masked_10(kept), partial(torch.autocast, "cpu", torch.bfloat16)
    compact = _compact_10(masked)
    assert compact.kept == (int(masked.mask.sum()))
    for shape in (*SHAPES_10, *reversed(SHAPES_10)):
        x = torch.randn(shape)
        right = masked(x)
        torch.testing.assert_close(compact(x), right, rtol=1e-5, atol=1e-5 * 12)
        with autocast():
            torch.testing.assert_close(compact(x).float(), masked(x).float(), rtol=0.05, atol=0.3)
    for x in (torch.randn(12, 5).T, torch.randn(4, 3, 24)[..., ::2], torch.randn(3, 4, 12).transpose(0, 1)):
        assert not x.is_contiguous()
        torch.testing.assert_close(compact(x), masked(x), rtol=1e-5, atol=1e-5 * 12)


@pytest.mark.parametrize("kept", [0, 2, 7])
def test_10_gradients_of_compact_equal_those_of_masked(kept):
    """Of x and the bias as they are; of rows and combinations those of the matrix, by the chain rule."""
    masked = _masked_10(kept, torch.float64)
    compact = _compact_10(masked)
    x = torch.randn(4, 3, 12, dtype=torch.float64)
    inputs, weights = [], torch.randn(4, 3, 10, dtype=torch.float64)
    for layer in (masked, compact):
        inputs.append(x.clone().requires_grad_())
        (layer(inputs[-1]).tanh() * weights).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(compact.bias.grad, masked.bias.grad, rtol=1e-9, atol=1e-9)
    order = compact.place.long().argsort()
    # (dW)_i = sum over tokens of dy_i x^T, whatever W is made of; S of a kept row has just that gradient.
    rank, stored_rows = compact.rank, compact.rank + compact.kept
    w = compact.dense_weight().detach().requires_grad_()
    ((x @ w.T + masked.bias.detach()).tanh() * weights).sum().backward()
    dense = w.grad[order]
    torch.testing.assert_close(masked.sparse.grad[masked.mask], w.grad[masked.mask], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(compact.rows.grad[rank:], dense[rank:stored_rows], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        compact.rows.grad[:rank], dense[:rank] + compact.mix.T @ dense[stored_rows:], rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(compact.mix.grad, dense[stored_rows:] @ compact.rows[:rank].T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("out", "inner", "rank", "kept"), [(10, 12, 3, 2), (48, 64, 9, 5), (64, 48, 0, 7), (40, 30, 6, 0)]
)
def test_10_multiply_adds_are_the_formula_less_what_is_shared(out, inner, rank, kept):
    """Section 2.9 counts r (in + out) + k in. Of the rows of L, those of kept rows are dead (r k), and those of the r
    rows that span the others are unit vectors (r^2): r (r + k) less."""
    factors = Factors(torch.randn(out, rank), torch.randn(rank, inner), torch.arange(kept), torch.randn(kept, inner))
    layer, tokens = LowRankRowsLinear.from_factors(factors), 7
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(tokens, inner))
    assert counter.get_total_flops() == 2 * tokens * (rank * (inner + out) + kept * inner - rank * (rank + kept))


# ---- training: 5 to 9, 12, 13, 16 ------------------------------------------------------------------------------------

ROWS = {"first": fill((4, 3), 7, 3, 11, 10), "second": fill((3, 4), 7, 6, 11, 10)}
"""The two S of oracles 5 to 8."""


def gradients(step):
    return {"first": fill((4, 3), 5, 2 * (1 + step), 13, 20), "second": fill((3, 4), 5, 2 * (2 + step), 13, 20)}


def pruned_by_hand(steps, rows=12):
    """The scores per number after each step at which rows could be chosen, with given gradients of fixed weights."""
    layers = {
        name: LoSparseLinear(rest.new_zeros(len(rest), 1), rest.new_zeros(1, rest.shape[1]), rest.clone())
        for name, rest in ROWS.items()
    }
    model = torch.nn.ModuleDict(layers)
    costs = {name: layer.in_features for name, layer in layers.items()}
    config = LoSparsePaper(tinit=steps, tfinal=1, interval=2)
    pruner = Pruner(model, layers, rows, costs, config, total_steps=steps + 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    found = {}
    for step in range(steps):
        for name, gradient in gradients(step).items():
            layers[name].rest.grad = gradient
        optimizer.step()
        found[step] = {name: score / costs[name] for name, score in pruner._importance.scores().items()}
    pruner.close()
    return pruner, found


def close(scores, first, second):
    wanted = {"first": first, "second": second}
    return all(
        torch.allclose(scores[name], torch.tensor(wanted[name], dtype=torch.float64), rtol=1e-12, atol=0)
        for name in scores
    )


def test_05_window_smoothing():
    _, found = pruned_by_hand(5)
    assert close(found[2], [0.005375, 0.00475, 0.005625, 0.00675], [0.0054375, 0.0105, 0.0054375])
    assert close(found[4], [0.01244375, 0.0112875, 0.01253125, 0.0151125], [0.008746875, 0.01426875, 0.009590625])


def by_steps(resolution, smoothing="step"):
    weights = {name: rest.clone().requires_grad_() for name, rest in ROWS.items()}
    parts = {name: [ScoredPart(weight, 0, "sum")] for name, weight in weights.items()}
    importance = Importance(parts, 0.85, None, smoothing=smoothing, window=2, resolution=resolution)
    found = []
    for step in range(5):
        for name, gradient in gradients(step).items():
            weights[name].grad = gradient
        importance.observe(step)
        found.append({name: score / weights[name].shape[1] for name, score in importance.scores().items()})
    return found


def test_06_step_smoothing():
    found = by_steps("unit")
    assert close(found[0], [0.00475, 0.0045, 0.0045, 0.006], [0.0058125, 0.0114375, 0.0058125])
    assert close(
        found[4],
        [0.0259092796875, 0.023288403125, 0.024994996875, 0.030150475],
        [0.017081919140625, 0.025340673046875, 0.021213012890625],
    )


@pytest.mark.parametrize("smoothing", ["step", "window"])
def test_07_unit_resolution_is_exact(smoothing):
    for by_unit, by_entry in zip(by_steps("unit", smoothing), by_steps("entry", smoothing), strict=True):
        for name, score in by_unit.items():
            assert torch.allclose(score, by_entry[name], rtol=1e-12, atol=1e-300)
    _, by_hand = pruned_by_hand(5)
    if smoothing == "window":
        assert all(torch.equal(by_hand[4][name], score) for name, score in by_steps("unit", "window")[4].items())


@pytest.mark.parametrize(
    ("share", "first", "second", "spent"),
    [
        (1.0, [0, 1, 2, 3], [0, 1, 2], 24),
        (0.75, [0, 1, 2, 3], [1], 16),
        (0.5, [2, 3], [1], 10),
        (0.25, [3], [], 3),
        (0.0, [], [], 0),
    ],
)
def test_08_allocation(share, first, second, spent):
    pruner, _ = pruned_by_hand(5)
    pruner._choose(int(share * 24))
    kept = {name: layer.mask.nonzero().flatten().tolist() for name, layer in pruner.layers.items()}
    assert kept == {"first": first, "second": second}
    assert pruner.kept() == int(pruner.history[-1][2]) == spent
    for name, layer in pruner.layers.items():
        zero = (layer.rest == 0).all(1)
        assert torch.equal(zero, ~layer.mask), name


def test_09_schedule():
    schedule = pruning_schedule(LoSparsePaper(tinit=2, tfinal=4, interval=2), 0.5, 20)
    values = {3: 0.90033, 4: 0.81487, 6: 0.68222, 8: 0.59329, 10: 0.53936, 12: 0.51166, 14: 0.50146, 15: 0.50018}
    assert schedule.value(2) == 1
    assert all(abs(schedule.value(step) - value) < 5e-6 for step, value in values.items())
    assert [schedule.value(step) for step in range(16, 20)] == [0.5] * 4
    assert [step for step in range(20) if schedule.due(step)] == [4, 6, 8, 10, 12, 14, 16, 17, 18, 19]


def compressed(rows=3000, steps=10, **more):
    torch.manual_seed(0)
    model = tiny_model("llama").model
    names = [slot.name for slot in layer_map(model).select(["all-linear"])]
    phases = LoSparsePaper(tinit=1, tfinal=4, interval=1)
    return attach(model, dict.fromkeys(names, 4), rows, phases, total_steps=steps, **more)


def batches(steps):
    return torch.randint(5, 200, (steps, 8, 12), generator=torch.Generator().manual_seed(1))


def train(handle, steps=10, parts=1, after=lambda step: None, lr=3e-3):
    model = handle.model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)
    for step, batch in enumerate(batches(steps)):
        for piece in batch.chunk(parts):
            (model(input_ids=piece, labels=piece).loss / parts).backward()
        optimizer.step()
        after(step)
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("can_cut", [True, False])
def test_12_frozen_final_phase(can_cut, monkeypatch):
    if not can_cut:
        monkeypatch.setattr("tenfold.compress.losparse.pruner.uncuttable", lambda *_: "it is held")
    handle = compressed()
    seen = []

    def look(step):
        if step < 10 - 4:
            return
        seen.append({name: layer.mask.tolist() for name, layer in handle.layers.items()})
        for layer in handle.layers.values():
            rest = torch.zeros(layer.out_features, layer.in_features).index_copy(0, layer.kept, layer.rest.detach())
            assert bool((rest[~layer.mask] == 0).all())
            assert layer.is_cut == can_cut or bool(layer.mask.all())

    train(handle, after=look)
    assert len(seen) == 4
    assert all(masks == seen[0] for masks in seen)
    kept = sum(len(factors.rows) * factors.rows.shape[1] for factors in handle.finish().values())
    assert 3000 - 128 < kept <= 3000


@pytest.mark.parametrize("frozen", [False, True])
def test_13_accumulation_invariance(frozen):
    found = []
    for parts in (1, 8):
        handle = compressed(frozen=frozen)
        handle.model.double()
        scores = []
        train(handle, 6, parts, after=lambda step, h=handle, s=scores: s.append(h.pruner._importance.scores()))
        found.append((scores, {name: layer.mask for name, layer in handle.layers.items()}))
    for whole, pieces in zip(found[0][0], found[1][0], strict=True):
        for name, score in whole.items():
            torch.testing.assert_close(pieces[name], score, rtol=1e-5, atol=1e-9)
    assert all(torch.equal(found[0][1][name], mask) for name, mask in found[1][1].items())
    assert not all(bool(mask.all()) for mask in found[0][1].values())


def test_16_gate_bound():
    batch = batches(1)[0]
    sensitivities, gates = {}, {}
    for frozen in (False, True):
        handle = compressed(frozen=frozen)
        model = handle.model.double().train()
        model(input_ids=batch, labels=batch).loss.backward()
        for name, layer in handle.layers.items():
            if frozen:
                assert layer.rest.grad is None
                gates[name] = layer.gate.grad
            else:
                product = layer.rest.detach() * layer.rest.grad
                sensitivities[name] = product.sum(1), product.abs().sum(1)
    for name, (signed, gamma) in sensitivities.items():
        torch.testing.assert_close(gates[name], signed, rtol=1e-8, atol=1e-10)
        assert bool((gates[name].abs() <= gamma * (1 + 1e-9)).all())
