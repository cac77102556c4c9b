"""`pixtral tune` end to end: a cliff is found, records are gone on with, the page shows it, bad input is refused."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from helpers.browser import browser
from helpers.bundles import exported
from helpers.places import DEMO
from helpers.rectangles import GRID, PICTURES, write_rectangles
from pixtral_cli.main import app
from pixtral_export.plan import ExportSettings


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    return exported(DEMO, folder, ExportSettings(dtype="float32")).path


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "half"
    return exported(DEMO, folder, ExportSettings(dtype="float16")).path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rectangles(tmp_path_factory.mktemp("photos"), PICTURES)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_cheapest_sufficient_setting_is_found_and_its_line_works(
    bundle: Path, photos: Path, tmp_path: Path
) -> None:
    asked = ("tune", bundle, "--images", photos, "--questions", photos / "rows.jsonl", *GRID, "-o", tmp_path / "out")
    done = invoke(*asked)
    assert done.exit_code == 0, done.stderr
    result = json.loads((tmp_path / "out" / "tune.json").read_text())
    assert [one["state"] for one in result["settings"]] == ["worse", "recommended", "dearer"]
    assert result["judged_by"] == "answers"
    assert result["settings"][0]["asked"] < result["settings"][1]["asked"] <= PICTURES
    line = done.stdout.splitlines()[-1]
    assert line == result["command"]
    assert line.endswith("--image-tokens 30")
    again = invoke(*shlex.split(line)[1:], "--max-new-tokens", 1, "--limit", 1)
    assert again.exit_code == 0, again.stderr

    kept = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.jsonl")}
    resumed = invoke(*asked, "--resume", "--json")
    assert resumed.exit_code == 0, resumed.stderr
    assert json.loads(resumed.stdout) == result  # from records, times included
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.jsonl")} == kept
    refused = invoke(*asked)
    assert refused.exit_code == 3
    assert "exists" in refused.stderr
    assert "--resume" in refused.stderr


def test_an_interrupted_tuning_asks_only_what_is_missing(bundle: Path, photos: Path, tmp_path: Path) -> None:
    asked = ("tune", bundle, "--images", photos, "--questions", photos / "rows.jsonl", *GRID, "-o", tmp_path / "out")
    first = invoke(*asked, "--budget", 30, "--json")
    assert json.loads(first.stdout)["requests"] == 30
    before = {path: path.read_text().splitlines() for path in (tmp_path / "out").glob("*.jsonl")}
    done = json.loads(invoke(*asked, "--resume", "--json").stdout)
    assert done["settings"][1]["state"] == "recommended"
    for path, lines in before.items():
        assert path.read_text().splitlines()[: len(lines)] == lines


def test_without_answers_the_others_are_judged_by_all_tokens(bundle: Path, photos: Path) -> None:
    done = invoke(
        "tune", bundle, "--images", photos, "--questions", photos / "asked.txt", *GRID, "--metric", "exact", "--json"
    )
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["judged_by"] == "full image tokens"
    assert result["best"] == 2
    assert result["settings"][2]["score"]["mean"] == 1
    assert result["recommended"] == 1
    assert "-p 'what color is the rectangle?'" in result["command"]


def test_costs_are_predicted_for_a_named_device_and_said_to_be(half: Path, photos: Path) -> None:
    line = ("tune", half, "--images", photos, "--questions", photos / "rows.jsonl", *GRID, "--budget", 60, "--json")
    first, second = (json.loads(invoke(*line, "--device", "orin-nx-16").stdout) for _ in range(2))
    assert first["costs"] == "predicted for orin-nx-16, at best"
    costs = [one["seconds"] for one in first["settings"]]
    assert costs == [one["seconds"] for one in second["settings"]]  # nothing in them was measured
    assert 0 < costs[0] <= costs[1] < costs[2]
    faster = json.loads(invoke(*line, "--device", "h100").stdout)
    assert faster["settings"][2]["seconds"] < costs[2]


def test_two_bundles_are_settings_of_one_grid(bundle: Path, half: Path, photos: Path, tmp_path: Path) -> None:
    line = (
        "tune",
        bundle,
        half,
        "--images",
        photos,
        "--questions",
        photos / "asked.txt",
        *GRID,
        "-o",
        tmp_path / "out",
    )
    done = invoke(*line, "--metric", "exact", "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    tried = [(one["bundle"], one["image_tokens"]) for one in result["settings"]]
    assert tried == [(str(path), tokens) for path in (bundle, half) for tokens in (4, 30, None)]
    assert result["judged_by"] == f"{bundle} with full image tokens"
    assert result["settings"][result["recommended"]]["image_tokens"] == 30
    assert len(list((tmp_path / "out").glob("*.jsonl"))) == 6
    records = [json.loads(text) for text in (tmp_path / "out").glob("half-*-30.jsonl").__next__().open()]
    assert {record["settings"]["image_tokens"] for record in records} == {30}
    assert max(record["image_tokens"] for record in records) <= 30


def test_the_page_shows_the_curve_and_what_changed(bundle: Path, photos: Path, tmp_path: Path) -> None:
    page_file = tmp_path / "tune.html"
    done = invoke("tune", bundle, "--images", photos, "--questions", photos / "rows.jsonl", *GRID, "--html", page_file)
    assert done.exit_code == 0, done.stderr
    with browser(tmp_path / "profile") as page:
        for scheme in ("light", "dark"):
            page.prefer(scheme)
            page.open(page_file.as_uri())
            assert page.run("document.querySelectorAll('svg circle').length") == 3
            assert page.run("document.querySelector('svg .chosen title').textContent").startswith("30 image tokens")
            places = page.run("[...document.querySelectorAll('svg circle')].map(one => one.getBoundingClientRect().y)")
            assert places[0] > places[1]  # a lower score lies lower
            assert "--image-tokens 30" in page.run("document.querySelector('pre').textContent")
            assert page.run("[...document.images].length") > 0
            assert page.run("[...document.images].every(one => one.naturalWidth > 0)")
            colours = page.run("[getComputedStyle(document.body).backgroundColor, "
                               "getComputedStyle(document.querySelector('svg .name')).fill]")  # fmt: skip
            assert colours[0] != colours[1]
        assert page.complaints == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--image-tokens", "64,all"), "'all' is no number"),
        (("--image-tokens", "1"), "'1' is no number from 2 on"),
        (("--device", "abacus"), "no device 'abacus'"),
        (("--tolerance", "0"), "tolerance of 0 points"),
        (("--metric", "taste"), "no metric 'taste'"),
        (("--images", "nowhere"), "nowhere is no folder"),
        (("--questions", "nowhere.jsonl"), "nowhere.jsonl cannot be read"),
        (("--resume",), "needs a folder"),
        (("--budget", "2"), "one example of each of 3 settings"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    changes: tuple[str, ...], message: str, bundle: Path, photos: Path
) -> None:
    line = ("tune", bundle, "--images", photos, "--questions", photos / "rows.jsonl", *GRID)
    refused = invoke(*line, *changes)
    assert refused.exit_code == 3, refused.stderr
    assert message in refused.stderr
    assert "hint:" in refused.stderr


def test_rows_that_cannot_be_asked_are_named_and_count_nowhere(bundle: Path, photos: Path, tmp_path: Path) -> None:
    rows = (
        photos / "rows.jsonl"
    ).read_text() + '{"question": "where?", "image": "gone.png", "answers": ["here"]}\nno\n'
    rows += '{"question": "what color is it?", "image": "00.png", "id": "unanswered"}\n'
    (tmp_path / "rows.jsonl").write_text(rows)
    line = ("tune", bundle, "--images", photos, "--questions", tmp_path / "rows.jsonl", *GRID, "--budget", 60)
    done = invoke(*line, "--json")
    assert done.exit_code == 5
    result = json.loads(done.stdout)
    assert result["examples"] == PICTURES
    assert len(result["broken_rows"]) == 3
    assert "gone.png" in done.stderr
    assert "no answers" in done.stderr


def test_pictures_that_cannot_be_read_are_counted_and_the_command_says_so(bundle: Path, tmp_path: Path) -> None:
    pictures = write_rectangles(tmp_path / "pictures", 20)
    whole = invoke("tune", bundle, "--images", pictures, "--questions", pictures / "asked.txt", *GRID, "--json")
    assert whole.exit_code == 0
    tokens = [row["mean_image_tokens"] for row in json.loads(whole.stdout)["settings"]]
    (pictures / "empty.png").write_bytes(b"")
    (pictures / "text.png").write_text("no picture")
    done = invoke("tune", bundle, "--images", pictures, "--questions", pictures / "asked.txt", *GRID, "--json")
    assert done.exit_code == 5
    assert "2 of 22 examples could not be answered" in done.stderr
    result = json.loads(done.stdout)
    assert result["unanswered"] == 2
    assert [row["mean_image_tokens"] for row in result["settings"]] == tokens  # of what was answered


def test_where_nothing_was_answered_nothing_is_claimed(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "empty.png").write_bytes(b"")
    (tmp_path / "asked.txt").write_text("what is it?\n")
    page = tmp_path / "tune.html"
    line = ("tune", bundle, "--images", tmp_path / "photos", "--questions", tmp_path / "asked.txt", *GRID)
    done = invoke(*line, "--html", page)
    assert done.exit_code == 5
    assert "no example was answered" in done.stdout
    assert "%" not in done.stdout.replace("95 % interval", "")
    assert "more are needed" not in page.read_text()


def test_tokens_are_those_of_a_picture_where_a_question_has_two(bundle: Path, photos: Path, tmp_path: Path) -> None:
    rows = [
        {"images": ["00.png", "01.png"], "question": f"what is {word}?", "answers": ["a"]} for word in ("this", "that")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    result = json.loads(
        invoke("tune", bundle, "--images", photos, "--questions", tmp_path / "rows.jsonl", *GRID, "--json").stdout
    )
    assert result["settings"][2]["mean_image_tokens"] == 72


def test_the_line_repeats_what_decides_answers(bundle: Path, photos: Path) -> None:
    line = ("tune", bundle, "--images", photos, "--questions", photos / "rows.jsonl", *GRID, "--json")
    said = json.loads(invoke(*line, "--preprocess", "hf", "--backend", "ort-cpu", "--threads", 1).stdout)["command"]
    options = shlex.split(said)[4:]
    assert dict(zip(options[::2], options[1::2], strict=True)) == {
        "--preprocess": "hf",
        "--max-new-tokens": "4",
        "--threads": "1",
        "--backend": "ort-cpu",
        "--image-tokens": "30",
    }


def test_the_line_is_greedy_where_the_checkpoint_is_not(photos: Path, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn"
    shutil.copytree(DEMO, drawn)
    (drawn / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.7}')
    bundle = exported(drawn, tmp_path / "bundle", ExportSettings(dtype="float32")).path
    line = ("tune", bundle, "--images", photos, "--questions", photos / "rows.jsonl", *GRID, "--json")
    assert "--temperature 0 " in json.loads(invoke(*line).stdout)["command"]


@pytest.mark.parametrize("question", ["what is on {name}?", "is [image] red?", "@home"])
def test_a_question_that_a_job_would_change_is_refused(
    question: str, bundle: Path, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "asked.txt").write_text(f"what is it?\n{question}\n")
    refused = invoke("tune", bundle, "--images", photos, "--questions", tmp_path / "asked.txt", *GRID)
    assert refused.exit_code == 3
    assert question in refused.stderr
    assert ".jsonl" in refused.stderr


def test_a_bundle_named_twice_counts_once_and_copies_are_refused(bundle: Path, photos: Path, tmp_path: Path) -> None:
    line = ("--images", photos, "--questions", photos / "rows.jsonl", *GRID, "--json")
    (tmp_path / "link").symlink_to(bundle.parent)
    done = invoke("tune", bundle, f"{bundle}/", tmp_path / "link" / bundle.name, *line)
    assert [row["image_tokens"] for row in json.loads(done.stdout)["settings"]] == [4, 30, None]
    copy = tmp_path / "elsewhere" / bundle.name
    shutil.copytree(bundle, copy)
    refused = invoke("tune", bundle, copy, *line)
    assert refused.exit_code == 3
    assert "same bundle" in refused.stderr


def test_a_question_that_is_asked_twice_is_evidence_once(bundle: Path, photos: Path, tmp_path: Path) -> None:
    row = (photos / "rows.jsonl").read_text().splitlines()[0]
    other = json.loads(row) | {"id": "other"}
    (tmp_path / "rows.jsonl").write_text(f"{row}\n{json.dumps(other)}\n")
    done = invoke("tune", bundle, "--images", photos, "--questions", tmp_path / "rows.jsonl", *GRID, "--json")
    assert done.exit_code == 5
    assert json.loads(done.stdout)["examples"] == 1
    assert "line 1 asks the same" in done.stderr
    (tmp_path / "asked.txt").write_text("what is it?\n what is it?\n")
    lines = invoke("tune", bundle, "--images", photos, "--questions", tmp_path / "asked.txt", *GRID, "--json")
    assert json.loads(lines.stdout)["examples"] == PICTURES


def test_a_page_never_takes_the_place_of_a_picture(bundle: Path, tmp_path: Path) -> None:
    photos = write_rectangles(tmp_path / "photos", 4)
    picture = photos / "01.png"
    before = picture.read_bytes()
    line = (bundle, "--html", picture, "--force")
    tuned = invoke("tune", *line, "--images", photos, "--questions", photos / "rows.jsonl", *GRID)
    evaluated = invoke("eval", *line, "--task", "custom", "--data", photos)
    compared = invoke("compare", bundle, *line, "--images", photos, "--limit", 1)  # which is another one
    for refused in (tuned, evaluated, compared):
        assert refused.exit_code == 3
        assert "is read, and cannot be written as well" in refused.stderr
    assert picture.read_bytes() == before


@pytest.mark.parametrize("metric", ["baseline", "level_3", "gsm8k_flexible", "math_equivalent"])
def test_without_answers_a_metric_must_call_equal_answers_equal(metric: str, bundle: Path, photos: Path) -> None:
    line = ("tune", bundle, "--images", photos, *GRID, "--metric", metric, "--budget", 9)
    refused = invoke(*line, "--questions", photos / "asked.txt")
    assert refused.exit_code == 3
    assert f"{metric} needs right answers" in refused.stderr
    assert "mistral_anls" in refused.stderr
    assert invoke(*line, "--questions", photos / "rows.jsonl").exit_code == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("q.json", "[\n{}\n]\n"),
        ("q.csv", "image,question\n00.png,what is it?\n"),
        ("q.txt", '{"image": "00.png", "question": "what is it?"}\n'),
    ],
)
def test_rows_are_not_asked_as_if_they_were_questions(
    name: str, content: str, bundle: Path, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    refused = invoke("tune", bundle, "--images", photos, "--questions", tmp_path / name, *GRID)
    assert refused.exit_code == 3
    assert "no question a line" in refused.stderr
    assert "rows of JSON" in refused.stderr
