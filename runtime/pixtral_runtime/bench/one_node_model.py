"""ONNX models of one node, written without the package onnx: what rates of matrix products are measured with.

Protocol buffers: a message is a list of fields, each a number, a wire type and a value. The numbers are onnx.proto's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pixtral_runtime.backends.session import Array
from pixtral_runtime.bundle.onnx_weights import BYTES, VARINT

ONNX_DTYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6}

ONE_NODE_IR_VERSION, ONE_NODE_OPSET = 10, 21

ATTRIBUTE_INT = 2


def single_node(
    op: str,
    inputs: Mapping[str, Array],
    weights: Mapping[str, Array],
    output: tuple[str, Sequence[int]],
    attributes: Mapping[str, int] | None = None,
    domain: str = "",
) -> bytes:
    """A model of one node. `inputs` lend dtypes and shapes, `weights` are stored in it; `output`: dtype and shape."""
    node = b"".join(_field(1, name) for name in (*inputs, *weights))
    node += _field(2, "y") + _field(4, op) + _field(7, domain)
    for name, number in (attributes or {}).items():
        node += _field(5, _field(1, name) + _field(3, number) + _field(20, ATTRIBUTE_INT))
    graph = _field(1, node) + _field(2, op)
    for name, array in weights.items():
        dims = b"".join(_field(1, size) for size in array.shape)
        graph += _field(
            5, dims + _field(2, ONNX_DTYPES[array.dtype.name]) + _field(8, name) + _field(9, array.tobytes())
        )
    graph += b"".join(_field(11, _value(name, array.dtype.name, array.shape)) for name, array in inputs.items())
    graph += _field(12, _value("y", *output))
    opsets = {domain: 1} | {"": ONE_NODE_OPSET}
    imported = b"".join(_field(8, _field(1, name) + _field(2, version)) for name, version in opsets.items())
    return _field(1, ONE_NODE_IR_VERSION) + _field(7, graph) + imported


def _value(name: str, dtype: str, shape: Sequence[int]) -> bytes:
    dims = b"".join(_field(1, _field(1, size)) for size in shape)
    return _field(1, name) + _field(2, _field(1, _field(1, ONNX_DTYPES[dtype]) + _field(2, dims)))


def _field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3 | VARINT) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | BYTES) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes((*digits, value))
