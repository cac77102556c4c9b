"""What this machine has for pixtral: packages, devices, memory and disk, as rows of data.

Versions come from the installed packages' metadata. Only onnxruntime is imported, because nothing else knows its
providers, and because an installation that cannot be imported is as good as none.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pixtral_runtime.device.memory import available_memory_bytes, meminfo, memory_limits
from pixtral_runtime.device.sysfs import SYSTEM, cpu_name, jetson_model
from pixtral_runtime.version import __version__, distribution_version

Status = Literal["ok", "warn", "missing"]

# Module, then the distributions that bring it: OpenCV has several, and a system's own may have none
BASE_PACKAGES = (
    ("numpy", "numpy"),
    ("PIL", "pillow"),
    ("cv2", "opencv-python-headless", "opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless"),
    ("mistral_common", "mistral-common"),
    ("safetensors", "safetensors"),
)
EXTRA_PACKAGES = {
    "export": (
        ("torch", "torch"),
        ("onnx", "onnx"),
        ("onnxscript", "onnxscript"),
        ("onnx_ir", "onnx-ir"),
        ("huggingface_hub", "huggingface-hub"),
    ),
    "gpu": (("onnx", "onnx"), ("cuda.bindings", "cuda-bindings")),  # beside onnxruntime-gpu
    "tensorrt": (
        ("tensorrt", "tensorrt"),
        ("onnx", "onnx"),
        ("ml_dtypes", "ml-dtypes"),
        ("cuda.bindings", "cuda-bindings"),
    ),
    "rtx": (
        ("tensorrt_rtx", "tensorrt-rtx"),
        ("polygraphy", "polygraphy"),
        ("onnx", "onnx"),
        ("ml_dtypes", "ml-dtypes"),
        ("cuda.bindings", "cuda-bindings"),
    ),
}
ORT_PACKAGES = ("onnxruntime", "onnxruntime-gpu")  # both write the folder onnxruntime/: one breaks the other
LOW_MEMORY_BYTES = 2_000_000_000
LOW_DISK_BYTES = 2_000_000_000
NVIDIA_SMI_TIMEOUT_S = 10


@dataclass(frozen=True)
class Finding:
    """One fact. `fix` is the command to type, empty where all is well; without a `needed` row nothing runs."""

    name: str
    value: str
    status: Status = "ok"
    fix: str = ""
    needed: bool = False


def examine(root: Path = SYSTEM) -> list[Finding]:
    """All facts about this machine, the needed ones first. Takes under a second, or ten where the GPU driver hangs."""
    gpu = _gpu()
    rows = [
        Finding("python", platform.python_version()),
        Finding("pixtral", __version__),
        _onnxruntime(prefer="gpu" if gpu.status == "ok" else "cpu"),
    ]
    rows += [_package(module, names, "pip install --upgrade pixtral", needed=True) for module, *names in BASE_PACKAGES]
    jetson = jetson_model(root)
    for extra, packages in EXTRA_PACKAGES.items():
        fix = f"pip install 'pixtral[{extra}]'"
        if extra == "tensorrt" and jetson:
            fix = "sudo apt install python3-libnvinfer"  # a Jetson's TensorRT comes with JetPack
        shown = {row.name for row in rows}  # extras share packages
        rows += [_package(module, names, fix) for module, *names in packages if names[0] not in shown]
    if jetson:
        rows.append(Finding("jetson", jetson))
    rows += [
        gpu,
        Finding("system", f"{platform.system()} {platform.machine()}"),
        Finding("cpu", _cpu(root)),
        _memory(root),
        _disk(),
    ]
    rows.append(Finding("extras", ", ".join(_extras(rows)) or "none"))
    return rows


def _onnxruntime(prefer: str) -> Finding:
    installed = [f"{name} {found}" for name in ORT_PACKAGES if (found := distribution_version(name))]
    fix = f"pip install 'pixtral[{prefer}]'"
    uninstall = f"pip uninstall -y {' '.join(ORT_PACKAGES)} && {fix}"
    if len(installed) > 1:
        return Finding("onnxruntime", f"{' and '.join(installed)} overwrite each other", "warn", uninstall, needed=True)
    try:
        import onnxruntime

        providers: list[str] = onnxruntime.get_available_providers()
    except ModuleNotFoundError:
        return Finding("onnxruntime", "not installed", "missing", fix, needed=True)
    except (ImportError, AttributeError) as error:  # a library it needs is missing, or half of its files are
        return Finding("onnxruntime", f"broken: {error}", "missing", uninstall, needed=True)
    short = ", ".join(name.removesuffix("ExecutionProvider") for name in providers)
    return Finding("onnxruntime", f"{onnxruntime.__version__} ({short})", needed=True)


def _package(module: str, distributions: list[str], fix: str, *, needed: bool = False) -> Finding:
    name = distributions[0]
    found = [version for candidate in distributions if (version := distribution_version(candidate))]
    if found:
        return Finding(name, found[0], needed=needed)
    if _is_importable(module):
        return Finding(name, "installed, version unknown", needed=needed)
    return Finding(name, "not installed", "missing", fix, needed)


def _is_importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a submodule, where its package is not there
        return False


def _extras(rows: list[Finding]) -> Iterator[str]:
    """The extras whose packages are all there."""
    has_cpu, has_gpu = (bool(distribution_version(name)) for name in ORT_PACKAGES)
    if has_cpu:
        yield "cpu"
    absent = {row.name for row in rows if row.status == "missing"}
    for extra, packages in EXTRA_PACKAGES.items():
        if not absent.intersection(names[0] for _, *names in packages) and (extra != "gpu" or has_gpu):
            yield extra


def _gpu() -> Finding:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=True)
    except FileNotFoundError:
        return Finding("cuda device", "none found", "missing")
    except subprocess.TimeoutExpired:
        return Finding("cuda device", f"nvidia-smi gave no answer in {NVIDIA_SMI_TIMEOUT_S} s", "warn", "nvidia-smi")
    except (OSError, subprocess.CalledProcessError) as error:
        return Finding("cuda device", f"nvidia-smi failed: {error}", "warn", "nvidia-smi")
    return Finding("cuda device", "; ".join(answer.stdout.split("\n")).strip("; "))


def _cpu(root: Path) -> str:
    model = cpu_name(root) or platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores"


def _memory(root: Path) -> Finding:
    available, total, limits = available_memory_bytes(root), meminfo(root).get("MemTotal"), memory_limits(root)
    if available is None:
        return Finding("memory", "unknown")
    text = f"{available / 1e9:.1f} GB available"
    if limits:
        text += f" of the {limits[0].limit_bytes / 1e9:.1f} GB that this process's control group may have"
    if total is not None:
        text += f"{', on a machine with' if limits else ' of'} {total / 1e9:.1f} GB"
    if available < LOW_MEMORY_BYTES:
        return Finding("memory", text, "warn", "ps aux --sort=-rss | head")
    return Finding("memory", text)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    text = f"{free / 1e9:.1f} GB free in {Path.cwd()}"
    return Finding("disk", text, "warn", "df -h .") if free < LOW_DISK_BYTES else Finding("disk", text)
