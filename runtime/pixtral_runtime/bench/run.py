"""A whole benchmark: cases in, a report out, with the setting that each figure was made in.

What machine, bundle and backend are is read before and after, so that the report can say what changed meanwhile. The
rates that ceilings are computed from are measured only where a case has a ceiling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pixtral_runtime.bench.cases import Case, CaseResult, DeviceRates, Effort
from pixtral_runtime.bench.measure import measure_latency, measure_serving, measure_throughput
from pixtral_runtime.bench.report import Report
from pixtral_runtime.bench.setting import measured_rates, remarks_on, setting_of
from pixtral_runtime.generation.model import Model

Progress = Callable[[str, int, int, str], None]
"""Called with the stage's name, cases done, cases in all, and the case that is next."""


def run_benchmark(
    model: Model,
    cases: Sequence[Case],
    effort: Effort,
    *,
    threads: int = 0,
    pictures: Sequence[Path] = (),
    progress: Progress = lambda *_: None,
) -> Report:
    """Measure each case in turn.

    `threads` are those that the model was loaded with, 0 for all cores; `pictures` the user's own, for cases without an
    `image_side`. Raises InputError where a case's request does not fit, or a picture cannot be read.
    """
    before = setting_of(model, threads)
    has_ceilings = any(case.mode == "latency" for case in cases)
    rates = measured_rates(model, threads, before.device.gpu) if has_ceilings else None
    results = []
    for done, case in enumerate(cases):
        progress("cases", done, len(cases), case.name)
        results.append(_measured(model, case, effort, rates, pictures))
    progress("cases", len(cases), len(cases), "")
    after = setting_of(model, threads)
    remarks = [remark for result in results if result.case.mode != "serve" for remark in result.remarks()]
    setting = before.to_dict(rates) | {"after": after.device.to_dict()}  # clocks, temperatures, throttling, load
    return Report(setting, results, [*remarks_on(before, after), *remarks])


def _measured(
    model: Model, case: Case, effort: Effort, rates: DeviceRates | None, pictures: Sequence[Path]
) -> CaseResult:
    if case.mode == "latency":
        return measure_latency(model, case, effort, rates, pictures)
    if case.mode == "throughput":
        return measure_throughput(model, case, effort, pictures)
    return measure_serving(model, case, pictures)
