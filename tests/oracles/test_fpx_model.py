"""The oracles of section 7 of the FPX specification that need a model, by number."""

import pytest
import torch

from tenfold.compress.fpx.apply import apply, remove
from tenfold.compress.fpx.losses import summed_divergence, unit_losses
from tenfold.compress.fpx.plan import plan
from tenfold.compress.fpx.units import units_of
from tenfold.core.weight_formats import weight_format
from tenfold.models.tiny import tiny_model

IDS = torch.randint(6, 262, (48,), generator=torch.Generator().manual_seed(0))


def rounded_by_hand(kind, name):
    """A tiny model whose linear layers of the blocks are all in a format, by code that knows nothing of plans."""
    model, form = tiny_model(kind).model, weight_format(name)

    def on_inputs(module, args):
        return (form.inputs(args[0]), *args[1:])

    for where, module in model.named_modules():
        if ".layers." in where and isinstance(module, torch.nn.Linear):
            module.weight.data = form.weight(module.weight.data)
            module.register_forward_pre_hook(on_inputs)
    return model


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_09_the_ends_of_gamma_are_the_models_all_in_one_format_and_removing_is_exact(kind):
    model = tiny_model(kind).model
    stored = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    with torch.no_grad():
        before = model(IDS[None]).logits
        base = plan(model, [IDS], gamma=0, paper=True)
        for gamma, name in ((0, "fp8_tensor"), (1, "fp4_tensor")):
            found = base.replan(gamma=gamma)
            apply(model, found)
            once = model(IDS[None]).logits
            apply(model, found)
            assert torch.equal(once, model(IDS[None]).logits)
            assert torch.equal(once, rounded_by_hand(kind, name)(IDS[None]).logits)
            assert not torch.equal(once, before)
        remove(model)
        assert torch.equal(before, model(IDS[None]).logits)
    assert stored == {name: tensor.data_ptr() for name, tensor in model.named_parameters()}


def test_11_fisher_of_the_head_is_that_of_a_softmax():
    """Of many draws of labels, half the mean of the squared changes of logits times p (1 - p)."""
    model = tiny_model("llama").model.double()
    form, seen = weight_format("nvfp4"), []
    hook = model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        likely = model(IDS[None]).logits.softmax(-1)
    hook.remove()
    x, weight = seen[0], model.lm_head.weight.detach()
    change = form.inputs(x) @ form.weight(weight).T - x @ weight.T
    wanted = float((change.square() * likely * (1 - likely)).sum()) / (2 * len(IDS))
    units = [unit for unit in units_of(model) if unit.name == "lm_head"]
    (found,) = unit_losses(model, [IDS] * 40, units, [form])["lm_head"]
    assert found == pytest.approx(wanted, rel=0.02)


def test_11_fisher_of_an_inner_layer_is_the_exact_diagonal():
    """By the Jacobian of all logits, where labels at all later positions play a part."""
    model = tiny_model("llama", vocab_size=24, hidden_size=32, intermediate_size=48).model.double()
    ids, form = torch.randint(6, 24, (5,), generator=torch.Generator().manual_seed(1)), weight_format("nvfp4")
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        layer, kept = model.get_submodule(name), {}

        def keep(module, args, output, kept=kept):
            kept.update(x=args[0].detach(), y=output)

        hook = layer.register_forward_hook(keep)
        logits = model(ids[None]).logits[0]
        hook.remove()
        likely = logits.detach().softmax(-1)
        rows = [torch.autograd.grad(one, kept["y"], retain_graph=True)[0][0] for one in logits.flatten()]
        jacobian = torch.stack(rows).view(*logits.shape, len(ids), -1)  # [position, token, at, out]
        mean = torch.einsum("sv,svtj->stj", likely, jacobian)
        squares = (torch.einsum("sv,svtj->stj", likely, jacobian.square()) - mean.square()).sum(0)
        change = form.inputs(kept["x"]) @ form.weight(layer.weight.detach()).T - kept["x"] @ layer.weight.detach().T
        wanted = float((squares * change[0].square()).sum()) / (2 * len(ids))
        units = [unit for unit in units_of(model) if unit.name == name]
        (found,) = unit_losses(model, [ids] * 2000, units, [form])[name]
        assert found == pytest.approx(wanted, rel=0.05)


def test_the_divergence_of_predictions_is_that_of_torch():
    p, q = torch.randn(2, 3, 100, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
    wanted = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum")
    assert summed_divergence(p, q) == pytest.approx(float(wanted), rel=1e-12)
