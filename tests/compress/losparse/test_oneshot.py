import copy
import re
from dataclasses import replace

import pytest
import torch

from tenfold.compress.losparse.calibration import equal_batches, moments, sensitivity, weight_of
from tenfold.compress.losparse.checks import check_asked
from tenfold.compress.losparse.fit import Second, fit_matrix, nearest_low_rank, root
from tenfold.compress.losparse.layer import compressed_layers, install
from tenfold.compress.losparse.oneshot import compress_once
from tenfold.compress.losparse.plan import RankAndRows, among, half
from tenfold.compress.losparse.streams import Blocks
from tenfold.config.budget import Budget
from tenfold.config.losparse import LoSparseConfig
from tenfold.config.shape import Shape
from tenfold.errors import ConfigError, DataError, ModelError
from tenfold.models.layer_map import layer_map
from tenfold.models.meta_model import meta_model
from tenfold.models.reference import ModelRef
from tenfold.models.tiny import tiny_model


def texts(count=16, length=48):
    return [torch.randint(6, 262, (length,), generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


HALF = Budget(0.5, "share")


def with_factors(model, factors):
    changed = copy.deepcopy(model)
    for name, matrix in factors.items():
        weight_of(changed.get_submodule(name)).data.copy_(matrix.dense())
    return changed


def distance(model, other, ids=None):
    """Mean divergence of the predictions, in nats."""
    ids = torch.stack(texts(24)[16:]) if ids is None else ids
    with torch.no_grad():
        before, after = (m(input_ids=ids).logits.log_softmax(-1) for m in (model, other))
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "t5", "deberta-v2"])
def test_every_architecture_keeps_its_budget_and_the_model_as_it_was(kind):
    model = tiny_model(kind).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    free = [parameter.requires_grad for parameter in model.parameters()]
    found = compress_once(model, texts(), budget=HALF)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == free
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    slots = layer_map(model).select(["all-linear"])
    assert [matrix.name for matrix in found.matrices] == [slot.name for slot in slots]
    assert 0.49 < found.share <= 0.5
    for slot, matrix in zip(slots, found.matrices, strict=True):
        assert matrix.shape == (slot.out_features, slot.in_features)
        if matrix.choice.kept == slot.out_features:
            assert slot.name not in found.factors
            continue
        factors = found.factors[slot.name]
        assert factors.left.shape == (slot.out_features, matrix.choice.rank)
        assert factors.right.shape == (matrix.choice.rank, slot.in_features)
        assert factors.rows.shape == (matrix.choice.kept, slot.in_features)
        assert factors.dense().isfinite().all()
        assert 0 <= matrix.error < 1.2


def test_it_repeats():
    model = tiny_model("llama").model
    first, second = (compress_once(model, texts(), budget=HALF) for _ in range(2))
    assert first.matrices == second.matrices
    assert all(torch.equal(a.dense(), second.factors[name].dense()) for name, a in first.factors.items())


def test_more_budget_is_nearer_to_the_model():
    model = tiny_model("llama").model
    found = [compress_once(model, texts(), budget=Budget(share, "share")) for share in (0.1, 0.4, 0.7, 0.95)]
    away = [distance(model, with_factors(model, one.factors)) for one in found]
    assert away == sorted(away, reverse=True)
    assert away[-1] < 0.05 * away[0]


def test_bytes_hold_everything():
    model = tiny_model("gpt2").model.to(torch.bfloat16)
    found = compress_once(model, texts(), budget=Budget(60_000, "bytes"))
    stored = 0
    for matrix in found.matrices:
        out, bias = matrix.shape[0], 2 * matrix.shape[0]
        stored += 2 * matrix.numbers + bias + (4 * out if matrix.choice.kept < out else 0)
    assert stored == sum(matrix.bytes for matrix in found.matrices)
    assert 0.95 * 60_000 < stored <= 60_000
    assert all(part.dtype == torch.bfloat16 for one in found.factors.values() for part in (one.left, one.rows))


def outstanding(kind="llama"):
    """A model some rows of which are worth keeping."""
    model = tiny_model(kind).model
    with torch.no_grad():
        for slot in layer_map(model).select(["all-linear"]):
            weight_of(model.get_submodule(slot.name))[::9] *= 60
    return model


