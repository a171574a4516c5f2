"""The Triton kernels against the torch form: by Triton's interpreter, in a process of its own, and on CUDA.

The interpreter is chosen when `triton` is imported, so this file is also the program that the tests run.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import torch

from tenfold.cache.gear.recipe import Format, compress
from tenfold.errors import ConfigError
from tenfold.kernels.compressed import choose
from tenfold.kernels.packed_blocks import RAW, PackedBlocks, combine, scores

installed = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: pip install triton")


@dataclass(frozen=True)
class Case:
    """One format on one shape; ``lines`` is -2 for keys and -1 for values, ``cut`` leaves so many tokens of a block."""

    lines: int
    form: Format
    tokens: int
    channels: int
    rows: int
    blocks: int = 1
    batch: int = 1
    metadata: torch.dtype | None = None
    cut: int | None = None

    def inputs(self, device: str) -> tuple[PackedBlocks, torch.Tensor]:
        """The packed blocks, and queries or weights."""
        generator = torch.Generator().manual_seed(0)
        side = None
        for _ in range(self.blocks):
            x = torch.randn(self.batch, 2, self.tokens, self.channels, generator=generator)
            block = compress(x, self.form, lines=self.lines, metadata=self.metadata)
            block = block if self.cut is None else block.first_tokens(self.cut)
            side = block if side is None else side.append(block)
        width = self.channels if self.lines == -2 else side.blocks * side.length
        numbers = torch.randn(self.batch, 2, self.rows, width, generator=generator)
        return side.map(lambda part: part.to(device)), (numbers / width**0.5).to(device)


SINGLE = torch.float32
CASES = {
    "keys of 2 bits, many parts": Case(-2, Format(2, -2, 16, rank=2, share=0.1), 32, 32, 1, blocks=2, batch=2),
    "keys of 3 bits, short last group": Case(-2, Format(3, -2, 20, rank=3), 50, 80, 3, blocks=2),
    "keys of 4 bits, one group": Case(-2, Format(4, -2, None, share=0.05), 100, 96, 7),
    "keys of 8 bits, single metadata": Case(-2, Format(8, -2, 16, rank=1, share=0.1), 32, 20, 2, metadata=SINGLE),
    "keys of 4 bits, several pieces": Case(-2, Format(4, -2, 64, rank=2, share=0.02), 300, 16, 4, batch=2),
    "keys of 3 bits, wide, short": Case(-2, Format(3, -2, 64, rank=2, share=0.1), 40, 160, 1, metadata=SINGLE),
    "keys that were cut": Case(-2, Format(2, -2, 32, rank=2, share=0.1), 64, 8, 2, cut=41),
    "raw keys": Case(-2, Format(RAW, -2), 70, 24, 4, blocks=2, batch=2),
    "raw keys, one query": Case(-2, Format(RAW, -2), 20, 64, 1),
    "values of 2 bits, many parts": Case(-1, Format(2, -1, 32, rank=2, share=0.1), 32, 32, 1, blocks=2, batch=2),
    "values of 3 bits, shared scales": Case(-1, Format(3, -1, None, shared=True, rank=3), 50, 80, 3, blocks=2, batch=2),
    "values of 4 bits, short last group": Case(-1, Format(4, -1, 64, share=0.05), 100, 96, 7),
    "values of 8 bits, single metadata": Case(-1, Format(8, -1, 16, rank=1, share=0.1), 32, 20, 2, metadata=SINGLE),
    "values of 4 bits, several pieces": Case(-1, Format(4, -1, 64, rank=2, share=0.02), 300, 16, 4, batch=2),
    "values of 3 bits, wide, short": Case(-1, Format(3, -1, None, share=0.02), 40, 300, 1),
    "values that were cut": Case(-1, Format(2, -1, 4, rank=2, share=0.1), 64, 8, 2, cut=41),
    "raw values": Case(-1, Format(RAW, -1), 70, 24, 4, blocks=2, batch=2),
    "raw values, one query": Case(-1, Format(RAW, -1), 20, 64, 1),
}


def outcome(case, device):
    """What the kernels and the reference give; float64 makes the reference the exact one."""
    from tenfold.kernels import compressed_triton as kernels

    side, numbers = case.inputs(device)
    found = (kernels.scores if case.lines == -2 else kernels.combine)(side, numbers)
    return found, (scores if case.lines == -2 else combine)(side, numbers.double())


@pytest.fixture(scope="module")
def interpreted():
    """Name by name the difference that the interpreter finds."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@installed
@pytest.mark.parametrize("name", CASES)
def test_the_interpreter_gives_the_reference(interpreted, name):
    assert interpreted[name] < 1e-4


@pytest.mark.gpu
@installed
@pytest.mark.parametrize("name", CASES)
def test_cuda_gives_the_reference(name):
    found, expected = outcome(CASES[name], "cuda")
    torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@installed
@pytest.mark.parametrize("rows", [1, 4, 32])
@pytest.mark.parametrize("lines", [-2, -1])
def test_cuda_gives_the_reference_on_a_long_cache(lines, rows):
    form = Format(2, lines, 64, rank=4, share=0.02)
    found, expected = outcome(Case(lines, form, 1024, 128, rows, blocks=8, batch=2), "cuda")
    torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=1e-4)


@installed
@pytest.mark.parametrize("lines", [-2, -1])
def test_what_the_kernels_do_not_read_goes_to_the_reference(lines):
    from tenfold.kernels import compressed_triton as kernels

    function, reference = (kernels.scores, scores) if lines == -2 else (kernels.combine, combine)
    side, numbers = Case(lines, Format(4, lines, 16), 32, 16, 3).inputs("cpu")
    for given in (numbers.double(), numbers.clone().requires_grad_(), numbers.repeat(1, 1, 30, 1)):
        assert torch.equal(function(side, given), reference(side, given))
    double, _ = Case(lines, Format(4, lines, 16), 32, 16, 3, metadata=torch.float64).inputs("cpu")
    assert torch.equal(function(double, numbers), reference(double, numbers))


@installed
def test_keys_with_scales_of_tokens_go_to_the_reference():
    from tenfold.kernels import compressed_triton as kernels

    side, query = Case(-2, Format(4, -1, 16), 32, 16, 3).inputs("cpu")
    assert torch.equal(kernels.scores(side, query), scores(side, query))


@installed
def test_the_cpu_has_triton_only_by_its_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="triton runs on CUDA"):
        choose("triton", torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("triton", torch.device("cpu")).name == "triton"


if __name__ == "__main__":
    differences = {}
    for name, case in CASES.items():
        found, expected = outcome(case, "cpu")
        assert found.dtype == torch.float32
        assert found.shape == expected.shape
        differences[name] = float((found - expected).abs().max())
    print(json.dumps(differences))
