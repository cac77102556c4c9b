"""Benchmarks of the demo bundle: stages add up, reports travel, and a slowdown is found where there is one."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from helpers.bundles import exported
from helpers.places import DEMO
from pixtral_cli.main import app
from pixtral_export.plan import ExportSettings
from pixtral_runtime import Model, load
from pixtral_runtime.bench.cases import LATENCY_STAGES, Case, CaseResult, DeviceRates, Effort, knee
from pixtral_runtime.bench.measure import measure_latency, measure_serving, measure_throughput
from pixtral_runtime.bench.report import (
    Report,
    compare_reports,
    csv_text,
    markdown,
    read_report,
    setting_changes,
    table_rows,
)
from pixtral_runtime.device.energy import Energy
from pixtral_runtime.errors import InputError
from pixtral_runtime.generation.generation import Generation
from pixtral_runtime.generation.model_runner import ModelRunner
from pixtral_runtime.generation.scheduler import Scheduler

CASE = Case("latency", 2, 6, 64)
QUICK = Effort(runs=3, warmup=1)
RATES = DeviceRates(1e12, {"vision": 1e13, "prefill": 1e13, "decode": 1e13}, 1e13)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(DEMO, tmp_path_factory.mktemp("bundles") / "bundle", ExportSettings(dtype="float32")).path


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return load(bundle)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_stages_add_up_to_the_whole(model: Model) -> None:
    result = measure_latency(model, CASE, QUICK, RATES)
    assert set(result.samples) == {*LATENCY_STAGES, "step"}
    assert {len(result.samples[stage]) for stage in LATENCY_STAGES} == {3}
    assert len(result.samples["step"]) == 3 * (CASE.decode_tokens - 1)
    explained = []  # of a run's time; another program may have had the core between two stages
    for run in range(3):
        parts = sum(result.samples[stage][run] for stage in ("image", "preprocess", "vision", "prefill"))
        assert result.samples["ttft"][run] == pytest.approx(parts, rel=1e-3)
        whole = parts + result.samples["tpot"][run] * (CASE.decode_tokens - 1)
        explained.append(whole / result.samples["e2e"][run])
    assert max(explained) <= 1.001 and max(explained) > 0.9
    assert set(result.shares) == {"vision", "prefill", "tpot"}
    assert all(0 < share < 1 for share in result.shares.values())
    assert result.tokens == {"prompt": 93, "image": 72, "new": 6}


def test_the_prompt_has_the_tokens_asked_for(model: Model) -> None:
    result = measure_latency(model, replace(CASE, prompt_tokens=300), QUICK, None)
    assert result.tokens["prompt"] - result.tokens["image"] == 300
    assert result.shares == {}
    with pytest.raises(InputError, match="context holds 1024") as raised:
        measure_latency(model, replace(CASE, prompt_tokens=5000), QUICK, None)
    assert "prompt_tokens" in [option.name for option in raised.value.options]


class Ticks:
    """A second at each look."""

    def __init__(self) -> None:
        self._looks = count()

    def perf_counter(self) -> float:
        return float(next(self._looks))


@pytest.mark.parametrize("slots", [1, 3])
def test_answers_under_measurement_are_as_long_as_asked_and_rates_are_per_second(
    slots: int, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo checkpoint would stop after some words. The clock is looked at twice a run: a run takes one second."""
    made, submit = list[Generation](), Scheduler.submit

    def noted(self: Scheduler, generation: Generation) -> None:
        made.append(generation)
        submit(self, generation)

    monkeypatch.setattr(Scheduler, "submit", noted)
    monkeypatch.setattr("pixtral_runtime.bench.measure.time", Ticks())
    result = measure_throughput(model, Case("throughput", slots, 40, 64), Effort(runs=2, warmup=1), requests=4)
    assert [len(generation.token_ids) for generation in made] == [40] * (3 * 4)
    assert {generation.finish_reason for generation in made} == {"length"}
    assert (result.samples["requests_per_s"], result.samples["tokens_per_s"]) == ([4.0, 4.0], [160.0, 160.0])
    stages_ms = [result.samples[stage] for stage in ("vision", "prefill", "decode")]
    assert all(len(samples) == 2 and min(samples) > 0 for samples in stages_ms)


