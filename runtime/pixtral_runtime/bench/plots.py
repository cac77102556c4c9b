"""A benchmark's plots: where the time of a request goes, what load does to latency, how far from the roof a stage is.

Each is drawn only where the report has data for it. The same report gives the same SVG.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pixtral_runtime.bench.cases import CaseResult, knee
from pixtral_runtime.bench.report import Report
from pixtral_runtime.errors import InputError, Option
from pixtral_runtime.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOTTED_STAGES = ("image", "preprocess", "vision", "prefill", "decode")
SERVER_STAGES = ("ttft", "decode")  # all that can be seen of a server
STAGE_COLORS = dict(zip(PLOTTED_STAGES, ("#bbbbbb", "#66ccee", "#228833", "#4477aa", "#ee6677"), strict=True))
STAGE_COLORS["ttft"] = STAGE_COLORS["prefill"]
"""Paul Tol's bright scheme, which people see who see fewer colours."""
STAGE_MARKERS = {"vision": "s", "prefill": "^", "decode": "o"}
PLOT_NAMES = ("latency", "load", "roofline")
PLOT_SUFFIXES = (".svg", ".png")
PLOT_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pixtral",
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}


def draw_plots(report: Report) -> dict[str, Figure]:
    """Figures by name: latency, load, roofline, those that the report has data for."""
    import matplotlib as mpl

    with mpl.rc_context(PLOT_STYLE):
        drawn = zip(PLOT_NAMES, (_latency(report), _load(report), _roofline(report)), strict=True)
        return {name: figure for name, figure in drawn if figure is not None}


def plot_paths(folder: Path) -> list[Path]:
    """Where `save_plots` may write."""
    return [folder / f"{name}{suffix}" for name in PLOT_NAMES for suffix in PLOT_SUFFIXES]


def svg_of(figure: Figure) -> str:
    """The figure as an SVG element, for a page: no XML declaration, text as text."""
    import matplotlib as mpl

    text = io.StringIO()
    with mpl.rc_context(PLOT_STYLE):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def save_plots(report: Report, folder: Path) -> list[Path]:
    """Write each plot as .svg and .png. Raises InputError where the report has data for none."""
    figures = draw_plots(report)
    if not figures:
        serving = Option("mode", "serve", "with several rates")
        raise InputError("the report has nothing to plot", Option("mode", "latency"), serving)
    paths = []
    for name, figure in figures.items():
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=150, metadata={"Software": None})
        for suffix, content in ((".svg", svg_of(figure).encode()), (".png", image.getvalue())):
            paths.append(folder / f"{name}{suffix}")
            write_atomically(paths[-1], content)
    return paths


def _figure(report: Report, title: str, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height))
    axes = figure.subplots()
    model = report.setting.get("precision") or report.setting.get("model", "")
    axes.set_title(f"{title}\n{report.place}, {model}", loc="left", fontsize=10)
    return figure, axes


def _latency(report: Report) -> Figure | None:
    """A bar for each case: medians of the stages, stacked, and the 95th percentile of the whole."""
    results = [result for result in report.results if result.case.mode == "latency" and result.samples]
    if not results:
        return None
    stages = SERVER_STAGES if any(result.server for result in results) else PLOTTED_STAGES
    figure, axes = _figure(report, "Where the time of a request goes", 1.4 + 0.5 * len(results))
    left = np.zeros(len(results))
    places = np.arange(len(results))
    for part in stages:
        widths = np.array([_part_ms(result, part) for result in results])
        axes.barh(places, widths, left=left, height=0.6, color=STAGE_COLORS[part], label=part)
        left += widths
    p95 = np.array([result.spreads["e2e"].p95 for result in results])
    axes.errorbar(left, places, xerr=[np.zeros(len(left)), np.maximum(p95 - left, 0)], fmt="none", ecolor="#333333",
                  capsize=3, label="p95")  # fmt: skip
    axes.set_yticks(places, [result.case.name.removeprefix("latency, ") for result in results])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds, medians")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=6, fontsize=8, frameon=False)
    return figure


