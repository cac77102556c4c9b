"""One page for a benchmark: setting, warnings, results, comparison and plots, in a file that loads nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from pixtral_runtime.bench.plots import draw_plots, svg_of
from pixtral_runtime.bench.report import (
    TABLE_HEADER,
    Report,
    StageChange,
    change_rows,
    energy_lines,
    memory_lines,
    request_lines,
    table_rows,
)
from pixtral_runtime.html_page import CLOSING, bullets, facts, note, opening, table

BENCH_STYLE = """th, td { white-space: nowrap; }
figure { margin: 1rem 0; background: #fff; border-radius: 8px; padding: .5rem; overflow-x: auto; }
figure svg { max-width: 100%; height: auto; }
"""


def bench_page(report: Report, changes: Sequence[StageChange] = ()) -> str:
    """The whole HTML document."""
    setting = {name: value for name, value in report.setting.items() if isinstance(value, str | int | float)}
    compared = table(("case", "stage", "change of the median", "p", ""), change_rows(changes)) if changes else ""
    parts = [
        opening(f"pixtral bench, {report.place}", style=BENCH_STYLE),
        facts(setting),
        "<h2>What makes the figures doubtful</h2>",
        bullets(report.remarks) or "<p>Nothing.</p>",
        "<h2>Results</h2>",
        note("Times in milliseconds, rates per second."),
        table(TABLE_HEADER, table_rows(report.results)),
        bullets([*request_lines(report.results), *memory_lines(report.results), *energy_lines(report.results)]),
        compared,
        *(f"<figure>{svg_of(figure)}</figure>" for figure in draw_plots(report).values()),
        CLOSING,
    ]
    return "\n".join(parts)
