"""What runs a bundle here: ONNX Runtime on the CPU, or the engines that were built for this machine's GPU.

`auto` takes engines where the bundle lists fresh ones for a GPU that is here, TensorRT-RTX's before TensorRT's, and the
CPU otherwise; it says which it took and why. A backend asked for by name is taken or refused, never replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pixtral_runtime.bundle import Bundle
from pixtral_runtime.cuda import CudaDevice
from pixtral_runtime.engines import open_engines
from pixtral_runtime.errors import InputError, PixtralError
from pixtral_runtime.generate import Sessions
from pixtral_runtime.ort_session import OrtSession, OrtSettings
from pixtral_runtime.spec import GRAPHS
from pixtral_runtime.trt_package import Flavor, load, version_of
from pixtral_runtime.trt_session import TrtSettings, open_sessions

BACKENDS = ("auto", "ort-cpu", "rtx", "trt")
FLAVORS: tuple[Flavor, ...] = ("rtx", "trt")


@dataclass(frozen=True)
class Opened:
    """Sessions, what they are, and why these."""

    sessions: Sessions
    backend: str
    reason: str


def open_backend(
    bundle: Bundle, backend: str = "auto", *, threads: int = 0, gpu: Callable[[], CudaDevice] = CudaDevice
) -> Opened:
    """Open a bundle's sessions.

    Raises InputError for a backend or engines that are not there, MachineError for a machine that cannot run them.
    """
    if backend not in BACKENDS:
        raise InputError(f"no backend '{backend}'", f"--backend {'|'.join(BACKENDS)}")
    for flavor in FLAVORS:
        if backend == flavor:
            return _open_engines(bundle, flavor, gpu)
    reason = "asked for"
    if backend == "auto":
        reasons = []
        for flavor in FLAVORS:
            if not any(target.partition(":")[0] == flavor for target in bundle.engines):
                continue
            try:
                return _open_engines(bundle, flavor, gpu)
            except PixtralError as error:  # what is wrong with engines is said, and the CPU does the work
                reasons.append(f"{flavor}: {error}")
        reason = "; ".join(reasons) or "the bundle lists no engines"
    settings = OrtSettings(threads=threads)
    sessions = Sessions(*(OrtSession(bundle, graph, settings) for graph in GRAPHS))
    return Opened(sessions, "ort-cpu", reason)


def _open_engines(bundle: Bundle, flavor: Flavor, gpu: Callable[[], CudaDevice]) -> Opened:
    trt = load(flavor)
    device = gpu()
    target = "trt" if flavor == "trt" else f"rtx:sm{device.capability}"
    engines = open_engines(bundle, target, version_of(trt))
    sessions = open_sessions(trt, bundle, engines, device, TrtSettings(cuda_graphs=True))
    return Opened(sessions, flavor, f"engines for {target} by {engines.tensorrt}")
