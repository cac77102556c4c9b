"""The machine a figure was measured on: clocks and their caps, power mode, throttling, temperature, load, versions.

Read from /proc, /sys and NVML, twice: before a run and after it. What cannot be read is None, never 0 and never
guessed. `warnings` compares both and names the command that makes the next run comparable.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pixtral_runtime.device.clocks import Clock, cpu_clock, gpu_clock, memory_clock
from pixtral_runtime.device.cpu_time import CpuTime, read_cpu_time
from pixtral_runtime.device.jetson import PowerMode, parse_nvpmodel
from pixtral_runtime.device.nvml import Gpu, open_gpu
from pixtral_runtime.device.sysfs import SYSTEM, cpu_name, jetson_model, read_text
from pixtral_runtime.device.throttling import Temperature, read_temperatures, read_throttling
from pixtral_runtime.errors import MachineError
from pixtral_runtime.version import __version__, distribution_version

LISTED_PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx")
COMMAND_TIMEOUT_S = 5

RunCommand = Callable[[Sequence[str]], str | None]


@dataclass(frozen=True)
class DeviceState:
    """`throttling` is what slows the device now, `throttle_counts` what did so since it was started."""

    device: str | None
    cpu: str | None
    gpu: str | None
    driver: str | None
    cuda: str | None
    cpu_cores: int | None
    cpu_threads: int | None
    cpu_clock: Clock
    gpu_clock: Clock
    memory_clock: Clock
    power_mode: PowerMode | None
    power_limit_w: float | None
    throttling: tuple[str, ...] | None
    throttle_counts: dict[str, int]
    temperatures: tuple[Temperature, ...]
    load_average: tuple[float, ...] | None
    cpu_time: CpuTime | None = field(repr=False)
    versions: dict[str, str | None]

    @property
    def is_jetson(self) -> bool:
        return "jetson" in (self.device or "").lower()

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what stays is flat, so that two reports can be told apart; what moves is in lists and dicts."""
        names = ("device", "cpu", "gpu", "driver", "cuda", "cpu_cores", "cpu_threads", "power_limit_w")
        clocks = {"cpu": self.cpu_clock, "gpu": self.gpu_clock, "memory": self.memory_clock}
        kept: dict[str, Any] = {name: getattr(self, name) for name in names}
        kept["power_mode"] = self.power_mode and self.power_mode.name
        kept["power_mode_default"] = self.power_mode and self.power_mode.default
        for name, clock in clocks.items():
            settings = {key: value for key, value in asdict(clock).items() if key != "current_hz"}
            kept |= {f"{name}_{key}": value for key, value in settings.items()}
        return (
            kept
            | self.versions
            | {
                "clocks_hz": {name: clock.current_hz for name, clock in clocks.items()},
                "throttling": None if self.throttling is None else list(self.throttling),
                "throttle_counts": self.throttle_counts,
                "temperatures": [asdict(temperature) for temperature in self.temperatures],
                "load_average": None if self.load_average is None else list(self.load_average),
            }
        )


def run_command(command: Sequence[str]) -> str | None:
    """What a command prints; None where it is absent, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def read_state(root: Path = SYSTEM, run: RunCommand = run_command) -> DeviceState:
    """The state now, in a few milliseconds. `root` is where /proc and /sys are, another place in tests."""
    try:
        gpu = open_gpu()
    except MachineError:
        gpu = None
    board, cpu = jetson_model(root), cpu_name(root)
    cores, threads = _cores_and_threads(root)
    gpu_name: str | None = gpu.read("Name") if gpu else None
    limit_mw: int | None = gpu.read("EnforcedPowerLimit") if gpu else None
    throttling, counts = read_throttling(root, gpu)
    return DeviceState(
        device=board or gpu_name or cpu,
        cpu=cpu,
        gpu=gpu_name,
        driver=(gpu.system("DriverVersion") if gpu else None) or _jetson_linux(root),
        cuda=_cuda(root, gpu),
        cpu_cores=cores,
        cpu_threads=threads,
        cpu_clock=cpu_clock(root),
        gpu_clock=gpu_clock(root, gpu),
        memory_clock=memory_clock(root, gpu),
        power_mode=_power_mode(root, run) if board else None,
        power_limit_w=limit_mw / 1000 if limit_mw else None,
        throttling=throttling,
        throttle_counts=counts,
        temperatures=read_temperatures(root, gpu),
        load_average=_load_average(root),
        cpu_time=read_cpu_time(root),
        versions={"pixtral": __version__, **{name: distribution_version(name) for name in LISTED_PACKAGES}},
    )


def _cores_and_threads(root: Path) -> tuple[int | None, int | None]:
    """Those that are online."""
    siblings = [
        text
        for path in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")
        if (text := read_text(path))
    ]
    return len(set(siblings)) or None, len(siblings) or None


def _power_mode(root: Path, run: RunCommand) -> PowerMode | None:
    conf, status = read_text(root / "etc/nvpmodel.conf"), read_text(root / "var/lib/nvpmodel/status")
    return parse_nvpmodel(run(["nvpmodel", "-q"]), conf, status)


def _jetson_linux(root: Path) -> str | None:
    """The release, as "R36 (release), REVISION: 4.3"."""
    release = read_text(root / "etc/nv_tegra_release")
    return ", ".join(release.lstrip("# ").split(", ")[:2]) if release else None


def _cuda(root: Path, gpu: Gpu | None) -> str | None:
    """The version that the driver has, or on a Jetson the toolkit's."""
    import json

    number = gpu.system("CudaDriverVersion_v2") if gpu else None
    if number:
        return f"{number // 1000}.{number % 1000 // 10}"
    text = read_text(root / "usr/local/cuda/version.json")
    try:
        return str(json.loads(text)["cuda"]["version"]) if text else None
    except (ValueError, KeyError, TypeError):
        return None


def _load_average(root: Path) -> tuple[float, ...] | None:
    """Over 1, 5 and 15 minutes."""
    text = read_text(root / "proc/loadavg")
    return tuple(float(number) for number in text.split()[:3]) if text else None
