"""Memory: what is available, what this process has and had at most, and its share of an NVIDIA GPU's.

A container, a service or a batch job may have less than its machine: a control group bounds it, or one around that
does. Which kernel interface says so, cgroup v1 or v2, is up to the system.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixtral_runtime.device.nvml import Gpu, open_gpu
from pixtral_runtime.device.sysfs import SYSTEM, read_fields, read_int, read_text
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


@dataclass(frozen=True)
class MemoryLimit:
    """What a control group may have, and what is left of it."""

    limit_bytes: int
    left_bytes: int


def available_memory_bytes(root: Path = SYSTEM) -> int | None:
    """Memory that a new program can have without swapping or being killed; None where the system does not say."""
    sizes = [meminfo(root).get("MemAvailable"), *(limit.left_bytes for limit in memory_limits(root))]
    return min((size for size in sizes if size is not None), default=None)


def memory_limits(root: Path = SYSTEM) -> list[MemoryLimit]:
    """Those of the control groups that this process is in, the tightest first; none where nothing bounds them."""
    total = meminfo(root).get("MemTotal")
    found = [limit for folder in _groups(root) if (limit := _limit_of(folder)) is not None]
    return sorted((one for one in found if total is None or one.limit_bytes < total), key=lambda one: one.left_bytes)


def _groups(root: Path) -> Iterator[Path]:
    """The folders of this process's control groups that may bound memory, each before the one around it.

    In a container the path may be the host's, which is not there: what is mounted is then the container's own group.
    """
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mounted = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        folder = mounted / path.lstrip("/")
        while folder != mounted and ".." not in folder.parts:
            yield folder
            folder = folder.parent
        yield mounted


def _limit_of(folder: Path) -> MemoryLimit | None:
    for limit_name, usage_name, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        limit, used = read_int(folder / limit_name), read_int(folder / usage_name)
        if limit is None or used is None:
            continue
        lines = (line.split() for line in (read_text(folder / "memory.stat") or "").splitlines())
        counters = {fields[0]: int(fields[1]) for fields in lines if len(fields) == 2 and fields[1].isdecimal()}
        caches = sum(counters.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))  # given back on demand
        return MemoryLimit(limit, max(0, min(limit, limit - used + caches)))
    return None


def resident_memory_bytes() -> int:
    """Memory that this program has at the moment."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def meminfo(root: Path = SYSTEM) -> dict[str, int]:
    """Linux's memory counters in bytes."""
    fields = read_fields(root / "proc/meminfo")
    return {name: 1024 * int(value.split()[0]) for name, value in fields.items() if value.endswith("kB")}
