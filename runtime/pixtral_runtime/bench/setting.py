"""The setting of a benchmark: machine, bundle and backend, and what this machine reaches at best."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from pixtral_runtime.backends.cuda import CudaDevice, DeviceStream
from pixtral_runtime.bench.cases import DeviceRates
from pixtral_runtime.bench.cpu_rates import MATRIX_KINDS, matrix_kind, measure_bandwidth, measure_matrix_rate
from pixtral_runtime.bench.gpu_rates import measure_copy_bandwidth, published_peak
from pixtral_runtime.device.state import DeviceState, read_state
from pixtral_runtime.device.state_warnings import state_warnings
from pixtral_runtime.errors import MachineError
from pixtral_runtime.generation.model import Model

COSTED_STAGES = ("vision", "prefill", "decode")


@dataclass(frozen=True)
class BenchSetting:
    """What every figure of a report was made with. `threads` 0 are as many as there are cores."""

    bundle: str
    precision: str
    dtype: str
    layers: int
    backend: str
    threads: int
    device: DeviceState

    def to_dict(self, rates: DeviceRates | None) -> dict[str, Any]:
        """Flat, but for the device's own lists; with the rates that ceilings were computed from."""
        own = {name: value for name, value in asdict(self).items() if name != "device"}
        ceilings = {} if rates is None else asdict(rates)
        return own | self.device.to_dict() | {"ceilings": ceilings}


def setting_of(model: Model, threads: int) -> BenchSetting:
    bundle = model.bundle
    backend = model.backend.partition(":")[0]
    return BenchSetting(
        bundle.fingerprint,
        bundle.precision,
        bundle.dtype,
        bundle.model.decoder.n_layers,
        backend,
        threads,
        read_state(),
    )


def measured_rates(model: Model, threads: int, gpu: str | None = None) -> DeviceRates | None:
    """Bandwidth and matrix rates of what runs the bundle, some seconds.

    On the CPU both are measured. Of a GPU the bandwidth is, matrix rates are the data sheet's; None where that is not
    known for the name `gpu`, or cuda-bindings is missing.
    """
    if not model.backend.startswith("ort-cpu"):
        return None if gpu is None else gpu_rates_of(model, gpu)
    cores = threads or os.cpu_count() or 1
    kinds = {stage: matrix_kind(model.bundle, stage) for stage in COSTED_STAGES}
    rates = {kind: measure_matrix_rate(cores, kind).max for kind in {*kinds.values(), next(iter(MATRIX_KINDS))}}
    flops = {stage: rates[kind] for stage, kind in kinds.items()}
    return DeviceRates(measure_bandwidth(cores).max, flops, rates["float32"])


def gpu_rates_of(model: Model, gpu: str, open_device: Callable[[], DeviceStream] = CudaDevice) -> DeviceRates | None:
    peak = published_peak(gpu)
    if peak is None:
        return None
    try:
        bandwidth = measure_copy_bandwidth(open_device()).max
    except MachineError:
        return None
    rate = {"int8": peak.int8, "fp8": peak.fp8}.get(model.bundle.precision, peak.float16)
    return DeviceRates(bandwidth, dict.fromkeys(COSTED_STAGES, rate), peak.float16)


def remarks_on(before: BenchSetting, after: BenchSetting) -> list[str]:
    """What the machine did meanwhile that makes figures doubtful, each with its remedy."""
    return [f"{warning.text}: {warning.remedy}" for warning in state_warnings(before.device, after.device)]
