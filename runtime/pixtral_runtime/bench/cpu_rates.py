"""What this machine's CPU reaches at best: bytes read a second, and operations a second of each kind of product."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pixtral_runtime.backends.ort_session import open_graph
from pixtral_runtime.backends.session import Array
from pixtral_runtime.bench.one_node_model import single_node
from pixtral_runtime.bench.spread import Spread
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.errors import SettingError

BANDWIDTH_BYTES = 1 << 29  # far beyond any cache
BANDWIDTH_PASSES = 5
MATRIX_SHAPE = (256, 4096, 2048)  # rows, inputs, outputs: a chunk of a prompt through a layer

MATRIX_PASSES, MATRIX_SECONDS = 5, 0.4

WEIGHTS_PER_SCALE = {4: 128, 8: 32}  # weights to a scale, by bits, as ONNX Runtime runs recipes in int4 and int8

Product = tuple[bytes, dict[str, Array]]
"""A model of one node and its inputs."""


def measure_bandwidth(threads: int, nbytes: int = BANDWIDTH_BYTES) -> Spread:
    """Bytes a second that `threads` threads read when they sum an array of `nbytes`, over some passes.

    `max` is the ceiling: what other load takes away is not the memory's.
    """
    parts = np.array_split(np.ones(nbytes // 8, np.int64), threads)
    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(BANDWIDTH_PASSES):
            started = time.perf_counter()
            list(pool.map(np.sum, parts))
            rates.append(nbytes / (time.perf_counter() - started))
    return Spread.of(rates)


def matrix_kind(bundle: Bundle, stage: str) -> str:
    """Which of `MATRIX_KINDS` a stage of the bundle multiplies with in ONNX Runtime on a CPU."""
    if bundle.precision == "int4":
        return "int8-weights" if stage == "vision" else "int4-weights"
    return "int8" if bundle.precision == "int8" else "float32"  # float16 and fp8 are computed in float32


def measure_matrix_rate(threads: int, kind: str = "float32") -> Spread:
    """Operations a second of a matrix product in ONNX Runtime on the CPU, a chunk of tokens by a square layer.

    `kind` is one of `MATRIX_KINDS`. Raises InputError on another, MachineError without onnxruntime.
    """
    if kind not in MATRIX_KINDS:
        raise SettingError(f"no matrix kind '{kind}'", f"one of {', '.join(MATRIX_KINDS)}")
    model, feeds = MATRIX_KINDS[kind](np.random.default_rng(0))
    session = open_graph(model, threads)
    session.run(None, feeds)
    flops, begun = 2 * math.prod(MATRIX_SHAPE), time.perf_counter()
    rates: list[float] = []
    while len(rates) < MATRIX_PASSES or time.perf_counter() - begun < MATRIX_SECONDS:
        started = time.perf_counter()
        session.run(None, feeds)
        rates.append(flops / (time.perf_counter() - started))
    return Spread.of(rates)


def _float_product(rng: np.random.Generator) -> Product:
    rows, inputs, outputs = MATRIX_SHAPE
    feeds = {"a": rng.standard_normal((rows, inputs), np.float32)}
    weights = {"b": rng.standard_normal((inputs, outputs), np.float32)}
    return single_node("MatMul", feeds, weights, ("float32", (rows, outputs))), feeds


def _int8_product(rng: np.random.Generator) -> Product:
    """uint8 by int8, summed in int32: W8A8 without its scales. ONNX Runtime moves int8 activations to uint8 on x86."""
    rows, inputs, outputs = MATRIX_SHAPE
    feeds = {"a": rng.integers(0, 256, (rows, inputs), np.uint8)}
    weights = {"b": rng.integers(-127, 128, (inputs, outputs), np.int8)}
    return single_node("MatMulInteger", feeds, weights, ("int32", (rows, outputs))), feeds


def _block_product(rng: np.random.Generator, bits: int) -> Product:
    """float32 by codes in blocks along the inputs, computed in int8 as sessions of bundles do."""
    rows, inputs, outputs = MATRIX_SHAPE
    block = WEIGHTS_PER_SCALE[bits]
    feeds = {"a": rng.standard_normal((rows, inputs), np.float32)}
    weights = {
        "b": rng.integers(0, 256, (outputs, inputs // block, block * bits // 8), np.uint8),
        "scales": rng.random((outputs, inputs // block), np.float32),
    }
    attributes = {"K": inputs, "N": outputs, "bits": bits, "block_size": block, "accuracy_level": 4}
    output = ("float32", (rows, outputs))
    return single_node("MatMulNBits", feeds, weights, output, attributes, "com.microsoft"), feeds


MATRIX_KINDS: dict[str, Callable[[np.random.Generator], Product]] = {
    "float32": _float_product,
    "int8": _int8_product,
    "int8-weights": lambda rng: _block_product(rng, 8),
    "int4-weights": lambda rng: _block_product(rng, 4),
}
