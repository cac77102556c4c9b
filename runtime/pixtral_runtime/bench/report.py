"""Results of a benchmark as rows, files and comparisons: what `pixtral bench` prints, saves and tests against.

A saved report has every sample, the setting it was made in and the remarks that qualify it, so that another run can be
tested against it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pixtral_runtime.bench.cases import CaseResult
from pixtral_runtime.bench.spread import Difference, significance
from pixtral_runtime.errors import InputError
from pixtral_runtime.files import write_atomically
from pixtral_runtime.json_data import from_json, sealed, unsealed

REPORT_SCHEMA = 1
TABLE_HEADER = ("case", "stage", "p50", "p95", "p99", "mean", "σ", "runs", "of ceiling")
COMPARED_STAGES = ("image", "preprocess", "vision", "prefill", "ttft", "tpot", "e2e", "requests_per_s", "tokens_per_s")


@dataclass
class Report:
    """A benchmark: its results, the machine and bundle it was made with, and what to know before believing it.

    `load_s` is how long the bundle took to load, once; None where nobody measured it.
    """

    setting: dict[str, Any]
    results: list[CaseResult]
    remarks: list[str] = field(default_factory=list)
    load_s: float | None = None

    @property
    def place(self) -> str:
        """What was measured, for a heading."""
        return str(self.setting.get("device") or self.setting.get("server") or "this machine")

    def to_dict(self) -> dict[str, Any]:
        results = [result.to_dict() for result in self.results]
        head = {"schema": REPORT_SCHEMA, "setting": self.setting, "remarks": self.remarks, "load_s": self.load_s}
        return head | {"results": results}

    def save(self, path: Path) -> None:
        write_atomically(path, (json.dumps(sealed(self.to_dict()), indent=1) + "\n").encode())


@dataclass(frozen=True)
class StageChange:
    """A stage of a case in two reports. `regressed`: worse by more than the threshold, and not by luck."""

    case: str
    stage: str
    difference: Difference
    regressed: bool


def read_report(path: Path) -> Report:
    """A report that `save` wrote. Raises InputError."""
    hint = "name a file that 'pixtral bench --save' wrote"
    try:
        data = unsealed(json.loads(path.read_bytes()))
        if data["schema"] != REPORT_SCHEMA:
            raise InputError(f"{path}: schema {data['schema']}, this pixtral reads {REPORT_SCHEMA}", "measure it anew")
        results = [CaseResult.from_dict(entry) for entry in data["results"]]
        own = {
            name: data[name] for name in ("setting", "remarks", "load_s") if name in data
        }  # the first have no load_s
        return from_json(Report, own, results=results)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", hint) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is no report of a benchmark: {error}", hint) from error


def compare_reports(old: Report, new: Report, threshold: float) -> list[StageChange]:
    """Every stage of every case that both have. Raises InputError where there is none."""
    before = {result.case: result for result in old.results}
    changes = []
    for result in new.results:
        if result.case not in before:
            continue
        for stage in COMPARED_STAGES:
            samples, earlier = result.samples.get(stage, []), before[result.case].samples.get(stage, [])
            if not samples or not earlier:
                continue
            difference = significance(earlier, samples)
            is_rate = stage.endswith("_per_s")
            regressed = difference.shrank(threshold) if is_rate else difference.grew(threshold)
            changes.append(StageChange(result.case.name, stage, difference, regressed))
    if not changes:
        cases = "; ".join(result.case.name for result in old.results)
        raise InputError(f"no case is in both reports; the old one has: {cases}", "measure the same cases again")
    return changes


def change_rows(changes: Sequence[StageChange]) -> list[tuple[str, str, str, str, str]]:
    """A row for each change: case, stage, change of the median, p, and what to make of it."""
    return [
        (
            change.case,
            change.stage,
            f"{change.difference.ratio - 1:+.1%}",
            f"{change.difference.p_value:.2g}",
            "REGRESSED" if change.regressed else "" if change.difference.significant else "no difference",
        )
        for change in changes
    ]


def setting_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs in the setting of two reports, so that a change is not put down to the wrong cause."""
    names = [name for name in old if name in new and old[name] != new[name] and not isinstance(old[name], dict | list)]
    return [f"{name} was {old[name]} and is {new[name]}" for name in names]


def table_rows(results: Sequence[CaseResult]) -> list[tuple[str, ...]]:
    """A row for each stage of each case, in `TABLE_HEADER`'s columns; times in milliseconds, rates per second."""
    table = []
    for result in results:
        shares = result.shares
        for stage, spread in result.spreads.items():
            numbers = (spread.p50, spread.p95, spread.p99, spread.mean, spread.sd)
            share = f"{shares[stage]:.0%} ({result.bound_by[stage]})" if stage in shares else ""
            table.append((result.case.name, stage, *map(_number, numbers), str(spread.n), share))
    return table


def energy_lines(results: Sequence[CaseResult]) -> list[str]:
    """What each meter says of each case; where it could not be read, once, why."""
    lines: dict[str, None] = {}
    for result in results:
        for meter in result.energy:
            name = f"energy of {meter['scope']} ({meter['source']})"
            if meter["joules"] is None:
                lines[f"{name}: not readable, {meter['reason']} {meter['remedy']}".rstrip()] = None
            else:
                each = f"{meter['joules_per_image']:.3g} J a picture, {meter['joules_per_token']:.3g} J a new token"
                lines[f"{name}, {result.case.name}: {each}"] = None
    return list(lines)


def memory_lines(results: Sequence[CaseResult]) -> list[str]:
    """What each case took of memory; where a GPU's cannot be read, once, why."""
    lines: dict[str, None] = {}
    for result in results:
        if (peak := result.memory.get("peak_rss_bytes")) is not None:
            lines[f"peak resident memory, {result.case.name}: {peak / 1e9:.3g} GB"] = None
        if (vram := result.memory.get("vram_bytes")) is not None:
            lines[f"GPU memory, {result.case.name}: {vram / 1e9:.3g} GB"] = None
        elif result.memory:
            lines[f"GPU memory: not readable, {result.memory['vram_reason']}"] = None
    return list(lines)


def request_lines(results: Sequence[CaseResult]) -> list[str]:
    """What became of the requests that a server got, and the tokens of one."""
    lines = []
    for result in results:
        if done := result.server:
            counts = ", ".join(f"{count:,} {kind}" for kind, count in result.tokens.items())
            outcome = f"{done['answered']} answered, {done['refused']} refused, {done['failed']} failed"
            lines.append(f"requests, {result.case.name}: {outcome}; tokens of one: {counts or 'none'}")
    return lines


def markdown(results: Sequence[CaseResult]) -> str:
    lines = [TABLE_HEADER, ["---"] * len(TABLE_HEADER), *table_rows(results)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def csv_text(results: Sequence[CaseResult]) -> str:
    import csv
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([TABLE_HEADER, *table_rows(results)])
    return text.getvalue().rstrip("\n")


def _number(value: float) -> str:
    """Three digits that mean something."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
