"""The machine a figure was measured on: clocks and their caps, power mode, throttling, temperature, load, versions.

Read from /proc, /sys and NVML, twice: before a run and after it. What cannot be read is None, never 0 and never
guessed. `warnings` compares both and names the command that makes the next run comparable.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pixtral_runtime.device.clocks import Clock, cpu_clock, gpu_clock, memory_clock
from pixtral_runtime.device.cpu_time import CpuTime, OtherLoad, other_load, read_cpu_time
from pixtral_runtime.device.jetson import PowerMode, parse_nvpmodel
from pixtral_runtime.device.nvml import Gpu, open_gpu
from pixtral_runtime.device.sysfs import read_text
from pixtral_runtime.device.throttling import Temperature, read_temperatures, read_throttling
from pixtral_runtime.errors import MachineError
from pixtral_runtime.version import __version__

PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx")
COMMAND_TIMEOUT_S = 5
MOVED = 0.02  # of a clock: one that is locked does not
FELL = 0.1
NEAR_LIMIT_C = 5
OTHER_LOAD = 0.05  # of all CPUs
STOLEN = 0.01

Run = Callable[[Sequence[str]], str | None]


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


@dataclass(frozen=True)
class Warning:
    """What makes figures doubtful, and the command or the deed that helps."""

    text: str
    remedy: str


def run_command(command: Sequence[str]) -> str | None:
    """What a command prints; None where it is absent, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def read_state(root: Path = Path("/"), run: Run = run_command) -> DeviceState:
    """The state now, in a few milliseconds. `root` is where /proc and /sys are, another place in tests."""
    try:
        gpu = open_gpu()
    except MachineError:
        gpu = None
    model = read_text(root / "proc/device-tree/model")
    board = model if model and "jetson" in model.lower() else None
    cpu, cores, threads = _cpu(root)
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
        versions={"pixtral": __version__, **{name: _version(name) for name in PACKAGES}},
    )


def warnings(before: DeviceState, after: DeviceState) -> list[Warning]:
    """Why figures measured between two states may not be reproducible; nothing is said of what is not readable."""
    return [
        *_mode_warnings(after),
        *_clock_warnings(before, after),
        *_throttle_warnings(before, after),
        *_heat_warnings(after),
        *_load_warnings(before, after),
    ]


def _mode_warnings(state: DeviceState) -> list[Warning]:
    mode = state.power_mode
    if mode is None or mode.is_fastest:
        return []
    return [Warning(f"power mode {mode.name} caps the clocks", _lock(state, "cpu"))]


def _lock(state: DeviceState, part: str) -> str:
    """The command that locks the clock of cpu, gpu or memory."""
    if state.is_jetson:
        mode = state.power_mode
        if mode is None or mode.is_fastest:
            return "sudo jetson_clocks"
        return f"sudo nvpmodel -m {mode.fastest_id or 0} && sudo jetson_clocks"
    if part == "cpu":
        return "sudo cpupower frequency-set -g performance"
    option, clock = ("-lgc", state.gpu_clock) if part == "gpu" else ("-lmc", state.memory_clock)
    return f"sudo nvidia-smi {option} {clock.max_hz // 1_000_000 if clock.max_hz else '<MHz>'}"


def _clock_warnings(before: DeviceState, after: DeviceState) -> list[Warning]:
    found = []
    for part, first, last in (
        ("cpu", before.cpu_clock, after.cpu_clock),
        ("gpu", before.gpu_clock, after.gpu_clock),
        ("memory", before.memory_clock, after.memory_clock),
    ):
        name = part if part == "memory" else part.upper()
        remedy = _lock(after, part)
        if last.locked is False:
            governor = f" (governor {last.governor})" if last.governor else ""
            found.append(Warning(f"the {name}'s clock is not locked{governor}", remedy))
        if not first.current_hz or not last.current_hz:
            continue
        change = last.current_hz / first.current_hz - 1
        from_to = f"from {first.current_hz / 1e6:.0f} to {last.current_hz / 1e6:.0f} MHz during the run"
        if change < -FELL:
            slowed = "let the device cool, then measure again" if last.locked else remedy
            found.append(Warning(f"the {name}'s clock fell {from_to}", slowed))
        elif last.locked is None and abs(change) > MOVED:  # NVML does not tell whether a clock is locked
            found.append(Warning(f"the {name}'s clock went {from_to}: it is not locked", remedy))
    return found


def _throttle_warnings(before: DeviceState, after: DeviceState) -> list[Warning]:
    counted = {name: count - before.throttle_counts.get(name, count) for name, count in after.throttle_counts.items()}
    reasons = {name for name, more in counted.items() if more > 0} | {
        *(before.throttling or ()),
        *(after.throttling or ()),
    }
    return [Warning(f"slowed down: {reason}", _throttle_remedy(reason, after)) for reason in sorted(reasons)]


def _throttle_remedy(reason: str, state: DeviceState) -> str:
    if "voltage" in reason or "current" in reason:
        return "a stronger power supply, or a lower power mode: sudo nvpmodel -m <mode>"
    if "power" in reason:
        return "a clock it can hold: sudo nvidia-smi -lgc <MHz>; its power limits: nvidia-smi -q -d POWER"
    return "full fan, sudo jetson_clocks --fan" if state.is_jetson else "more cooling, then measure again"


def _heat_warnings(state: DeviceState) -> list[Warning]:
    remedy = "let the device cool, or give it more air, then measure again"
    return [
        Warning(f"{hot.name} is at {hot.celsius:.0f} °C, its limit is {hot.limit_celsius:.0f} °C", remedy)
        for hot in state.temperatures
        if hot.limit_celsius is not None and hot.celsius > hot.limit_celsius - NEAR_LIMIT_C
    ]


def _load_warnings(before: DeviceState, after: DeviceState) -> list[Warning]:
    load = load_between(before, after)
    if load is None:
        return []
    found = []
    if load.share > OTHER_LOAD:
        named = f": {', '.join(load.busiest)}" if load.busiest else ""
        found.append(
            Warning(f"other programs took {load.share:.0%} of the CPUs{named}", "stop them: ps aux --sort=-pcpu | head")
        )
    if load.stolen > STOLEN:
        text = f"other guests of this virtual machine's host took {load.stolen:.0%} of its CPU time"
        found.append(Warning(text, "measure on a machine of your own"))
    return found


def load_between(before: DeviceState, after: DeviceState) -> OtherLoad | None:
    """What other programs took of the CPUs between two states; None where it is not readable or the time too short."""
    if before.cpu_time is None or after.cpu_time is None:
        return None
    return other_load(before.cpu_time, after.cpu_time)


def _cpu(root: Path) -> tuple[str | None, int | None, int | None]:
    """Model, cores and threads that are online."""
    model = None
    for line in (read_text(root / "proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            model = value.strip()
            break
    siblings = [
        text
        for path in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")
        if (text := read_text(path))
    ]
    return model, len(set(siblings)) or None, len(siblings) or None


def _power_mode(root: Path, run: Run) -> PowerMode | None:
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


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
