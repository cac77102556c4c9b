"""The page of a benchmark: complete, harmless, and refused before the measurement where it cannot be written."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from helpers.bundles import exported
from helpers.places import DEMO
from helpers.reports import SETTING, latency
from pixtral_cli.main import app
from pixtral_export.plan import ExportSettings
from pixtral_runtime.bench.page import bench_page
from pixtral_runtime.bench.report import Report, StageChange, read_report
from pixtral_runtime.bench.spread import Difference


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(DEMO, tmp_path_factory.mktemp("bundles") / "bundle", ExportSettings(dtype="float32")).path


def test_the_page_has_setting_warnings_results_comparison_and_plots() -> None:
    change = StageChange("a case", "tpot", Difference(1.2, 1.1, 1.3, 0.001), True)
    page = bench_page(Report(SETTING, [latency()], ["<b>lock</b> the clocks"]), [change])
    assert "&lt;b&gt;lock&lt;/b&gt; the clocks" in page and "<b>" not in page
    assert "a &lt;device&gt;" in page and "+20.0%" in page and "REGRESSED" in page
    assert len(re.findall(r"<figure><svg", page)) == 2 and "{{" not in page
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        ET.fromstring(svg)
    assert not re.findall(r'(?:src|href)="(?!#)', page)


def test_a_device_whose_name_looks_like_a_place_of_the_template_is_shown_as_it_is() -> None:
    plain, odd = (bench_page(Report(SETTING | {"device": name}, [latency()])) for name in ("DEVICE", "{{style}}"))
    assert odd == plain.replace("DEVICE", "{{style}}") and odd.count("{{style}}") >= 3  # title, heading, setting


def test_plots_and_page_are_written_with_peak_memory(bundle: Path, tmp_path: Path) -> None:
    asked = (bundle, "--image-side", 64, "--decode-tokens", 4, "--runs", 3, "--warmup", 1)
    made = invoke(*asked, "--plot", tmp_path / "plots", "--html", tmp_path / "b.html", "--save", tmp_path / "b.json")
    assert made.exit_code == 0, made.stderr
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {"latency.svg", "latency.png", "roofline.svg", "roofline.png"}
    assert "peak resident memory" in made.stdout and "GPU memory" in made.stdout
    page = (tmp_path / "b.html").read_text(encoding="utf-8")
    assert "peak resident memory" in page and page.count("<svg") == 2
    (result,) = read_report(tmp_path / "b.json").results
    assert result.memory["peak_rss_bytes"] > 10_000_000
    assert set(result.costs) == {"vision", "prefill", "decode"} and result.costs["decode"]["flops"] > 0


@pytest.mark.parametrize("option", ["--plot", "--html"])
def test_what_cannot_be_written_is_refused_before_measuring(option: str, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    done = invoke(bundle, option, tmp_path / "file" / "below")
    assert done.exit_code == 3 and option in done.stderr and "hint:" in done.stderr


def test_a_missing_matplotlib_is_said_before_measuring(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = invoke(bundle, "--html", "b.html")
    assert done.exit_code == 4 and "pip install 'pixtral[bench]'" in done.stderr
