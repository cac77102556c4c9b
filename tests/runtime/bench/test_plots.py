"""Plots of benchmarks: what they show is what was measured, and nothing is drawn without data."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers.reports import SETTING, latency, serve, throughput
from pixtral_runtime.bench.cases import Case, CaseResult
from pixtral_runtime.bench.plots import draw_plots, save_plots, svg_of
from pixtral_runtime.bench.report import Report, memory_lines
from pixtral_runtime.device.memory import memory_use, vram_of
from pixtral_runtime.device.nvml import Gpu
from pixtral_runtime.errors import InputError


def texts(svg: str) -> list[str]:
    return [node.text or "" for node in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_plots_without_data_are_not_drawn() -> None:
    assert set(draw_plots(Report(SETTING, [latency()]))) == {"latency", "roofline"}
    assert set(draw_plots(Report({}, [latency()]))) == {"latency"}  # no ceiling was measured
    assert set(draw_plots(Report(SETTING, [serve(1, 10, 1), serve(2, 20, 2)]))) == {"load"}
    assert set(draw_plots(Report(SETTING, [throughput(1), throughput(2)]))) == {"load"}
    assert draw_plots(Report(SETTING, [throughput(1)])) == {}


def test_the_bars_are_the_medians_of_the_stages() -> None:
    (axes,) = draw_plots(Report(SETTING, [latency(), latency(1024)]))["latency"].axes
    widths = [bar.get_width() for bars in axes.containers[:5] for bar in bars]
    assert widths == [1, 1, 2, 2, 100, 100, 50, 50, 100, 100]  # decode: 10 steps of 10 ms
    assert axes.get_xlabel() == "milliseconds, medians" and "a <device>" in axes.get_title(loc="left")


def test_the_knee_is_marked_where_requests_leave_as_fast_as_they_come() -> None:
    figure = draw_plots(Report(SETTING, [serve(1, 10, 1), serve(4, 30, 3.9), serve(8, 300, 4.1)]))["load"]
    assert any("kept up with 4/s" in text for text in texts(svg_of(figure)))
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines["p50"].get_xdata()) == [1, 3.9, 4.1]  # type: ignore[arg-type]
    assert list(lines["p50"].get_ydata()) == [15, 45, 450]  # type: ignore[arg-type]


def test_points_of_the_roofline_are_intensity_and_rate() -> None:
    (axes,) = draw_plots(Report(SETTING, [latency()]))["roofline"].axes
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if len(line.get_xdata()) == 1]  # type: ignore[index,arg-type]
    assert points == [pytest.approx(each) for each in ((10, 10), (10, 20), (10, 100))]
    assert axes.get_xscale() == axes.get_yscale() == "log"


def test_the_same_report_gives_the_same_svg_with_text_as_text() -> None:
    first, again = (svg_of(draw_plots(Report(SETTING, [latency()]))["latency"]) for _ in range(2))
    assert first == again and first.startswith("<svg")
    assert any("a <device>" in text for text in texts(first)) and "prefill" in texts(first)


def test_plots_are_saved_as_svg_and_png(tmp_path: Path) -> None:
    paths = save_plots(Report(SETTING, [latency()]), tmp_path)
    assert [path.name for path in paths] == ["latency.svg", "latency.png", "roofline.svg", "roofline.png"]
    assert Image.open(tmp_path / "latency.png").width >= 1000
    with pytest.raises(InputError, match="nothing to plot"):
        save_plots(Report(SETTING, [throughput(1)]), tmp_path)


class Library:
    """NVML as the driver answers: this process and another one."""

    NVMLError = ValueError

    def __init__(self, used: int | None) -> None:
        self._used = used

    def nvmlDeviceGetComputeRunningProcesses(self, handle: object) -> list[Any]:
        return [type("Process", (), {"pid": pid, "usedGpuMemory": used}) for pid, used in ((1, 5), (7, self._used))]


def test_memory_of_a_gpu_is_that_of_this_process_or_says_why_not() -> None:
    assert vram_of(Gpu(Library(123), None), 7) == (123, "")
    for gpu, process in ((Gpu(Library(None), None), 7), (Gpu(Library(0), None), 7), (Gpu(Library(1), None), 9)):
        seen, reason = vram_of(gpu, process)
        assert seen is None and reason


def test_peak_memory_is_read_from_the_system_and_never_zero() -> None:
    assert memory_use("VmPeak:\t 99 kB\nVmHWM:\t   2048 kB\n")["peak_rss_bytes"] == 2048 * 1024
    assert memory_use("")["peak_rss_bytes"] is None
    assert memory_use()["peak_rss_bytes"] > 10_000_000
    lines = memory_lines([CaseResult(Case("latency", 1, 8, 64), {}, memory=memory_use("VmHWM:\t 2000000 kB"))])
    assert lines[0] == "peak resident memory, latency, 64 px, batch 1, 8 new tokens: 2.05 GB"
    assert lines[1].startswith("GPU memory") and " 0 " not in lines[1]
