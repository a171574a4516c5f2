"""The peers of one-shot LoSparse do what they are said to do: closed forms, models with the parts really cut out."""

import pytest
import torch

from benchmarks import losparse_peers as peers
from tenfold.models.tiny import tiny_model


@pytest.fixture(scope="module")
def subject():
    ids = torch.randint(8, 200, (24, 32), generator=torch.Generator().manual_seed(0))
    return peers.Subject(tiny_model("llama").model.eval(), ids)


def outputs(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def name_of(block, last):
    return f"model.layers.{block}.{'mlp' if last in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{last}"


@pytest.mark.parametrize("peer", peers.PEERS)
def test_budgets_are_met_from_below_and_the_model_is_given_back(peer, subject):
    before = outputs(subject.model, subject.ids[:2])
    at = peers.PEERS[peer](subject)
    small, large = at(0.5), at(0.9)
    for keep, made in ((0.5, small), (0.9, large)):
        assert (keep - 0.05) * subject.numbers < made.numbers <= keep * subject.numbers
        assert made.weights.keys() == subject.matrices.keys()
    with peers.applied(subject.model, small):
        assert not torch.allclose(outputs(subject.model, subject.ids[:2]), before, atol=1e-3)
    assert torch.equal(outputs(subject.model, subject.ids[:2]), before)
    assert all(matrix.bias is None for matrix in subject.matrices.values())


def test_moments_are_those_of_the_inputs(subject):
    seen = {}
    hooks = [matrix.register_forward_pre_hook(lambda m, args, n=name: seen.update({n: args[0]}))
             for name, matrix in subject.matrices.items()]  # fmt: skip
    outputs(subject.model, subject.ids)
    for hook in hooks:
        hook.remove()
    for name, inputs in seen.items():
        rows, moments = inputs.flatten(0, -2).double(), subject.moments[name]
        torch.testing.assert_close(moments.gram, rows.T @ rows, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(moments.mean, rows.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moments.variance, rows.var(0, correction=0), rtol=1e-3, atol=1e-6)


def test_whitening_loses_what_the_spectrum_says_and_plain_svd_more(subject):
    name = name_of(1, "down_proj")
    weight, moments = subject.matrices[name].weight.detach(), subject.moments[name]
    values = torch.linalg.svdvals(weight.double() @ moments.root())

    def lost(left, right):
        return ((weight - left[:, :9] @ right[:9]).double() @ moments.root()).norm().item()

    whitened = lost(*peers.truncated(weight, moments))
    assert whitened == pytest.approx(values[9:].square().sum().sqrt().item(), rel=1e-5)
    assert whitened < lost(*peers.truncated(weight, None))


def test_all_ranks_together_are_the_matrix(subject):
    for whitened in (True, False):
        made = peers.low_rank(subject, whitened=whitened, pivoted=True)(1.0)
        for name, weight in made.weights.items():
            torch.testing.assert_close(weight, subject.matrices[name].weight.data, rtol=1e-3, atol=1e-5)


def test_the_first_block_of_the_sequence_sees_the_dense_inputs_and_later_ones_do_not(subject):
    plain, sequence = peers.low_rank(subject, whitened=True, pivoted=True)(0.5), peers.sequential(subject)(0.5)
    assert plain.numbers == sequence.numbers
    torch.testing.assert_close(plain.weights[name_of(0, "up_proj")], sequence.weights[name_of(0, "up_proj")])
    inputs = []
    with peers.applied(subject.model, sequence):
        matrix = subject.matrices[name_of(1, "q_proj")]
        hook = matrix.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
        outputs(subject.model, subject.ids)
        hook.remove()
    dense = matrix.weight.detach()
    errors = [((dense - made.weights[name_of(1, "q_proj")]) @ inputs[0].T).square().sum() for made in (plain, sequence)]
    assert errors[1] < errors[0]


def test_removed_neurons_can_really_be_cut_out(subject):
    made = peers.neurons(subject, "flap")(0.6)
    ids = subject.ids[:3]
    with peers.applied(subject.model, made):
        masked = outputs(subject.model, ids)
        numbers, before = 0, {}
        for index in range(2):
            mlp = subject.model.model.layers[index].mlp
            kept = mlp.gate_proj.weight.abs().sum(1) > 0
            before[index] = {name: getattr(mlp, name).weight.data for name in ("gate_proj", "up_proj", "down_proj")}
            mlp.gate_proj.weight.data = mlp.gate_proj.weight.data[kept]
            mlp.up_proj.weight.data = mlp.up_proj.weight.data[kept]
            mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, kept]
            numbers += 3 * int(kept.sum()) * 64
            heads = subject.matrices[name_of(index, "k_proj")].weight.data.abs().sum(1) > 0
            numbers += 2 * int(heads.sum()) * 64 + 2 * 2 * int(heads.sum()) * 64
        torch.testing.assert_close(outputs(subject.model, ids), masked)
        for index, weights in before.items():
            for name, weight in weights.items():
                getattr(subject.model.model.layers[index].mlp, name).weight.data = weight
    assert made.numbers == numbers + sum(bias.numel() for bias in made.biases.values())


def test_what_flap_removes_leaves_its_mean_behind(subject):
    made = peers.neurons(subject, "flap")(0.6)
    for name, bias in made.biases.items():
        gone = subject.matrices[name].weight.detach() - made.weights[name]
        torch.testing.assert_close(bias, gone @ subject.moments[name].mean.float(), rtol=1e-4, atol=1e-6)


def test_rows_keep_the_highest_and_replace_the_others_by_their_mean(subject):
    name = name_of(0, "gate_proj")
    weight = subject.matrices[name].weight.detach()
    kept = peers.rows(subject, "ln")(0.5).weights[name].abs().sum(1) > 0
    assert weight[kept].norm(dim=1).min() >= weight[~kept].norm(dim=1).max()
    made = peers.rows(subject, "wanda")(0.5)
    kept = made.weights[name].abs().sum(1) > 0
    score = (weight.abs().double() @ subject.moments[name].norm).float()
    assert score[kept].min() >= score[~kept].max()
    inputs = subject.moments[name].mean.float()
    torch.testing.assert_close(
        made.weights[name] @ inputs + made.biases[name], torch.where(kept, weight @ inputs, made.biases[name])
    )
    torch.testing.assert_close(made.biases[name][~kept], (weight @ inputs)[~kept], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("bits", "share"), [(8, 8.25 / 16), (4, 4.5 / 16)])
def test_rounding_is_off_by_at_most_half_a_step(bits, share, subject):
    made = peers.rounded(subject, bits)
    assert made.bytes == pytest.approx(2 * share * subject.numbers, rel=0.02)
    for name, weight in made.weights.items():
        exact = subject.matrices[name].weight.detach()
        assert (weight - exact).norm() < exact.norm() * (0.02 if bits == 8 else 0.2)


def test_heads_go_with_the_keys_and_values_that_they_share(subject):
    made = peers.neurons(subject, "wanda")(0.5)
    for block in range(2):
        kept = made.weights[name_of(block, "k_proj")].abs().sum(1).view(2, 16) > 0
        assert kept.all(1).tolist() == kept.any(1).tolist()
        assert kept.any(1).sum() == 1
        queries = kept.any(1).repeat_interleave(2 * 16)  # two heads to a group
        assert torch.equal(made.weights[name_of(block, "q_proj")].abs().sum(1) > 0, queries)
        assert torch.equal(made.weights[name_of(block, "o_proj")].abs().sum(0) > 0, queries)
