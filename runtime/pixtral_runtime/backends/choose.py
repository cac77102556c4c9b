"""What runs a bundle here: the engines that were built for this machine's GPU, or ONNX Runtime on the GPU or the CPU.

`auto` takes engines where the bundle lists fresh ones for a GPU that is here, TensorRT-RTX's before TensorRT's, then
ONNX Runtime's CUDA where it has it, and the CPU otherwise; it says which it took and why. A backend asked for by name
is taken or refused, never replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pixtral_runtime.backends.cuda import CudaDevice
from pixtral_runtime.backends.ort_cuda import (
    CudaSettings,
    lists_cuda,
    load_libraries,
    open_cuda_sessions,
    refuse_wide_products,
    require_provider,
)
from pixtral_runtime.backends.ort_session import OrtSession, OrtSettings
from pixtral_runtime.backends.session import Sessions
from pixtral_runtime.backends.trt_bundle import open_sessions
from pixtral_runtime.backends.trt_package import Flavor, import_tensorrt, version_of
from pixtral_runtime.backends.trt_session import TrtSettings
from pixtral_runtime.bundle.engine_list import built_elsewhere, open_engines, unchanged_engines
from pixtral_runtime.bundle.integrity import unchanged
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.bundle.spec import GRAPHS
from pixtral_runtime.errors import Option, PixtralError, SettingError

BACKENDS = ("auto", "ort-cpu", "ort-cuda", "rtx", "trt")
FEW_SLOTS = 4  # up to which kernels for one slot are faster
FLAVORS: tuple[Flavor, ...] = ("rtx", "trt")


@dataclass(frozen=True)
class Opened:
    """Sessions, what they are, and why these."""

    sessions: Sessions
    backend: str
    reason: str


def open_backend(
    bundle: Bundle,
    backend: str = "auto",
    *,
    threads: int = 0,
    slots: int | None = 1,
    rows: int | None = None,
    gpu: Callable[[], CudaDevice] = CudaDevice,
) -> Opened:
    """Open a bundle's sessions, for about so many answers at a time; None: as many as fit.

    `rows`: the most cache rows that an answer takes; None: as many as there are. Raises SettingError for an unknown
    backend, EngineError for engines that are missing or stale, MachineError for a machine that cannot run them.
    """
    if backend not in BACKENDS:
        raise SettingError(f"no backend '{backend}'", Option("backend", BACKENDS))
    for flavor in FLAVORS:
        if backend == flavor:
            return _open_engines(bundle, flavor, gpu, rows)
    if backend == "ort-cuda":
        return _open_cuda(bundle, gpu, slots, "asked for")
    reason = "asked for"
    if backend == "auto":
        reasons = []
        for flavor in FLAVORS:
            if not any(target.partition(":")[0] == flavor for target in bundle.engines):
                continue
            try:
                return _open_engines(bundle, flavor, gpu, rows)
            except PixtralError as error:  # what is wrong with engines is said, and ONNX Runtime does the work
                reasons.append(f"{flavor}: {error}")
        reason = "; ".join(reasons) or "the bundle lists no engines"
        if lists_cuda():
            try:
                return _open_cuda(bundle, gpu, slots, reason)
            except PixtralError as error:
                reason += f"; ort-cuda: {error}"
    with unchanged(bundle):
        sessions = Sessions(*(OrtSession(bundle, graph, OrtSettings(threads)) for graph in GRAPHS))
    return Opened(sessions, "ort-cpu", reason)


def _open_cuda(bundle: Bundle, gpu: Callable[[], CudaDevice], slots: int | None, reason: str) -> Opened:
    refuse_wide_products(bundle)
    require_provider()
    device = gpu()  # says best what is wrong with a driver
    load_libraries()
    settings = CudaSettings(many_slots=slots is None or slots > FEW_SLOTS)
    with unchanged(bundle):
        sessions = open_cuda_sessions(bundle, device, settings)
    return Opened(sessions, "ort-cuda", reason)


def _open_engines(bundle: Bundle, flavor: Flavor, gpu: Callable[[], CudaDevice], rows: int | None) -> Opened:
    trt = import_tensorrt(flavor)
    device = gpu()
    target = "trt" if flavor == "trt" else f"rtx:sm{device.capability}"
    engines = open_engines(bundle, target, version_of(trt), rows)
    elsewhere = built_elsewhere(bundle, engines, device.name, device.capability)
    with unchanged_engines(bundle, engines):
        sessions = open_sessions(trt, bundle, engines, device, TrtSettings(cuda_graphs=True))
    reason = f"engines for {target} of {engines.context} rows by {engines.tensorrt}"
    return Opened(sessions, flavor, f"{reason}, {elsewhere}" if elsewhere else reason)