def _part_ms(result: CaseResult, part: str) -> float:
    if part == "decode":
        return result.spreads["tpot"].p50 * (result.case.decode_tokens - 1) if "tpot" in result.spreads else 0.0
    return result.spreads[part].p50


def _load(report: Report) -> Figure | None:
    """Latency over the rate of requests, or tokens a second over the requests at a time."""
    measured = [result for result in report.results if result.samples]
    served = sorted((r for r in measured if r.case.mode == "serve"), key=lambda r: r.case.rate or 0)
    batched = sorted((r for r in measured if r.case.mode == "throughput"), key=lambda r: r.case.batch)
    if len(served) > 1:
        return _served(report, served)
    return _batched(report, batched) if len(batched) > 1 else None


def _served(report: Report, results: Sequence[CaseResult]) -> Figure:
    figure, axes = _figure(report, "Time to the last token under load", 4)
    rates = [result.spreads["requests_per_s"].p50 for result in results]
    for name, style in (("p50", "-"), ("p95", "--"), ("p99", ":")):
        axes.plot(
            rates, [getattr(r.spreads["e2e"], name) for r in results], style, marker="o", color="#4477aa", label=name
        )
    if best := knee(results):
        axes.axvline(best.spreads["requests_per_s"].p50, color="#ee6677")
        axes.annotate(f" kept up with {best.case.rate:g}/s", (best.spreads["requests_per_s"].p50, 0.9), color="#ee6677",
                      xycoords=("data", "axes fraction"), fontsize=8)  # fmt: skip
    axes.set_xlabel("requests answered a second")
    axes.set_ylabel("milliseconds")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _batched(report: Report, results: Sequence[CaseResult]) -> Figure:
    figure, axes = _figure(report, "Throughput by requests at a time", 4)
    spreads = [result.spreads["tokens_per_s"] for result in results]
    axes.errorbar([r.case.batch for r in results], [s.p50 for s in spreads], yerr=[s.sd for s in spreads], marker="o",
                  color="#4477aa", capsize=3)  # fmt: skip
    axes.set_xlabel("requests at a time")
    axes.set_ylabel("new tokens a second, median ± σ")
    axes.set_ylim(bottom=0)
    return figure


def _roofline(report: Report) -> Figure | None:
    """Each stage's operations a second over its operations a byte, below what the device reaches at best."""
    ceilings = report.setting.get("ceilings") or {}
    points = [(result, stage) for result in report.results for stage in result.costs if _stage_s(result, stage)]
    if not points or not ceilings:
        return None
    figure, axes = _figure(report, "Roofline: how far each stage is from what the device reaches", 4.5)
    seen = [result.costs[stage]["flops"] / result.costs[stage]["bytes"] for result, stage in points]
    intensities = np.geomspace(min(*seen, 1) / 2, max(*seen, 100) * 2, 200)
    bandwidth = ceilings["bandwidth_bytes_per_s"]
    for rate in sorted(set(ceilings["flops_per_s"].values())):
        axes.plot(intensities, np.minimum(bandwidth * intensities, rate) / 1e9, color="#333333", linewidth=1)
        stages = [stage for stage, own in ceilings["flops_per_s"].items() if own == rate]
        axes.annotate(", ".join(stages), (intensities[-1], rate / 1e9), ha="right", va="bottom", fontsize=8)
    for (result, stage), intensity in zip(points, seen, strict=True):
        reached = result.costs[stage]["flops"] / _stage_s(result, stage) / 1e9
        axes.plot(intensity, reached, STAGE_MARKERS[stage], color=STAGE_COLORS[stage], markersize=6)
        axes.annotate(f" {stage}, {_short(result)}", (intensity, reached), fontsize=7, va="center")
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="billion operations a second")
    return figure


def _stage_s(result: CaseResult, stage: str) -> float:
    """Median seconds of a pass; 0 where it was not measured."""
    spread = result.spreads.get("tpot" if stage == "decode" else stage)
    return spread.p50 / 1e3 if spread else 0.0


def _short(result: CaseResult) -> str:
    side = f"{result.case.image_side} px, " if result.case.image_side else ""
    return f"{side}batch {result.case.batch}"
