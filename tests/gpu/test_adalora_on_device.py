"""AdaLoRA's steps under bfloat16 autocast: the budget, the scores in float64, and the merged model."""

import torch

from tenfold.adapt.adalora import AdaLoraConfig, attach
from tenfold.models.tiny import tiny_model

IDS = torch.arange(5, 53).view(4, 12)
PHASES = {"steps": 12, "tinit": 2, "tfinal": 4, "interval": 1}


def adapter_on(device, **settings):
    torch.manual_seed(0)
    return attach(tiny_model("llama").model.to(device), AdaLoraConfig(rank=1, initial_rank=3, **PHASES, **settings))


def train(adapter, device, steps, watch=lambda: None):
    ids = IDS.to(device)
    optimizer = torch.optim.AdamW([p for p in adapter.model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses = []
    adapter.model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = adapter.model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        watch()
        losses.append(loss.item())
    return losses


def test_the_budget_is_kept_and_something_is_learnt(device, away):
    adapter = adapter_on(device)
    losses = train(adapter, device, 12)
    assert losses[-1] < losses[0] - 0.1
    matrices = len(adapter.matrices)
    assert sum(adapter.ranks().values()) == matrices  # a mean rank of 1
    assert len(set(adapter.ranks().values())) > 1  # and not the same for all
    assert all(matrix.rank == max(1, adapter.ranks()[name]) for name, matrix in adapter.matrices.items())
    ids = IDS.to(device)
    with torch.no_grad():
        adapted = adapter.model.eval()(input_ids=ids).logits
        merged = adapter.model.merge_and_unload()(input_ids=ids).logits
    assert away(merged, adapted.double()) < 1e-3


def test_scores_are_those_of_the_formula_in_float64(device, away):
    # Before anything is allocated: the paper's section 3.2, entry by entry.
    adapter = adapter_on(device)
    averages = {}

    def watch():
        for name, matrix in adapter.matrices.items():
            for number, tensor in enumerate(matrix.tensors):
                sensitivity = (tensor.detach().double() * tensor.grad.double()).abs()
                mean, doubt = averages.get((name, number), (0.0, 0.0))
                mean = 0.85 * mean + 0.15 * sensitivity
                doubt = 0.85 * doubt + 0.15 * (sensitivity - mean).abs()
                averages[name, number] = mean, doubt

    train(adapter, device, 2, watch)
    found = adapter.controller._importance.scores()
    for name in adapter.matrices:
        Q, singular, P = ((mean * doubt) for mean, doubt in (averages[name, number] for number in range(3)))
        assert away(found[name], Q.mean(1) + singular[:, 0] + P.mean(0)) < 1e-4


def test_a_layer_under_autocast_is_that_of_float64(device, away):
    adapter = adapter_on(device)
    train(adapter, device, 12)
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1)).to(device)
    for matrix in list(adapter.matrices.values())[:3]:
        with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
            found = matrix.layer(x)
        Q, singular, P = (tensor.detach().double() for tensor in matrix.tensors)
        update = (P * singular.mT) @ Q * adapter.plan.scale
        exact = x.double() @ (matrix.layer.get_base_layer().weight.double() + update).mT
        assert away(found, exact) < 1e-2
