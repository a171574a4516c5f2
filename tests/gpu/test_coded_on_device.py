"""Packed matrices and models where they run: products against float64, and the same model on both devices."""

import copy

import pytest
import torch

from tenfold import fpx
from tenfold.compress.fpx.packed_layers import CodedLinear
from tenfold.kernels.packed_matrix import PACKED, packed_format
from tenfold.kernels.packed_product import kernels_for, packed_product
from tenfold.models.tiny import tiny_model

IDS = torch.randint(6, 262, (2, 24), generator=torch.Generator().manual_seed(0))
CLOSE = {"float32": 1e-5, "packed": 6e-3, "bfloat16": 8e-3, "whole": 2e-2}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("shape", [(64, 64), (100, 72), (300, 200)])
def test_products(device, away, name, shape):
    draw = torch.Generator().manual_seed(0)
    matrix = packed_format(name).pack(torch.randn(*shape, generator=draw).to(device))
    for rows in (1, 7, 100):
        x = torch.randn(rows, shape[1], generator=draw).to(device)
        exact = x.double().cpu() @ matrix.dense().double().cpu().T
        for kernel in kernels_for(matrix):
            found = packed_product(x, matrix, kernel)
            assert found.device.type == device
            assert away(found, exact) < CLOSE[kernel], kernel
    ids = torch.tensor([0, 5, shape[0] - 1, 33], device=device)
    assert away(matrix.rows(ids), matrix.dense()[ids]) < 1e-6


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_packed_model(device, away, kind):
    """Planned, timed, packed and run on the device; and packed on the CPU, then moved."""
    plain = tiny_model(kind, tie_word_embeddings=True).model
    found = fpx.plan(plain.to(device), [IDS[0]], budget="99bits", codec="kernels").replan("8bits")
    assert found.seconds > 0
    model, simulated, moved = (copy.deepcopy(plain) for _ in range(3))
    fpx.apply(simulated, found.replan("8bits"))
    moved = moved.cpu()
    fpx.pack(model, found)
    fpx.pack(moved, found)
    moved = moved.to(device)
    for each in (model, moved):
        for layer in each.modules():
            if isinstance(layer, CodedLinear):
                layer.kernels = ("float32",) * 4
    ids = IDS.to(device)
    with torch.no_grad():
        here = model(ids).logits
        assert here.device.type == device
        assert away(moved(ids).logits, here) < 1e-4
        layers = [layer for layer in model.modules() if isinstance(layer, CodedLinear)]
        wanted = layers[0].matrix.dense().to(device)
        assert torch.equal(layers[0].weight.data, wanted)
        for layer in layers:
            layer.kernels = ()
        assert away(model(ids).logits, here) < 0.05  # whatever kernels are the fastest
        assert away(model.cpu()(IDS).logits, here) < 0.05
        assert away(simulated(ids).logits, here) < 0.1  # which rounds inputs of int8
