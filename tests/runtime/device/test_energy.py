"""Meters on recorded machines: wrap-around, sockets, rails, missing permission, and counters that stand still."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.machines import L4, machine, plant, pretend_no_nvml, pretend_nvml, tegrastats_lines
from pixtral_runtime.device.energy import (
    CounterGauge,
    Energy,
    EnergyMeter,
    PowerGauge,
    SampledMeter,
    TegrastatsMeter,
    measure_energy,
)
from pixtral_runtime.device.energy_meters import open_meters
from pixtral_runtime.device.jetson import parse_tegrastats, total_rails

RANGE_UJ = 262_143_328_850
ZONES = "sys/class/powercap/intel-rapl"
ABSENT = ("no-tegrastats-here",)
TIMEOUT_S = 20
INA238 = {"name": "ina238", "label": "VIN", "in1_input": 19900, "curr1_input": 994, "power1_input": 19_780_000}


@pytest.fixture(autouse=True)
def no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_no_nvml(monkeypatch)


def reader(*values: float | None) -> Callable[[], float | None]:
    rest: Iterator[float | None] = iter(values)
    return lambda: next(rest)


def counter(*values: int | None) -> Callable[[], int | None]:
    rest: Iterator[int | None] = iter(values)
    return lambda: next(rest)


def only(meters: list[EnergyMeter]) -> EnergyMeter:
    (meter,) = meters
    return meter


def energy_of(root: Path, meanwhile: Callable[[], object] = lambda: None) -> Energy:
    with measure_energy(open_meters(root, ABSENT)) as readings:
        meanwhile()
    (energy,) = readings
    return energy


def test_a_counter_that_wraps_goes_on() -> None:
    gauge = CounterGauge(counter(RANGE_UJ - 2_000_000, 1_000_000, 1_500_000), 1e-6, RANGE_UJ)
    assert [gauge.sample(0), gauge.sample(1), gauge.sample(2)] == [True, True, True]
    assert gauge.joules == pytest.approx(3.5)


def test_a_counter_without_a_range_that_falls_has_failed() -> None:
    gauge = CounterGauge(counter(5000, 10), 1e-3)
    assert [gauge.sample(0), gauge.sample(1)] == [True, False]


def test_power_is_integrated_over_uneven_steps() -> None:
    gauge = PowerGauge(reader(10.0, 20.0, 20.0))
    for now_s in (5.0, 6.0, 9.0):
        gauge.sample(now_s)
    assert gauge.joules == 15 + 60


def test_both_sockets_count_once_and_the_zones_in_and_around_them_do_not(tmp_path: Path) -> None:
    root = machine(tmp_path, "xeon-2s")
    work = {f"{ZONES}:{zone}/energy_uj": 90_000_000_000 for zone in ("0:0", "1:0", "2")}  # memory and psys
    work |= {f"{ZONES}:0/energy_uj": 52_649_883_221 + 4_000_000, f"{ZONES}:1/energy_uj": 1_000_000}  # the second wraps
    energy = energy_of(root, lambda: plant(root, work))
    assert (energy.scope, energy.source) == ("cpu", "RAPL package-0 + package-1")
    assert energy.joules == pytest.approx(4 + 3)
    assert energy.watts == pytest.approx(7 / energy.seconds)


def test_a_meter_can_be_used_again(tmp_path: Path) -> None:
    root = machine(tmp_path, "xeon-2s")
    meter = only(open_meters(root, ABSENT))
    for joules in (2, 5):
        meter.start()
        at = int((root / f"{ZONES}:0/energy_uj").read_text())
        plant(root, {f"{ZONES}:0/energy_uj": at + joules * 1_000_000})
        assert meter.stop().joules == pytest.approx(joules)


def test_counters_that_this_user_may_not_read_say_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = machine(tmp_path, "xeon-2s")
    secret, read = root / f"{ZONES}:1/energy_uj", Path.read_bytes

    def refuse(path: Path) -> bytes:  # root, who runs the tests in containers, may read a file of any mode
        if path == secret:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    energy = energy_of(root)
    assert energy.joules is None and energy.watts is None
    assert energy.reason == f"{secret}: Permission denied"
    assert energy.remedy == "sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj"


def test_a_counter_that_stands_still_is_not_zero_joules(tmp_path: Path) -> None:
    energy = energy_of(machine(tmp_path, "xeon-2s"))
    assert energy.joules is None
    assert "did not move" in energy.reason and "seconds" in energy.remedy


def test_a_counter_that_goes_away_meanwhile_is_not_readable(tmp_path: Path) -> None:
    root = machine(tmp_path, "xeon-2s")
    energy = energy_of(root, (root / f"{ZONES}:1/energy_uj").unlink)
    assert energy.joules is None and "stopped to be readable" in energy.reason


def test_a_machine_without_any_meter_says_so(tmp_path: Path) -> None:
    energy = energy_of(tmp_path)
    assert energy.joules is None
    assert energy.reason == "no RAPL, no NVIDIA GPU and no INA3221 monitor is there"


def test_a_gpus_energy_counter_is_in_millijoules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter((5_000_000, 5_000_000, 5_012_500))  # is it there, start, stop
    pretend_nvml(monkeypatch, L4 | {"TotalEnergyConsumption": lambda: next(ticks)})
    energy = energy_of(tmp_path)
    assert (energy.scope, energy.source, energy.joules) == ("gpu", "NVML energy", 12.5)


def test_a_gpu_without_a_counter_has_its_power_integrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_nvml(monkeypatch, L4 | {"TotalEnergyConsumption": None})
    energy = energy_of(tmp_path)
    assert (energy.scope, energy.source) == ("gpu", "NVML power")
    assert energy.watts == pytest.approx(60)


def test_a_gpu_that_nothing_can_be_asked_of_is_named_with_the_remedy(tmp_path: Path) -> None:
    plant(tmp_path, {"proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15"})
    energy = energy_of(tmp_path)
    assert energy.joules is None and (energy.scope, energy.remedy) == ("gpu", "pip install 'pixtral[bench]'")


@pytest.mark.parametrize(
    "name, source, watts",
    [
        ("orin-nano-super", "INA VDD_IN", 4.984 * 1.856),
        ("agx-orin", "INA VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0", 19 * 0.123 + 19 * 0.02 + 5 * 0.805),
        ("thor", "INA VDD_GPU + VDD_CPU_SOC_MSS + VIN_SYS_5V0", 19.6 * 0.1 + 19.6 * 0.3 + 5 * 1.127),
    ],
)
def test_a_jetsons_module_is_the_sum_of_the_rails_that_do_not_overlap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str, watts: float
) -> None:
    monkeypatch.setattr("pixtral_runtime.device.energy_meters.POWER_PERIOD_S", TIMEOUT_S)
    energy = energy_of(machine(tmp_path, name))
    assert (energy.scope, energy.source) == ("module", source)
    assert energy.watts == pytest.approx(watts)


def test_a_board_with_nothing_but_its_input_monitored_is_measured_there(tmp_path: Path) -> None:
    plant(tmp_path, {f"sys/class/hwmon/hwmon1/{name}": text for name, text in INA238.items()})
    energy = energy_of(tmp_path)
    assert (energy.scope, energy.source) == ("board", "INA VIN")
    assert energy.watts == pytest.approx(19.78)


def test_a_jetson_without_readable_rails_says_where_to_look(tmp_path: Path) -> None:
    plant(tmp_path, {"proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit"})
    energy = energy_of(tmp_path)
    assert energy.joules is None and energy.scope == "module"
    assert energy.reason == "no INA3221 monitor is readable"


def test_a_thread_samples_while_work_is_done_and_ends_with_it() -> None:
    sampled = threading.Event()
    calls: list[int] = []

    def watts() -> float:
        calls.append(threading.get_ident())
        if len(calls) >= 5:
            sampled.set()
        return 10.0

    meter = SampledMeter("module", "test", lambda: [PowerGauge(watts)], 0.001)
    with measure_energy([meter]) as readings:
        assert sampled.wait(TIMEOUT_S)
    assert len(set(calls)) == 2
    assert readings[0].watts == pytest.approx(10)
    assert not [thread for thread in threading.enumerate() if thread.name == "energy of module"]


def sampling_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("energy of")]


def test_meters_stop_where_the_work_fails(tmp_path: Path) -> None:
    def fail() -> None:
        assert sampling_threads() == ["energy of module"]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), measure_energy(open_meters(machine(tmp_path, "orin-nano-super"), ABSENT)):
        fail()
    assert sampling_threads() == []


# --- tegrastats


def test_tegrastats_of_an_orin_nano() -> None:
    stats = parse_tegrastats(tegrastats_lines()["orin-nano-jetpack6-root"])
    assert stats is not None
    assert (stats.ram_used_bytes, stats.ram_total_bytes) == (6185 << 20, 7620 << 20)
    assert stats.cpu_loads == (0.15, 0.11, 0.14, 0.13, 0.11, 0.08)
    assert set(stats.cpu_clocks_hz) == {729_000_000}
    assert (stats.memory_load, stats.memory_clock_hz) == (0.43, 2_133_000_000)
    assert (stats.gpu_load, stats.gpu_clock_hz) == (0.63, 621_000_000)
    assert stats.temperatures_c["tj"] == 53.968 and len(stats.temperatures_c) == 6
    assert stats.power_w == {"VDD_IN": 12.479, "VDD_CPU_GPU_CV": 4.667, "VDD_SOC": 2.817}


def test_tegrastats_without_root_has_no_clock_of_gpu_and_memory() -> None:
    stats = parse_tegrastats(tegrastats_lines()["orin-nano-jetpack6"])
    assert stats is not None
    assert (stats.gpu_load, stats.gpu_clock_hz, stats.memory_load, stats.memory_clock_hz) == (0, None, None, None)
    assert stats.power_w["VDD_IN"] == 4.046  # of the moment, not the mean beside it


def test_tegrastats_of_a_thor_has_clocks_without_a_load() -> None:
    stats = parse_tegrastats(tegrastats_lines()["thor-jetpack7-root"])
    assert stats is not None
    assert (stats.gpu_load, stats.gpu_clock_hz) == (None, 314_000_000)
    assert stats.power_w == {"VDD_GPU": 1.962, "VDD_CPU_SOC_MSS": 5.887, "VIN_SYS_5V0": 5.635, "VIN": 19.78}


def test_tegrastats_leaves_out_what_is_off_and_what_is_not_connected() -> None:
    stats = parse_tegrastats(tegrastats_lines()["agx-orin-jetpack5"])
    assert stats is not None
    assert "GPU" not in stats.temperatures_c and stats.temperatures_c["SOC2"] == 40.093  # GPU@-256C
    assert stats.gpu_clock_hz is None  # asleep at [0,0]
    assert set(stats.power_w) == {"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"}
    stats = parse_tegrastats(tegrastats_lines()["orin-nx-jetpack7"])
    assert stats is not None
    assert stats.cpu_loads == (0.55, 0.09, 0.24, 0.64, None, None, 0, 0)
    assert stats.power_w == {"VDD_IN": 7.28}  # mean and maximum beside it
    assert stats.temperatures_c["tj"] == 59.687


@pytest.mark.parametrize("name", tegrastats_lines())
def test_every_recorded_line_has_a_total(name: str) -> None:
    stats = parse_tegrastats(tegrastats_lines()[name])
    assert stats is not None
    total = total_rails(set(stats.power_w))
    assert total is not None and total[0] == "module"
    assert 1 < sum(stats.power_w[rail] for rail in total[1]) < 75


def test_what_is_no_line_of_tegrastats_is_none() -> None:
    assert parse_tegrastats("tegrastats: command not found") is None


def test_tegrastats_is_started_read_and_ended(tmp_path: Path) -> None:
    printed = tmp_path / "printed"
    os.mkfifo(printed)
    line = tegrastats_lines()["orin-nano-jetpack6-root"]
    name = repr(str(printed))
    script = f"print({line!r}); print('noise', flush=True); open({name}, 'w').close(); open({name}).read()"
    meter = TegrastatsMeter((sys.executable, "-c", script))
    with measure_energy([meter]) as readings:
        printed.read_bytes()  # comes back when the script has printed
        assert "tegrastats" in {thread.name for thread in threading.enumerate()}
    assert (readings[0].scope, readings[0].source) == ("module", "tegrastats")
    assert readings[0].watts == pytest.approx(12.479)
    assert not [thread for thread in threading.enumerate() if thread.name == "tegrastats"]


def test_a_tegrastats_that_is_not_there_is_not_readable() -> None:
    meter = TegrastatsMeter(ABSENT)
    meter.start()
    energy = meter.stop()
    assert energy.joules is None and "no total" in energy.reason
