"""What happened to a machine between two states that makes figures doubtful, and the command that helps."""

from __future__ import annotations

from dataclasses import dataclass

from pixtral_runtime.device.cpu_time import OtherLoad, other_load
from pixtral_runtime.device.state import DeviceState

CLOCK_MOVED_SHARE = 0.02  # of a clock: one that is locked does not
CLOCK_FELL_SHARE = 0.1
NEAR_LIMIT_C = 5
OTHER_LOAD_SHARE = 0.05  # of all CPUs
STOLEN_SHARE = 0.01


@dataclass(frozen=True)
class StateWarning:
    """What makes figures doubtful, and the command or the deed that helps."""

    text: str
    remedy: str


def state_warnings(before: DeviceState, after: DeviceState) -> list[StateWarning]:
    """Why figures measured between two states may not be reproducible; nothing is said of what is not readable."""
    return [
        *_mode_warnings(after),
        *_clock_warnings(before, after),
        *_throttle_warnings(before, after),
        *_heat_warnings(after),
        *_load_warnings(before, after),
    ]


def _mode_warnings(state: DeviceState) -> list[StateWarning]:
    mode = state.power_mode
    if mode is None or mode.is_fastest:
        return []
    return [StateWarning(f"power mode {mode.name} caps the clocks", _lock(state, "cpu"))]


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


def _clock_warnings(before: DeviceState, after: DeviceState) -> list[StateWarning]:
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
            found.append(StateWarning(f"the {name}'s clock is not locked{governor}", remedy))
        if not first.current_hz or not last.current_hz:
            continue
        change = last.current_hz / first.current_hz - 1
        from_to = f"from {first.current_hz / 1e6:.0f} to {last.current_hz / 1e6:.0f} MHz during the run"
        if change < -CLOCK_FELL_SHARE:
            slowed = "let the device cool, then measure again" if last.locked else remedy
            found.append(StateWarning(f"the {name}'s clock fell {from_to}", slowed))
        elif last.locked is None and abs(change) > CLOCK_MOVED_SHARE:  # NVML does not tell whether a clock is locked
            found.append(StateWarning(f"the {name}'s clock went {from_to}: it is not locked", remedy))
    return found


def _throttle_warnings(before: DeviceState, after: DeviceState) -> list[StateWarning]:
    counted = {name: count - before.throttle_counts.get(name, count) for name, count in after.throttle_counts.items()}
    reasons = {name for name, more in counted.items() if more > 0} | {
        *(before.throttling or ()),
        *(after.throttling or ()),
    }
    return [StateWarning(f"slowed down: {reason}", _throttle_remedy(reason, after)) for reason in sorted(reasons)]


def _throttle_remedy(reason: str, state: DeviceState) -> str:
    if "voltage" in reason or "current" in reason:
        return "a stronger power supply, or a lower power mode: sudo nvpmodel -m <mode>"
    if "power" in reason:
        return "a clock it can hold: sudo nvidia-smi -lgc <MHz>; its power limits: nvidia-smi -q -d POWER"
    return "full fan, sudo jetson_clocks --fan" if state.is_jetson else "more cooling, then measure again"


def _heat_warnings(state: DeviceState) -> list[StateWarning]:
    remedy = "let the device cool, or give it more air, then measure again"
    return [
        StateWarning(f"{hot.name} is at {hot.celsius:.0f} °C, its limit is {hot.limit_celsius:.0f} °C", remedy)
        for hot in state.temperatures
        if hot.limit_celsius is not None and hot.celsius > hot.limit_celsius - NEAR_LIMIT_C
    ]


def _load_warnings(before: DeviceState, after: DeviceState) -> list[StateWarning]:
    load = load_between(before, after)
    if load is None:
        return []
    found = []
    if load.share > OTHER_LOAD_SHARE:
        named = f": {', '.join(load.busiest)}" if load.busiest else ""
        found.append(
            StateWarning(
                f"other programs took {load.share:.0%} of the CPUs{named}", "stop them: ps aux --sort=-pcpu | head"
            )
        )
    if load.stolen > STOLEN_SHARE:
        text = f"other guests of this virtual machine's host took {load.stolen:.0%} of its CPU time"
        found.append(StateWarning(text, "measure on a machine of your own"))
    return found


def load_between(before: DeviceState, after: DeviceState) -> OtherLoad | None:
    """What other programs took of the CPUs between two states; None where it is not readable or the time too short."""
    if before.cpu_time is None or after.cpu_time is None:
        return None
    return other_load(before.cpu_time, after.cpu_time)
