"""Pixtral-12B's shapes on the device: weights made there, then the decoder in both forms of attention."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from device_decoder import EAGER, Call, Decoder, Stream, relative
from device_results import WORK, emit, median_ms, reported, time_left

GRAPHS = ("vision", "embed", "decoder")
ROWS = (256, 2048, 4864)
CODES_STD: dict[int, float] = {
    onnx.TensorProto.INT4: 4.61,
    onnx.TensorProto.INT8: 73.9,
}  # of codes that are equally likely
BLOCK = 1 << 25  # values


@dataclass(frozen=True)
class Stored:
    """A tensor of the weight file, as the graphs that read it say."""

    name: str
    shape: tuple[int, ...]
    kind: int  # onnx.TensorProto's
    offset: int
    nbytes: int


def stored_tensors(folder: Path) -> list[Stored]:
    """What the bundle's graphs read from its weight file, each tensor once."""
    found: dict[int, Stored] = {}
    for graph in GRAPHS:
        for tensor in onnx.load(str(folder / f"{graph}.onnx"), load_external_data=False).graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            if place:
                start, nbytes = int(place["offset"]), int(place["length"])
                found[start] = Stored(tensor.name, tuple(tensor.dims), tensor.data_type, start, nbytes)
    return [found[start] for start in sorted(found)]


@cache
def random_bytes() -> memoryview:
    return memoryview(np.random.default_rng(0).bytes(2 * BLOCK))


@cache
def normal_block(std: float) -> memoryview:
    values = np.random.default_rng(1).standard_normal(BLOCK, np.float32)
    return memoryview((std * values).astype(np.float16).tobytes())


def rope(shape: tuple[int, ...], kind: str, theta: float) -> bytes:
    rows, half = shape
    angles = np.arange(rows)[:, None] * theta ** (-np.arange(half) / half)
    return bytes((np.cos(angles) if kind == "cos" else np.sin(angles)).astype(np.float16).tobytes())


def std_of(shape: tuple[int, ...], name: str) -> float:
    """Outputs of a product keep their inputs' size; those that are added to the stream stay small."""
    return 1 / math.sqrt(shape[0]) / (math.sqrt(80) if ".wo." in name or ".w2." in name else 1)


