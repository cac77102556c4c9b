"""`pixtral eval` with several budgets of image tokens: a curve of results, kept, gone on with, compared and shown."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from helpers.browser import browser
from helpers.bundles import exported
from helpers.judge_stub import Reply, judge_server
from helpers.places import DEMO
from helpers.rectangles import PICTURES, write_rectangles
from pixtral_cli.main import app
from pixtral_export.plan import ExportSettings
from pixtral_runtime.evaluation.dataset import is_own_file
from pixtral_runtime.generation.model import load_bundle

SHORT = ("--max-new-tokens", 4)
GRID = ("--image-tokens", "full,4,30,4", *SHORT)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    return exported(DEMO, folder, ExportSettings(dtype="float32")).path


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "int4"
    return exported(DEMO, folder, ExportSettings(precision="int4", method="rtn")).path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rectangles(tmp_path_factory.mktemp("data"), PICTURES)


@pytest.fixture(scope="module")
def saved(bundle: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A curve of the bundle with its results and its page."""
    path = tmp_path_factory.mktemp("saved") / "curve.json"
    page = ("--html", path.with_suffix(".html"))
    done = invoke(bundle, "--task", "custom", "--data", data, *GRID, "--save", path, *page)
    assert done.exit_code == 0, done.stderr  # that fewer tokens lose is no failure
    path.with_suffix(".txt").write_text(done.stdout, encoding="utf-8")
    return path


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def examples(path: Path) -> Any:
    return json.loads(path.read_bytes())["examples"]


def test_each_budget_has_a_score_in_pairs_with_the_most_tokens(saved: Path) -> None:
    document = json.loads(saved.read_bytes())
    few, some, whole = document["curve"]
    assert [point["image_tokens"] for point in (few, some, whole)] == [4, 30, None]
    assert few["mean_image_tokens"] <= 4 < some["mean_image_tokens"] <= 30 < whole["mean_image_tokens"]
    assert whole["mean_image_tokens"] == 72  # eight rows of eight patches, each with its end
    assert whole["comparison"] is None
    for point in (few, some):
        change = point["comparison"]["changes"]["exact"]
        means = [one["summary"]["scores"]["exact"]["mean"] for one in (point, whole)]
        assert change["n"] == PICTURES
        assert change["difference"] == pytest.approx(means[0] - means[1])
        assert change["worse"] - change["better"] == round((means[1] - means[0]) * PICTURES)
    assert few["comparison"]["changes"]["exact"]["p_value"] < 0.001
    assert all(point["seconds_per_answer"] > 0 for point in document["curve"])


def test_the_result_of_a_budget_is_that_of_the_budget_alone(
    bundle: Path, data: Path, saved: Path, tmp_path: Path
) -> None:
    alone = ("--task", "custom", "--data", data, *SHORT, "--save", tmp_path / "alone.json")
    done = invoke(bundle, *alone, "--image-tokens", 4, "--against", saved.with_suffix(".4.json"))
    assert done.exit_code == 0, done.stderr
    assert "no difference can be shown" in done.stdout
    assert examples(tmp_path / "alone.json") == examples(saved.with_suffix(".4.json"))
    done = invoke(bundle, *alone, "--image-tokens", "full", "--force")
    assert done.exit_code == 0, done.stderr
    assert examples(tmp_path / "alone.json") == examples(saved.with_suffix(".full.json"))
    assert not (tmp_path / "alone.full.json").exists()


def test_the_table_has_a_row_for_each_budget(saved: Path) -> None:
    header, *rows = saved.with_suffix(".txt").read_text(encoding="utf-8").strip().splitlines()
    assert header.split("  ")[0] == "image tokens"
    assert "against full" in header
    assert [row.split()[0] for row in rows] == ["4", "30", "full"]
    assert "+" not in rows[0]
    assert rows[2].rstrip().endswith(str(PICTURES))


