"""Stages of the device check before any model: what the machine is, our CUDA calls, NVML, and its ceilings."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from device_results import WORK, emit, median_ms, reported

PACKAGES = (
    "torch", "transformers", "numpy", "onnx", "onnxruntime", "cuda-bindings", "nvidia-ml-py", "nvidia-cublas",
    "nvidia-cudnn-cu13", "nvidia-cuda-runtime", "nvidia-curand", "safetensors", "pillow", "opencv-python-headless",
    "typer", "rich", "tiktoken", "ml-dtypes", "pyarrow", "pydantic", "pydantic_core", "mistral_common",
)  # fmt: skip
SIZES = {"4 KB": 4 << 10, "64 KB": 64 << 10, "1 MB": 1 << 20, "64 MB": 64 << 20}
LARGE = 1 << 28


def facts() -> None:
    """The machine, what is installed, and how fast its disks take weights."""
    with reported("nvidia-smi"):
        query = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,mig.mode.current"
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, timeout=10
        )
        emit("nvidia-smi", done.stdout.strip() or done.stderr.strip())
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    emit("packages", found)
    with reported("onnxruntime"):
        import onnxruntime as ort

        emit("onnxruntime", f"{ort.__version__} at {ort.__file__}", providers=ort.get_available_providers())
    with reported("imports"):
        for name in ("cv2", "PIL.Image", "mistral_common", "pixtral_cli.main", "pixtral_runtime.generation.model"):
            started = time.perf_counter()
            with reported(f"import {name}"):
                importlib.import_module(name)
                emit(f"import {name}", round(time.perf_counter() - started, 2), "s")
    memory = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    emit("machine", f"{os.cpu_count()} cores, {memory['MemAvailable'].strip()} free", python=os.sys.version)  # type: ignore[attr-defined]
    block = np.random.default_rng(0).bytes(1 << 26)
    for folder in (WORK, Path("/dev/shm")):
        with reported(f"writes to {folder}"):
            free, file = shutil.disk_usage(folder).free, folder / "write-speed"
            started = time.perf_counter()
            with open(file, "wb") as target:
                for _ in range(16 if free > 4 << 30 else 1):
                    target.write(block)
                target.flush()
                os.fsync(target.fileno())
            speed = file.stat().st_size / (time.perf_counter() - started)
            file.unlink()
            emit(f"writes to {folder}", round(speed / 1e9, 2), "GB/s", free_gb=round(free / 1e9, 1))


def plumbing() -> None:
    with reported("state by NVML"):
        from pixtral_runtime.device.state import read_state

        emit("state by NVML", read_state().to_dict())
    with reported("CudaDevice opens"):
        from pixtral_runtime.backends.cuda import CudaDevice

        device = CudaDevice()
        with reported("capability"):
            emit("capability", device.capability, expected="90")
        for name, check in {"overwritten after copy_to_device": overwritten, "2-D copies": two_dimensional,
                            "capture and replay": captured, "copy speeds": speeds}.items():  # fmt: skip
            with reported(name):
                check(device)
        with reported("copy within the device"):
            from pixtral_runtime.bench.gpu_rates import measure_copy_bandwidth

            rate = measure_copy_bandwidth(device, LARGE)
            emit("copy within the device", round(rate.p50 / 1e12, 3), "TB/s", expected="3.0 H100, 4.3 H200")
    with reported("ceilings by torch"):
        ceilings()


def overwritten(device: Any) -> None:
    """Arrays that change as soon as `copy_to_device` returns, behind a stream that is busy."""
    busy = 1 << 28
    first, second = device.alloc(busy), device.alloc(busy)
    for name, nbytes in SIZES.items():
        wrong = 0
        address, seen = device.alloc(nbytes), np.zeros(nbytes, np.uint8)
        for attempt in range(5):
            array = np.random.default_rng(attempt).integers(0, 256, nbytes, np.uint8)
            expected = array.copy()
            for _ in range(20):
                device.copy_within(first, second, busy)
            started = time.perf_counter()
            device.copy_to_device(address, array)
            took = time.perf_counter() - started
            array[:] = 0xEE
            device.copy_to_host(seen, address)
            wrong += int((seen != expected).sum())
        emit(f"bytes wrong, {name} overwritten", wrong, expected="0", call_ms=round(1e3 * took, 3))
        device.free(address)
    device.free(first)
    device.free(second)


def two_dimensional(device: Any) -> None:
    """Rows of one pitch into rows of another, as a cache that grows and a slot that is copied do."""
    rows, width, pitches, right = 1000, 256, ((1024, 512), (512, 1024), (768, 768)), []
    for target_pitch, source_pitch in pitches:
        target, source = device.alloc(rows * target_pitch), device.alloc(rows * source_pitch)
        array = np.random.default_rng(0).integers(0, 256, (rows, source_pitch), np.uint8)
        seen = np.ones((rows, target_pitch), np.uint8)
        device.copy_to_device(source, array)
        device.zero(target, seen.nbytes)
        device.copy_rows(target, source, width, (target_pitch, source_pitch), rows)
        device.copy_to_host(seen, target)
        right.append(bool((seen[:, :width] == array[:, :width]).all() and not seen[:, width:].any()))
        device.free(target)
        device.free(source)
    emit("2-D copies right", all(right), expected="True", pitches=pitches)


def captured(device: Any) -> None:
    nbytes = 1 << 20
    first, second = device.alloc(nbytes), device.alloc(nbytes)
    array, seen = np.full(nbytes, 7, np.uint8), np.zeros(nbytes, np.uint8)
    device.copy_to_device(first, array)
    device.begin_capture()
    device.copy_within(second, first, nbytes)
    device.zero(first, nbytes)
    graph = device.end_capture()
    device.launch(graph)
    device.copy_to_host(seen, second)
    once = bool((seen == 7).all())
    device.copy_to_host(seen, first)
    emptied = not seen.any()
    device.copy_to_device(first, np.full(nbytes, 9, np.uint8))
    device.launch(graph)
    device.copy_to_host(seen, second)
    emit("capture and replay right", once and emptied and bool((seen == 9).all()), expected="True")
    emit("launch of a graph", median_ms(lambda: device.launch(graph)), "ms")
    device.copy_to_host(seen, second)
    device.release(graph)
    device.free(first)
    device.free(second)


def speeds(device: Any) -> None:
    """Pageable memory as `copy_to_device` takes it, and pinned memory through the same calls."""
    nbytes = LARGE
    address = device.alloc(nbytes)
    arrays = {"pageable": np.ones(nbytes, np.uint8)}
    pinned = int(device._call("cudaMallocHost", nbytes))
    arrays["pinned"] = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(pinned))
    arrays["pinned"][:] = 1
    done = np.zeros(1, np.uint8)
    for kind, array in arrays.items():

        def up(array: Any = array) -> None:
            device.copy_to_device(address, array)
            device.copy_to_host(done, address)

        def down(array: Any = array) -> None:
            device.copy_to_host(array, address)

        for way, work in {"up": up, "down": down}.items():
            rate = nbytes / median_ms(work, 5, 1) / 1e6
            emit(f"{kind} memory, {way}", round(rate, 2), "GB/s")
        small = array[: 131_072 * 4]
        emit(f"512 KB to {kind} memory", median_ms(lambda: down(small)), "ms")  # noqa: B023 - called at once
    device.free(address)


def ceilings() -> None:
    """What torch reaches, and whether NVML's energy counter agrees with power times time."""
    try:
        import torch
    except ImportError as error:
        emit("ceilings by torch", f"not here: {error}")
        return
    if not torch.cuda.is_available():
        emit("ceilings by torch", "torch.cuda is not available here")
        return
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))

    def product() -> None:
        torch.matmul(a, b)
        torch.cuda.synchronize()

    rate = 2 * 8192**3 / median_ms(product, 20, 5) / 1e9
    emit("float16 product 8192³", round(rate, 1), "TFLOP/s", expected="about 700")
    matrix = torch.randn(131_072, 8192, device="cuda", dtype=torch.float16)
    vector = torch.randn(8192, device="cuda", dtype=torch.float16)

    def read() -> None:
        torch.mv(matrix, vector)
        torch.cuda.synchronize()

    emit("float16 matrix by vector", round(matrix.numel() * 2 / median_ms(read, 20, 3) / 1e9, 3), "TB/s")
    from pixtral_runtime.device.energy import measure_energy
    from pixtral_runtime.device.energy_meters import open_meters
    from pixtral_runtime.device.nvml import open_gpu

    gpu, watts, stopped = open_gpu(), [], threading.Event()

    def sample() -> None:
        while not stopped.wait(0.05):
            watts.append((gpu.read("PowerUsage") or 0) / 1000)

    sampler = threading.Thread(target=sample)
    with measure_energy(open_meters()) as readings:
        sampler.start()
        started = time.perf_counter()
        while time.perf_counter() - started < 2.5:
            product()
        seconds = time.perf_counter() - started
        stopped.set()
        sampler.join()
    for reading in readings:
        emit(f"energy of {reading.scope} by {reading.source}", reading.joules, "J", reason=reading.reason)
    mean = sum(watts) / max(1, len(watts))
    emit("power by NVML × time", round(mean * seconds, 1), "J", expected="the counter ± 10 %", watts=round(mean, 1))
    emit("memory by NVML", getattr(gpu.read("MemoryInfo"), "used", None), "bytes")
