"""Formats of weights: against torch's own numbers, at shapes that blocks do not divide, and what they refuse."""

import itertools
import math

import pytest
import torch

from tenfold.core import weight_formats
from tenfold.core.floats import e2m1, e4m3, power_of_two
from tenfold.core.weight_formats import FORMATS, weight_format
from tenfold.errors import ConfigError, ModelError

BLOCKS = {"nvfp4": 16, "mxfp4": 32, "mxfp4_up": 32, "int4_g32": 32, "int4_g64": 64, "int4_g128": 128}
BLOCKS |= {name.replace("_g", "_sym_g"): size for name, size in BLOCKS.items() if "int4" in name}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_e4m3_is_what_torch_stores():
    """Every code, every midpoint between two, and the float32 numbers beside those."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    near = torch.cat([codes, middles, middles.nextafter(torch.tensor(0.0)), middles.nextafter(torch.tensor(500.0))])
    x = torch.cat([near, -near, random(10_000).exp()])
    assert torch.equal(e4m3(x), x.to(torch.float8_e4m3fn).float())
    assert codes.max() == 448


def test_e2m1_is_the_nearest_with_even_ties():
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    x = torch.arange(0, 10, 1 / 64)
    distance = (x[:, None] - values).abs()
    nearest = distance == distance.amin(1, keepdim=True)
    even = torch.arange(8) % 2 == 0
    chosen = torch.where(nearest.sum(1, keepdim=True) == 2, nearest & even, nearest)
    wanted = values[chosen.int().argmax(1)]
    assert torch.equal(e2m1(x), wanted)
    assert torch.equal(e2m1(-x), -wanted)
    assert torch.equal(e2m1(x.bfloat16()), e2m1(x.bfloat16().float()).bfloat16())


def test_powers_of_two_are_exact():
    x = random(1000).exp() ** 9
    assert torch.equal(power_of_two(x), 2.0 ** x.double().log2().floor().float())
    assert power_of_two(torch.tensor([-7.0, 0.0, math.inf, math.nan])).tolist() == [4, 0, math.inf, math.inf]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", FORMATS)
def test_shape_type_and_a_second_rounding(name, dtype):
    weight = random(6, 80).to(dtype)
    form = weight_format(name)
    rounded = form.weight(weight)
    assert (rounded.shape, rounded.dtype) == (weight.shape, weight.dtype)
    assert rounded.data_ptr() != weight.data_ptr()
    assert form.inputs(weight.view(2, 3, 80)).shape == (2, 3, 80)
    again = form.weight(rounded)
    # What is rounded once more is the result in `dtype`; float32 holds what the formats do to its last digit.
    assert (again - rounded).norm() <= max(torch.finfo(dtype).eps, 1e-6) * rounded.norm()


@pytest.mark.parametrize(("name", "block"), BLOCKS.items())
def test_what_blocks_do_not_divide_is_padded_with_zeros(name, block):
    weight = random(5, 2 * block + 3)
    padded = torch.nn.functional.pad(weight, (0, block - 3))
    form = weight_format(name)
    assert torch.equal(form.weight(weight), form.weight(padded)[:, : weight.shape[1]])
    assert form.bytes(5, 2 * block + 3) == form.bytes(5, 3 * block)


@pytest.mark.parametrize(("name", "block"), BLOCKS.items())
def test_scales_lie_along_the_inputs(name, block):
    """A huge number harms its own block alone; eight times the scale of an NVFP4 tensor moves no scale of a block."""
    weight = random(4, 2 * block)
    small = weight_format(name).weight(weight)
    weight[0, 0] = 8 * weight.abs().max()
    large = weight_format(name).weight(weight)
    assert not torch.equal(large[0, 1:block], small[0, 1:block])
    assert torch.equal(large[0, block:], small[0, block:])
    assert torch.equal(large[1:], small[1:])


def test_inputs_have_a_scale_for_each_token_and_weights_for_each_output():
    x = random(3, 64)
    huge = x.clone()
    huge[0] *= 1e4
    for name in ("fp8_row", "fp4_row", "int8_row", "mxfp4"):
        form = weight_format(name)
        assert torch.equal(form.inputs(huge)[1:], form.inputs(x)[1:]), name
        assert torch.equal(form.weight(x), form.inputs(x)), name
    assert not torch.equal(weight_format("fp4_tensor").inputs(huge)[1:], weight_format("fp4_tensor").inputs(x)[1:])


@pytest.mark.parametrize("name", ["f16", "bf16", "f32", "int4_g32", "fp8_row_a16", "nvfp4_a16", "int8_row_a16"])
def test_formats_for_weights_alone_leave_inputs(name):
    x = random(3, 64)
    assert weight_format(name).inputs(x) is x
    plain = weight_format(name.removesuffix("_a16"))
    assert torch.equal(weight_format(name).weight(x), plain.weight(x))
    assert weight_format(name).bytes(64, 70) == plain.bytes(64, 70)


def test_sixteen_bits_are_a_cast_that_saturates():
    weight = torch.tensor([[1.0, 1e5, -1e5, 1 / 3]])
    assert weight_format("f16").weight(weight)[0, 1:3].tolist() == [65504, -65504]
    assert weight_format("f16").weight(weight)[0, 3] == weight[0, 3].half().float()
    assert torch.equal(weight_format("bf16").weight(weight), weight.bfloat16().float())


def test_rounding_up_never_cuts_off_the_largest():
    weight = random(64, 320).view(64, 10, 32)
    largest = weight.abs().amax(-1)
    for name, worst in (("mxfp4", 0.25), ("mxfp4_up", 0.2)):
        rounded = weight_format(name).weight(weight.flatten(1)).view_as(weight).abs().amax(-1)
        lost = 1 - rounded / largest
        assert lost.max() <= worst + 1e-6, name
        if name == "mxfp4":
            assert lost.max() > 0.22
    exact = torch.tensor([[6.0] + [1.0] * 31])  # what both rules hold needs no larger scale
    assert torch.equal(weight_format("mxfp4_up").weight(exact), exact)


@pytest.mark.parametrize("name", [name for name in FORMATS if weight_format(name).bytes(1, 1) < 8])
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-20, 1e20, 1e37])
def test_tiny_and_huge_numbers_are_finite(name, scale):
    rounded = weight_format(name).weight(random(4, 64) * scale)
    assert rounded.isfinite().all()
    if 1e-30 < scale < 1e30 and name != "f16":
        one = weight_format(name).weight(random(4, 64) * 2.0**10) / 2.0**10
        assert (rounded / scale - one).norm() < 0.2 * one.norm()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_in_weights_and_seen_in_outputs(name, value):
    x = random(3, 64)
    x[1, 5] = value
    with pytest.raises(ModelError, match=rf"weight: {value} at \[1, 5\], one of 1 values"):
        weight_format(name).weight(x)
    found = weight_format(name).inputs(x)
    assert not found[1, 5].isfinite()
    if "_row" in name or "mxfp4" in name:
        assert found[[0, 2]].isfinite().all()


def test_an_expert_without_tokens():
    for form in FORMATS.values():
        assert form.inputs(torch.empty(0, 64)).shape == (0, 64)


def test_gradients_pass_through_rounded_inputs():
    x = random(3, 64).requires_grad_()
    weight_format("nvfp4").inputs(x).mul(3).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3))
    assert not weight_format("nvfp4").weight(x).requires_grad


@pytest.mark.parametrize("name", FORMATS)
def test_parts_are_rounded_as_the_whole(name, monkeypatch):
    weight = random(50, 70)
    whole = weight_format(name).weight(weight)
    monkeypatch.setattr(weight_formats, "_PART", 200)
    assert torch.equal(weight_format(name).weight(weight), whole)


def test_blocks_are_those_of_torchao():
    formats = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    nvidia = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    weight = random(128, 256) * random(128, 1, seed=1).exp()
    modes = formats.ScaleCalculationMode
    for name, mode in (("mxfp4", modes.FLOOR), ("mxfp4_up", modes.RCEIL)):
        theirs = formats.MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, 32, mode).dequantize(torch.float32)
        assert torch.equal(weight_format(name).weight(weight), theirs), name
    scale = nvidia.per_tensor_amax_to_scale(weight.abs().max())
    theirs = nvidia.NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=scale).dequantize(torch.float32)
    assert torch.equal(weight_format("nvfp4").weight(weight), theirs)


def test_rows_that_are_not_contiguous():
    weight = random(64, 48).T
    for form in FORMATS.values():
        assert torch.equal(form.weight(weight), form.weight(weight.contiguous()))


def test_four_bits_without_a_zero_are_multiples_of_the_largest_over_seven():
    weight = random(3, 64)
    weight[0, :32] = torch.linspace(-7, 7, 32)
    rounded = weight_format("int4_sym_g32").weight(weight)
    assert torch.equal(rounded[0, :32], weight[0, :32].round())
    blocks, before = rounded.view(3, 2, 32), weight.view(3, 2, 32)
    step = before.abs().amax(-1, keepdim=True) / 7
    assert ((blocks / step).round() - blocks / step).abs().max() < 1e-5
    assert (blocks - before).abs().max() <= step.max() / 2 * (1 + 1e-5)


def test_bytes_with_all_scales():
    wanted = {  # of 10 rows of 70 numbers
        "fp8_tensor": 700 + 4,
        "fp8_row": 700 + 10 * 4,
        "fp4_tensor": 350 + 4,
        "fp4_row": 350 + 10 * 4,
        "nvfp4": 10 * 5 * (8 + 1) + 4,
        "mxfp4": 10 * 3 * (16 + 1),
        "mxfp4_up": 10 * 3 * (16 + 1),
        "int8_row": 700 + 10 * 4,
        "int4_g32": 10 * 3 * (16 + 4),
        "int4_g64": 10 * 2 * (32 + 4),
        "int4_g128": 10 * (64 + 4),
        "int4_sym_g32": 10 * 3 * (16 + 2),
        "int4_sym_g64": 10 * 2 * (32 + 2),
        "int4_sym_g128": 10 * (64 + 2),
        "f16": 1400,
        "bf16": 1400,
        "f32": 2800,
    }
    for name, size in wanted.items():
        assert weight_format(name).bytes(10, 70) == size, name
    assert set(wanted) == {name for name in FORMATS if not name.endswith("_a16")}
    assert weight_format("fp4_row").bytes(3, 7) == 3 * (4 + 4)  # half a byte is one
    assert isinstance(weight_format("nvfp4").bytes(3, 7), int)


def test_only_formats_without_kernels_are_simulated():
    assert {name for name, form in FORMATS.items() if not form.simulated} == {
        *("fp8_tensor", "fp8_row", "int8_row", "int8_row_a16", "int4_g32", "int4_g64", "int4_g128"),
        *("f16", "bf16", "f32"),
    }


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="unknown format 'fp5'") as error:
        weight_format("fp5")
    assert "nvfp4" in str(error.value)


def test_finer_formats_round_less():
    weight = random(64, 1024, seed=3)
    by_bits = ("fp4_tensor", "fp4_row", "nvfp4", "fp8_tensor", "int8_row", "bf16", "f16", "f32")
    errors = [float((weight_format(name).weight(weight) - weight).norm()) for name in by_bits]
    assert all(coarse > fine for coarse, fine in itertools.pairwise(errors))