@pytest.mark.parametrize("budget", [Budget(0.6, "share"), Budget(60_000, "count"), Budget(220_000, "bytes")])
def test_what_elastic_layers_store_beside_is_within_the_budget_and_reported(budget):
    model = outstanding()
    found = compress_once(model, texts(), budget=budget, refit=False, elastic=True)
    install(model, found.factors, elastic=True)
    layers = compressed_layers(model)
    assert sum(layer.kept * layer.rank for layer in layers.values()) > 100
    numbers = size = 0
    for matrix in found.matrices:
        held = [*model.get_submodule(matrix.name).parameters(), *model.get_submodule(matrix.name).buffers()]
        mine = sum(tensor.numel() for tensor in held if tensor.is_floating_point())
        assert mine == matrix.numbers
        numbers, size = numbers + mine, size + sum(tensor.numel() * tensor.element_size() for tensor in held)
        assert mine == (layers[matrix.name].numbers if matrix.name in layers else matrix.shape[0] * matrix.shape[1])
    assert (numbers, size) == (found.numbers, sum(matrix.bytes for matrix in found.matrices))
    spent = {"share": numbers / found.dense, "count": numbers, "bytes": size}[budget.unit]
    assert 0.98 * budget.amount < spent <= budget.amount


class Unreadable(torch.nn.Module):
    """Stands for a model that must not be read."""

    def forward(self, *args, **keys):
        raise AssertionError("the model was read")


def unread(kind="llama"):
    model = tiny_model(kind).model
    model.model.norm = Unreadable()
    return model


@pytest.mark.parametrize(
    ("budget", "why"),
    [
        (Budget(1, "count"), "budget: 1 buys neither .*\n.*give 64 or more"),
        (Budget(1e-11, "share"), "buys neither"),
        (Budget(100, "bytes"), "buys neither"),
        (0.5, "budget: must be a share, a count or bytes, got 0.5"),
        ("50%", "got '50%'"),
        (Budget(0.2, "seconds"), "must be a share"),
        (Budget(1.5, "share"), "at most 1, got 1.5"),
    ],
)
def test_budgets_are_refused_before_anything_is_read(budget, why):
    with pytest.raises(ConfigError, match=why):
        compress_once(unread(), texts(), budget=budget)


@pytest.mark.parametrize(
    ("passage", "why"),
    [
        (torch.zeros(0, dtype=torch.long), "passage 16: holds no token"),
        (torch.tensor([5, 10_000]), "passage 16: token 10000 is not in the vocabulary"),
        (torch.tensor([5, -1]), "token -1 is not"),
        (torch.zeros(1, 7, dtype=torch.long), r"passage 16: must be .* got torch.int64 of \[1, 7\]"),
        (torch.zeros(7), "got torch.float32"),
        ([5, 6, 7], "got a list"),
        ("a text", "got a str"),
    ],
)
def test_passages_that_cannot_be_read_are_refused_by_their_number(passage, why):
    with pytest.raises(DataError, match=why):
        compress_once(unread(), [*texts(), passage], budget=HALF)


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"paper": {"low_rank": 0.9}, "budget": "50%"}, "paper.low_rank: low-rank parts of 0.9 .* above the budget"),
        ({"paper": {"low_rank": 0.5}, "budget": "100KiB"}, r"paper.low_rank: .* above the budget of 102,400"),
        ({"targets": ["nope"]}, "'nope' matches nothing"),
        ({"budget": "1"}, "give 64 or more"),
    ],
)
def test_what_no_weight_is_needed_for_is_refused_without_one(keys, why):
    more = {"pruning": "schedule", "steps": 9} if "paper" in keys else {}
    config = LoSparseConfig.parse({**keys, **more}, "test")
    assert config.needs_matrices(Shape("tiny"))
    with pytest.raises(ConfigError, match=why):
        check_asked(meta_model(ModelRef("tiny:llama")), config)


class OwnLinear(torch.nn.Linear):
    """As Falcon has one: it may do more than multiply."""


def test_layers_of_another_kind_stay_and_are_named():
    model = tiny_model("llama").model
    model.model.layers[0].mlp.up_proj.__class__ = OwnLinear
    found = compress_once(model, texts(), budget=HALF)
    assert len(found.matrices) == 13
    assert "matrices of the kind OwnLinear stay as they are: model.layers.0.mlp.up_proj" in found.notes
    install(model, found.factors)
    none = unread()
    for module in none.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = OwnLinear
    with pytest.raises(
        ConfigError, match=r"nothing that can be replaced: matrices of the kind OwnLinear .* and 13 more"
    ):
        compress_once(none, texts(), budget=HALF)


def test_a_compressed_model_is_refused_by_name():
    model = tiny_model("llama").model
    install(model, compress_once(model, texts(), budget=HALF, refit=False).factors)
    with pytest.raises(ModelError, match=r"self_attn.q_proj: this model is compressed already"):
        compress_once(model, texts(), budget=HALF)


