"""Memory: what is available, what this process has and had at most, and its share of an NVIDIA GPU's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pixtral_runtime.device.nvml import Gpu, open_gpu
from pixtral_runtime.device.sysfs import SYSTEM, read_fields
from pixtral_runtime.errors import MachineError

STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # Linux: the peak of the resident set begins anew


def begin_peak() -> None:
    """Begin a new peak, where the system lets us; else peaks are those since the process began."""
    try:
        REFERENCES.write_text(RESET_PEAK, encoding="ascii")
    except OSError:
        return


def memory_use(status: str | None = None) -> dict[str, Any]:
    """`peak_rss_bytes` since `begin_peak`, mapped files included, and `vram_bytes` now; None with a reason, never 0."""
    text = (STATUS.read_text(encoding="utf-8") if STATUS.exists() else "") if status is None else status
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    peak = lines.get("VmHWM", "").split()
    vram, reason = _vram()
    return {"peak_rss_bytes": 1024 * int(peak[0]) if peak else None, "vram_bytes": vram, "vram_reason": reason}


def _vram() -> tuple[int | None, str]:
    try:
        return vram_of(open_gpu(), os.getpid())
    except MachineError as error:
        return None, str(error)


def vram_of(gpu: Gpu, process: int) -> tuple[int | None, str]:
    """Bytes of the GPU's memory that a process has, or None and why."""
    for one in gpu.read("ComputeRunningProcesses") or ():
        if one.pid == process and one.usedGpuMemory:
            return int(one.usedGpuMemory), ""
    return None, "the driver lists no memory of this process"


def available_memory_bytes(root: Path = SYSTEM) -> int | None:
    """Memory that a new program can have without swapping; None where the system does not say."""
    return meminfo(root).get("MemAvailable")


def resident_memory_bytes() -> int:
    """Memory that this program has at the moment."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def meminfo(root: Path = SYSTEM) -> dict[str, int]:
    """Linux's memory counters in bytes."""
    fields = read_fields(root / "proc/meminfo")
    return {name: 1024 * int(value.split()[0]) for name, value in fields.items() if value.endswith("kB")}
