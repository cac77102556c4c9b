"""`pixtral run --watch`: real processes that are stopped and killed while pictures come."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from helpers.bundles import exported
from helpers.job_records import by_id
from helpers.pdf_files import pdf_file, text_page
from helpers.places import DEMO, IMAGES
from helpers.videos import write_video
from pixtral_cli.main import app
from pixtral_export.plan import ExportSettings

GIVE_UP_S = 60.0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    return exported(DEMO, folder, ExportSettings(dtype="float32")).path


@pytest.fixture
def cam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("cam").mkdir()
    return Path("cam")


@contextmanager
def watch(bundle: Path, arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "pixtral_cli", "run", str(bundle), "cam", "--watch", *arguments.split()]
    with (
        Path("said").open("w") as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def wait_until(found: Callable[[], object]) -> None:
    started = time.monotonic()
    while not found():
        assert time.monotonic() - started < GIVE_UP_S, Path("said").read_text()
        time.sleep(0.01)


def records() -> list[dict[str, Any]]:
    path = Path("r.jsonl")
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def test_from_an_empty_folder_to_a_stop(bundle: Path, cam: Path) -> None:
    whole = (IMAGES / "red_triangle_64x64.png").read_bytes()
    with watch(bundle, "-o r.jsonl --format csv --report r.html --sidecar .txt") as process:
        wait_until(lambda: "waiting for pictures in cam" in Path("said").read_text())
        with (cam / "slow.png").open("wb", buffering=0) as file:
            for part in (whole[:100], whole[100:200], whole[200:]):
                file.write(part)
                time.sleep(0.2)
        shutil.copy(IMAGES / "blue_circle_64x64.png", cam / "scan.png.part")
        (cam / "scan.png.part").rename(cam / "scan.png")
        wait_until(lambda: len(records()) == 2)
        process.send_signal(signal.SIGTERM)
        answers, _ = process.communicate(timeout=GIVE_UP_S)
    assert process.returncode == 0, Path("said").read_text()
    assert "2 of 2 requests answered" in Path("said").read_text()
    found = by_id(Path("r.jsonl"))
    assert {id: record["answer"].split()[1] for id, record in found.items()} == {
        "cam/slow.png": "red",
        "cam/scan.png": "blue",
    }
    assert sorted(answers.splitlines()) == sorted(f"{id}: {record['answer']}" for id, record in found.items())
    assert (cam / "slow.txt").read_text() == found["cam/slow.png"]["answer"]
    assert Path("r.csv").read_text().count("cam/") >= 2
    page = Path("r.html").read_text()
    assert "cam/slow.png" in page
    assert len(re.findall(r'<script id="p[01]" type="text/plain">.+</script>', page)) == 2  # their thumbnails


def test_killed_it_goes_on_and_asks_nothing_twice(bundle: Path, cam: Path) -> None:
    for name in ("red_triangle_64x64.png", "blue_circle_64x64.png"):
        shutil.copy(IMAGES / name, cam)
    with watch(bundle, "-o r.jsonl --resume --batch 1") as process:
        wait_until(records)
        process.kill()
        process.wait(GIVE_UP_S)
    before = len(records())
    (cam / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n, and no picture IEND\xaeB`\x82")
    with watch(bundle, "-o r.jsonl --resume --json") as process:
        wait_until(lambda: len(records()) == 3)
        process.send_signal(signal.SIGINT)
        summary = json.loads(process.communicate(timeout=GIVE_UP_S)[0])
    assert process.returncode == 5, Path("said").read_text()
    assert summary | {"requests": 3, "answered": 2, "kept": before} == summary
    assert [failed["id"] for failed in summary["failed"]] == ["cam/broken.png"]
    assert len(by_id(Path("r.jsonl"))) == 3


def run(bundle: Path, arguments: str) -> Any:
    return CliRunner().invoke(app, ["run", str(bundle), *arguments.split()])


def test_it_ends_by_itself_after_so_many(bundle: Path, cam: Path) -> None:
    for number in range(3):
        shutil.copy(IMAGES / "red_triangle_64x64.png", cam / f"{number}.png")
    result = run(bundle, "cam --watch --limit 2 -o elsewhere/r.jsonl --format imagefolder")
    assert result.exit_code == 3
    assert "is not below" in result.stderr
    result = run(bundle, "cam --watch --limit 2 -o cam/metadata.jsonl -p {name}?")
    assert result.exit_code == 0, result.output
    assert [record["question"] for record in by_id(cam / "metadata.jsonl").values()] == ["0?", "1?"]
    result = run(bundle, "cam --watch --limit 2 -o cam/metadata.jsonl")
    assert result.exit_code == 3
    assert "--resume to go on with it; --force" in result.stderr
    (cam / "0.png").unlink()
    (cam / "1.png").unlink()
    result = run(bundle, "cam --watch --limit 1 -o cam/metadata.jsonl -p {name}? --resume --format csv")
    assert result.exit_code == 0, result.output
    assert Path("cam/metadata.csv").read_text().count("\ncam/") == 3  # of those that have gone, too


def test_a_scanner_that_is_killed_over_a_document_goes_on_with_its_pages(bundle: Path, cam: Path) -> None:
    scan = pdf_file([text_page(word) for word in ("one", "two", "three", "four")])
    with watch(bundle, "-o r.jsonl --resume --batch 1 --pages 1-3 -p {text}?") as process:
        with (cam / "scan.pdf").open("wb", buffering=0) as file:
            for part in (scan[:100], scan[100:-20], scan[-20:]):
                file.write(part)
                time.sleep(0.2)
        wait_until(records)
        process.kill()
        process.wait(GIVE_UP_S)
    before = len(records())
    assert before < 3
    with watch(bundle, "-o r.jsonl --resume --pages 1-3 -p {text}? --json --report r.html") as process:
        wait_until(lambda: len(records()) == 3)
        write_video(cam / "clip.avi", "MJPG", 10)  # nobody asked for frames
        (cam / "bad.pdf").write_bytes(b"%PDF-1.7\nstartxref\n9\n%%EOF")
        wait_until(lambda: len(records()) == 4)
        process.send_signal(signal.SIGINT)
        summary = json.loads(process.communicate(timeout=GIVE_UP_S)[0])
    assert summary | {"requests": 4, "answered": 3, "kept": before} == summary
    assert summary["failed"] == [{"id": "cam/bad.pdf", "error": "cam/bad.pdf: damaged or incomplete PDF"}]
    found = by_id(Path("r.jsonl"))
    asked = {id: record["question"] for id, record in found.items() if record["error"] is None}
    assert asked == {
        f"cam/scan.pdf#page={number}": f"{word}?" for number, word in enumerate(("one", "two", "three"), 1)
    }
    assert len(re.findall(r'<script id="p[0-3]" type="text/plain">.+</script>', Path("r.html").read_text())) == 3
    (cam / "bad.pdf").unlink()
    result = run(bundle, "cam -o r.jsonl --resume --pages 1-3 -p {text}? --json")
    assert json.loads(result.stdout)["kept"] == 3, result.output


def test_clips_and_whole_documents_are_asked_about_where_that_is_wanted(bundle: Path, cam: Path) -> None:
    (cam / "scan.pdf").write_bytes(pdf_file([text_page("one"), text_page("two")]))
    write_video(cam / "clip.mp4", "mp4v", 10)
    result = run(bundle, "cam --watch --limit 2 -o r.jsonl --frames 2 --per document --image-tokens 100 -p {text}?")
    assert result.exit_code == 0, result.output
    found = by_id(Path("r.jsonl"))
    assert {id: [image["path"] for image in record["images"]] for id, record in found.items()} == {
        "cam/clip.mp4": ["cam/clip.mp4#t=0.1", "cam/clip.mp4#t=0.3"],
        "cam/scan.pdf": ["cam/scan.pdf#page=1", "cam/scan.pdf#page=2"],
    }


def test_a_table_that_names_files_has_none_for_a_document(bundle: Path, cam: Path) -> None:
    (cam / "b.pdf").write_bytes(pdf_file([text_page("one"), text_page("two")]))
    shutil.copy(IMAGES / "red_triangle_64x64.png", cam / "a.png")
    result = run(bundle, "cam --watch --limit 2 -o r.jsonl --format imagefolder")
    assert result.exit_code == 5
    assert "cam/b.pdf: its picture is no file that a dataset can name" in result.stderr
    assert [json.loads(line)["file_name"] for line in Path("metadata.jsonl").read_text().splitlines()] == ["cam/a.png"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("cam --watch", "-o results.jsonl"),
        ("cam --watch -o -", "-o results.jsonl"),
        ("--watch -o r.jsonl", "pixtral run BUNDLE photos/ --watch"),
        ("cam/a.png --watch -o r.jsonl", "'cam/a.png' cannot be watched: Not a directory"),
        ("cam cam/* --watch -o r.jsonl", "'cam/*' cannot be watched"),
        ("- --watch -o r.jsonl", "'-' cannot be watched"),
        ("cam --watch -o cam/r.png", "would be taken for a picture"),
        ("cam --watch -o cam/r.pdf", "would be taken for a picture"),
        ("cam --watch -o r.jsonl --pages 3-1", "pages 3-1 end before they begin"),
        ("cam --watch -o r.jsonl --shard 1/2", "--shard would do nothing with --watch"),
        ("cam --watch -o r.jsonl --ray local", "--ray would do nothing with --watch"),
        ("--watch -o r.jsonl --requests asked.jsonl", "--requests would do nothing with --watch"),
        ("cam --watch -o r.jsonl --format parquet --embed", "--embed copies pictures at the end"),
        ("cam --watch -o r.jsonl --format webdataset", "without --watch"),
        ("cam --watch -o r.jsonl --sidecar .txt -p A? -p B?", "asked 2 questions"),
        ("cam --watch -o r.jsonl --sidecar .jsonl --sidecar-dir cam/a.png", "cam/a.png"),
    ],
)
def test_what_cannot_be_watched_is_refused(bundle: Path, cam: Path, arguments: str, said: str) -> None:
    shutil.copy(IMAGES / "red_triangle_64x64.png", cam / "a.png")
    result = run(bundle, arguments)
    assert result.exit_code == 3, result.output
    assert said in result.output
    assert sorted(map(str, Path().rglob("*"))) == ["cam", "cam/a.png"]
