"""Matrices in the types of GGUF files: exact bytes, ggml as the peer, importance, substitutes."""

from __future__ import annotations

import sys

import gguf
import numpy as np
import pytest
import torch

from tenfold.errors import ConfigError, MissingDependencyError, ModelError
from tenfold.models import ggml
from tenfold.models.gguf_types import (
    BLOCK_TYPES,
    GGML_TYPES,
    PLAIN_TYPES,
    decode,
    encode,
    gguf_format,
    settled_type,
    type_bytes,
)

QUICK = [name for name in GGML_TYPES if name[:3] not in ("iq1", "iq2", "iq3")]  # the others make tables for a minute
WEIGHT = np.random.default_rng(0).standard_normal((16, 512)).astype(np.float32)
IMPORTANCE = (np.random.default_rng(1).random(512).astype(np.float32) + 0.01) ** 4


@pytest.fixture
def library():
    try:
        ggml._library()
    except MissingDependencyError as error:
        pytest.skip(str(error))


def error_of(packed, name, importance=1.0):
    return float((((decode(packed, name) - WEIGHT) ** 2) * importance).sum())


@pytest.mark.parametrize("name", [*PLAIN_TYPES, *BLOCK_TYPES])
def test_what_is_read_back_is_what_the_package_gguf_makes(name):
    kind = gguf.GGMLQuantizationType[name.upper()]
    size, width = gguf.GGML_QUANT_SIZES[kind]
    expected = gguf.dequantize(gguf.quantize(WEIGHT, kind), kind)
    form = gguf_format(name)
    assert torch.equal(form.weight(torch.from_numpy(WEIGHT)), torch.from_numpy(expected))
    assert encode(WEIGHT, name).nbytes == form.bytes(16, 512) == type_bytes(name, 16, 512) == 16 * 512 // size * width
    assert form.inputs(expected) is expected
    assert not form.simulated


@pytest.mark.parametrize("name", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_ggml_writes_the_same_bytes(name, library):
    kind = gguf.GGMLQuantizationType[name.upper()]
    packed = encode(WEIGHT, name)
    assert np.array_equal(ggml.ggml_quantize(WEIGHT, kind, packed.shape[1], None), packed)


# the least relative error that so many bits can have on Gaussian numbers is 2**-bits; each type comes within this of it
@pytest.mark.parametrize(
    ("name", "bits", "error"),
    [("q6_k", 6.5625, 0.018), ("q5_k", 5.5, 0.037), ("q4_k", 4.5, 0.073), ("q3_k", 3.4375, 0.155),
     ("q2_k", 2.625, 0.31), ("iq4_nl", 4.5, 0.078), ("iq4_xs", 4.25, 0.078)],
)  # fmt: skip
def test_types_of_ggml(name, bits, error, library):
    packed = encode(WEIGHT, name)
    assert packed.nbytes == gguf_format(name).bytes(16, 512) == 16 * 512 * bits / 8
    assert 2**-bits < (error_of(packed, name) / float((WEIGHT**2).sum())) ** 0.5 < error


@pytest.mark.parametrize("name", [*QUICK, "q5_1", "q5_0", "q4_1", "q4_0"])
def test_importance_makes_the_errors_that_count_smaller(name, library):
    plain, weighted = encode(WEIGHT, name), encode(WEIGHT, name, IMPORTANCE)
    assert error_of(weighted, name, IMPORTANCE) < 0.99 * error_of(plain, name, IMPORTANCE)
    assert not np.array_equal(encode(WEIGHT, name, IMPORTANCE[::-1].copy()), weighted)


@pytest.mark.parametrize("name", [*PLAIN_TYPES, *BLOCK_TYPES, *QUICK])
def test_zeros_stay_zeros_in_their_dtype(name, library):
    zeros = torch.zeros(2, 256, dtype=torch.bfloat16)
    found = gguf_format(name).weight(zeros)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, zeros)


@pytest.mark.parametrize(
    ("name", "inner", "settled"),
    [("q4_k", 512, "q4_k"), ("q4_k", 576, "q5_0"), ("q5_k", 896, "q5_1"), ("q6_k", 640, "q8_0"), ("q3_k", 64, "q4_0"),
     ("q2_k", 64, "q4_0"), ("iq4_xs", 64, "iq4_nl"), ("iq3_s", 96, "iq4_nl"), ("q4_0", 48, "f16"), ("q4_k", 48, "f16"),
     ("MXFP4", 64, "mxfp4"), ("f32", 3, "f32")],
)  # fmt: skip
def test_rows_that_do_not_divide_get_a_named_substitute(name, inner, settled):
    assert settled_type(name, inner) == settled
    assert gguf_format(name).bytes(7, inner) == type_bytes(settled, 7, inner)


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ConfigError, match=r"unknown GGUF type 'q9_0'"):
        gguf_format("q9_0")
    with pytest.raises(ConfigError, match="rows of 48 do not divide by 32"):
        encode(WEIGHT[:, :48], "q8_0")
    for bad in (np.nan, np.inf):
        with pytest.raises(ModelError, match="NaN or infinite"):
            gguf_format("q8_0").weight(torch.full((1, 32), bad))
    with pytest.raises(ModelError, match="beyond 65504"):
        encode(np.full((1, 32), 7e4), "f16")
    assert decode(encode(np.full((1, 32), 7e4), "bf16"), "bf16")[0, 0] == pytest.approx(7e4, rel=0.01)


@pytest.mark.parametrize("importance", [IMPORTANCE[:256], -IMPORTANCE, IMPORTANCE * np.nan])
def test_an_importance_that_cannot_be_meant_is_refused(importance):
    with pytest.raises(ConfigError, match="importance"):
        encode(WEIGHT, "q4_0", importance)


def test_ggml_is_not_asked_for_what_would_end_the_process(library):
    with pytest.raises(ModelError, match="IQ2_XXS cannot be written without an importance"):
        encode(WEIGHT, "iq2_xxs")


def test_without_the_library_the_command_that_installs_it_is_named(monkeypatch):
    ggml._library.cache_clear()
    monkeypatch.setitem(sys.modules, "xllamacpp.xllamacpp", None)
    with pytest.raises(MissingDependencyError, match="xllamacpp") as caught:
        encode(WEIGHT, "q4_k")
    assert 'pip install "tenfold[gguf]"' in caught.value.remedy
    ggml._library.cache_clear()
