"""The state of recorded machines, and every warning: where it is due and where it is not."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.machines import L4, machine, plant, pretend_no_nvml, pretend_nvml
from pixtral_runtime.device.clocks import Clock
from pixtral_runtime.device.cpu_time import other_load, read_cpu_time
from pixtral_runtime.device.jetson import parse_nvpmodel
from pixtral_runtime.device.nvml import open_gpu
from pixtral_runtime.device.state import DeviceState, read_state, run_command
from pixtral_runtime.device.state_warnings import StateWarning, load_between, state_warnings
from pixtral_runtime.device.sysfs import int8_sums_saturate
from pixtral_runtime.device.throttling import Temperature
from pixtral_runtime.errors import MachineError

XEON = "Intel(R) Xeon(R) Gold 6226R CPU @ 2.90GHz"
POLICY = "sys/devices/system/cpu/cpufreq/policy2"


@pytest.fixture(autouse=True)
def no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_no_nvml(monkeypatch)


def state_of(root: Path, nvpmodel: str | None = None) -> DeviceState:
    return read_state(root, lambda command: nvpmodel if list(command) == ["nvpmodel", "-q"] else None)


def texts(found: Sequence[StateWarning]) -> list[str]:
    return [warning.text for warning in found]


def test_a_server_with_two_sockets_is_read_from_its_files(tmp_path: Path) -> None:
    state = state_of(machine(tmp_path, "xeon-2s"))
    assert (state.device, state.cpu, state.gpu) == (XEON, XEON, None)
    assert (state.cpu_cores, state.cpu_threads) == (4, 8)
    assert state.cpu_clock == Clock(3_600_000_000, 3_700_000_000, 3_900_000_000, "performance", True)
    assert state.temperatures == (Temperature("x86_pkg_temp", 61, 100),)  # its trip point at 0 is one that is not set
    assert state.throttle_counts == {"CPU core thermal throttling": 6, "CPU package thermal throttling": 56}
    assert state.load_average == (0.52, 0.58, 0.59)


def test_an_amd_cpus_temperature_is_that_of_its_own_monitor(tmp_path: Path) -> None:
    files = {
        "hwmon0/name": "nvme",
        "hwmon0/temp1_input": 40_000,
        "hwmon1/name": "k10temp",
        "hwmon1/temp1_input": 71_500,
    }
    root = plant(tmp_path, {f"sys/class/hwmon/{name}": text for name, text in files.items()})
    assert state_of(root).temperatures == (Temperature("k10temp", 71.5, None),)
    plant(root, {"sys/class/hwmon/hwmon1/temp1_max": 95_000})
    assert state_of(root).temperatures == (Temperature("k10temp", 71.5, 95),)


def test_a_jetson_is_named_after_its_board_and_has_its_power_mode(tmp_path: Path) -> None:
    state = state_of(machine(tmp_path, "orin-nano-super"), "NV Power Mode: 25W\n1\n")
    assert state.device == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    assert (state.driver, state.cuda) == ("R36 (release), REVISION: 4.3", "12.6.11")
    mode = state.power_mode
    assert mode is not None and (mode.name, mode.id, mode.default, mode.fastest_id) == ("25W", 1, "25W", 2)
    assert state.cpu_clock == Clock(960_000_000, 1_344_000_000, 1_728_000_000, "schedutil", False)
    assert state.gpu_clock == Clock(306_000_000, 918_000_000, 1_020_000_000, "nvhost_podgov", False)
    assert state.memory_clock == Clock(None, 2_133_000_000, None, None, None)  # the rate itself is for root alone
    assert [zone.name for zone in state.temperatures] == ["cpu-thermal", "gpu-thermal", "tj-thermal"]  # cv0 sleeps
    assert state.temperatures[0].limit_celsius == 99  # the fan's trip point, at 51, limits nothing
    assert state.throttling == ()
    assert state.throttle_counts == {
        "under-voltage (OC1)": 0,
        "average over-current (OC2)": 15,
        "instantaneous over-current (OC3)": 37,
    }


def test_a_thor_has_its_gpu_under_another_name(tmp_path: Path) -> None:
    state = state_of(machine(tmp_path, "thor"), "NV Power Mode: 120W\n1\n")
    assert state.gpu_clock == Clock(315_000_000, 1_575_000_000, 1_575_000_000, "nvhost_podgov", False)


def test_clocks_that_jetson_clocks_has_locked_are_locked_whatever_the_governor(tmp_path: Path) -> None:
    state = state_of(machine(tmp_path, "agx-orin"), "NV Fan Mode:quiet\nNV Power Mode: MAXN\n0\n")
    assert state.cpu_clock.governor == "schedutil"
    assert (state.cpu_clock.locked, state.gpu_clock.locked, state.memory_clock.locked) == (True, True, True)
    assert state.memory_clock.cap_hz is None  # a cap of 0 is none
    assert state_warnings(state, state) == []


def test_a_gpu_is_read_through_nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_nvml(monkeypatch, L4 | {"CurrentClocksEventReasons": 0x01 | 0x04})
    state = state_of(machine(tmp_path, "xeon-2s"))
    assert (state.device, state.gpu, state.cpu) == ("NVIDIA L4", "NVIDIA L4", XEON)
    assert (state.driver, state.cuda, state.power_limit_w) == ("550.54.15", "12.4", 72)
    assert state.gpu_clock == Clock(1_740_000_000, 2_040_000_000, 2_040_000_000)
    assert state.memory_clock.current_hz == 6_251_000_000
    assert state.throttling == ("GPU power cap",)  # being idle is not
    assert state.temperatures[-1] == Temperature("GPU", 61, 95)


def test_what_a_gpu_does_not_tell_is_none_and_not_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_nvml(monkeypatch, {"Name": "Orin (nvgpu)"})
    state = state_of(tmp_path)
    assert state.gpu == "Orin (nvgpu)"
    assert state.gpu_clock == state.memory_clock == Clock()
    assert (state.power_limit_w, state.throttling, state.temperatures) == (None, None, ())


def test_of_a_machine_that_shows_nothing_nothing_is_made_up(tmp_path: Path) -> None:
    state = state_of(tmp_path)
    found = state.to_dict()
    assert found.pop("clocks_hz") == {"cpu": None, "gpu": None, "memory": None}
    unknown = {name: value for name, value in found.items() if name not in state.versions}
    assert len(unknown) > 20
    assert [name for name, value in unknown.items() if value is not None and value not in ([], {})] == []
    assert state_warnings(state, state) == []


def test_a_state_goes_into_json_with_what_moves_kept_apart(tmp_path: Path) -> None:
    root = machine(tmp_path, "orin-nano-super")
    before = state_of(root, "NV Power Mode: 25W\n1\n").to_dict()
    plant(root, {"proc/loadavg": "3 2 1 1/2 3", "sys/class/thermal/thermal_zone0/temp": 77000})
    after = state_of(root, "NV Power Mode: 15W\n0\n").to_dict()
    assert json.loads(json.dumps(after)) == after
    flat = {name for name in after if not isinstance(after[name], dict | list) and after[name] != before[name]}
    assert flat == {"power_mode"}
    assert after["load_average"] == [3, 2, 1]


def test_this_machine_is_read_without_an_error() -> None:
    state = read_state()
    if Path("/proc/stat").exists():  # else it is not told
        assert state.cpu_threads is not None and state.cpu_threads >= len(os.sched_getaffinity(0))
    assert state.versions["numpy"] == version("numpy")


@pytest.mark.parametrize(
    "query, name, number",
    [
        ("NV Power Mode: MAXN_SUPER\n2\n", "MAXN_SUPER", 2),
        ("NVPM WARN: fan mode is not set!\nNV Power Mode: 15W\n0\n", "15W", 0),
        ("NV Fan Mode:quiet\nNV Power Mode: MODE_30W\n2\n", "MODE_30W", 2),
        ("NV Power Mode: MAXN", "MAXN", None),
    ],
)
def test_nvpmodel_says_the_mode_among_other_lines(query: str, name: str, number: int | None) -> None:
    mode = parse_nvpmodel(query, None)
    assert mode is not None and (mode.name, mode.id) == (name, number)
    assert mode.is_fastest == name.startswith("MAXN")


def test_a_board_with_a_mode_above_maxn_is_not_at_its_fastest_in_maxn() -> None:
    conf = "< POWER_MODEL ID=0 NAME=MAXN_SUPER >\n< POWER_MODEL ID=4 NAME=MAXN >\n< PM_CONFIG DEFAULT=4 >"
    mode = parse_nvpmodel("NV Power Mode: MAXN\n4\n", conf)
    assert mode is not None and (mode.is_fastest, mode.fastest_id, mode.default) == (False, 0, "MAXN")


def test_where_nvpmodel_cannot_run_its_status_tells_the_mode(tmp_path: Path) -> None:
    mode = state_of(machine(tmp_path, "orin-nano-super")).power_mode
    assert mode is not None and (mode.name, mode.id) == ("25W", 1)
    assert parse_nvpmodel("NVPM ERROR: no root", None, None) is None


def test_a_command_that_is_absent_or_fails_gives_none() -> None:
    assert run_command(["echo", "15W"]) == "15W\n"
    assert run_command(["false"]) is None
    assert run_command(["nvpmodel-that-is-not-there"]) is None


def test_without_nvidia_ml_py_the_error_says_how_to_get_it() -> None:
    with pytest.raises(MachineError, match="nvidia-ml-py") as caught:
        open_gpu()
    assert caught.value.hint == "pip install 'pixtral[bench]'"


def test_the_gpu_is_the_first_that_cuda_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_nvml(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert open_gpu()._handle == "gpu 3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(MachineError, match="names no GPU"):
        open_gpu()


# --- warnings


def test_a_quiet_server_with_locked_clocks_gets_no_warning(tmp_path: Path) -> None:
    state = state_of(machine(tmp_path, "xeon-2s"))
    assert state_warnings(state, state) == []


def test_one_cpu_with_another_governor_is_a_warning_with_the_command(tmp_path: Path) -> None:
    root = plant(machine(tmp_path, "xeon-2s"), {f"{POLICY}/scaling_governor": "powersave"})
    state = state_of(root)
    (warning,) = state_warnings(state, state)
    assert warning.text == "the CPU's clock is not locked (governor performance, powersave)"
    assert warning.remedy == "sudo cpupower frequency-set -g performance"


def test_a_capped_power_mode_names_the_fastest_mode_of_this_board(tmp_path: Path) -> None:
    """Mode 0 of an Orin Nano Super is 15 W: the customary -m 0 would make it slower."""
    state = state_of(machine(tmp_path, "orin-nano-super"), "NV Power Mode: 25W\n1\n")
    found = state_warnings(state, state)
    assert found[0] == StateWarning("power mode 25W caps the clocks", "sudo nvpmodel -m 2 && sudo jetson_clocks")
    assert texts(found)[1:] == [
        "the CPU's clock is not locked (governor schedutil)",
        "the GPU's clock is not locked (governor nvhost_podgov)",
    ]


def test_in_the_fastest_mode_jetson_clocks_alone_is_the_remedy(tmp_path: Path) -> None:
    state = state_of(machine(tmp_path, "orin-nano-super"), "NV Power Mode: MAXN_SUPER\n2\n")
    assert {warning.remedy for warning in state_warnings(state, state)} == {"sudo jetson_clocks"}


def test_a_gpu_clock_that_moves_during_a_run_is_not_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = machine(tmp_path, "xeon-2s")
    pretend_nvml(monkeypatch, L4 | {"ClockInfo": {"NVML_CLOCK_SM": 210, "NVML_CLOCK_MEM": 6251}})
    before = state_of(root)
    pretend_nvml(monkeypatch)
    after = state_of(root)
    (warning,) = state_warnings(before, after)
    assert warning.text == "the GPU's clock went from 210 to 1740 MHz during the run: it is not locked"
    assert warning.remedy == "sudo nvidia-smi -lgc 2040"
    assert state_warnings(after, after) == []


@pytest.mark.parametrize("fraction, warns", [(0.85, True), (0.95, False)])
def test_a_locked_clock_that_falls_all_the_same_is_a_warning(tmp_path: Path, fraction: float, warns: bool) -> None:
    before = state_of(machine(tmp_path, "xeon-2s"))
    fallen = replace(before.cpu_clock, current_hz=int(3_600_000_000 * fraction))
    found = state_warnings(before, replace(before, cpu_clock=fallen))
    assert texts(found) == (["the CPU's clock fell from 3600 to 3060 MHz during the run"] if warns else [])
    assert not warns or found[0].remedy == "let the device cool, then measure again"


def test_throttling_counted_during_the_run_is_a_warning_and_older_is_not(tmp_path: Path) -> None:
    root = machine(tmp_path, "xeon-2s")
    before = state_of(root)
    plant(root, {"sys/devices/system/cpu/cpu4/thermal_throttle/core_throttle_count": 4})
    (warning,) = state_warnings(before, state_of(root))
    assert (warning.text, warning.remedy) == (
        "slowed down: CPU core thermal throttling",
        "more cooling, then measure again",
    )


def test_a_jetsons_over_current_events_and_alerts_are_warnings(tmp_path: Path) -> None:
    root = machine(tmp_path, "agx-orin")
    before = state_of(root)
    events = {"sys/class/hwmon/hwmon2/oc3_event_cnt": 4, "sys/class/thermal/cooling_device1/cur_state": 1}
    heat, current = sorted(state_warnings(before, state_of(plant(root, events))), key=lambda warning: warning.text)
    assert (heat.text, heat.remedy) == (
        "slowed down: GPU thermal throttling",
        "full fan, sudo jetson_clocks --fan",
    )
    assert current.text == "slowed down: instantaneous over-current (OC3)"
    assert "power supply" in current.remedy


def test_a_gpus_time_under_its_power_cap_counts_even_if_it_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def state(power_ns: int) -> DeviceState:
        times = {"NVML_PERF_POLICY_POWER": power_ns, "NVML_PERF_POLICY_THERMAL": 900}
        found = {name: SimpleNamespace(violationTime=value) for name, value in times.items()}
        pretend_nvml(monkeypatch, L4 | {"ViolationStatus": found})
        return state_of(tmp_path)

    (warning,) = state_warnings(state(5_000_000), state(9_000_000))
    assert warning.text == "slowed down: GPU power cap" and "-lgc" in warning.remedy
    assert state_warnings(state(5_000_000), state(5_000_000)) == []


@pytest.mark.parametrize("millidegrees, warns", [(95_500, True), (94_500, False)])
def test_a_temperature_within_five_degrees_of_its_limit_is_a_warning(
    tmp_path: Path, millidegrees: int, warns: bool
) -> None:
    root = plant(machine(tmp_path, "xeon-2s"), {"sys/class/thermal/thermal_zone0/temp": millidegrees})
    state = state_of(root)
    expected = ["x86_pkg_temp is at 96 °C, its limit is 100 °C"] if warns else []
    assert texts(state_warnings(state, state)) == expected


# --- other load; ticks are hundredths of a second


def cpu_line(user: int, idle: int, stolen: int = 0) -> str:
    return "\n".join([f"cpu  {user} 0 1600 {idle} 0 0 0 {stolen} 0 0", *(f"cpu{i} 1 0 0 1 0 0 0 0" for i in range(8))])


def process(pid: int, name: str, parent: int, user: int) -> dict[str, str]:
    return {f"proc/{pid}/stat": f"{pid} ({name}) R {parent} 1 1 0 -1 0 0 0 0 0 {user} 0 0 0 20 0 1 0 1 1 1"}


def loaded(root: Path, changes: dict[str, str]) -> list[StateWarning]:
    machine(root, "xeon-2s")
    before = state_of(root)
    return state_warnings(before, state_of(plant(root, changes)))


def test_what_other_programs_took_during_the_run_is_a_warning_that_names_them(tmp_path: Path) -> None:
    changes = {"proc/stat": cpu_line(8000 + 400, 64000 + 400)} | process(200, "chrome", 1, 400 + 60)
    (warning,) = loaded(tmp_path, changes)  # one second of eight CPUs
    assert warning.text == "other programs took 50% of the CPUs: chrome (40% of one)"
    assert warning.remedy == "stop them: ps aux --sort=-pcpu | head"


def test_own_work_and_that_of_own_workers_is_not_other_load(tmp_path: Path) -> None:
    own = "100 (pixtral) S 1 1 1 0 -1 0 0 0 0 0 800 100 0 0 20 0 1 0 1 1 1"  # 300 more
    changes = {"proc/stat": cpu_line(8000 + 400, 64000 + 400), "proc/self/stat": own}
    assert loaded(tmp_path, changes | process(101, "python3 (worker)", 100, 50 + 100)) == []


def test_time_that_a_virtual_machines_host_gave_away_is_a_warning(tmp_path: Path) -> None:
    (warning,) = loaded(tmp_path, {"proc/stat": cpu_line(8000, 64000 + 760, stolen=40)})
    assert warning.text == "other guests of this virtual machine's host took 5% of its CPU time"


def test_load_is_not_told_from_less_time_than_the_kernel_can_tell(tmp_path: Path) -> None:
    root = machine(tmp_path, "xeon-2s")
    before = state_of(root)
    after = state_of(plant(root, {"proc/stat": cpu_line(8000 + 80, 64000)}))
    assert load_between(before, after) is None
    assert load_between(state_of(tmp_path / "nothing"), after) is None


def test_this_process_burning_cpu_is_not_taken_for_others() -> None:
    """Whatever else runs here: what this process burns must be in its own time, and not in that of others."""
    before = read_cpu_time(Path("/"))
    if before is None:
        pytest.skip("/proc is not readable here")
    ended = threading.Event()
    threading.Timer(0.3, ended.set).start()
    from_s = time.process_time()
    while not ended.is_set():
        pass
    burnt_s = time.process_time() - from_s
    after = read_cpu_time(Path("/"))
    assert after is not None
    assert after.own_s - before.own_s == pytest.approx(burnt_s, abs=0.1)  # seen 0.01
    assert os.getpid() not in after.others
    load = other_load(before, after)
    assert load is None or 0 <= load.share <= 1


@pytest.mark.parametrize(
    ("flags", "saturate"),
    [
        ("fpu sse4_2 avx avx2 fma", True),
        ("fpu avx2 avx512f avx512bw", True),
        ("fpu avx2 avx512f avx512_vnni", False),
        ("fpu avx2 avx_vnni", False),
        ("fp asimd", False),
        ("", False),
    ],
)
def test_processors_whose_int8_sums_saturate(tmp_path: Path, flags: str, saturate: bool) -> None:
    plant(tmp_path, {"proc/cpuinfo": f"processor : 0\nflags : {flags}"})
    assert int8_sums_saturate(tmp_path) is saturate
