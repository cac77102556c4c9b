"""One NVIDIA GPU through NVML, the library under nvidia-smi.

What a GPU or a driver does not know is None, as are all of a Jetson Orin's clocks.
"""

from __future__ import annotations

import os
from typing import Any

from pixtral_runtime.errors import MachineError, extra_missing


class Gpu:
    """Queries by NVML's names, without the handle. NVML stays open until the program ends."""

    def __init__(self, library: Any, handle: Any) -> None:
        self._library, self._handle = library, handle

    def read(self, query: str, *arguments: object) -> Any | None:
        """The answer of nvmlDeviceGet<query>, in NVML's units; None where it has none."""
        return self._ask(f"nvmlDeviceGet{query}", self._handle, *arguments)

    def system(self, query: str) -> Any | None:
        """The answer of nvmlSystemGet<query>."""
        return self._ask(f"nvmlSystemGet{query}")

    def number(self, name: str) -> int:
        """A constant, as NVML_CLOCK_SM."""
        value: int = getattr(self._library, name)
        return value

    def _ask(self, name: str, *arguments: object) -> Any | None:
        try:
            return getattr(self._library, name)(*arguments)
        except (AttributeError, self._library.NVMLError):  # an older nvidia-ml-py lacks the function itself
            return None


def open_gpu() -> Gpu:
    """The first GPU that CUDA may use. Raises MachineError.

    CUDA and NVML number GPUs alike where all are of one kind, or with CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    try:
        import pynvml
    except ImportError as error:
        raise extra_missing("nvidia-ml-py", "bench", "reading a GPU's clocks, temperature and energy") from error
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    try:
        pynvml.nvmlInit()
        if chosen.startswith(("GPU-", "MIG-")):
            return Gpu(pynvml, pynvml.nvmlDeviceGetHandleByUUID(chosen))
        if not chosen.isdecimal():
            raise MachineError(f"CUDA_VISIBLE_DEVICES={chosen} names no GPU that NVML knows", "nvidia-smi -L")
        return Gpu(pynvml, pynvml.nvmlDeviceGetHandleByIndex(int(chosen)))
    except pynvml.NVMLError as error:
        raise MachineError(f"NVML answers: {error}", "nvidia-smi") from error
