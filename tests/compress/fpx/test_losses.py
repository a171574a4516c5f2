"""Losses: each metric against a computation by hand in float64, on every architecture."""

import copy

import pytest
import torch

from tenfold.compress.fpx.losses import unit_losses
from tenfold.compress.fpx.units import units_of
from tenfold.compress.losparse.calibration import equal_batches, read
from tenfold.core.weight_formats import weight_format
from tenfold.errors import ConfigError, DataError, ModelError
from tenfold.models.tiny import KINDS, tiny_model
from tests.compress.fpx.test_units import EXPERTS, experts

PALETTE = [weight_format("fp8_row"), weight_format("nvfp4"), weight_format("int4_g32")]
PASSAGES = [
    torch.randint(6, 262, (length,), generator=torch.Generator().manual_seed(length)) for length in (40, 17, 40, 9)
]


def outputs_by_hand(model, name, form):
    """Of a layer over all passages: as it is, and with its own inputs in a format."""
    layer, inputs, exact, changed = model.get_submodule(name), [], [], []
    hook = layer.register_forward_hook(lambda module, args, output: inputs.append((args[0], output)))
    with torch.no_grad():
        for ids in equal_batches(PASSAGES, torch.device("cpu")):
            read(model, ids)
    hook.remove()
    transposed = not isinstance(layer, torch.nn.Linear | torch.nn.Embedding)
    weight = layer.weight.detach().T if transposed else layer.weight.detach()
    rounded = form.weight(weight.contiguous()).double()
    for x, output in inputs:
        exact.append(output.double().flatten(0, -2))
        if isinstance(layer, torch.nn.Embedding):
            scale = getattr(layer, "embed_scale", torch.tensor(1.0)).double()
            changed.append((rounded[x] * scale).flatten(0, -2))
        else:
            bias = 0 if layer.bias is None else layer.bias.detach().double()
            changed.append((form.inputs(x).double() @ rounded.T + bias).flatten(0, -2))
    return torch.cat(exact), torch.cat(changed)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_outputs_are_those_computed_by_hand(kind):
    model = tiny_model(kind, tie_word_embeddings=False).model
    units = [unit for unit in units_of(model) if len(unit.modules) == 1][:9]
    whole = unit_losses(model, PASSAGES, units, PALETTE, "relative_l2")
    tokens = unit_losses(model, PASSAGES, units, PALETTE, "token_mean")
    for unit in units:
        for place, form in enumerate(PALETTE):
            exact, changed = outputs_by_hand(model, unit.name, form)
            error = changed - exact
            assert whole[unit.name][place] == pytest.approx(float(error.norm() / exact.norm()), rel=1e-4)
            each = error.norm(dim=-1) / exact.norm(dim=-1).masked_fill(error.norm(dim=-1) == 0, 1)
            assert tokens[unit.name][place] == pytest.approx(float(each.mean()), rel=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_fisher_is_near_the_true_divergence(kind, tied):
    """Small changes cost what their squares say, were errors of outputs independent: within a factor."""
    model = tiny_model(kind, tie_word_embeddings=tied).model
    units, form = units_of(model), [weight_format("fp8_row")]
    fisher = unit_losses(model, PASSAGES * 4, units, form)
    exact = unit_losses(model, PASSAGES, units, form, "kl")
    ratios = torch.tensor([fisher[unit.name][0] / exact[unit.name][0] for unit in units])
    assert 1 / 3 < float(ratios.median()) < 3
    if kind not in ("t5", "deberta-v2"):  # one prediction for a passage is too few to tell
        assert float(ratios.log().abs().max()) < 1.5


@pytest.mark.parametrize("name", EXPERTS)
def test_stacked_experts_lose_what_their_block_changes(name):
    model = experts(name)
    unit = next(unit for unit in units_of(model) if len(unit.weights) > 1)
    form = weight_format("nvfp4_a16")
    changed = copy.deepcopy(model)
    for weight in unit.weights:
        parameter = changed.get_parameter(weight.name)
        for expert in parameter.data:
            matrix = expert.T.contiguous() if weight.transposed else expert
            assert matrix.shape == (weight.out, weight.inner)
            rounded = form.weight(matrix)
            expert.copy_(rounded.T if weight.transposed else rounded)
    with torch.no_grad():
        seen = []
        hook = model.get_submodule(unit.name).register_forward_hook(lambda m, args, output: seen.append((args, output)))
        model(PASSAGES[0][None])
        hook.remove()
        (args, exact) = seen[0]
        wanted = float((changed.get_submodule(unit.name)(*args) - exact).norm() / exact.norm())
    found = unit_losses(model, PASSAGES[:1], [unit], [form], "relative_l2")[unit.name]
    assert found[0] == pytest.approx(wanted, rel=1e-4)
    assert unit_losses(model, PASSAGES[:1], [unit], [form])[unit.name][0] > 0


def test_the_model_stays_as_it_is_and_the_same_call_gives_the_same_numbers():
    model = tiny_model("llama").model.train()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = {name: (tensor.clone(), tensor.requires_grad) for name, tensor in model.named_parameters()}
    for metric in ("fisher", "relative_l2", "token_mean", "kl"):
        units = units_of(model)[:3]
        once = unit_losses(model, PASSAGES, units, PALETTE, metric)
        assert once == unit_losses(model, PASSAGES, units, PALETTE, metric)
    assert model.training
    assert all(module.training for module in model.modules())
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, before[name][0])
        assert tensor.requires_grad == before[name][1]
        assert tensor.grad is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_fused_units_lose_the_sum_of_their_parts():
    model = tiny_model("llama").model
    parts = unit_losses(model, PASSAGES, units_of(model), PALETTE)
    whole = unit_losses(model, PASSAGES, units_of(model, fused=True), PALETTE)
    for place in range(len(PALETTE)):
        wanted = sum(parts[f"model.layers.0.self_attn.{own}_proj"][place] for own in "qkv")
        assert whole["model.layers.0.self_attn.q_proj+k_proj+v_proj"][place] == pytest.approx(wanted, rel=1e-9)


