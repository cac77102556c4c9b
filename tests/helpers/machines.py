"""Machines for tests: trees of /proc and /sys from `data/device_state`, and an NVML with recorded answers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.places import DATA

STATES = DATA / "device_state"
# An L4 under load, as nvidia-smi -q shows it
L4: dict[str, Any] = {
    "Name": "NVIDIA L4",
    "EnforcedPowerLimit": 72_000,  # milliwatts
    "ClockInfo": {"NVML_CLOCK_SM": 1740, "NVML_CLOCK_MEM": 6251},  # megahertz
    "MaxClockInfo": {"NVML_CLOCK_SM": 2040, "NVML_CLOCK_MEM": 6251},
    "ApplicationsClock": {"NVML_CLOCK_SM": 2040, "NVML_CLOCK_MEM": 6251},
    "CurrentClocksEventReasons": 0,
    "Temperature": {"NVML_TEMPERATURE_GPU": 61},
    "TemperatureThreshold": {"NVML_TEMPERATURE_THRESHOLD_SLOWDOWN": 95},
    "ViolationStatus": {
        "NVML_PERF_POLICY_POWER": SimpleNamespace(violationTime=0),
        "NVML_PERF_POLICY_THERMAL": SimpleNamespace(violationTime=0),
    },
    "TotalEnergyConsumption": 5_000_000,  # millijoules
    "PowerUsage": 60_000,
}


def plant(root: Path, files: Mapping[str, object]) -> Path:
    """Write files under `root`, which it gives back."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", encoding="utf-8")
    return root


def machine(root: Path, name: str) -> Path:
    """The tree of a recorded machine."""
    files: dict[str, str] = {}
    for line in (STATES / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        path, _, text = line.partition(": ")
        files[path] = f"{files[path]}\n{text}" if path in files else text
    return plant(root, files)


def tegrastats_lines() -> dict[str, str]:
    lines = (STATES / "tegrastats.txt").read_text(encoding="utf-8").splitlines()
    return {name: line for name, _, line in (line.partition("\t") for line in lines)}


def pretend_no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where nvidia-ml-py is not installed."""
    monkeypatch.setitem(sys.modules, "pynvml", None)


def pretend_nvml(monkeypatch: pytest.MonkeyPatch, answers: Mapping[str, Any] = L4) -> None:
    """A pynvml that gives `answers` by query and, where they are a mapping, by constant; else NVMLError."""

    class NVMLError(Exception):
        pass

    def query(name: str) -> Any:
        def answer(handle: object, constant: str | None = None) -> Any:
            found = answers.get(name)
            found = found.get(constant) if isinstance(found, Mapping) else found
            if found is None:
                raise NVMLError("Not Supported")
            return found() if callable(found) else found

        return answer

    names = [*L4, "CurrentClocksThrottleReasons"]
    constants = ("NVML_CLOCK_SM", "NVML_CLOCK_MEM", *L4["Temperature"], *L4["TemperatureThreshold"])
    fake = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: f"gpu {index}",
        nvmlSystemGetDriverVersion=lambda: "550.54.15",
        nvmlSystemGetCudaDriverVersion_v2=lambda: 12040,
        **{f"nvmlDeviceGet{name}": query(name) for name in names},
        **{name: name for name in (*constants, *L4["ViolationStatus"])},
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