def test_a_count():
    found = compress_once(tiny_model("llama").model, texts(), budget=Budget(30_000, "count"))
    assert 29_000 < found.numbers <= 30_000


def test_fewer_tokens_than_inputs():
    found = compress_once(tiny_model("llama").model, texts(2, 40), budget=HALF)
    assert all(one.dense().isfinite().all() for one in found.factors.values())


def test_one_passage_is_not_refitted_and_says_so():
    found = compress_once(tiny_model("llama").model, texts(1, 64), budget=HALF)
    assert not any(matrix.refit for matrix in found.matrices)
    assert any("nothing is refitted" in note for note in found.notes)


def test_a_shared_weight_is_left_out():
    model = tiny_model("llama").model
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[1].mlp.gate_proj.weight
    found = compress_once(model, texts(), budget=HALF)
    assert len(found.matrices) == 12
    assert any("share" in note and "gate_proj" in note for note in found.notes)


def test_bad_input():
    model = tiny_model("llama").model
    with pytest.raises(DataError, match="no passage"):
        compress_once(model, [], budget=HALF)
    with pytest.raises(ConfigError, match=r"give 64 or more"):
        compress_once(model, texts(), budget=Budget(10, "count"))
    with pytest.raises(ConfigError, match="matches nothing"):
        compress_once(model, texts(), budget=HALF, targets=["wrong"])
    model.hf_quantizer = type("Quantizer", (), {"quantization_config": type("C", (), {"quant_method": "gptq"})})
    with pytest.raises(ModelError, match=r"quantised \(gptq\)"):
        compress_once(model, texts(), budget=HALF)


def test_sensitivity_is_the_fisher_diagonal_of_the_outputs():
    """Against the closed form of the last layer: E of the squared gradient of a drawn label's loss."""
    torch.manual_seed(0)
    model = tiny_model("llama", num_hidden_layers=1).model.double()
    name = "model.layers.0.mlp.down_proj"
    ids = texts(64, 32)
    found = sensitivity(model, ids, [name])[name].diagonal().double()
    exact = torch.zeros(64, dtype=torch.float64)
    for passage in ids[:16]:
        with torch.enable_grad():
            shift = torch.zeros(1, 32, 64, dtype=torch.float64, requires_grad=True)
            hook = model.get_submodule(name).register_forward_hook(lambda module, inputs, out, shift=shift: out + shift)
            logits = model(passage[None]).logits
            hook.remove()
            # This is the last block: a token's output changes its own prediction alone.
            weight = logits.detach().softmax(-1).sqrt()
            noise = torch.randn(64, *logits.shape, dtype=torch.float64)
            for one in noise:
                score = weight * one - logits.detach().softmax(-1) * (weight * one).sum(-1, keepdim=True)
                exact += torch.autograd.grad((score * logits).sum(), shift, retain_graph=True)[0][0].square().mean(0)
    torch.testing.assert_close(found, exact / (16 * 64), rtol=0.2, atol=0)


def test_moments_by_passes_are_those_of_one_pass(monkeypatch):
    model = tiny_model("llama").model
    batches = equal_batches(texts(), torch.device("cpu"))
    names = [slot.name for slot in layer_map(model).select(["all-linear"])]
    whole = dict(moments(model, batches, names))
    assert whole[names[0]] is whole[names[1]]  # q and k read the same
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr("tenfold.compress.losparse.calibration.GRAM_BYTES", 4 * 64**2 * 5)
    parts = dict(moments(model, batches, names))
    assert len(calls) > 3 * len(batches)
    assert list(parts) == list(whole)
    for name in names:
        torch.testing.assert_close(parts[name].own, whole[name].own)
    layer = model.get_submodule(names[-1])
    with torch.no_grad():
        kept = []
        layer.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0].flatten(0, 1).double()))
        for ids in batches:
            model(ids)
    x = torch.cat(kept)
    torch.testing.assert_close(whole[names[-1]].own.double(), x.T @ x, rtol=1e-5, atol=1e-5)
    assert whole[names[-1]].tokens == len(x)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "qwen3", "deberta-v2"])
