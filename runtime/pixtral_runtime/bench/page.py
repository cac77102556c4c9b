"""One page for a benchmark: setting, warnings, results, comparison and plots, in a file that loads nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files

from pixtral_runtime.bench.plots import draw_plots, svg_of
from pixtral_runtime.bench.report import TABLE_HEADER, Report, StageChange, energy_lines, memory_lines, table_rows


def bench_page(report: Report, changes: Sequence[StageChange] = ()) -> str:
    """The whole HTML document."""
    template = files("pixtral_runtime.bench").joinpath("page.html").read_text(encoding="utf-8")
    setting = {name: value for name, value in report.setting.items() if isinstance(value, str | int | float)}
    compared = [
        (change.case, change.stage, f"{change.difference.ratio - 1:+.1%}", f"{change.difference.p_value:.2g}",
         "regressed" if change.regressed else "" if change.difference.significant else "no difference")
        for change in changes
    ]  # fmt: skip
    parts = {
        "title": escape(f"pixtral bench, {setting.get('device') or 'this machine'}"),
        "setting": _facts(setting),
        "remarks": _list(report.remarks) or "<p>None.</p>",
        "results": _table(TABLE_HEADER, table_rows(report.results)),
        "memory": _list([*memory_lines(report.results), *energy_lines(report.results)]),
        "comparison": _table(("case", "stage", "change of the median", "p", ""), compared) if compared else "",
        "plots": "".join(f"<figure>{svg_of(figure)}</figure>" for figure in draw_plots(report).values()),
    }
    for name, content in parts.items():
        head, mark, tail = template.partition(f"{{{{{name}}}}}")
        assert mark, name
        template = head + content + tail
        if name == "title":
            template = template.replace("{{heading}}", content, 1)
    return template


def _facts(values: Mapping[str, object]) -> str:
    return "".join(f"<div><dt>{escape(name)}<dd>{escape(str(value))}</div>" for name, value in values.items())


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def _table(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}" for cell in header)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}' for cell in row)}</tr>" for row in body)
    return f'<div class="wide"><table><tr>{head}</tr>{lines}</table></div>'
