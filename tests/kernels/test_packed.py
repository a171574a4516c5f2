"""Products with packed matrices against float64 of what is stored, for every kernel, shape and kind of input."""

import math
from functools import partial

import pytest
import torch

from tenfold.core.weight_formats import weight_format
from tenfold.errors import ConfigError, ModelError
from tenfold.kernels import packed_choice, packed_product
from tenfold.kernels.packed_choice import GAIN, STEPS, fastest, kernel_seconds, step_of
from tenfold.kernels.packed_matrix import PACKED, Layout, layout_of_torch, packed_format
from tenfold.kernels.packed_product import kernels_for, multiplies_bytes
from tenfold.kernels.timing import in_turns

SHAPES = [(1, 1), (2, 3), (17, 33), (64, 64), (30, 100), (100, 36), (130, 160)]
"""Columns that 32 does not divide, rows that neither 16 nor 64 do: torch's kernels would read beyond them."""
CLOSE = {"float32": 1e-5, "packed": 6e-3, "bfloat16": 8e-3, "whole": 2e-2}
FORMS = [*PACKED]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def each_kernel(name, weight):
    matrix = packed_format(name).pack(weight)
    return [(kernel, matrix) for kernel in kernels_for(matrix)]


def check(x, matrix, kernel):
    found = packed_product.packed_product(x, matrix, kernel)
    assert found.dtype == x.dtype
    assert found.shape == (len(x), matrix.out)
    wanted = x.double() @ matrix.dense().double().T
    # Of one output there is no average; rounding is relative to the sizes of what is summed.
    size = (x.double().abs() @ matrix.dense().double().abs().T).norm() if matrix.out < 16 else wanted.norm()
    assert float((found.double() - wanted).norm()) <= CLOSE[kernel] * float(size), kernel


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMS)
def test_products_of_all_shapes(name, shape):
    for kernel, matrix in each_kernel(name, draw(*shape)):
        for rows in (1, 3, 64, 100):
            check(draw(rows, shape[1], seed=rows), matrix, kernel)
            check(draw(rows, shape[1], seed=rows).bfloat16().float(), matrix, kernel)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_of_inputs(name, dtype):
    for kernel, matrix in each_kernel(name, draw(48, 64)):
        found = packed_product.packed_product(draw(5, 64, seed=1).to(dtype), matrix, kernel)
        assert found.dtype == dtype
        wanted = draw(5, 64, seed=1).to(dtype).double() @ matrix.dense().double().T
        assert float((found.double() - wanted).norm() / wanted.norm()) < max(CLOSE[kernel], 5e-3)


@pytest.mark.parametrize("name", FORMS)
def test_no_rows_are_none(name):
    for kernel, matrix in each_kernel(name, draw(20, 40)):
        assert packed_product.packed_product(torch.empty(0, 40), matrix, kernel).shape == (0, 20)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", FORMS)
def test_what_is_not_finite_stays_in_its_row_and_is_seen_there(name, bad):
    for kernel, matrix in each_kernel(name, draw(20, 40)):
        for rows in (2, 70):
            x = draw(rows, 40, seed=1)
            x[1, 7] = bad
            found = packed_product.packed_product(x, matrix, kernel)
            assert not found[1].isfinite().any(), kernel
            rest = torch.arange(rows) != 1
            check(x[rest], matrix, kernel)
            assert found[rest].isfinite().all(), kernel


@pytest.mark.parametrize("name", FORMS)
def test_zeros(name):
    weight = draw(20, 64)
    weight[3] = 0
    for kernel, matrix in each_kernel(name, weight):
        assert torch.equal(matrix.dense()[3], torch.zeros(64))
        found = packed_product.packed_product(torch.cat((draw(2, 64), torch.zeros(1, 64))), matrix, kernel)
        assert torch.equal(found[2], torch.zeros(20)), kernel
        assert torch.equal(found[:, 3], torch.zeros(3)), kernel


def test_bytes_are_multiplied_exactly_each_row_with_its_scale():
    """On any processor; where that is slow, `kernels_for` has no such kernel."""
    assert ("whole" in kernels_for(packed_format("int8_row").pack(draw(32, 64)))) == multiplies_bytes()
    weight = torch.full((17, 100), 3.0)
    weight[1] *= -1
    largest = packed_format("int8_row").pack(weight)
    assert largest.codes[:2, :100].tolist() == [[127] * 100, [-127] * 100]
    for rows in (1, 8, 40):  # 127 * 127 * 100 in whole numbers: sums of two products are beyond 16 bits
        found = packed_product.packed_product(torch.full((rows, 100), 2.0), largest, "whole")
        torch.testing.assert_close(found, (torch.full((rows, 100), 2.0) @ largest.dense().T), atol=0, rtol=1e-6)
    matrix, sizes = packed_format("int8_row").pack(draw(30, 64)), torch.tensor([1e-3, 1.0, 500.0])[:, None]
    x = draw(3, 64, seed=2) * sizes
    wanted = weight_format("int8_row").inputs(x).double() @ matrix.dense().double().T
    found = packed_product.packed_product(x, matrix, "whole")
    torch.testing.assert_close(found.double() / sizes, wanted / sizes, atol=1e-5, rtol=1e-5)
    x[1, 5], x[2] = math.nan, 0
    found = packed_product.packed_product(x, matrix, "whole")
    assert found[1].isnan().all()
    assert torch.equal(found[2], torch.zeros(30))


