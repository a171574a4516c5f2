"""ggml's own quantiser, from the shared library inside the wheel ``xllamacpp``: K and IQ types, weighted roundings."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np

from tenfold.errors import MissingDependencyError, ModelError


def ggml_quantize(values: np.ndarray, kind: Any, row_bytes: int, importance: np.ndarray | None) -> np.ndarray:
    """Rows of numbers as ggml packs them.

    Args:
        values: ``[rows, inner]`` float32; ``inner`` a multiple of the type's block.
        kind: of the type, a ``gguf.GGMLQuantizationType``.
        row_bytes: bytes of one packed row.
        importance: ``[inner]`` float32, how much an error of each column counts; None counts all alike.

    Returns:
        ``[rows, row_bytes]`` uint8.

    Raises:
        MissingDependencyError: the library is absent.
        ModelError: the type needs an importance, or ggml wrote another number of bytes.
    """
    library = _library()
    # the first matrix of an IQ1 to IQ3 type makes its tables, which takes a second to a minute
    if importance is None and library.ggml_quantize_requires_imatrix(kind):  # ggml would end the process
        raise ModelError(
            f"{kind.name} cannot be written without an importance",
            remedy="give the mean square of each input of the matrix, or choose IQ4_XS or a K type",
        )
    values = np.ascontiguousarray(values, dtype=np.float32)
    rows, inner = values.shape
    packed = np.zeros((rows, row_bytes), dtype=np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    written = library.ggml_quantize_chunk(
        kind, values.ctypes.data, packed.ctypes.data, 0, rows, inner, None if weights is None else weights.ctypes.data
    )
    if written != packed.nbytes:
        raise ModelError(f"ggml wrote {written} bytes for {packed.nbytes}", remedy="update xllamacpp and gguf together")
    return packed


@cache
def _library() -> Any:
    try:
        import xllamacpp.xllamacpp as extension

        library = ctypes.CDLL(extension.__file__)
        library.ggml_quantize_chunk.restype = ctypes.c_size_t
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
        library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    except (ImportError, OSError, AttributeError) as error:  # absent, not loadable, or without these symbols
        raise MissingDependencyError(
            f"K and IQ types and weighted roundings need ggml, which xllamacpp brings: {error}",
            remedy='pip install "tenfold[gguf]", or choose Q8_0, Q5_1, Q5_0, Q4_1, Q4_0 or MXFP4',
        ) from error
    return library
