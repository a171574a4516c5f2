"""Every implementation that reads packed codes against the dense product with what they stand for."""

import contextlib
import itertools

import pytest
import torch

from tenfold.cache.gear.recipe import Format, compress
from tenfold.errors import ConfigError
from tenfold.kernels import compressed
from tenfold.kernels.compressed import choose
from tenfold.kernels.packed_blocks import RAW

FORMS = [
    *(Format(bits, -2, 64) for bits in (2, 3, 4, 8, RAW)),
    Format(4, -2, 16),
    *(Format(bits, -2, 40, rank=3, share=0.03) for bits in (2, 3)),
    Format(4, -2, None, rank=1, share=0.3),
    Format(4, -1, 16, rank=2, share=0.02),
]


def make(form, tokens, channels, lines, blocks=2, batch=2):
    generator = torch.Generator().manual_seed(form.bits + tokens)
    x = torch.randn(blocks, batch, 2, tokens, channels, generator=generator)
    parts = [compress(part, form, lines=lines) for part in x]
    return parts[0].append(parts[1])


def check(functions, form, tokens, channels, rows):
    generator = torch.Generator().manual_seed(1)
    keys = make(form, tokens, channels, -2)
    query = torch.randn(2, 2, rows, channels, generator=generator)
    expected = query @ keys.dense(torch.float64).float().mT
    torch.testing.assert_close(functions.scores(keys, query), expected, atol=1e-4, rtol=0)
    shared = form.group is None
    values = make(Format(form.bits, -1, form.group, shared, form.rank, form.share), tokens, channels, -1)
    weights = torch.randn(2, 2, rows, 2 * tokens, generator=generator)
    expected = weights @ values.dense(torch.float64).float()
    torch.testing.assert_close(functions.combine(values, weights), expected, atol=3e-4, rtol=0)


@pytest.mark.parametrize(("form", "tokens", "rows"), [*itertools.product(FORMS, [64, 100], [1, 6])])
def test_torch(form, tokens, rows):
    check(compressed.REFERENCE, form, tokens, 24, rows)


@pytest.mark.filterwarnings("ignore:numba does not read")
@pytest.mark.parametrize(("form", "tokens"), [*itertools.product(FORMS, [64, 300])])
def test_numba(form, tokens):
    pytest.importorskip("numba")
    functions = choose("numba", torch.device("cpu"))
    for rows in (1, 6):
        check(functions, form, tokens, 32, rows)


def test_numba_leaves_to_torch_what_it_does_not_read():
    pytest.importorskip("numba")
    from tenfold.kernels.compressed_numba import _slowly

    functions = choose("numba", torch.device("cpu"))
    x, query = torch.randn(1, 1, 64, 12), torch.randn(1, 1, 3, 12)
    wide = torch.randn(1, 1, 64, 16) * 1e6
    for side, given, said in (
        (compress(x, Format(4, -2, 64), lines=-2), query, "heads of 12 channels"),  # they fill no byte of one bit each
        (compress(wide, Format(4, -2, 64), lines=-2), torch.randn(1, 1, 3, 16), "beyond float16"),
        (compress(x.double(), Format(4, -2, 64), lines=-2), query.double(), None),
    ):
        expected = given @ side.dense(given.dtype).mT
        _slowly.cache_clear()
        with pytest.warns(UserWarning, match=said) if said else contextlib.nullcontext():
            found = functions.scores(side, given)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * max(1e3, float(expected.abs().max())))


def test_numba_leaves_the_threads_of_torch_alone():
    pytest.importorskip("numba")
    side = compress(torch.randn(1, 2, 64, 16), Format(4, -2, 64), lines=-2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        choose("numba", torch.device("cpu")).scores(side, torch.randn(1, 2, 3, 16))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_numba_reads_every_float16():
    pytest.importorskip("numba")
    from tenfold.kernels.compressed_numba import _half

    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    exact = bits.view(torch.float16).float()
    finite = exact.isfinite()
    found = torch.tensor([_half(number) for number in bits.numpy()])
    assert torch.equal(found[finite], exact[finite])


def test_what_is_forced_and_cannot_run_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="kernel: unknown kernel 'fast'"):
        choose("fast", torch.device("cpu"))
    monkeypatch.setattr(compressed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="numba is not installed"):
        choose("numba", torch.device("cpu"))


def test_without_the_fast_kernel_torch_reads_and_says_so(monkeypatch):
    monkeypatch.setattr(compressed.importlib.util, "find_spec", lambda name: None)
    compressed._without.cache_clear()
    with pytest.warns(UserWarning, match="numba is not installed"):
        assert choose("auto", torch.device("cpu")).name == "torch"
    compressed._without.cache_clear()
