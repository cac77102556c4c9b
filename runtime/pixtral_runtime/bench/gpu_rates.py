"""What a GPU reaches at best: bandwidth by a copy within its memory, matrix rates by data sheet where it is known.

The copy ran on an H200: 4.12 TB/s. Tests put a device in host memory in its place.
"""

from __future__ import annotations

import time

import numpy as np

from pixtral_runtime.backends.cuda import DeviceStream, Memory
from pixtral_runtime.bench.spread import Spread
from pixtral_runtime.bundle.device_catalog import KNOWN_DEVICES, PeakRates

COPY_BYTES = 1 << 28  # beyond any cache
COPIES_PER_PASS, COPY_PASSES = 8, 5

DRIVER_NAMES = {
    "NVIDIA GeForce RTX 4090": "rtx-4090",
    "NVIDIA L4": "l4",
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA A100-SXM4-80GB": "a100-80",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA GB10": "dgx-spark",
    "NVIDIA Thor": "thor",
}
"""Of `footprint.DEVICES`. Other boards of a family have other rates: an H100 PCIe is no H100 SXM."""


def measure_copy_bandwidth(device: DeviceStream, nbytes: int = COPY_BYTES) -> Spread:
    """Bytes a second that a copy of `nbytes` within the device's memory reads and writes, over some passes."""
    source, target = Memory(device, nbytes), Memory(device, nbytes)
    device.zero(source.address, nbytes)
    done = np.empty(1, np.uint8)
    rates = []
    for _ in range(COPY_PASSES + 1):
        device.copy_to_host(done, target.address)  # waits
        started = time.perf_counter()
        for _ in range(COPIES_PER_PASS):
            device.copy_within(target.address, source.address, nbytes)
        device.copy_to_host(done, target.address)
        rates.append(2 * COPIES_PER_PASS * nbytes / (time.perf_counter() - started))
    return Spread.of(rates[1:])  # the first one wakes the clocks


def published_peak(gpu: str) -> PeakRates | None:
    """The data sheet's rates of a GPU by the name its driver gives; None if unknown."""
    known = KNOWN_DEVICES.get(DRIVER_NAMES.get(gpu, ""))
    return None if known is None else known.peak
