"""How `pixtral bench` shows a report: on the terminal, as plots, as a page."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pixtral_cli import output

if TYPE_CHECKING:
    from pixtral_runtime.bench.report import Report, StageChange

REPORT_FORMATS = ("table", "md", "csv", "json")


def check_bench_outputs(
    table: str, save: Path | None, plot: Path | None, html: Path | None, *, force: bool, inputs: Iterable[Path]
) -> None:
    """Refuse what could not be written, before anything is measured. Raises InputError, MachineError."""
    from pixtral_runtime.bench.plots import plot_paths
    from pixtral_runtime.errors import InputError, Option
    from pixtral_runtime.files import Output, check_outputs

    if table not in REPORT_FORMATS:
        raise InputError(f"no format '{table}'", f"--format {'|'.join(REPORT_FORMATS)}")
    if plot is not None or html is not None:
        output.require("matplotlib", "bench", "Plotting")
    places = [(save, Option("save", "report.json")), (html, Option("html", "bench.html"))]
    places += [(path, Option("plot", "FOLDER")) for path in (plot_paths(plot) if plot else ())]
    check_outputs([Output(path, option, force) for path, option in places if path is not None], inputs)


def show(report: Report, changes: list[StageChange], table: str, plot: Path | None, html: Path | None) -> None:
    """Print the report in a format, then write plots and page."""
    print_report(report, table, changes)
    if plot is not None:
        from pixtral_runtime.bench.plots import save_plots

        output.talk(f"plots: {', '.join(str(path) for path in save_plots(report, plot))}")
    if html is not None:
        from pixtral_runtime.bench.page import bench_page
        from pixtral_runtime.files import write_text_atomically

        write_text_atomically(html, bench_page(report, changes))
        output.talk(f"the page is {html}")


def print_report(report: Report, form: str, changes: list[StageChange]) -> None:
    from pixtral_runtime.bench.cases import knee
    from pixtral_runtime.bench.report import (
        TABLE_HEADER,
        change_rows,
        csv_text,
        energy_lines,
        markdown,
        memory_lines,
        request_lines,
        table_rows,
    )

    compared = change_rows(changes)
    if form == "json":
        output.print_json(report.to_dict() | {"comparison": compared})
    elif form == "csv":
        output.print_line(csv_text(report.results))
    elif form == "md":
        output.print_line(markdown(report.results))
    else:
        output.print_pairs({name: v for name, v in report.setting.items() if isinstance(v, str | int | float)})
        output.print_table(TABLE_HEADER, table_rows(report.results))
        if report.load_s is not None:
            output.print_line(f"load: {report.load_s:.2f} s")
        results = report.results
        for line in (*request_lines(results), *memory_lines(results), *energy_lines(results)):
            output.print_line(line)
        if best := knee(report.results):
            output.print_line(f"\nkept up with {best.case.rate:g} requests/s")
        if compared:
            output.print_table(("case", "stage", "change of the median", "p", ""), compared)