def test_the_model_is_loaded_once_for_all_budgets(bundle: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []

    def counting(*arguments: Any, **options: Any) -> Any:
        loads.append(arguments)
        return load_bundle(*arguments, **options)

    monkeypatch.setattr("pixtral_runtime.batch.worker.load_bundle", counting)
    done = invoke(bundle, "--task", "custom", "--data", data, *GRID, "--limit", 2)
    assert done.exit_code == 0, done.stderr
    assert len(loads) == 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_curve_stopped_between_budgets_is_gone_on_with(
    how: signal.Signals, bundle: Path, data: Path, saved: Path, tmp_path: Path
) -> None:
    path = tmp_path / "curve.json"
    asked = [str(word) for word in ("--task", "custom", "--data", data, *GRID, "--save", path)]
    command = [sys.executable, "-m", "pixtral_cli", "eval", str(bundle), *asked]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not path.with_suffix(".full.json").exists():
        time.sleep(0.001)
    process.send_signal(how)
    said = process.communicate()[1]
    assert not path.exists(), said
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "--resume to go on" in said
    kept = path.with_suffix(".full.answers.jsonl").read_bytes()
    refused = invoke(bundle, *asked)
    assert refused.exit_code == 3
    assert "--resume" in refused.stderr
    done = invoke(bundle, *asked, "--resume")
    assert done.exit_code == 0, done.stderr
    assert path.with_suffix(".full.answers.jsonl").read_bytes() == kept
    points = [json.loads(one.read_bytes())["curve"] for one in (path, saved)]
    for old, new in zip(*points, strict=True):
        assert old["comparison"] == new["comparison"]
        assert old["summary"]["scores"] == new["summary"]["scores"]
        assert old["mean_image_tokens"] == new["mean_image_tokens"]
    assert points[0][2]["summary"]["setting"]["kept"] == PICTURES


def test_another_bundle_is_compared_budget_by_budget(
    bundle: Path, int4: Path, data: Path, saved: Path, tmp_path: Path
) -> None:
    asked = ("--task", "custom", "--data", data, *GRID)
    both = invoke(int4, *asked, "--against", bundle, "--save", tmp_path / "a.json", "--json")
    read = invoke(int4, *asked, "--against", saved, "--html", tmp_path / "b.html", "--json")
    assert {both.exit_code, read.exit_code} <= {0, 6}, both.stderr + read.stderr
    first, second = (json.loads(done.stdout)["curve"] for done in (both, read))
    assert [point["against"] for point in first] == [point["against"] for point in second]
    assert all(point["against"]["changes"]["exact"]["n"] == PICTURES for point in first)
    assert "Against the other" in (tmp_path / "b.html").read_text(encoding="utf-8")
    again = invoke(int4, *asked, "--against", tmp_path / "a.against.json", "--json")  # the other's curve was kept
    assert [point["against"] for point in json.loads(again.stdout)["curve"]] == [point["against"] for point in first]


def test_a_bundle_that_lost_its_answers_at_one_budget_ends_with_exit_6(bundle: Path, data: Path, saved: Path) -> None:
    asked = ("--task", "custom", "--data", data, *GRID, "--max-image-side", 16)  # what a broken export would do
    done = invoke(bundle, *asked, "--against", saved)
    assert done.exit_code == 6, done.stderr
    assert "full: worse by" in done.stdout
    assert "4: no difference can be shown" in done.stdout


def test_what_has_no_score_is_counted_for_each_budget_and_named_once(bundle: Path, tmp_path: Path) -> None:
    data = write_rectangles(tmp_path, 8)
    (data / "03.png").write_bytes(b"broken")
    done = invoke(bundle, "--task", "custom", "--data", data, *GRID, "--json")
    assert done.exit_code == 5, done.stderr
    assert [point["summary"]["scored"] for point in json.loads(done.stdout)["curve"]] == [7, 7, 7]
    assert "with 30 image tokens 7 of 8 examples were scored" in done.stderr
    assert sum(line.startswith("error: 03: ") for line in done.stderr.splitlines()) == 1


def test_the_page_has_the_curve_and_what_changed_in_pictures(saved: Path, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as page:
        for scheme in ("light", "dark"):
            page.prefer(scheme)
            page.open(saved.with_suffix(".html").as_uri())
            assert page.run("[...document.querySelectorAll('svg .name')].map(one => one.textContent)") == [
                "4", "30", "full",
            ]  # fmt: skip
            places = page.run("[...document.querySelectorAll('svg circle')].map(one => one.getBoundingClientRect())"
                              ".map(({x, y}) => [x, y])")  # fmt: skip
            assert places[0][0] < places[1][0] < places[2][0]
            assert places[0][1] > places[2][1]  # a lower score lies lower
            assert "30 image tokens, " in page.run("document.querySelectorAll('svg title')[1].textContent")
            assert page.run("[...document.querySelectorAll('table')][0].rows.length") == 4
            headings = page.run("[...document.querySelectorAll('h2')].map(one => one.textContent)")
            assert headings[1:] == [
                "What changes from full image tokens to 30 image tokens",
                "What changes from 30 image tokens to 4 image tokens",
            ]
            assert page.run("[...document.images].length") > 0
            assert page.run("[...document.images].every(one => one.naturalWidth > 0)")
        assert page.complaints == []


def test_turns_are_rated_for_each_budget(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    data = write_rectangles(tmp_path, 1)
    talk = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a shape"}]
    row = {"image": "00.png", "conversation": json.dumps(talk), "category": "charts"}
    (data / "rows.jsonl").write_text(f"{json.dumps(row)}\n", encoding="utf-8")
    asked = ("--task", "mm_mt_bench", "--data", data, "--save", tmp_path / "r.json", "--image-tokens", "4,full", *SHORT)
    without = invoke(bundle, *asked, "--html", tmp_path / "r.html")
    assert without.exit_code == 5, without.stderr
    assert "Nothing was scored" in (tmp_path / "r.html").read_text(encoding="utf-8")
    with judge_server(Reply("[[8]]"), Reply("[[3]]")) as judge:
        done = invoke(bundle, *asked, "--resume", "--judge-url", judge.url, "--html", tmp_path / "r.html", "--json")
        assert done.exit_code == 0, done.stderr
        assert len(judge.requests) == 2
    few, whole = json.loads(done.stdout)["curve"]
    assert (few["summary"]["scores"]["rating"]["mean"], whole["summary"]["scores"]["rating"]["mean"]) == (3, 8)
    assert few["comparison"]["changes"]["rating"]["difference"] == -5
    assert ">10.0<" in (tmp_path / "r.html").read_text(encoding="utf-8")  # the axis is one of ratings
    assert {path.name for path in tmp_path.glob("r.*.ratings.jsonl")} == {"r.4.ratings.jsonl", "r.full.ratings.jsonl"}


def test_a_curve_among_the_questions_is_none_of_them(saved: Path, tmp_path: Path) -> None:
    assert is_own_file(saved)
    document = json.loads(saved.read_bytes())
    document["task"] = "another"  # changed since it was written
    (tmp_path / "changed.json").write_text(json.dumps(document, indent=1))
    assert not is_own_file(tmp_path / "changed.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--image-tokens", "64,all"), "'all' is no number"),
        (("--image-tokens", "1"), "'1' is no number from 2 on"),
        (("--image-tokens", ""), "'' is no number"),
        (("--image-tokens", "4,8", "--against", "{saved}"), "has no result with 8 image tokens"),
        (("--image-tokens", "4", "--against", "{saved}"), "is a curve over 3 budgets"),
        (("--against", "{one}"), "is the result of one budget"),
        (("--against", "{tmp}/none.json"), "none.json cannot be read"),
        (("--save", "{saved}"), "exists"),
        (("--save", "{tmp}/new.json", "--html", "{tmp}/new.4.json"), "would be written twice"),
        (("--save", "{tmp}/new.json", "--against", "{saved}", "--html", "{one}", "--force"), "is read"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_any_work(
    changes: tuple[str, ...], message: str, bundle: Path, data: Path, saved: Path, tmp_path: Path
) -> None:
    places = {"saved": saved, "one": saved.with_suffix(".4.json"), "tmp": tmp_path}
    line = ("--task", "custom", "--data", data, *GRID, *(word.format(**places) for word in changes))
    refused = invoke(bundle, *line)
    assert refused.exit_code == 3, refused.stderr
    assert message in refused.stderr
    assert "hint:" in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_result_in_the_way_of_a_budget_is_refused_or_replaced(bundle: Path, data: Path, tmp_path: Path) -> None:
    asked = ("--task", "custom", "--data", data, *GRID, "--limit", 2, "--save", tmp_path / "c.json")
    (tmp_path / "c.30.json").write_text("mine")
    refused = invoke(bundle, *asked)
    assert refused.exit_code == 3
    assert "c.30.json exists" in refused.stderr
    done = invoke(bundle, *asked, "--force")
    assert done.exit_code == 0, done.stderr
    assert len(examples(tmp_path / "c.30.json")) == 2


def test_a_curve_is_not_lost_where_one_budget_goes_on_under_its_name(bundle: Path, saved: Path, data: Path) -> None:
    before = saved.read_bytes()
    line = (bundle, "--task", "custom", "--data", data, *SHORT, "--resume", "--save")
    refused = invoke(*line, saved, "--image-tokens", 4)
    assert refused.exit_code == 3
    assert "a curve over 3 budgets" in refused.stderr
    assert "--save another.json" in refused.stderr
    assert saved.read_bytes() == before
    one = saved.with_name("curve.4.json")
    result = one.read_bytes()
    refused = invoke(*line, one, "--image-tokens", "4,30")
    assert refused.exit_code == 3
    assert one.read_bytes() == result
