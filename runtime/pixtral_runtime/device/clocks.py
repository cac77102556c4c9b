"""Clocks of CPU, GPU and memory: what they are, what settings allow and what the device can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pixtral_runtime.device.nvml import Gpu
from pixtral_runtime.device.sysfs import in_order, read_int, read_text, scaled

JETSON_GPUS = ("*.gpu", "*.ga10b", "*.gv11b", "*.gp10b", "gpu-gpc-*")  # names in /sys/class/devfreq


@dataclass(frozen=True)
class Clock:
    """In hertz. `cap_hz` is what settings allow, `max_hz` what the device can; of several, the fastest."""

    current_hz: int | None = None
    cap_hz: int | None = None
    max_hz: int | None = None
    governor: str | None = None
    locked: bool | None = None


def gpu_clock(root: Path, gpu: Gpu | None) -> Clock:
    """A Jetson's from devfreq, other GPUs' from NVML."""
    return _devfreq(root) or _nvml(gpu, "NVML_CLOCK_SM")


def memory_clock(root: Path, gpu: Gpu | None) -> Clock:
    """A Jetson's memory controller, or a GPU's memory."""
    return _emc(root) or _nvml(gpu, "NVML_CLOCK_MEM")


def cpu_clock(root: Path) -> Clock:
    policies = in_order(root / "sys/devices/system/cpu/cpufreq", "policy*")
    governors = [read_text(policy / "scaling_governor") for policy in policies]
    locks = []
    for policy, governor in zip(policies, governors, strict=True):
        low, high = read_int(policy / "scaling_min_freq"), read_int(policy / "scaling_max_freq")
        locks.append(None if governor is None else governor == "performance" or (low is not None and low == high))
    return Clock(
        _fastest(policies, "scaling_cur_freq"),
        _fastest(policies, "scaling_max_freq"),
        _fastest(policies, "cpuinfo_max_freq"),
        ", ".join(sorted({name for name in governors if name})) or None,
        None if not locks or None in locks else all(locks),
    )


def _fastest(policies: Sequence[Path], name: str) -> int | None:
    """The kernel writes kilohertz."""
    return scaled(max((value for policy in policies if (value := read_int(policy / name))), default=None), 1000)


def _devfreq(root: Path) -> Clock | None:
    devices = (path for pattern in JETSON_GPUS for path in in_order(root / "sys/class/devfreq", pattern))
    device = next(devices, None)
    if device is None:
        return None
    low, cap = read_int(device / "min_freq"), read_int(device / "max_freq")
    steps = (read_text(device / "available_frequencies") or "").split()
    return Clock(
        read_int(device / "cur_freq") or None,  # 0 is a GPU that sleeps
        cap,
        max((int(step) for step in steps if step.isdecimal()), default=None),
        read_text(device / "governor"),
        None if low is None or cap is None else low == cap,
    )


def _emc(root: Path) -> Clock | None:
    """A Jetson's memory controller. Root alone may read its clock, anyone the cap."""
    emc = root / "sys/kernel/debug/bpmp/debug/clk/emc"
    rate, cap = read_int(emc / "rate"), read_int(root / "sys/kernel/nvpmodel_clk_cap/emc")
    if rate is None and cap is None:
        return None
    held = read_int(emc / "mrq_rate_locked")
    return Clock(rate, cap or None, read_int(emc / "max_rate"), None, None if held is None else held == 1)


def _nvml(gpu: Gpu | None, kind: str) -> Clock:
    if gpu is None:
        return Clock()
    number = gpu.number(kind)
    now, cap, top = (
        scaled(gpu.read(query, number), 1_000_000) for query in ("ClockInfo", "ApplicationsClock", "MaxClockInfo")
    )
    return Clock(now, cap, top)
