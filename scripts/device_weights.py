"""Weights for a bundle that has none: random values of a model's size, each where the graphs read it."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from device_results import WORK, emit
from pixtral_runtime.bundle.manifest import WEIGHTS, Bundle, open_bundle
from pixtral_runtime.bundle.spec import GRAPHS

INT4, INT8, FLOAT16 = onnx.TensorProto.INT4, onnx.TensorProto.INT8, onnx.TensorProto.FLOAT16
CODES_STD: Mapping[int, float] = {INT4: math.sqrt(17.5), INT8: 73.47}  # of `random_codes`
BLOCK = 16_777_213  # values that repeat; odd, so that no two rows of a matrix are the same
PART = 1 << 27  # bytes that a thread writes at a time
HEAD_SCALE = 5  # of the logits, so that few tokens are likely, as after training

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Stored:
    """A tensor of the weight file, as the graphs that read it say. `kind` is onnx.TensorProto's."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    nbytes: int

    def std(self, layers: int) -> float:
        """Of the values. Products keep their inputs' size; what layers add makes up half of the stream in the end."""
        if "tok_embeddings" in self.name:
            return 1.0
        if len(self.shape) == 4:  # the patches' convolution
            return 1 / math.sqrt(math.prod(self.shape[1:]))
        added = ".wo." in self.name or ".w2." in self.name
        head = HEAD_SCALE if self.name == "output.weight" else 1
        return head / math.sqrt(self.shape[0] * (2 * layers if added else 1))


def stored_tensors(folder: Path) -> list[Stored]:
    """What the bundle's graphs read from its weight file, each tensor once, in the file's order."""
    found: dict[int, Stored] = {}
    for graph in GRAPHS:
        for tensor in onnx.load(str(folder / f"{graph}.onnx"), load_external_data=False).graph.initializer:
            if place := {entry.key: entry.value for entry in tensor.external_data}:
                start, nbytes = int(place["offset"]), int(place["length"])
                found[start] = Stored(tensor.name, tuple(tensor.dims), tensor.data_type, start, nbytes)
    return [found[start] for start in sorted(found)]


def write_weights(folder: Path) -> int:
    """Write the bundle's weight file. Returns its bytes."""
    tensors = stored_tensors(folder)
    by_name = {tensor.name: tensor for tensor in tensors}
    layers = sum(name.startswith("layers.") and name.endswith("attention.wo.weight") for name in by_name)
    size = max(tensor.offset + tensor.nbytes for tensor in tensors)
    with open(folder / WEIGHTS, "wb") as file:
        file.truncate(size)
    # Mapped: threads that write to one file take turns.
    target = np.memmap(folder / WEIGHTS, np.uint8, "r+")
    jobs = []
    for tensor in tensors:
        source = content(tensor, by_name, layers)
        # Elsewhere in the block for each, at a whole value.
        first = 0 if len(source) == tensor.nbytes else tensor.offset // 2 * 2
        for start in range(0, tensor.nbytes, PART):
            part = target[tensor.offset + start : tensor.offset + min(start + PART, tensor.nbytes)]
            jobs.append((part, source, (first + start) % len(source)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: fill(*job), jobs))
    return size


def fill(target: Bytes, source: Bytes, place: int) -> None:
    """Copy the source from `place` on, and again from its start until the target is full."""
    done = 0
    while done < len(target):
        count = min(len(target) - done, len(source) - place)
        target[done : done + count] = source[place : place + count]
        done, place = done + count, 0


def content(tensor: Stored, by_name: Mapping[str, Stored], layers: int) -> Bytes:
    """A tensor's bytes, or a block of them that repeats."""
    if "rope." in tensor.name:
        theta = 1e9 if "decoder" in tensor.name else 1e4
        rows, half = tensor.shape
        angles = np.arange(rows)[:, None] * theta ** (-np.arange(half) / half)
        values = np.cos(angles) if tensor.name.endswith("cos") else np.sin(angles)
    elif tensor.name.endswith("_scale"):
        codes = by_name[tensor.name.removesuffix("_scale")]
        values = np.full(tensor.shape, codes.std(layers) / CODES_STD[codes.kind])
    elif len(tensor.shape) == 1:  # norms, and biases of the adapter
        values = np.random.default_rng(tensor.offset).normal(1, 0.02, tensor.shape)
    elif tensor.kind == FLOAT16:
        return normal_values(tensor.std(layers))
    else:
        return random_codes(tensor.kind)
    return np.frombuffer(values.astype(np.float16), np.uint8)


@cache
def normal_values(std: float) -> Bytes:
    return np.frombuffer((std * _normal()).astype(np.float16).tobytes(), np.uint8)


@cache
def _normal() -> npt.NDArray[np.float32]:
    normal: npt.NDArray[np.float32] = np.random.default_rng(1).standard_normal(BLOCK, np.float32)
    return normal


@cache
def random_codes(kind: int) -> Bytes:
    """Codes whose mean is zero: -8 and -128 become 0. With another mean all rows of a product would lean one way."""
    found = np.random.default_rng(0).integers(0, 256, BLOCK, np.uint8)
    halves = ((0x0F, 0x08), (0xF0, 0x80)) if kind == INT4 else ((0xFF, 0x80),)
    for mask, least in halves:
        found[(found & mask) == least] &= 0xFF ^ mask
    return found


@contextmanager
def weighted(name: str) -> Iterator[Bundle]:
    """A packed bundle with weights, in memory where that has room; both are gone afterwards."""
    source, shared = WORK / "large" / name, Path("/dev/shm")
    size = weight_bytes(source)
    root = shared if shared.is_dir() and shutil.disk_usage(shared).free > size + (8 << 30) else WORK
    folder = root / "device-check" / name
    shutil.copytree(source, folder, dirs_exist_ok=True)
    try:
        started = time.perf_counter()
        write_weights(folder)
        emit(f"{name}: weights written", round(time.perf_counter() - started, 1), "s", bytes=size, to=str(folder))
        yield open_bundle(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight file that its graphs expect."""
    return max(tensor.offset + tensor.nbytes for tensor in stored_tensors(folder))