def test_blocks_one_by_one_are_the_model(kind):
    model = tiny_model(kind).model
    names = [slot.name for slot in layer_map(model).select(["all-linear"])]
    batches = equal_batches([*texts(40), *texts(3, 17)], torch.device("cpu"))
    blocks = Blocks.of(model, names, batches)
    assert blocks is not None
    assert len(blocks.names) == 2
    for ids in batches:
        wanted = []
        hook = model.get_submodule(blocks.names[-1]).register_forward_hook(
            lambda module, inputs, out, wanted=wanted: wanted.append(out if torch.is_tensor(out) else out[0])
        )
        with torch.no_grad():
            model(ids)
        hook.remove()
        hidden = blocks.begin(ids)
        for index in range(2):
            hidden = blocks.run(index, hidden, ids)
        torch.testing.assert_close(hidden, wanted[0])


def test_encoder_decoders_have_no_blocks_one_by_one():
    model = tiny_model("t5").model
    names = [slot.name for slot in layer_map(model).select(["all-linear"])]
    assert Blocks.of(model, names, equal_batches(texts(), torch.device("cpu"))) is None


def pairs(tokens=400, inner=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inner, generator=generator).double() * torch.linspace(3, 0.1, inner) + 0.5
    near = x @ (torch.eye(inner) + 0.3 * torch.randn(inner, inner, generator=generator)).double() + 0.2
    return x, near


def second(x, near):
    n = len(x)
    return Second(near.T @ near / n, x.T @ near / n, x.T @ x / n)


