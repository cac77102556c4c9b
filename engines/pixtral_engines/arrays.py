"""TensorRT's types and weights as NumPy's."""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np

from pixtral_runtime.backends.session import Array

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "FLOAT": np.float32, "HALF": np.float16, "BF16": ml_dtypes.bfloat16, "FP8": ml_dtypes.float8_e4m3fn,
        "FP4": ml_dtypes.float4_e2m1fn, "INT64": np.int64, "INT32": np.int32, "INT8": np.int8, "INT4": ml_dtypes.int4,
        "UINT8": np.uint8, "BOOL": np.bool_,
    }.items()
}  # fmt: skip
"""NumPy's types for TensorRT's."""


class _Weights(ctypes.Structure):
    """nvinfer1::Weights."""

    _fields_ = (("type", ctypes.c_int32), ("values", ctypes.c_void_p), ("count", ctypes.c_int64))


def weights_array(weights: Any) -> Array:
    """Weights of any type as a flat array that views TensorRT's memory; 4-bit codes are unpacked, low nibble first.

    The bindings give NumPy arrays for NumPy's own types only, and no address for the others. Theirs is read from the
    pybind11 object, which starts with a pointer to the C++ one, and checked against the type and size they do give.
    """
    if isinstance(weights, np.ndarray):
        return weights
    address = ctypes.c_void_p.from_address(id(weights) + object.__basicsize__).value
    found = _Weights.from_address(address or 0) if address else None
    if found is None or (found.type, found.count) != (int(weights.dtype), weights.size):
        raise RuntimeError("the memory layout of TensorRT's Weights is not the known one")
    if found.count == 0:
        return np.zeros(0, NUMPY_DTYPES[weights.dtype.name])
    is_packed = weights.dtype.name in ("INT4", "FP4")
    nbytes = -(-found.count // 2) if is_packed else found.count * NUMPY_DTYPES[weights.dtype.name].itemsize
    raw = np.frombuffer((ctypes.c_uint8 * nbytes).from_address(found.values or 0), np.uint8)
    if is_packed:
        raw = np.stack([raw & 0xF, raw >> 4], -1).reshape(-1)[: found.count]
        if weights.dtype.name == "INT4":
            return ((raw ^ 8).astype(np.int8) - 8).astype(ml_dtypes.int4)
    return raw.view(NUMPY_DTYPES[weights.dtype.name])