class Hours:
    """A millisecond at each look, and as much as is slept: each step of the loop takes two."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 0.001
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_requests_that_come_too_fast_wait_and_the_knee_lies_below(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request takes some 17 steps of 2 ms, so a slot can serve some 30 a second."""
    monkeypatch.setattr("pixtral_runtime.bench.measure.time", Hours())
    slow, fast = (measure_serving(model, Case("serve", 1, 16, 64, rate=rate), requests=12) for rate in (2.0, 2000.0))
    assert {name: len(values) for name, values in fast.samples.items()} == {
        **dict.fromkeys(("ttft", "tpot", "e2e"), 12),
        **dict.fromkeys(("offered_per_s", "requests_per_s", "tokens_per_s"), 1),
    }
    assert slow.spreads["ttft"].p50 < 10 < 100 < fast.spreads["ttft"].p50
    assert slow.spreads["tpot"].p50 == pytest.approx(2, rel=0.1)
    assert all(e2e > ttft for ttft, e2e in zip(fast.samples["ttft"], fast.samples["e2e"], strict=True))
    assert fast.samples["offered_per_s"][0] > 1000 and 20 < fast.samples["requests_per_s"][0] < 40
    assert fast.samples["tokens_per_s"][0] == pytest.approx(16 * fast.samples["requests_per_s"][0])
    assert knee([slow, fast]) is slow and knee([fast]) is None
    # What waits, waits from its own arrival on: counted from there, one slot's answers end at even times.
    arrivals_ms = 1e3 * np.cumsum(np.random.default_rng(0).exponential(1 / 2000, 12))
    gaps_ms = np.diff(arrivals_ms + fast.samples["e2e"])
    assert gaps_ms == pytest.approx(gaps_ms[-1])


class Meter:
    """An energy meter that always measured 48 joules."""

    scope, source = "module", "test"

    def start(self) -> None:
        pass

    def stop(self) -> Energy:
        return Energy(self.scope, self.source, 48.0, 1.0)


