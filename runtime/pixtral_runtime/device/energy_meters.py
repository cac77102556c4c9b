"""The energy meters of this machine: CPU packages (RAPL), an NVIDIA GPU (NVML), a Jetson's module."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from pixtral_runtime.device.energy import (
    TEGRASTATS_COMMAND,
    CounterGauge,
    EnergyMeter,
    PowerGauge,
    SampledMeter,
    TegrastatsMeter,
    Unreadable,
)
from pixtral_runtime.device.jetson import total_rails
from pixtral_runtime.device.nvml import Gpu, open_gpu
from pixtral_runtime.device.sysfs import SYSTEM, in_order, jetson_model, read_int, read_text
from pixtral_runtime.errors import MachineError

COUNTER_PERIOD_S = 10.0  # AMD's RAPL counters wrap after 65 kJ

POWER_PERIOD_S = 0.05


def open_meters(root: Path = SYSTEM, tegrastats: Sequence[str] = TEGRASTATS_COMMAND) -> list[EnergyMeter]:
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
    if jetson_model(root) is None:
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
