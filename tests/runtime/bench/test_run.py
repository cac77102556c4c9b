"""A whole benchmark without a terminal: every case is measured, reported as it goes, and has its setting."""

from __future__ import annotations

import pytest

from pixtral_runtime.bench import run
from pixtral_runtime.bench.cases import Case, CaseResult, DeviceRates, Effort, case_combinations
from pixtral_runtime.bench.setting import BenchSetting
from pixtral_runtime.device.state import read_state

RATES = DeviceRates(1e12, {"vision": 1e13, "prefill": 1e13, "decode": 1e13}, 1e13)


def test_cases_are_every_combination_the_last_varying_fastest() -> None:
    cases = case_combinations(
        "serve", 8, image_sides_px=[64, None], prompt_tokens=[0], batches=[1, 2], rates=[0.5, 1.0]
    )
    assert len(cases) == len(set(cases)) == 8
    assert cases[:3] == [
        Case("serve", 1, 8, 64, 0, 0.5),
        Case("serve", 1, 8, 64, 0, 1.0),
        Case("serve", 2, 8, 64, 0, 0.5),
    ]


@pytest.mark.parametrize(("modes", "measured"), [(("latency", "serve"), 1), (("throughput", "serve"), 0)])
def test_each_case_is_measured_by_its_mode_and_rates_only_where_there_is_a_ceiling(
    monkeypatch: pytest.MonkeyPatch, modes: tuple[str, ...], measured: int
) -> None:
    rates_measured: list[DeviceRates] = []

    def measured_rates(*_: object) -> DeviceRates:
        rates_measured.append(RATES)
        return RATES

    def result(mode: str) -> object:
        return lambda model, case, *rest: CaseResult(case, {mode: [1.0, 1.0, 1.0]})

    monkeypatch.setattr(run, "measure_latency", result("latency"))
    monkeypatch.setattr(run, "measure_throughput", result("throughput"))
    monkeypatch.setattr(run, "measure_serving", result("serve"))
    monkeypatch.setattr(run, "measured_rates", measured_rates)
    monkeypatch.setattr(
        run, "setting_of", lambda *_: BenchSetting("b", "int4", "float16", 2, "ort-cpu", 0, read_state())
    )
    seen: list[tuple[str, int, int, str]] = []
    cases = [Case(mode, 1, 4, 64, rate=1.0 if mode == "serve" else None) for mode in modes]
    model: object = None
    report = run.run_benchmark(model, cases, Effort(), progress=lambda *stage: seen.append(stage))  # type: ignore[arg-type]
    assert [list(result.samples) for result in report.results] == [[mode] for mode in modes]
    assert [(done, total, note) for _, done, total, note in seen] == [
        (0, 2, cases[0].name),
        (1, 2, cases[1].name),
        (2, 2, ""),
    ]
    assert len(rates_measured) == measured
    assert bool(report.setting["ceilings"]) == bool(measured)
    assert "after" in report.setting
    assert not any(case.name in remark for case in cases if case.mode == "serve" for remark in report.remarks)