def test_a_tied_weight_counts_at_the_embedding_and_at_the_head():
    tied = tiny_model("llama", tie_word_embeddings=True).model
    untied = copy.deepcopy(tied)
    untied.lm_head.weight = torch.nn.Parameter(tied.lm_head.weight.detach().clone())
    one = unit_losses(tied, PASSAGES, units_of(tied), PALETTE)["model.embed_tokens"]
    two = unit_losses(untied, PASSAGES, units_of(untied), PALETTE)
    assert [unit.name for unit in units_of(untied)][-1] == "lm_head"
    assert one == pytest.approx(
        [a + b for a, b in zip(two["model.embed_tokens"], two["lm_head"], strict=True)], rel=1e-9
    )


def test_a_massive_token_does_not_make_a_layer_tolerant():
    """Epsilon sees the token with outputs of thousands alone, which a scale for the whole tensor suits (oracle 10)."""
    model = tiny_model("llama").model
    massive = tiny_model("llama").model
    with torch.no_grad():  # one channel of one block is huge at one token alone, as in models that are trained
        layer = massive.model.layers[0].mlp
        key = massive.model.embed_tokens.weight[PASSAGES[0][0]]
        layer.gate_proj.weight[0] = 40 * key / key.norm()
        layer.up_proj.weight[0] = 40 * key / key.norm()
    name, form = "model.layers.0.mlp.down_proj", [weight_format("fp4_tensor")]
    unit = next(unit for unit in units_of(model) if unit.name == name)
    ordinary, found = (
        {metric: unit_losses(each, PASSAGES, [unit], form, metric)[name][0] for metric in ("relative_l2", "fisher")}
        for each in (model, massive)
    )
    assert found["relative_l2"] < ordinary["relative_l2"]
    assert found["fisher"] > ordinary["fisher"]


def test_errors_name_the_layer():
    model = tiny_model("llama").model
    units = units_of(model)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    with pytest.raises(ModelError, match=r"model.layers.1.self_attn.q_proj: the squares of its gradients"):
        unit_losses(model, PASSAGES, units, PALETTE)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[2, 3] = torch.nan
    with pytest.raises(ModelError, match=r"model.layers.1.self_attn.o_proj.weight"):
        unit_losses(model, PASSAGES, units, PALETTE, "relative_l2")
    with pytest.raises(ConfigError, match="metric"):
        unit_losses(model, PASSAGES, units, PALETTE, "hessian")
    with pytest.raises(DataError, match="no token"):
        unit_losses(model, [torch.tensor([], dtype=torch.long)], units, PALETTE)


def test_inputs_that_the_model_overwrites_are_seen():
    model = tiny_model("llama").model
    layer = model.model.layers[1].self_attn.k_proj

    def overwrite(module, args, output):
        args[0].mul_(1.5)

    layer.register_forward_hook(overwrite)
    with pytest.raises(ModelError, match=r"layers.1.self_attn.[qkv]_proj: the model overwrites"):
        unit_losses(model, PASSAGES, units_of(model), PALETTE)


def test_half_precision_gives_the_losses_of_single():
    model = tiny_model("llama").model.bfloat16().float()  # numbers that both hold
    for metric in ("fisher", "relative_l2"):
        single = unit_losses(model.float(), PASSAGES, units_of(model), PALETTE, metric)
        half = unit_losses(model.bfloat16(), PASSAGES, units_of(model), PALETTE, metric)
        for name, losses in single.items():
            assert half[name] == pytest.approx(losses, rel=0.15)


def test_a_type_and_its_substitute_are_one_piece_of_work():
    gguf_format = pytest.importorskip("tenfold.models.gguf_types").gguf_format
    pytest.importorskip("gguf")
    model = tiny_model("llama").model  # rows of 64: q4_k becomes q5_0
    units = [unit for unit in units_of(model) if unit.name == "model.layers.0.self_attn.q_proj"]
    rounded = []

    class Counted(type(gguf_format("q5_0"))):
        def weight(self, weight, importance=None):
            rounded.append(self.name)
            return super().weight(weight, importance)

    ids = [torch.arange(6, 70)]
    (found,) = unit_losses(model, ids, units, [Counted("q5_0"), Counted("q4_0"), Counted("q4_k")]).values()
    assert rounded == ["q5_0", "q4_0"]
    assert found[2] == found[0] < found[1]
