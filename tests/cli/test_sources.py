"""`pixtral run` over what holds pictures: archives, tables, documents, in one job; its shards, and what is refused."""

from __future__ import annotations

import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from helpers.bundles import exported
from helpers.job_records import by_id
from helpers.pdf_files import pdf_file, text_page
from helpers.places import DEMO, IMAGES
from pixtral_cli.main import app
from pixtral_export.plan import ExportSettings

RED, BLUE = IMAGES / "red_triangle_64x64.png", IMAGES / "blue_circle_64x64.png"
PROMPT = "{name} in {directory} ({tags}): {text} What is shown?"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    return exported(DEMO, folder, ExportSettings(dtype="float32")).path


@pytest.fixture
def inbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a picture, a document and a scan of two pages; beside it an archive, a shard and two tables."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    (tmp_path / "inbox").mkdir()
    (tmp_path / "inbox/a.png").write_bytes(RED.read_bytes())
    (tmp_path / "inbox/a.txt").write_text("sharp")
    (tmp_path / "inbox/b.pdf").write_bytes(pdf_file([text_page("Total 5"), text_page("Thank you")]))
    first, second = Image.open(RED), Image.open(BLUE)
    first.save(tmp_path / "inbox/c.tif", save_all=True, append_images=[second])
    with tarfile.open("shard.tar", "w") as tar:
        tar.add(BLUE, "0001.png")
        tar.add(tmp_path / "inbox/a.txt", "0001.txt")
        tar.add(RED, "0002.png")
    with zipfile.ZipFile("album.zip", "w") as archive:
        archive.write(BLUE, "2024/sea.png")
    rows = [{"bytes": path.read_bytes(), "path": path.name} for path in (RED, BLUE, RED)]
    pq.write_table(pa.table({"image": rows, "n": [0, 1, 2]}), "rows.parquet")
    Path("list.csv").write_text("file,label\ninbox/a.png,x\n")
    return tmp_path


ALL = ("inbox", "shard.tar", "album.zip", "rows.parquet", "list.csv")
QUESTIONS = {
    "inbox/a.png": "a in inbox (sharp):  What is shown?",
    "inbox/b.pdf#page=1": "b in inbox (): Total 5 What is shown?",
    "inbox/b.pdf#page=2": "b in inbox (): Thank you What is shown?",
    "inbox/c.tif#page=1": "c in inbox ():  What is shown?",
    "inbox/c.tif#page=2": "c in inbox ():  What is shown?",
    "shard.tar/0001.png": "0001 in shard (sharp):  What is shown?",
    "shard.tar/0002.png": "0002 in shard ():  What is shown?",
    "album.zip/2024/sea.png": "sea in 2024 ():  What is shown?",
    "rows.parquet/0": "red_triangle_64x64 in rows ():  What is shown?",
    "rows.parquet/1": "blue_circle_64x64 in rows ():  What is shown?",
    "rows.parquet/2": "red_triangle_64x64 in rows ():  What is shown?",
}


def run(bundle: Path, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["run", str(bundle), *arguments, "--max-new-tokens", "6"])


