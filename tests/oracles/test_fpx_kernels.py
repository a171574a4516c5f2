"""Oracles 16 and 17 of section 7 of the FPX specification, and what its section 6 says of the rounding of kernels."""

import itertools

import numpy as np
import pytest
import torch

from tenfold.compress.fpx.epsilon import OutputError
from tenfold.core.formats import dequantise, quantise
from tenfold.core.latency import LatencyModel, TimedCall
from tenfold.core.weight_formats import weight_format
from tenfold.kernels.packed_matrix import packed_format
from tenfold.kernels.packed_product import kernels_for, packed_product


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def away(wanted, found):
    read = OutputError()
    read.add(wanted.float(), found.float())
    return read.epsilon


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_16_the_int4_kernel_is_a_product_with_the_dequantised_weight(rows):
    packed = packed_format("int4_g32").pack(draw(192, 256))
    if "packed" not in kernels_for(packed):
        pytest.skip("torch has no kernel for nibbles here")
    x = draw(rows, 256, seed=1).bfloat16()
    assert 0 < away(x @ packed.dense().bfloat16().T, packed_product(x, packed, "packed")) < 0.01
    # The formula of the specification, from what is stored.
    scale, zero = packed.scales.view(torch.bfloat16).double().repeat_interleave(32, 0).unbind(-1)
    codes = packed.layout.columns(packed.codes).double()
    assert codes.amin() == 0
    assert codes.amax() == 15
    by_hand = x.double() @ ((codes - 8) * scale + zero)
    assert away(by_hand, packed_product(x, packed, "packed")) < 0.004


def test_16_what_was_q4_1_loses_next_to_nothing():
    """llama.cpp's Q4_1 is sixteen values between a minimum and a maximum, with both as float16, in blocks of 32."""
    codes, scale, low = quantise(draw(64, 256), 4, dim=-1, group=32, metadata=torch.float16)
    weight = dequantise(codes, scale, low, dim=-1, group=32, dtype=torch.float32)
    x = draw(50, 256, seed=1)
    reference, packed = weight_format("int4_g32").weight(weight), packed_format("int4_g32").pack(weight)
    assert away(x @ weight.T, x @ reference.T) < 1e-3
    for kernel in kernels_for(packed):  # scale and zero are bfloat16 there
        assert 1e-3 < away(x @ weight.T, packed_product(x, packed, kernel)) < 6e-3, kernel


@pytest.mark.parametrize(("name", "error"), [("int8_row", 0.00747), ("int4_g32", 0.0785), ("bf16", 0.00166)])
def test_errors_on_gaussian_data_are_those_of_the_references(name, error):
    torch.manual_seed(0)
    weight = torch.randn(512, 512)
    x, packed = draw(64, 512, seed=1), packed_format(name).pack(weight)
    assert away(weight, packed.dense()) == pytest.approx(error, rel=0.02)
    wanted = {"int8_row": 0.008, "int4_g32": 0.078, "bf16": 0.0017}[name]  # section 6, weight-only
    assert away(x @ weight.T, packed_product(x, packed, "float32")) == pytest.approx(wanted, rel=0.1)


def test_17_latency_model():
    """Times T = 5 + 0.2 n_in + n_out (3 + 0.001 n_ctx) ms with 1 % of noise: all four numbers within 5 %."""
    wanted, sizes = (5.0, 0.2, 3.0, 0.001), list(itertools.product((1, 64, 1024, 8192), (0, 1, 16, 256)))
    worst = []
    for seed in range(100):
        random = np.random.default_rng(seed)
        calls = [
            TimedCall(n_in, n_out, float(exact * (1 + 0.01 * random.standard_normal()) / 1000))
            for n_in, n_out in sizes * 5
            if (exact := 5 + 0.2 * n_in + n_out * (3 + 0.001 * (n_in + n_out / 2)))
        ]
        found = LatencyModel.fit(calls, draws=0)
        numbers = (found.start, found.read, found.write, found.attend)
        worst.append(max(abs(1000 * one / own - 1) for one, own in zip(numbers, wanted, strict=True)))
    assert max(worst) < 0.05
    assert np.quantile(worst, 0.95) == pytest.approx(0.018, abs=0.006)  # of the n_ctx term, as the specification has it
