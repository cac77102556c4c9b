"""Rates of GPUs: the copy that measures bandwidth on a device in host memory, and whose data sheet is whose."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from helpers.bundles import exported
from helpers.host_device import HostDevice
from helpers.places import DEMO
from pixtral_export.plan import ExportSettings
from pixtral_runtime import load
from pixtral_runtime.bench.gpu_rates import (
    COPIES_PER_PASS,
    COPY_PASSES,
    DRIVER_NAMES,
    measure_copy_bandwidth,
    published_peak,
)
from pixtral_runtime.bench.setting import gpu_rates_of
from pixtral_runtime.bundle.device_catalog import KNOWN_DEVICES


def test_bandwidth_is_measured_by_copies_that_really_ran_and_memory_is_given_back() -> None:
    device = HostDevice()
    spread = measure_copy_bandwidth(device, 1 << 20)
    assert spread.n == COPY_PASSES and 1e6 < spread.p50 < 1e13
    assert device.calls["copy_to_host"] == 2 * (COPY_PASSES + 1) and COPIES_PER_PASS > 1
    assert not device.memory


def test_ceilings_of_a_known_gpu_are_measured_bandwidth_and_published_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = partial(measure_copy_bandwidth, nbytes=1 << 20)
    monkeypatch.setattr("pixtral_runtime.bench.setting.measure_copy_bandwidth", small)
    model = load(exported(DEMO, tmp_path / "b", ExportSettings(precision="int4", method="rtn")).path)
    rates = gpu_rates_of(model, "NVIDIA L4", HostDevice)
    peak = KNOWN_DEVICES["l4"].peak
    assert rates is not None and peak is not None
    assert set(rates.flops_per_s.values()) == {peak.float16} and rates.attention_flops_per_s == peak.float16
    assert 1e6 < rates.bandwidth_bytes_per_s < 1e13
    assert gpu_rates_of(model, "NVIDIA T4", HostDevice) is None


def test_every_known_gpu_has_published_rates() -> None:
    for driver, name in DRIVER_NAMES.items():
        assert published_peak(driver) == KNOWN_DEVICES[name].peak is not None


@pytest.mark.parametrize("driver", ["NVIDIA L40S", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 PCIe", ""])
def test_a_gpu_of_another_name_is_unknown(driver: str) -> None:
    assert published_peak(driver) is None