def pieces(tensor: Stored, all_tensors: dict[str, Stored]) -> Iterator[tuple[int, Any]]:
    """A tensor's bytes with their places in the file."""
    if "rope." in tensor.name:
        yield tensor.offset, rope(tensor.shape, tensor.name[-3:], 1e9 if "decoder" in tensor.name else 1e4)
        return
    if tensor.name.endswith("_scale"):
        codes = all_tensors[tensor.name.removesuffix("_scale")]
        wanted = 1.0 if "tok_embeddings" in tensor.name else std_of(codes.shape, tensor.name)
        value = wanted / CODES_STD[codes.kind]
        yield tensor.offset, np.full(tensor.nbytes // 2, value, np.float16).tobytes()
        return
    if len(tensor.shape) == 1:  # norms; biases, where there are any, may be ones too
        random = np.random.default_rng(tensor.offset)
        yield tensor.offset, (1 + 0.02 * random.standard_normal(tensor.shape[0])).astype(np.float16).tobytes()
        return
    is_code = tensor.kind != onnx.TensorProto.FLOAT16
    std = 1.0 if "tok_embeddings" in tensor.name else std_of(tensor.shape, tensor.name)
    if len(tensor.shape) == 4:  # the patches' convolution
        std = 1 / math.sqrt(math.prod(tensor.shape[1:]))
    block = random_bytes() if is_code else normal_block(round(std, 7))
    done, start = 0, 2 * (tensor.offset // 4096 * 977 % (BLOCK // 2))
    while done < tensor.nbytes:
        count = min(tensor.nbytes - done, len(block) - start)
        yield tensor.offset + done, block[start : start + count]
        done, start = done + count, 0


def write_weights(folder: Path) -> int:
    """The bundle's weight file: random values of the right size each. Returns its bytes."""
    tensors = stored_tensors(folder)
    by_name = {tensor.name: tensor for tensor in tensors}
    path = folder / "weights.bin"
    file = os.open(path, os.O_CREAT | os.O_WRONLY, 0o644)
    try:

        def write(tensor: Stored) -> None:
            for place, content in pieces(tensor, by_name):
                view = memoryview(content)
                while view:
                    count = os.pwrite(file, view, place)
                    view, place = view[count:], place + count

        random_bytes()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(write, tensors))
    finally:
        os.close(file)
    return path.stat().st_size


def placed(name: str) -> Path:
    """A large bundle in memory where that has room, its weights written."""
    shared = Path("/dev/shm")
    source = WORK / "large" / name
    end = max(tensor.offset + tensor.nbytes for tensor in stored_tensors(source))
    root = shared if shared.is_dir() and shutil.disk_usage(shared).free > end + (8 << 30) else WORK
    folder = root / "device-check" / name
    if not (folder / "weights.bin").is_file():
        shutil.copytree(source, folder, dirs_exist_ok=True)
        started = time.perf_counter()
        size = write_weights(folder)
        seconds = time.perf_counter() - started
        emit(f"{name} weights written", round(seconds, 1), "s", bytes=size, to=str(folder))
    return folder


def gpu_memory() -> int | None:
    try:
        from pixtral_runtime.device.nvml import open_gpu

        return getattr(open_gpu().read("MemoryInfo"), "used", None)
    except Exception:
        return None


def int4() -> None:
    """A first quick look: by key length and masked, CUDA graphs on and off, one and eight slots, and prefill."""
    began = time.perf_counter()
    folder, stream = placed("int4"), Stream()
    emit("own stream", stream.made_by)
    logits: dict[str, Any] = {}
    compare(folder, "packed-by-length", "by length", stream, logits)
    compare(folder, "packed-masked", "masked", stream, logits)
    os.environ["ORT_ENABLE_CUDNN_FLASH_ATTENTION"] = "0"
    compare(folder, "packed-by-length", "by length, no cuDNN", stream, logits)
    del os.environ["ORT_ENABLE_CUDNN_FLASH_ATTENTION"]
    if time_left() > 12:
        with reported("12B int4 backend"):
            backend(folder)
    emit("int4 stage", round(time.perf_counter() - began, 1), "s")


def compare(folder: Path, file: str, form: str, stream: Stream, logits: dict[str, Any]) -> None:
    """One decoder's figures."""
    with reported(f"12B int4 {form}"):
        if time_left() < 10:
            emit(f"12B int4 {form}", "no time left")
            return
        passed = os.environ.get("DEVICE_CHECK_PASSED", "graphs,graphs-own").split(",")
        own = "graphs-own" in passed
        started = time.perf_counter()
        decoder = Decoder(
            folder / f"{file}.onnx", stream, 8, max(ROWS), captures=own or "graphs" in passed, own_stream=own
        )
        seconds = round(time.perf_counter() - started, 1)
        emit(f"{form}: load", seconds, "s", gpu_bytes=gpu_memory(), own=own, graphs=decoder.captures)
        again = "no cuDNN" in form
        measure(decoder, form, logits, (256, 4864) if again else ROWS)
        if not again:
            prefill(decoder, form)


EXPECTED = {  # of a step, written before the first run; no card named: an H100
    ("by length", 1): "5 to 6", ("by length", 8): "10", ("masked", 1): "6 to 8 at 256, 13 to 15 at 4,864",
    ("masked", 8): "20",
}  # fmt: skip


def measure(decoder: Decoder, form: str, logits: dict[str, Any], sizes: tuple[int, ...]) -> None:
    """Steps of one and eight slots at each cache size."""
    number = 0
    for slots in (1, 8):
        for rows in sizes:
            case = f"{slots} × {rows}"
            if time_left() < 6:
                emit(f"{form} {case}", "no time left")
                return
            number += 1
            with reported(f"{form} {case}"):
                eager, expected = Call(decoder, slots, 1, rows), EXPECTED.get((form, slots), "")
                emit(f"{form} {case} kernels", eager.kernel_lines())
                seen = eager.fresh_logits()
                emit(
                    f"{form} {case} logits", float(np.abs(seen).max()), "largest", finite=bool(np.isfinite(seen).all())
                )
                other = logits.setdefault(case, seen)
                if other is not seen:
                    emit(f"{form} {case} to by length", relative(seen, other), "rel", expected="< 0.02")
                emit(
                    f"{form} {case} eager",
                    median_ms(eager.step, 50, 5, 0.8),
                    "ms",
                    expected=expected,
                    host=host_ms(eager),
                )
                if not decoder.captures:
                    continue
                graph = Call(decoder, slots, 1, rows, graph=number)
                started = time.perf_counter()
                graph.step()
                captured = round(time.perf_counter() - started, 3)
                error = relative(graph.fresh_logits(), seen)
                emit(f"{form} {case} graph", median_ms(graph.step, 60, 5, 0.8), "ms", expected=expected,
                     host=host_ms(graph), capture_s=captured, replay_error=error)  # fmt: skip


def host_ms(call: Call) -> float:
    """How long the host takes to queue a step."""
    times = []
    for _ in range(15):
        started = time.perf_counter()
        call.queue()
        times.append(time.perf_counter() - started)
        call.decoder.stream.wait()
    return round(1e3 * sorted(times)[7], 4)


def prefill(decoder: Decoder, form: str) -> None:
    """2,048 tokens of one slot, in chunks."""
    for chunk in (256, 2048):
        if time_left() < 6:
            return
        calls = [Call(decoder, 1, chunk, 2048, start=start, graph=EAGER) for start in range(0, 2048, chunk)]

        def run(calls: list[Call] = calls) -> None:
            for call in calls:
                call.step()

        expected = {256: "250", 2048: "100"}[chunk] if form == "by length" else ""
        milliseconds = median_ms(run, 5, 1, 3.0)
        emit(
            f"{form} prefill 2,048 by {chunk}", milliseconds, "ms", expected=expected, kernels=calls[-1].kernel_lines()
        )


def backend(folder: Path) -> None:
    """Steps through the project's own decoder session as it is: feeds from the host, logits to the host."""
    from pixtral_runtime.backends.choose import open_backend
    from pixtral_runtime.bundle.manifest import open_bundle

    bundle = open_bundle(folder)
    started = time.perf_counter()
    sessions = open_backend(bundle, "ort-cuda").sessions
    session = sessions.decoder
    emit("backend: load of all graphs", round(time.perf_counter() - started, 1), "s", expected="< 40")
    for slots, rows in ((1, 256), (1, 4864), (8, 2048)):
        if time_left() < 5:
            return
        with reported(f"backend {slots} × {rows}"):
            cache = session.new_cache(slots, rows)
            position = np.full((slots, 1), rows - 1, np.int64)
            feeds = {"hidden": np.ones((slots, 1, bundle.model.decoder.dim), np.float16), "position_ids": position,
                     "write_index": position[:, 0].copy(), "logits_index": np.arange(slots)}  # fmt: skip
            if getattr(sessions, "picks", False):  # of the graph that chooses candidates itself
                feeds["inverse_temperature"] = np.ones(slots, np.float32)

            def step(feeds: Any = feeds, cache: Any = cache) -> None:
                for output in session.run(feeds, cache).values():
                    output.numpy()

            milliseconds = median_ms(step, 30, 3, 1.0)
            emit(f"backend {slots} × {rows}", milliseconds, "ms", expected=EXPECTED["masked", slots])