def test_energy_is_shared_out_over_pictures_and_new_tokens(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four runs of two pictures each, with six new tokens a picture; warm-ups do not count."""
    monkeypatch.setattr("pixtral_runtime.bench.measure.open_meters", lambda: [Meter()])
    (energy,) = measure_latency(model, CASE, Effort(runs=4, warmup=1), None).energy
    assert (energy["scope"], energy["joules"]) == ("module", 48)
    assert (energy["joules_per_image"], energy["joules_per_token"]) == (6, 1)


class Clock:
    """Time that passes a little at each look, with a tenth of it as noise, and where a stage is told to be slow."""

    def __init__(self) -> None:
        self.now, self._rng = 0.0, np.random.default_rng(0)

    def perf_counter(self) -> float:
        self.now += 0.001 * (1 + 0.1 * self._rng.uniform(-1, 1))
        return self.now


def test_a_slowdown_of_ten_per_cent_is_found_and_none_in_a_run_against_itself(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vision becomes 10 % slower by a clock of the test's own; the other stages stay as they are."""
    clock, encode, vision_s = Clock(), ModelRunner.encode, 0.02

    def slowed(self: ModelRunner, images: Any) -> Any:
        clock.now += vision_s
        return encode(self, images)

    monkeypatch.setattr(ModelRunner, "encode", slowed)
    monkeypatch.setattr("pixtral_runtime.bench.measure.time", clock)
    old, again = (Report({}, [measure_latency(model, CASE, Effort(runs=20), None)]) for _ in range(2))
    for same in (old, again):
        unchanged = compare_reports(old, same, 0.05)
        assert [change.stage for change in unchanged] == list(LATENCY_STAGES)
        assert [change.stage for change in unchanged if change.regressed] == []
        assert all(change.difference.ratio == pytest.approx(1, abs=0.05) for change in unchanged)
    vision_s *= 1.1
    changes = {
        change.stage: change
        for change in compare_reports(old, Report({}, [measure_latency(model, CASE, Effort(20), None)]), 0.05)
    }
    assert [stage for stage, change in changes.items() if change.regressed] == ["vision", "ttft", "e2e"]
    assert changes["vision"].difference.ratio == pytest.approx(1.1, abs=0.02)


def test_a_drop_of_a_rate_is_a_regression() -> None:
    old = CaseResult(Case("throughput", 1, 8, 64), {"tokens_per_s": [100.0, 101, 99, 100, 102, 98]})
    new = CaseResult(old.case, {"tokens_per_s": [80.0, 81, 79, 80, 82, 78]})
    (change,) = compare_reports(Report({}, [old]), Report({}, [new]), 0.05)
    assert change.regressed and change.difference.ratio == pytest.approx(0.8)
    (change,) = compare_reports(Report({}, [old]), Report({}, [new]), 0.25)
    assert change.difference.significant and not change.regressed  # a fifth less is within a quarter
    (change,) = compare_reports(Report({}, [new]), Report({}, [old]), 0.05)
    assert change.difference.significant and not change.regressed  # a rise
    with pytest.raises(InputError, match="no case is in both"):
        compare_reports(Report({}, [old]), Report({}, [CaseResult(CASE, {"e2e": [1.0]})]), 0.05)


def test_a_report_is_printed_saved_and_compared(bundle: Path, tmp_path: Path) -> None:
    asked = (bundle, "--image-side", "64,48", "--decode-tokens", 4, "--runs", 9, "--warmup", 1)
    done = invoke(*asked, "--save", tmp_path / "old.json")
    assert done.exit_code == 0, done.stderr
    assert all(word in done.stdout for word in ("48 px", "64 px", "tpot", "prefill", "precision"))
    saved = read_report(tmp_path / "old.json")
    assert [result.case.image_side for result in saved.results] == [64, 48]
    assert saved.load_s is not None and saved.load_s > 0 and "\nload: " in done.stdout
    assert saved.setting["bundle"] == load(bundle).bundle.fingerprint
    assert saved.results[0].energy  # a machine without a meter says so
    assert all(meter["reason"] if meter["joules"] is None else meter["joules"] > 0 for meter in saved.results[0].energy)
    assert "energy" in done.stdout
    assert set(saved.setting["after"]) >= {"clocks_hz", "temperatures", "throttling", "load_average"}
    assert saved.setting["ceilings"]["bandwidth_bytes_per_s"] > 1e9
    again = invoke(*asked, "--compare", tmp_path / "old.json", "--threshold", 1000, "--json")
    assert again.exit_code == 0, again.stderr
    assert len(json.loads(again.stdout)["comparison"]) == 2 * len(LATENCY_STAGES)
    slow = json.loads((tmp_path / "old.json").read_text())
    for result in slow["results"]:
        result["samples"] = {name: [value / 100 for value in values] for name, values in result["samples"].items()}
    del slow["load_s"], slow["seal"]  # as in the first reports
    (tmp_path / "fast.json").write_text(json.dumps(slow))
    assert invoke(*asked, "--compare", tmp_path / "fast.json").exit_code == 6


def test_every_format_has_every_row(model: Model) -> None:
    results = [measure_latency(model, CASE, QUICK, RATES)]
    table = table_rows(results)
    assert {row[1] for row in table} == {*LATENCY_STAGES, "step"}
    assert next(row for row in table if row[1] == "tpot")[-1].endswith("(memory)")
    assert len(markdown(results).splitlines()) == 2 + len(table)
    assert len(list(csv.reader(io.StringIO(csv_text(results))))) == 1 + len(table)


def test_settings_that_differ_are_named_and_no_others() -> None:
    old = {"threads": 1, "x": 2, "gone": 3, "ceilings": {"a": 1}, "lists": [1], "device": "one"}
    new = {"device": "another", "lists": [2], "ceilings": {"a": 2}, "new": 3, "x": 2, "threads": 2}
    assert setting_changes(old, new) == ["threads was 1 and is 2", "device was one and is another"]
    assert setting_changes(old, old) == []


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["--mode", "speed"], "latency|throughput|serve", 3),
        (["--image-side", "0"], "--image-side", 3),
        (["--image-side", "99999"], "--image-side 9459", 3),
        (["--prompt-tokens", "999999999999"], "the context holds", 3),
        (["--decode-tokens", "999999999999"], "the context holds", 3),
        (["--batch", "x"], "--batch", 3),
        (["--format", "xml"], "table|md|csv|json", 3),
        (["--compare", "nowhere.json"], "nowhere.json", 3),
        (["--images", "nowhere"], "nowhere", 3),
        (["--backend", "rtx"], "nvidia-smi", 4),
    ],
)
def test_bad_input_is_refused(bundle: Path, arguments: list[str], words: str, code: int) -> None:
    done = invoke(bundle, *arguments)
    assert done.exit_code == code, done.stderr
    assert words in done.stderr
    assert "hint: " in done.stderr


def test_a_file_that_is_no_report_is_refused(tmp_path: Path) -> None:
    case = '{"mode": "latency", "batch": "1", "decode_tokens": 2}'
    typed = f'{{"schema": 1, "setting": {{}}, "remarks": [], "results": [{{"case": {case}, "samples": {{}}}}]}}'
    for text in ("{}", "[]", '{"schema": 99}', "no", typed):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(InputError, match=r"x\.json"):
            read_report(tmp_path / "x.json")
