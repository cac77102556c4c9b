"""As much of the ONNX file format as the runtime needs without the package onnx: sizes of weights, graphs of one node.

Protocol buffers: a message is a list of fields, each a number, a wire type and a value. The numbers are onnx.proto's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.errors import BundleError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

ROPE_MARK = "rope"  # in the names of rotary tables, of which a pass reads a few rows


def weight_bytes(path: Path) -> dict[str, int]:
    """Bytes of each initializer that a graph keeps in another file, by name. Raises InputError."""
    sizes: dict[str, int] = {}
    try:
        for graph in _messages(memoryview(path.read_bytes()), 7):
            for tensor in _messages(graph, 5):
                entries = [[bytes(next(_messages(entry, key))) for key in (1, 2)] for entry in _messages(tensor, 13)]
                sizes |= {bytes(*_messages(tensor, 8)).decode(): int(size) for key, size in entries if key == b"length"}
    except (OSError, IndexError, ValueError, StopIteration) as error:
        raise BundleError(f"{path} is no ONNX file: {error}", "pixtral export CHECKPOINT -o BUNDLE --force") from error
    return sizes


def _messages(data: memoryview, wanted: int) -> Iterator[memoryview]:
    """The fields of bytes (texts and messages) with the wanted number. Raises ValueError or IndexError on others."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            _, at = _read_varint(data, at)
            continue
        if kind == BYTES:
            size, at = _read_varint(data, at)
        elif kind in (FIXED64, FIXED32):
            size = 8 if kind == FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(data):
            raise ValueError("cut off")
        if kind == BYTES and number == wanted:
            yield data[at : at + size]
        at += size


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def graph_weight_bytes(bundle: Bundle, graph: str) -> int:
    """Bytes of the weights a graph reads, without rotary tables. Raises InputError."""
    return sum(size for name, size in weight_bytes(bundle.graph_path(graph)).items() if ROPE_MARK not in name)
