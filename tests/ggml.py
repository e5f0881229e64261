"""The real libggml, which quantisers are compared with: the shared library that llama.cpp itself quantises with.

It is a file of the npm package @node-llama-cpp/linux-x64, among others, and looked for in the folder `llama` of the
virtual environment. Where it is missing, tests that compare with it are skipped.
"""

import ctypes
import functools
import sys
from pathlib import Path

import gguf
import torch
from torch import Tensor

LIBRARY = Path(sys.prefix) / "llama" / "libggml-base.so"


class _Traits(ctypes.Structure):
    """`ggml_type_traits` of ggml.h."""

    _fields_ = (("name", ctypes.c_char_p), ("block", ctypes.c_int64), ("interleave", ctypes.c_int64),
                ("size", ctypes.c_size_t), ("quantized", ctypes.c_bool), ("to_float", ctypes.c_void_p),
                ("from_float", ctypes.c_void_p))


@functools.cache
def library() -> ctypes.CDLL | None:
    """libggml-base, or None where it is missing."""
    if not LIBRARY.exists():
        return None
    found = ctypes.CDLL(str(LIBRARY))
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    found.ggml_quantize_chunk.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3,
                                          ctypes.c_void_p)
    found.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    found.ggml_get_type_traits.argtypes = (ctypes.c_int,)
    return found


def _kind(kind: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[kind.upper()]


def quantize(weight: Tensor, kind: str, importance: Tensor | None = None) -> Tensor:
    """[N, K] float32 -> [N, bytes of a row] by `ggml_quantize_chunk`, on the calling thread."""
    ggml, type_ = library(), _kind(kind)
    assert ggml is not None and weight.dtype == torch.float32 and weight.is_contiguous() and weight.ndim == 2
    block, size = gguf.GGML_QUANT_SIZES[type_]
    N, K = weight.shape
    out = torch.empty(N, K // block * size, dtype=torch.uint8)
    ggml.ggml_quantize_init(int(type_))
    written = ggml.ggml_quantize_chunk(int(type_), weight.data_ptr(), out.data_ptr(), 0, N, K,
                                       None if importance is None else importance.data_ptr())
    assert written == out.numel()
    return out


def dequantize(data: Tensor, kind: str) -> Tensor:
    """[N, bytes of a row] -> [N, K] float32 by ggml's `to_float`."""
    ggml, type_ = library(), _kind(kind)
    assert ggml is not None and data.is_contiguous()
    traits = ggml.ggml_get_type_traits(int(type_)).contents
    out = torch.empty(data.shape[0], data.shape[1] // traits.size * traits.block)
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(traits.to_float)
    function(data.data_ptr(), out.data_ptr(), out.numel())
    return out