def test_one_job_asks_about_all_that_holds_pictures(bundle: Path, inbox: Path) -> None:
    done = run(bundle, *ALL, "-p", PROMPT, "-o", "r.jsonl", "--format", "csv", "--report", "r.html", "--json")
    assert done.exit_code == 0, done.output
    records = by_id(Path("r.jsonl"))
    assert {id: record["question"] for id, record in records.items()} == QUESTIONS
    summary = json.loads(done.stdout)
    assert (summary["requests"], summary["answered"], summary["shared"]) == (11, 11, 1)  # rows 0 and 2 are one picture
    ids = [line.partition(",")[0] for line in Path("r.csv").read_text(encoding="utf-8-sig").splitlines()]
    assert ids[1:] == list(QUESTIONS)
    assert Path("r.html").read_text().count('type="text/plain">/9j/') == 11  # a JPEG each
    again = run(bundle, *ALL, "-p", PROMPT, "-o", "r.jsonl", "--resume", "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["kept"] == 11


@pytest.mark.parametrize("shards", [2, 7])
def test_shards_of_a_stream_make_the_whole(bundle: Path, inbox: Path, shards: int) -> None:
    assert run(bundle, *ALL, "-o", "whole.jsonl").exit_code == 0
    whole, parts = by_id(Path("whole.jsonl")), dict[str, Any]()
    for index in range(1, shards + 1):
        part = Path(f"part{index}.jsonl")
        assert run(bundle, *ALL, "-o", str(part), "--shard", f"{index}/{shards}").exit_code == 0
        assert not set(by_id(part)) & set(parts)
        parts |= by_id(part)
    assert parts == whole and len(whole) == 11


def test_a_document_is_one_record_where_that_is_wanted(bundle: Path, inbox: Path) -> None:
    done = run(
        bundle,
        "inbox/b.pdf",
        "inbox/c.tif",
        "--per",
        "document",
        "--image-tokens",
        "300",
        "-p",
        "{text}",
        "-o",
        "r.jsonl",
    )
    assert done.exit_code == 0, done.output
    records = by_id(Path("r.jsonl"))
    assert records["inbox/b.pdf"]["question"] == "Total 5\n\nThank you"
    assert [image["path"] for image in records["inbox/c.tif"]["images"]] == [f"inbox/c.tif#page={n}" for n in (1, 2)]


def test_a_document_that_is_too_long_stops_no_other(bundle: Path, inbox: Path) -> None:
    done = run(bundle, "inbox", "--per", "document", "-o", "r.jsonl")
    assert done.exit_code == 5, done.output
    records = by_id(Path("r.jsonl"))
    assert [id for id, record in records.items() if record["error"]] == ["inbox/b.pdf"]
    assert "1024" in records["inbox/b.pdf"]["error"] and "--image-tokens" in records["inbox/b.pdf"]["hint"]
    assert len(records) == 3


def test_what_is_broken_is_a_record_and_the_rest_is_answered(bundle: Path, inbox: Path) -> None:
    Path("inbox/b.pdf").write_bytes(b"%PDF-1.7\nnothing")
    shard = Path("shard.tar").read_bytes()
    Path("shard.tar").write_bytes(shard[: shard.index(RED.read_bytes()) + 100])
    done = run(bundle, "inbox", "shard.tar", "-o", "r.jsonl")
    assert done.exit_code == 5, done.output
    failed = {id: record for id, record in by_id(Path("r.jsonl")).items() if record["error"]}
    assert "inbox/b.pdf" in failed and len(failed) == 2
    assert all(record["hint"] for record in failed.values())
    assert any("0001.txt" in record["error"] for record in failed.values())  # behind which the shard breaks off
    assert len(by_id(Path("r.jsonl"))) == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("inbox/a.png --column x", "--column would do nothing"),
        ("shard.tar --pages 1", "--pages would do nothing"),
        ("inbox/a.png --frames 2", "--frames would do nothing"),
        ("rows.parquet --column x", "image (struct"),
        ("inbox --per line", "--per page|document|frame|clip"),
        ("inbox --pages 0", "--pages 1-3,7,10-"),
        ("inbox/b.pdf --every 0s", "--every 2s"),
        ("inbox/b.pdf --every 2s --frames 3", "--frames 8"),
        ("shard.tar --ray local", "leave --ray away"),
        ("shard.tar --sidecar .txt", "no file that a sidecar"),
        ("rows.parquet -o rows.parquet --force", "is read, and cannot be written"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(bundle: Path, inbox: Path, arguments: str, said: str) -> None:
    done = run(bundle, *arguments.split())
    assert done.exit_code in (2, 3), done.output
    assert said in done.output
    assert not list(inbox.glob("*.jsonl"))
