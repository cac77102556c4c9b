"""Joules of a piece of work: CPU packages (RAPL), a GPU (NVML), a Jetson's module (INA3221 monitors or tegrastats).

    with measure_energy(open_meters()) as readings:
        work()
    for energy in readings:
        ...  # energy.joules, or None and energy.reason

Counters are read before and after, and in between often enough to see them wrap. Where there is only power, a thread
samples it and integrates. What a meter covers is its `scope`; scopes may overlap and are not to be added.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from pixtral_runtime.device.jetson import parse_tegrastats, total_rails

TEGRASTATS_COMMAND = ("tegrastats", "--interval", "100")  # milliseconds


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
            return Energy(self.scope, self.source, None, seconds, reason, "measure for 5 seconds or more")
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

    def __init__(self, command: Sequence[str] = TEGRASTATS_COMMAND) -> None:
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
def measure_energy(meters: Sequence[EnergyMeter]) -> Iterator[list[Energy]]:
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
