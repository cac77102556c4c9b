"""Joules of a piece of work: CPU packages (RAPL), a GPU (NVML), a Jetson's module (INA3221 monitors or tegrastats).

    with measure(open_meters()) as readings:
        work()
    for energy in readings:
        ...  # energy.joules, or None and energy.reason

Counters are read before and after, and in between often enough to see them wrap. Where there is only power, a thread
samples it and integrates. What a meter covers is its `scope`; scopes may overlap and are not to be added.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pixtral_runtime.device.jetson import parse_tegrastats, total_rails
from pixtral_runtime.device.nvml import Gpu, open_gpu
from pixtral_runtime.device.sysfs import in_order, read_int, read_text
from pixtral_runtime.errors import MachineError

COUNTER_PERIOD_S = 10.0  # AMD's RAPL counters wrap after 65 kJ
POWER_PERIOD_S = 0.05
TEGRASTATS = ("tegrastats", "--interval", "100")  # milliseconds


@dataclass(frozen=True)
class Energy:
    """What one meter measured. `joules` is None where it could not, with the reason and what to do about it."""

    scope: str
    source: str
    joules: float | None
    seconds: float
    reason: str = ""
    remedy: str = ""

    @property
    def watts(self) -> float | None:
        return None if self.joules is None or self.seconds <= 0 else self.joules / self.seconds


class EnergyMeter(Protocol):
    """Measures from `start` to `stop`, again and again. `scope` is what it covers: cpu, gpu, module or board."""

    @property
    def scope(self) -> str: ...

    @property
    def source(self) -> str: ...

    def start(self) -> None: ...

    def stop(self) -> Energy: ...


class Gauge(Protocol):
    """Adds up energy from one reading to the next."""

    def sample(self, now_s: float) -> bool:
        """Read once; False where that failed."""
        ...

    @property
    def joules(self) -> float: ...


class CounterGauge:
    """An energy counter in some unit, that begins again at 0 after `wraps_at`, None for one that never does."""

    def __init__(self, read: Callable[[], int | None], unit_j: float, wraps_at: int | None = None) -> None:
        self._read, self._unit_j, self._wraps_at = read, unit_j, wraps_at
        self._last: int | None = None
        self._units = 0

    def sample(self, now_s: float) -> bool:
        value = self._read()
        if value is None:
            return False
        step = 0 if self._last is None else value - self._last
        if step < 0:
            if self._wraps_at is None:
                return False
            step += self._wraps_at
        self._units += step
        self._last = value
        return True

    @property
    def joules(self) -> float:
        return self._units * self._unit_j


class PowerGauge:
    """Power in watts, integrated with straight lines between samples."""

    def __init__(self, read: Callable[[], float | None]) -> None:
        self._read = read
        self._last: tuple[float, float] | None = None
        self._joules = 0.0

    def sample(self, now_s: float) -> bool:
        watts = self._read()
        if watts is None:
            return False
        if self._last is not None:
            then_s, before = self._last
            self._joules += (watts + before) / 2 * (now_s - then_s)
        self._last = now_s, watts
        return True

    @property
    def joules(self) -> float:
        return self._joules


class Unreadable:
    """Stands where there is something to measure that this user may not read, or nothing at all."""

    def __init__(self, scope: str, source: str, reason: str, remedy: str = "") -> None:
        self.scope, self.source, self._reason, self._remedy = scope, source, reason, remedy

    def start(self) -> None:
        pass

    def stop(self) -> Energy:
        return Energy(self.scope, self.source, None, 0.0, self._reason, self._remedy)


class SampledMeter:
    """The sum of gauges, which a thread reads every `period_s`. `open_gauges` makes new ones for each measurement."""

    def __init__(self, scope: str, source: str, open_gauges: Callable[[], Sequence[Gauge]], period_s: float) -> None:
        self.scope, self.source = scope, source
        self._open_gauges, self._period_s = open_gauges, period_s
        self._gauges: Sequence[Gauge] = ()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._failed = False
        self._from_s = 0.0

    def start(self) -> None:
        self._gauges, self._failed = self._open_gauges(), False
        self._ended.clear()
        self._from_s = self._sample()
        self._thread = threading.Thread(target=self._run, name=f"energy of {self.scope}", daemon=True)
        self._thread.start()

    def stop(self) -> Energy:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        seconds = self._sample() - self._from_s
        if self._failed:
            return Energy(self.scope, self.source, None, seconds, f"{self.source} stopped to be readable meanwhile")
        joules = sum(gauge.joules for gauge in self._gauges)
        if joules <= 0:
            reason = f"{self.source} did not move within {seconds:.3f} s"
            return Energy(self.scope, self.source, None, seconds, reason, "measure for some seconds: --min-seconds 5")
        return Energy(self.scope, self.source, joules, seconds)

    def _run(self) -> None:
        while not self._ended.wait(self._period_s):
            self._sample()

    def _sample(self) -> float:
        """When it was, in seconds of the clock."""
        now_s = time.perf_counter()
        for gauge in self._gauges:
            self._failed |= not gauge.sample(now_s)
        return now_s


class TegrastatsMeter:
    """A Jetson's total from lines of tegrastats, which it starts and ends."""

    scope = "module"
    source = "tegrastats"

    def __init__(self, command: Sequence[str] = TEGRASTATS) -> None:
        self._command = command
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None
        self._powers: list[float] = []
        self._from_s = 0.0

    def start(self) -> None:
        self._powers = []
        self._from_s = time.perf_counter()
        try:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError:
            self._process = None
            return
        self._thread = threading.Thread(target=self._run, args=(self._process,), name="tegrastats", daemon=True)
        self._thread.start()

    def stop(self) -> Energy:
        """Mean power times the time that passed: lines come at even times."""
        seconds = time.perf_counter() - self._from_s
        if self._process is not None and self._thread is not None:
            self._process.kill()
            self._process.wait()
            self._thread.join()  # it reads to the end what was printed until now
        powers = self._powers
        if not powers:
            return Energy(
                self.scope, self.source, None, seconds, f"tegrastats told no total within {seconds:.3f} s", "tegrastats"
            )
        return Energy(self.scope, self.source, sum(powers) / len(powers) * seconds, seconds)

    def _run(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                stats = parse_tegrastats(line)
                total = total_rails(set(stats.power_w)) if stats else None
                if stats and total:
                    self._powers.append(sum(stats.power_w[rail] for rail in total[1]))


@contextmanager
def measure(meters: Sequence[EnergyMeter]) -> Iterator[list[Energy]]:
    """Measure a block: the list that it gives is filled when the block ends, one entry for each meter."""
    readings: list[Energy] = []
    started: list[EnergyMeter] = []
    try:
        for meter in meters:
            meter.start()
            started.append(meter)
        yield readings
    finally:
        readings.extend(meter.stop() for meter in started)


def open_meters(root: Path = Path("/"), tegrastats: Sequence[str] = TEGRASTATS) -> list[EnergyMeter]:
    """Every meter of this machine, those that may not be read with the reason; at least one that says there is none."""
    found = [meter for meter in (_rapl(root), _nvml(root), _jetson(root, tegrastats)) if meter is not None]
    return found or [Unreadable("machine", "none", "no RAPL, no NVIDIA GPU and no INA3221 monitor is there")]


def _rapl(root: Path) -> EnergyMeter | None:
    """All sockets. Cores and memory are zones within packages, psys is around them: adding those would count twice."""
    zones = [
        zone
        for zone in in_order(root / "sys/class/powercap", "intel-rapl:*")
        if (read_text(zone / "name") or "").startswith("package-")
    ]
    if not zones:
        return None
    source = f"RAPL {' + '.join(read_text(zone / 'name') or '' for zone in zones)}"
    for zone in zones:
        try:
            (zone / "energy_uj").read_bytes()
        except OSError as error:
            reason = f"{zone / 'energy_uj'}: {error.strerror}"
            return Unreadable("cpu", source, reason, "sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj")

    def gauge(zone: Path) -> CounterGauge:
        return CounterGauge(lambda: read_int(zone / "energy_uj"), 1e-6, read_int(zone / "max_energy_range_uj"))

    return SampledMeter("cpu", source, lambda: [gauge(zone) for zone in zones], COUNTER_PERIOD_S)


def _nvml(root: Path) -> EnergyMeter | None:
    """The energy counter (Volta and later), or else power samples; None where there is no GPU with NVML."""
    try:
        gpu = open_gpu()
    except MachineError as error:
        if (root / "proc/driver/nvidia/version").exists():
            return Unreadable("gpu", "NVML", str(error), error.hint)
        return None
    if gpu.read("TotalEnergyConsumption") is not None:
        return SampledMeter("gpu", "NVML energy", lambda: [_energy_of(gpu)], COUNTER_PERIOD_S)
    if gpu.read("PowerUsage") is not None:
        return SampledMeter("gpu", "NVML power", lambda: [_power_of(gpu)], POWER_PERIOD_S)
    return Unreadable("gpu", "NVML", f"{gpu.read('Name')} tells neither energy nor power")


def _energy_of(gpu: Gpu) -> CounterGauge:
    """In millijoules since the driver was loaded."""
    return CounterGauge(lambda: gpu.read("TotalEnergyConsumption"), 1e-3)


def _power_of(gpu: Gpu) -> PowerGauge:
    def watts() -> float | None:
        milliwatts = gpu.read("PowerUsage")
        return None if milliwatts is None else milliwatts / 1000

    return PowerGauge(watts)


def _jetson(root: Path, tegrastats: Sequence[str]) -> EnergyMeter | None:
    rails = _rails(root)
    total = total_rails(set(rails))
    if total is not None:
        scope, names = total
        chosen = [rails[name] for name in names]
        source = f"INA {' + '.join(names)}"
        return SampledMeter(scope, source, lambda: [PowerGauge(rail) for rail in chosen], POWER_PERIOD_S)
    if "jetson" not in (read_text(root / "proc/device-tree/model") or "").lower():
        return None
    if shutil.which(tegrastats[0]):
        return TegrastatsMeter(tegrastats)
    known = f"the rails {', '.join(sorted(rails))} make no known total" if rails else "no INA3221 monitor is readable"
    return Unreadable("module", "INA3221", known, "grep . /sys/class/hwmon/hwmon*/in*_label")


def _rails(root: Path) -> dict[str, Callable[[], float | None]]:
    """Power in watts of each rail by its label. Of INA3221's inputs 4 to 7 are shunts and have no current of their own.

    INA238, which monitors all of Thor's board, has one rail and computes its power itself.
    """
    found: dict[str, Callable[[], float | None]] = {}
    for monitor in in_order(root / "sys/class/hwmon", "hwmon*"):
        if not (read_text(monitor / "name") or "").startswith("ina"):
            continue
        for label in in_order(monitor, "in?_label"):
            number = label.name[2]
            if (monitor / f"curr{number}_input").exists():
                found[read_text(label) or ""] = _volts_times_amperes(monitor, number)
        if (board := read_text(monitor / "label")) and (monitor / "power1_input").exists():
            found[board] = _own_power(monitor)
    return found


def _volts_times_amperes(monitor: Path, number: str) -> Callable[[], float | None]:
    def watts() -> float | None:
        millivolts, milliamperes = (read_int(monitor / f"{kind}{number}_input") for kind in ("in", "curr"))
        return None if millivolts is None or milliamperes is None else millivolts * milliamperes / 1e6

    return watts


def _own_power(monitor: Path) -> Callable[[], float | None]:
    def watts() -> float | None:
        microwatts = read_int(monitor / "power1_input")
        return None if microwatts is None else microwatts / 1e6

    return watts
