"""Devices that bundles are planned for: memory, what a system keeps of it, peak rates, the types they compute in."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20
UNIFIED_RESERVE_BYTES = 3_000_000_000  # Linux, CUDA context and TensorRT on a board whose CPU and GPU share memory
DISCRETE_RESERVE_BYTES = 1_000_000_000  # CUDA context and TensorRT
CPU_RESERVE_BYTES = 500_000_000  # Python with ONNX Runtime and the tokenizer; 0.4 GB seen


@dataclass(frozen=True)
class PeakRates:
    """Memory bandwidth and dense tensor-core rates, operations a second, by data sheets; 0 where the type is missing.

    float16 is with sums in float32.
    """

    bandwidth_bytes_per_s: float
    float16: float
    int8: float
    fp8: float = 0


@dataclass(frozen=True)
class KnownDevice:
    """`capability` is CUDA's, 89 for 8.9, and 0 for a CPU."""

    name: str
    memory_bytes: int
    reserved_bytes: int
    capability: int
    peak: PeakRates | None = None

    @property
    def is_card(self) -> bool:
        """A GPU with memory of its own: ONNX Runtime's CUDA is published for these, boards run engines."""
        return self.capability > 0 and self.reserved_bytes == DISCRETE_RESERVE_BYTES

    @property
    def is_board(self) -> bool:
        """A GPU in the memory of the CPU."""
        return self.capability > 0 and not self.is_card


KNOWN_DEVICES = {
    device.name: device
    for device in (
        KnownDevice("orin-nx-16", 15_700 * MIB, UNIFIED_RESERVE_BYTES, 87, PeakRates(102.4e9, 15e12, 30e12)),
        KnownDevice("agx-orin-64", 62_800 * MIB, UNIFIED_RESERVE_BYTES, 87, PeakRates(204.8e9, 42.5e12, 85e12)),
        KnownDevice("thor", 125_700 * MIB, UNIFIED_RESERVE_BYTES, 110, PeakRates(273e9, 258.75e12, 517.5e12, 517.5e12)),
        KnownDevice("dgx-spark", 122_500 * MIB, UNIFIED_RESERVE_BYTES, 121, PeakRates(273e9, 125e12, 250e12, 250e12)),
        KnownDevice(
            "rtx-4090", 24_564 * MIB, DISCRETE_RESERVE_BYTES, 89, PeakRates(1008e9, 165.2e12, 660.6e12, 330.3e12)
        ),
        KnownDevice("l4", 23_034 * MIB, DISCRETE_RESERVE_BYTES, 89, PeakRates(300e9, 121e12, 242.5e12, 242.5e12)),
        KnownDevice("a100-40", 40_960 * MIB, DISCRETE_RESERVE_BYTES, 80, PeakRates(1555e9, 312e12, 624e12)),
        KnownDevice("a100-80", 81_920 * MIB, DISCRETE_RESERVE_BYTES, 80, PeakRates(2039e9, 312e12, 624e12)),
        KnownDevice("h100", 81_559 * MIB, DISCRETE_RESERVE_BYTES, 90, PeakRates(3350e9, 989.5e12, 1979e12, 1979e12)),
        KnownDevice("h200", 143_771 * MIB, DISCRETE_RESERVE_BYTES, 90, PeakRates(4800e9, 989.5e12, 1979e12, 1979e12)),
    )
}
"""Memory as the drivers report it, less than on the box. Where peaks come from: docs/roofline.md."""


LEAST_CAPABILITY = {"fp8": 89, "nvfp4": 100}
"""The first GPUs that compute in a recipe's types; every GPU here has the others."""


NOT_ON_CPU = ("bfloat16", "nvfp4")


NOT_ON_GPU = "float32"  # TensorRT's attention takes none