def products(channels):
    root = torch.randn(channels, channels, generator=torch.Generator().manual_seed(5)).double()
    return root @ root.T + torch.eye(channels).double()


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("shape", [(14, 10), (7, 10)])
def test_fit_is_reduced_rank_regression(shape, whole, monkeypatch):
    """No other factors of this rank come nearer: those that descend from it by gradient do not get lower."""
    x, near = pairs()
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(3)).double()
    outputs = products(shape[0]) if whole else torch.linspace(0.2, 4, shape[0]).double()
    price = outputs if whole else torch.diag(outputs)
    seen, order = second(x, near), torch.arange(shape[0])
    costs = half(among(outputs, order[2:]))
    with monkeypatch.context() as context:
        context.setattr("tenfold.compress.losparse.fit.STEADINESS", 1e-9)
        found = fit_matrix(weight, RankAndRows(3, 2), order, second(x, near), costs, refit=True)

    def away(left, right):
        return weight @ x.T - torch.cat((found.rows, (left @ right)[2:])) @ near.T

    def loss(left, right):
        error = away(left, right)[2:]
        return (price[2:, 2:] @ error * error).sum() / len(x)

    # A row that is kept is a regression of its own.
    rows = torch.linalg.lstsq(near, x @ weight[:2].T).solution.T
    torch.testing.assert_close(found.rows, rows, rtol=1e-4, atol=1e-4)
    error = away(found.left, found.right).square()
    relative = (price.diagonal() @ error).sum() / (price.diagonal() @ (weight @ x.T).square()).sum()
    assert abs(seen.error(weight, found, outputs) - float(relative)) < 1e-9
    at = loss(found.left, found.right).item()
    parts = [part.clone().requires_grad_() for part in (found.left, found.right)]
    optimizer = torch.optim.LBFGS(parts, max_iter=300, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(*parts)
        value.backward()
        return value

    optimizer.step(closure)
    assert at <= loss(*parts).item() * (1 + 1e-4)
    plain = fit_matrix(weight, RankAndRows(3, 2), order, seen, costs, refit=False)
    steady = fit_matrix(weight, RankAndRows(3, 2), order, seen, costs, refit=True)
    assert at < loss(steady.left, steady.right).item() < loss(plain.left, plain.right).item()


def test_directions_without_inputs_are_projected_along():
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double()
    gram = torch.zeros(5, 5).double()
    gram[0, 0] = 1
    basis, right = nearest_low_rank(weight, root(gram), 2)
    assert right.isfinite().all()
    torch.testing.assert_close((basis @ right)[:, 0], weight[:, 0], rtol=1e-5, atol=1e-5)


def test_what_a_refit_gains_can_be_read():
    """Also of a model that knows nothing, where a compressed one is 0.0001 nats away."""
    found = compress_once(tiny_model("llama").model, texts(), budget=HALF)
    (note,) = [note for note in found.notes if note.startswith("refit ")]
    away = re.fullmatch(r".* tokens are (\S+) nats from .* without it (\S+)", note)
    assert 0 < float(away[1]) != float(away[2]) > 0


def test_the_report_names_what_was_not_tried():
    found = compress_once(tiny_model("t5").model, texts(), budget=HALF)
    assert any(re.search("cannot be called one by one", note) for note in found.notes)


class _Routed(torch.nn.Module):
    """Two experts: the second one reads few tokens; and one that no token reaches."""

    def __init__(self, mlp):
        super().__init__()
        self.experts = torch.nn.ModuleList(copy.deepcopy(mlp) for _ in range(3))

    def forward(self, hidden):
        flat = hidden.flatten(0, -2)
        routed = (flat[:, 0] > flat[:, 0].float().quantile(0.6)).long()
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            chosen = routed == index
            if chosen.any():
                out[chosen] = expert(flat[chosen])
        return out.view_as(hidden)


def test_experts_are_fitted_to_the_tokens_that_reach_them():
    model = tiny_model("llama").model
    for layer in model.model.layers:
        layer.mlp = _Routed(layer.mlp)
    found = compress_once(model, texts(24), budget=Budget(0.6, "share"))
    unreached = [name for name, module in model.named_modules() if "experts.2" in name and hasattr(module, "weight")]
    assert len(unreached) == 6
    assert not {matrix.name for matrix in found.matrices}.intersection(unreached)
    assert any("calibration tokens reach" in note and unreached[0] in note for note in found.notes)
    away = distance(model, with_factors(model, found.factors))
    torch.manual_seed(0)
    noise = copy.deepcopy(model)
    for name, matrix in found.factors.items():
        weight = weight_of(noise.get_submodule(name)).data
        error = (matrix.dense() - weight).norm()
        weight += torch.randn(weight.shape) * error / weight.numel() ** 0.5
    assert away < 0.5 * distance(model, noise)


def test_numbers_that_are_not_finite_are_refused_by_name():
    model = tiny_model("llama").model
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("inf")
    with pytest.raises(ModelError, match=r"layers\.\d.*not finite"):
        compress_once(model, texts(), budget=HALF)


def test_outputs_count_alone_where_their_products_would_take_too_much(monkeypatch):
    model = tiny_model("llama").model
    names = [slot.name for slot in layer_map(model).select(["all-linear"])]
    whole = sensitivity(model, texts(), names)
    monkeypatch.setattr("tenfold.compress.losparse.calibration.GRAM_BYTES", 1000)
    alone = sensitivity(model, texts(), names)
    for name in names:
        assert whole[name].shape == (len(alone[name]),) * 2
        torch.testing.assert_close(whole[name].diagonal(), alone[name])
        assert bool((torch.linalg.eigvalsh(whole[name].double()) > 0).all())
    found = compress_once(model, texts(), budget=HALF)
    assert 0.49 < found.share <= 0.5


def test_what_the_loss_depends_on_is_kept_better():
    """A head that reads few of the channels: with weighing these are what the budget goes to."""
    model = tiny_model("llama").model
    model.lm_head.weight.data[:, 16:] *= 0.01
    ids = texts(24)
    away = [
        distance(model, with_factors(model, compress_once(model, ids, budget=HALF, weigh=weigh).factors))
        for weigh in (False, True)
    ]
    assert away[1] < 0.7 * away[0]


def test_progress_tells_every_part():
    said = {}
    compress_once(
        tiny_model("llama").model,
        texts(),
        budget=HALF,
        progress=lambda label, done, total: said.setdefault(label, []).append((done, total)),
    )
    assert list(said) == ["sensitivity", "inputs", "fit", "refit"]
    assert all(steps[-1][0] == steps[-1][1] > 0 for steps in said.values())


def test_a_refit_is_kept_where_predictions_come_nearer(monkeypatch):
    """The first layer leaves so little that the second reads other inputs; and once refits make things worse."""
    model = tiny_model("llama").model
    ids = texts(64)
    little = Budget(0.25, "share")
    kept, without = (compress_once(model, ids, budget=little, refit=refit) for refit in (True, False))
    held = torch.stack(ids[7::8])
    away = [distance(model, with_factors(model, found.factors), held) for found in (kept, without)]
    assert away[0] <= away[1] + 1e-6
    note = next(note for note in kept.notes if "held-out tokens" in note)
    assert f"{away[1]:.4f}" in note
    assert note.startswith("refit kept") == any(matrix.refitted is not None for matrix in kept.matrices)

    def spoiled(self, blocks, texts, tell):
        self.at_once(texts, tell)
        self.factors = {name: replace(one, left=one.left * 0, rows=one.rows * 0) for name, one in self.factors.items()}

    monkeypatch.setattr("tenfold.compress.losparse.oneshot._Work.by_blocks", spoiled)
    found = compress_once(model, ids, budget=little)
    assert found.matrices == without.matrices
    assert any(note.startswith("refit left out") for note in found.notes)