@pytest.mark.parametrize("name", FORMS)
def test_rows_are_those_of_the_matrix(name):
    matrix = packed_format(name).pack(draw(130, 40))
    ids = torch.tensor([0, 129, 31, 32, 33, 63, 64, 127, 5, 5])
    torch.testing.assert_close(matrix.rows(ids), matrix.dense()[ids], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", FORMS)
def test_bytes_are_those_in_memory(name):
    for shape in SHAPES:
        matrix = packed_format(name).pack(draw(*shape))
        held = matrix.codes.nbytes + (0 if matrix.scales is None else matrix.scales.nbytes)
        assert packed_format(name).bytes(*shape) == held


@pytest.mark.parametrize("name", FORMS)
def test_large_matrices_are_packed_in_pieces(name, monkeypatch):
    weight = draw(200, 64)
    whole = packed_format(name).pack(weight)
    monkeypatch.setattr("tenfold.kernels.packed_matrix._PACKED_AT_ONCE", 64 * 64)
    monkeypatch.setattr("tenfold.kernels.packed_matrix.PART", 64 * 32)
    pieces = packed_format(name).pack(weight)
    assert torch.equal(whole.codes, pieces.codes)
    assert whole.scales is None or torch.equal(whole.scales, pieces.scales)
    x = draw(9, 64, seed=1)
    for kernel in kernels_for(pieces):
        check(x, pieces, kernel)


@pytest.mark.parametrize("layout", [Layout(64, False), Layout(32, False), Layout(32, True), Layout(16, False)])
def test_nibbles_lie_as_they_are_read(layout):
    codes = torch.randint(16, (128, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    laid = layout.lay(codes)
    assert laid.shape == (128, 3)
    assert torch.equal(layout.columns(laid), codes.T)
    ids = torch.tensor([0, 127, 64, 63, 15, 16, 33])
    assert torch.equal(layout.rows(laid, ids), codes[ids])


def test_nibbles_of_another_processor_are_expanded():
    """A model that was packed elsewhere, where vectors have another length, must not be given to the kernel here."""
    here = layout_of_torch()
    if here is None:
        pytest.skip("torch has no kernel for nibbles here")
    matrix = packed_format("int4_g32").pack(draw(64, 64))
    assert matrix.layout == here
    other = Layout(16, False)
    moved = matrix._replace(codes=other.lay(here.columns(matrix.codes).T.contiguous()), layout=other)
    assert torch.equal(moved.dense(), matrix.dense())
    assert kernels_for(moved) == ("float32", "bfloat16")


@pytest.mark.parametrize("name", FORMS)
def test_gradients_are_those_of_the_expanded_matrix(name):
    for kernel, matrix in each_kernel(name, draw(30, 100)):
        x, weights = draw(7, 100, seed=1).requires_grad_(), draw(7, 30, seed=2)
        (packed_product.packed_product(x, matrix, kernel) * weights).sum().backward()
        torch.testing.assert_close(x.grad, weights @ matrix.dense(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(bad):
    weight = draw(8, 32)
    weight[2, 5] = bad
    for name in FORMS:
        with pytest.raises(ModelError, match=r"at \[2, 5\]"):
            packed_format(name).pack(weight)


@pytest.mark.parametrize("name", ["nvfp4", "fp8_row", "q4_k"])
def test_formats_without_a_kernel_are_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"no kernel here multiplies in '{name}'"):
        packed_format(name)


def test_the_choice_prefers_what_rounds_less(monkeypatch):
    times = {"float32": 1.0, "packed": 0.99, "bfloat16": GAIN - 0.01, "whole": 0.8}
    monkeypatch.setattr(packed_choice, "kernel_seconds", lambda *args: times)
    monkeypatch.setattr(packed_choice, "kernels_for", lambda matrix: tuple(times))
    assert fastest("int8_row", (64, 64), torch.float32, torch.device("cpu")) == ("bfloat16",) * len(STEPS)
    times["whole"] = 0.5
    assert fastest("int8_row", (64, 64), torch.float32, torch.device("cpu"))[0] == "whole"


def test_times_are_measured_once_and_grow_with_the_matrix(monkeypatch):
    calls = []

    def counted(kinds, device):
        calls.append(kinds)
        return in_turns(kinds, device)

    monkeypatch.setattr(packed_choice, "in_turns", counted)
    packed_choice._measured.cache_clear()
    here = torch.device("cpu")
    small = kernel_seconds("int8_row", (64, 64), 1, torch.float32, here)
    assert kernel_seconds("int8_row", (64, 64), 1, torch.float32, here) is small
    assert len(calls) == 1
    assert all(0 < seconds < 1 for seconds in small.values())
    assert [step_of(rows) for rows in STEPS] == [0, 1, 2, 3]


def test_calls_that_are_hopeless_are_not_timed_again(monkeypatch):
    """By a clock that goes on by what each call is said to take."""
    now, counts = [0.0], {"fast": 0, "near": 0, "slow": 0}
    monkeypatch.setattr("tenfold.kernels.timing.time.perf_counter", lambda: now[0])

    def call(name, seconds):
        counts[name] += 1
        now[0] += seconds * (2 if counts[name] == 1 else 1)  # the first time it takes twice as long

    lengths = {"slow": 7.0, "near": 2.0, "fast": 1.0}
    found = in_turns({name: [partial(call, name, each)] for name, each in lengths.items()}, torch.device("cpu"))
    assert counts == {"fast": 4, "near": 4, "slow": 1}
    assert found == {"fast": 1.0, "near": 2.0, "slow": 14.0}
