"""What slows a device down: throttling that is on or was counted, and temperatures with their limits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pixtral_runtime.device.nvml import Gpu
from pixtral_runtime.device.sysfs import in_order, read_int, read_text

# NVML's clock event reasons that mean slower than asked for; not idle (1), nor clocks that the user set (2)
SLOWDOWNS = {
    0x04: "GPU power cap",
    0x08: "GPU hardware slowdown",
    0x20: "GPU thermal slowdown by the driver",
    0x40: "GPU thermal slowdown by the hardware",
    0x80: "GPU power brake",
}
VIOLATIONS = {"NVML_PERF_POLICY_POWER": "GPU power cap", "NVML_PERF_POLICY_THERMAL": "GPU thermal slowdown"}
# Jetson Linux developer guide, "Jetson Orin", over-current throttling
OVER_CURRENT = {1: "under-voltage", 2: "average over-current", 3: "instantaneous over-current"}
TRIPS = ("passive", "hot", "critical")  # from the first on, the kernel slows or stops the device


@dataclass(frozen=True)
class Temperature:
    """A sensor, and where it makes the device slow down or stop."""

    name: str
    celsius: float
    limit_celsius: float | None = None


def read_throttling(root: Path, gpu: Gpu | None) -> tuple[tuple[str, ...] | None, dict[str, int]]:
    """What slows the device now, None where nothing tells; and counts of what did so: events, or nanoseconds."""
    flags: dict[str, bool] = {}
    counts: dict[str, int] = {}
    for kind in ("core", "package"):
        pattern = f"cpu[0-9]*/thermal_throttle/{kind}_throttle_count"
        found = [read_int(path) for path in (root / "sys/devices/system/cpu").glob(pattern)]
        if known := [count for count in found if count is not None]:
            counts[f"CPU {kind} thermal throttling"] = sum(known)
    for alert in in_order(root / "sys/class/thermal", "cooling_device*"):
        name, state = read_text(alert / "type") or "", read_int(alert / "cur_state")
        if name.endswith("-throttle-alert") and state is not None:
            flags[f"{name.removesuffix('-throttle-alert').upper()} thermal throttling"] = state > 0
    for monitor in in_order(root / "sys/class/hwmon", "hwmon*"):
        for number, event in OVER_CURRENT.items():
            if (count := read_int(monitor / f"oc{number}_event_cnt")) is not None:
                counts[f"{event} (OC{number})"] = count
    if gpu is not None:
        reasons = gpu.read("CurrentClocksEventReasons")
        reasons = gpu.read("CurrentClocksThrottleReasons") if reasons is None else reasons
        if reasons is not None:
            flags |= {name: bool(reasons & bit) for bit, name in SLOWDOWNS.items()}
        for policy, name in VIOLATIONS.items():
            violation = gpu.read("ViolationStatus", gpu.number(policy))
            if violation is not None:
                counts[name] = int(violation.violationTime)
    return tuple(name for name, is_on in flags.items() if is_on) if flags else None, counts


def read_temperatures(root: Path, gpu: Gpu | None) -> tuple[Temperature, ...]:
    """Every sensor that answers, in degrees Celsius."""
    return (*_zones(root), *_nvml(gpu))


def _zones(root: Path) -> list[Temperature]:
    """Thermal zones, in millidegrees; a Jetson's GPU has none while it sleeps. AMD's CPUs are in hwmon instead."""
    found = []
    for zone in in_order(root / "sys/class/thermal", "thermal_zone*"):
        reading = read_int(zone / "temp")
        limits = (
            read_int(trip.with_name(trip.name.replace("_type", "_temp")))
            for trip in zone.glob("trip_point_*_type")
            if read_text(trip) in TRIPS
        )
        limit = min((value for value in limits if value is not None and value > 0), default=None)
        if reading is not None:
            found.append(_temperature(read_text(zone / "type") or zone.name, reading, limit))
    for monitor in in_order(root / "sys/class/hwmon", "hwmon*"):
        reading = read_int(monitor / "temp1_input")
        if read_text(monitor / "name") == "k10temp" and reading is not None:
            found.append(_temperature("k10temp", reading, read_int(monitor / "temp1_max")))
    return found


def _temperature(name: str, reading: int, limit: int | None) -> Temperature:
    return Temperature(name, reading / 1000, None if limit is None else limit / 1000)


def _nvml(gpu: Gpu | None) -> list[Temperature]:
    if gpu is None or (reading := gpu.read("Temperature", gpu.number("NVML_TEMPERATURE_GPU"))) is None:
        return []
    limit = gpu.read("TemperatureThreshold", gpu.number("NVML_TEMPERATURE_THRESHOLD_SLOWDOWN"))
    return [Temperature("GPU", float(reading), None if limit is None else float(limit))]
