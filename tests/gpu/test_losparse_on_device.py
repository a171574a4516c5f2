"""LoSparse on a device: the factors of float64, one budget, the same logits masked, compact, reloaded and dense."""

import pytest
import torch

from tenfold.compress.losparse.handle import attach
from tenfold.compress.losparse.layer import LowRankRowsLinear, compressed_layers, install
from tenfold.compress.losparse.layout import settle
from tenfold.compress.losparse.oneshot import compress_once
from tenfold.compress.losparse.own_text import own_text
from tenfold.config.budget import Budget
from tenfold.models.open import open_model
from tenfold.models.tiny import tiny_model

IDS = torch.arange(5, 53).view(4, 12)
HALF = Budget(0.5, "share")


def texts(device):
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(6, 262, (48,), generator=draw).to(device) for _ in range(16)]


def logits(model, device):
    with torch.no_grad():
        return model(input_ids=IDS.to(device)).logits


def test_what_is_found_without_training_is_that_of_float64(device, away):
    found, exact = (
        compress_once(tiny_model("llama").model.to(place, dtype), texts(place), budget=HALF)
        for place, dtype in ((device, torch.float32), ("cpu", torch.float64))
    )
    assert found.share <= 0.5
    same = [one.choice == other.choice for one, other in zip(found.matrices, exact.matrices, strict=True)]
    assert sum(same) >= len(same) - 2  # a choice may hang on rounding
    for one, other in zip(found.matrices, exact.matrices, strict=True):
        alike = one.choice == other.choice and one.refit == other.refit
        if alike and one.name in found.factors and one.numbers:
            assert away(found.factors[one.name].dense(), exact.factors[one.name].dense()) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compact_is_dense_and_opens_again(device, away, dtype, tmp_path):
    model = tiny_model("llama").model.to(device, dtype)
    factors = compress_once(model, texts(device), budget=HALF).factors
    assert all(part.device.type == device for one in factors.values() for part in (one.left, one.right, one.rows))
    install(model, factors, elastic=True)
    forms = settle(model)
    assert set(forms) == set(compressed_layers(model))
    for layer in compressed_layers(model).values():
        x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        exact = x.double() @ layer.dense_weight().double().mT
        for form in ("stored", "joined", "whole"):
            layer.take(form, form)
            with torch.no_grad():
                found = layer(x)
            assert (found - exact).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * exact.norm()
    settle(model)
    before = logits(model, device)
    model.save_pretrained(tmp_path)
    tiny_model("llama").tokenizer.save_pretrained(tmp_path)
    again = open_model(tmp_path, device=device, dtype=dtype).model
    settle(again)
    assert torch.equal(logits(again, device), before)


@pytest.mark.parametrize("frozen", [False, True])
def test_rows_are_pruned_in_training(device, away, frozen):
    torch.manual_seed(0)
    model = tiny_model("llama").model.to(device)
    names = [f"model.layers.{layer}.mlp.{name}_proj" for layer in (0, 1) for name in ("gate", "down")]
    handle = attach(model, dict.fromkeys(names, 4), rows=4000, total_steps=20, frozen=frozen)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    ids, losses = IDS.to(device), []
    model.train()
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    kept = sum(layer.in_features * int(layer.mask.sum()) for layer in handle.layers.values())
    assert 3500 < kept <= 4000
    model.eval()
    masked = logits(model, device)
    compact = logits(handle.compact(), device)
    assert away(compact, masked.double()) < 1e-4
    assert sum(isinstance(module, LowRankRowsLinear) for module in model.modules()) == len(names)


def test_texts_of_its_own_are_written_on_the_device(device):
    opened = tiny_model("llama")
    state = torch.get_rng_state()
    written = own_text(opened.model.to(device), opened.tokenizer, 40, length=20)
    assert [ids.device.type for ids in written] == [device] * 2
    assert torch.equal(torch.get_rng_state(), state)
