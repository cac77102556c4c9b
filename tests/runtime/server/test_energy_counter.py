"""Joules since the start: what meters measured between one look and the next, added up."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest

from pixtral_runtime.device.energy import Energy, Unreadable
from pixtral_runtime.server.metrics import EnergyCounter


@dataclass
class Meter:
    """Measures what it is told to, from each start to the next stop."""

    readings: list[float | None]
    scope: str = "gpu"
    source: str = "NVML"
    runs: bool = False

    def start(self) -> None:
        assert not self.runs
        self.runs = True

    def stop(self) -> Energy:
        assert self.runs
        self.runs = False
        return Energy(self.scope, self.source, self.readings.pop(0), 1.0)


def test_energy_adds_up_over_looks_and_gaps() -> None:
    registry, meter = CollectorRegistry(), Meter([2.5, None, 4.0])
    registry.register(EnergyCounter([meter, Unreadable("cpu", "RAPL", "root alone may read it")]))
    for _ in range(3):
        text = generate_latest(registry).decode()
    assert 'pixtral:joules_total{scope="gpu",source="NVML"} 6.5' in text.splitlines()
    assert "cpu" not in text
    assert meter.runs
