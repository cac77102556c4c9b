"""`pixtral run --sidecar`: captions of real answers beside pictures, and what is refused before the work."""

from __future__ import annotations

import json
import shutil
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from helpers.browser import browser
from helpers.bundles import exported
from helpers.job_records import by_id
from helpers.places import DEMO, IMAGES
from pixtral_cli.main import app
from pixtral_export.plan import ExportSettings

PHOTOS = {"red.png": "red_triangle_64x64.png", "sub/blue.png": "blue_circle_64x64.png"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    return exported(DEMO, folder, ExportSettings(dtype="float32")).path


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, source in PHOTOS.items():
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(IMAGES / source, tmp_path / "photos" / name)
    return Path("photos")


def run(bundle: Path, arguments: str) -> Any:
    return CliRunner().invoke(app, ["run", str(bundle), "photos", "-r", *arguments.split()])


def test_answers_become_sidecars_and_a_dataset(bundle: Path, photos: Path) -> None:
    (photos / "red.txt").write_text("tag")
    asked = "--sidecar .txt --existing append -o photos/r.jsonl --format imagefolder --json"
    first = run(bundle, asked)
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout)["sidecars"]["written"] == 2
    answers = {name: record["answer"] for name, record in by_id(photos / "r.jsonl").items()}
    assert "red" in answers["photos/red.png"]
    captions = {"red.png": f"tag, {answers['photos/red.png']}", "sub/blue.png": answers["photos/sub/blue.png"]}
    assert {name: (photos / name).with_suffix(".txt").read_text() for name in PHOTOS} == captions
    lines = [json.loads(line) for line in (photos / "metadata.jsonl").read_text().splitlines()]
    assert lines == [{"file_name": name, "text": text} for name, text in captions.items()]
    again = run(bundle, f"{asked} --resume")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["sidecars"] | {"kept": 2, "written": 0} == json.loads(again.stdout)["sidecars"]
    assert (photos / "red.txt").read_text() == captions["red.png"]


def test_captions_are_edited_on_the_page_and_unpacked_where_the_job_wrote_them(bundle: Path, photos: Path) -> None:
    asked = ["--sidecar", ".caption", "--sidecar-dir", "captions", "--prefix", "TOK, ", "--report", "page.html"]
    asked += ["-o", "r.jsonl"]
    assert CliRunner().invoke(app, ["run", str(bundle), "photos", "-r", *asked]).exit_code == 0
    before = Path("captions/red.caption").read_text()
    with browser(Path("browser")) as page:
        page.open(Path("page.html").absolute().as_uri())
        shown = page.run("records.map((record, index) => [record.id, textOf(index)])")
        page.run(f"beginEdit({[id for id, _ in shown].index('photos/sub/blue.png')})")
        page.type(", ✓")
        page.press("Enter", control=True)
        Path("downloads").mkdir()
        archive = page.downloaded(Path("downloads").absolute(), "at('sidecars').click()")
        assert page.complaints == []
    assert dict(shown)["photos/red.png"] == before
    with zipfile.ZipFile(archive) as files:
        files.extractall(".")
    assert Path("captions/red.caption").read_text() == before
    assert Path("captions/sub/blue.caption").read_text() == dict(shown)["photos/sub/blue.png"] + ", ✓"
    again = CliRunner().invoke(app, ["run", str(bundle), "photos", "-r", *asked, "--resume"])
    assert "1 changed by somebody since and left alone" in again.stderr


def test_pictures_with_a_sidecar_are_not_asked_about_and_cut_off_answers_not_written(
    bundle: Path, photos: Path
) -> None:
    (photos / "red.txt").write_text("mine")
    result = run(bundle, "--sidecar .txt --max-new-tokens 3")
    assert result.exit_code == 0, result.output
    assert "1 of 1 requests answered" in result.stderr
    assert "sidecars: 1 there already and left alone, 1 not written, for want of a whole answer" in result.stderr
    assert [path.name for path in photos.rglob("*.txt")] == ["red.txt"]


def test_a_resumed_run_asks_with_the_tags_of_before_its_own_captions(bundle: Path, photos: Path) -> None:
    (photos / "red.txt").write_text("sharp")
    asked = "--sidecar .txt --existing append -o r.jsonl -p {name}:{tags}{tag}{tag}?"
    first = run(bundle, asked)
    assert first.exit_code == 0, first.output
    assert first.stderr.count("{tag} stays in the prompt as it is") == 1
    records, sidecar = by_id(Path("r.jsonl")), (photos / "red.txt").read_text()
    assert records["photos/red.png"]["question"] == "red:sharp{tag}{tag}?"
    assert records["photos/sub/blue.png"]["question"] == "blue:{tag}{tag}?"
    again = run(bundle, f"{asked} --resume")
    assert again.exit_code == 0, again.output
    assert "2 were done before" in again.stderr
    assert by_id(Path("r.jsonl")) == records
    assert (photos / "red.txt").read_text() == sidecar != "sharp"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--sidecar .txt --existing append", "needs an output file"),
        ("--sidecar .txt --existing prepend -o -", "needs an output file"),
        ("--sidecar .txt --existing replace", "skip|overwrite|append|prepend"),
        ("--sidecar txt", "no suffix of a file"),
        ("--sidecar .txt -p What? -p Where?", "asked 2 questions"),
        ("--sidecar .md --existing overwrite -p @photos/red.md", "photos/red.md is read"),
        ("--sidecar .new -o photos/red.new", "photos/red.new would be written twice"),
        ("--sidecar .md --sidecar-dir photos/red.png", "photos/red.png"),
        ("--format imagefolder -o elsewhere/r.jsonl", "is not below"),
        ("--format imagefolder -o r.jsonl -p What? -p Where?", "asked about twice"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_work(bundle: Path, photos: Path, arguments: str, said: str) -> None:
    (photos / "red.md").write_text("What is it?")
    before = sorted(Path().rglob("*"))
    result = run(bundle, arguments)
    assert result.exit_code == 3, result.output
    assert said in result.output
    assert sorted(Path().rglob("*")) == before


@pytest.mark.skipif(find_spec("datasets") is None, reason="needs the package 'datasets'")
def test_datasets_read_the_captions(bundle: Path, photos: Path, tmp_path: Path) -> None:
    from datasets import load_dataset

    assert run(bundle, "-o photos/r.jsonl --format imagefolder").exit_code == 0
    data = load_dataset("imagefolder", data_dir=str(photos), split="train", cache_dir=str(tmp_path / "cache"))
    answers = [record["answer"] for record in by_id(photos / "r.jsonl").values()]
    assert sorted(data["text"]) == sorted(answers)
    assert data[0]["image"].size == (64, 64)
