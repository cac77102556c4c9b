"""What commands write: judged before the work, never over what was not named, and readable to whom it is for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from helpers.bundles import export_tiny
from helpers.places import ROOT
from helpers.tiny import tiny_config, write_checkpoint
from pixtral_cli.main import app
from pixtral_runtime.bundle.manifest import LOCK

SHORT = ("--max-new-tokens", "2")
QUICK = ("--image-side", "16", "--runs", "1", "--warmup", "0", "--decode-tokens", "2")


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    return export_tiny(write_checkpoint(folder / "checkpoint", tiny_config()), folder / "bundle")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with two pictures, a file of the user's, and a small dataset."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (32, 16), color).save(tmp_path / "photos" / name)
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "mine.csv").write_text("mine")
    with tarfile.open(tmp_path / "mine-000003.tar", "w") as shard:
        shard.add(tmp_path / "photos" / "a.png", "a.png")
    row = {"question": "Which?", "answer": "red", "image": "photos/a.png"}
    for name in ("rows.jsonl", "data/rows.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    return tmp_path


RUN = "run BUNDLE photos"
EVAL = "eval BUNDLE --task custom --data data"
BENCH = "bench BUNDLE"
COMPARE = "compare BUNDLE BUNDLE --images photos"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (f"{RUN} -o mine", "mine exists"),
        (f"{RUN} -o r.jsonl --report mine", "mine exists"),
        (f"{RUN} --report mine", "mine exists"),
        (f"{RUN} -o mine.jsonl --format csv", "mine.csv exists"),
        (f"{RUN} -o mine.jsonl --format webdataset", "mine-000003.tar exists"),
        ("run BUNDLE photos mine-000003.tar -o mine.jsonl --format webdataset --force", "mine-000003.tar is read"),
        (f"{RUN} -o r.csv --format csv", "r.csv would be written twice"),
        (f"{RUN} -o r.jsonl --report ./r.jsonl", "./r.jsonl would be written twice".removeprefix("./")),
        (f"{RUN} -o photos/a.png --force", "photos/a.png is read"),
        (f"{RUN} -p @mine -o mine --force", "mine is read"),
        (f"{RUN} -o BUNDLE/bundle.json --force", "bundle.json is read"),
        (f"{RUN} --report BUNDLE/decoder.onnx --force", "decoder.onnx is read"),
        ("run BUNDLE --requests asked.jsonl -o asked.jsonl --force", "asked.jsonl is read"),
        (f"{RUN} -o photos", "photos is a folder"),
        (f"{RUN} -o photos/", "photos/ is a folder"),
        (f"{RUN} -o new/", "new/ is a folder"),
        (f"{RUN} -o . --format csv", ". is a folder"),
        (f"{EVAL} --save .", ". is a folder"),
        (f"{RUN} --report -", "standard output is no place"),
        (f"{RUN} -o r.jsonl --report mine/x.html", "Not a directory"),
        (f"{EVAL} --save mine", "mine exists"),
        (f"{EVAL} --html mine", "mine exists"),
        (f"{EVAL} --save s.json --html ./s.json", "s.json would be written twice"),
        (f"{EVAL} --save data/rows.jsonl --force", "data/rows.jsonl is read"),
        (f"{EVAL} --save s.json --against s.json", "cannot be read"),
        (f"{BENCH} --save mine", "mine exists"),
        (f"{BENCH} --html mine", "mine exists"),
        (f"{BENCH} --save photos", "photos is a folder"),
        (f"{BENCH} --save b.json --html b.json", "b.json would be written twice"),
        (f"{BENCH} --plot mine", "Not a directory"),
        (f"{BENCH} --images photos --save photos/a.png --force", "photos/a.png is read"),
        (f"{COMPARE} --html mine", "mine exists"),
        (f"{COMPARE} --html photos/b.png --force", "photos/b.png is read"),
        (f"{COMPARE} --prompts mine --html mine --force", "mine is read"),
        ("merge rows.jsonl -o mine", "mine exists"),
        ("merge rows.jsonl -o rows.jsonl --force", "rows.jsonl is read"),
        ("merge rows.jsonl -o new/", "new/ is a folder"),
        ("export CHECKPOINT -o photos", "is no bundle"),
        ("export CHECKPOINT -o mine --force", "mine is a file"),
        ("export CHECKPOINT -o mine/b", "Not a directory"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    command: str, words: str, bundle: Path, here: Path
) -> None:
    Path("asked.jsonl").write_text(json.dumps({"prompt": "Which?", "images": ["photos/a.png"]}) + "\n")
    before = {path: path.read_bytes() for folder in (here, bundle) for path in folder.rglob("*") if path.is_file()}
    places = {"BUNDLE": str(bundle), "CHECKPOINT": str(bundle.parent / "checkpoint")}
    for name, place in places.items():
        command = command.replace(name, place)
    done = invoke(*command.split())
    assert (done.exit_code, done.stdout) == (3, ""), done.stderr
    assert words in done.stderr
    assert "hint" in done.stderr
    after = {path: path.read_bytes() for folder in (here, bundle) for path in folder.rglob("*") if path.is_file()}
    assert after == before


def test_force_replaces_what_was_named_and_resume_what_the_job_wrote(bundle: Path, here: Path) -> None:
    asked = ("run", bundle, "photos", *SHORT, "-o", "r.jsonl", "--format", "csv", "--report", "mine")
    assert invoke(*asked).exit_code == 3
    assert invoke(*asked, "--force").exit_code == 0
    assert Path("mine").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert invoke(*asked, "--resume").exit_code == 0
    assert invoke(*asked).exit_code == 3


def test_bench_replaces_a_report_and_plots_when_forced(bundle: Path, here: Path) -> None:
    asked = ("bench", bundle, *QUICK, "--save", "mine", "--plot", "plots")
    assert invoke(*asked, "--force").exit_code == 0
    assert json.loads(Path("mine").read_text())["schema"]
    refused = invoke("bench", bundle, *QUICK, "--plot", "plots")
    assert (refused.exit_code, "plots/latency.svg exists" in refused.stderr) == (3, True)


def test_an_evaluation_against_a_bundle_judges_the_other_ones_files_too(bundle: Path, here: Path) -> None:
    Path("s.against.json").write_text("mine")
    done = invoke(*f"eval {bundle} --task custom --data data --save s.json --against {bundle}".split())
    assert (done.exit_code, "s.against.json exists" in done.stderr) == (3, True)
    assert Path("s.against.json").read_text() == "mine"


def test_an_evaluation_may_save_beside_its_rows_and_again_when_forced(bundle: Path, here: Path) -> None:
    Path("photos/a.png").rename("data/a.png")
    Path("data/rows.jsonl").write_text('{"question": "Which?", "answer": "red", "image": "a.png"}\n')
    asked = f"eval {bundle} --task custom --data data --max-new-tokens 2 --save data/s.json --html data/s.html".split()
    assert invoke(*asked).exit_code == 0
    assert invoke(*asked).exit_code == 3
    assert invoke(*asked, "--force").exit_code == 0


def test_a_build_for_a_bundle_that_is_being_written_is_refused(bundle: Path, here: Path) -> None:
    from pixtral_runtime.files import locked

    with locked(bundle / LOCK):
        done = invoke("build", bundle, "--target", "rtx:sm89")
    assert (done.exit_code, "is being written" in done.stderr) == (3, True)


def terminal(line: str, **places: object) -> subprocess.CompletedProcess[bytes]:
    roots = (ROOT, ROOT / "export", ROOT / "engines", ROOT / "runtime")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, roots)),
        "PIXTRAL": f"{sys.executable} -m pixtral_cli",
        **{name: str(place) for name, place in places.items()},
    }
    return subprocess.run(["bash", "-c", line], env=environment, capture_output=True, check=False)


def test_records_go_to_stdout_when_asked_for(bundle: Path, here: Path) -> None:
    done = terminal(f"$PIXTRAL run $B photos {' '.join(SHORT)} -q -o -", B=bundle)
    ids = [json.loads(line)["id"] for line in done.stdout.splitlines()]
    assert (done.returncode, sorted(ids)) == (0, ["photos/a.png", "photos/b.png"])
    assert not Path("-").exists()
    for more in ("--json", "--resume", "--format csv"):
        assert terminal(f"$PIXTRAL run $B photos -o - {more}", B=bundle).returncode == 3


def test_a_reader_that_leaves_ends_a_run_and_not_a_job_with_a_file(bundle: Path, here: Path) -> None:
    many = " ".join(["photos/a.png", "photos/b.png"])
    line = f"$PIXTRAL run $B {many} {' '.join(SHORT)} -q"
    done = terminal(f"{line} | head -c 1 > /dev/null; echo ${{PIPESTATUS[0]}}", B=bundle)
    assert done.stdout in (b"141\n", b"0\n")
    done = terminal(f"({line}; echo $? > code) | true", B=bundle)
    assert (Path("code").read_text(), done.stderr) == ("141\n", b"")
    terminal(f"({line} -o r.jsonl; echo $? > code) | true", B=bundle)
    assert Path("code").read_text() == "0\n"
    assert len(Path("r.jsonl").read_text().splitlines()) == 2


def test_a_reader_of_the_talk_that_leaves_ends_nothing(bundle: Path, here: Path) -> None:
    Path("photos/c.png").write_text("no picture")
    run = f"$PIXTRAL run $B photos {' '.join(SHORT)} -o r.jsonl"
    terminal(f"({run} 2>&1 > /dev/null; echo $? > code) | true", B=bundle)
    assert Path("code").read_text() == "5\n"
    assert len(Path("r.jsonl").read_text().splitlines()) == 3
    terminal("($PIXTRAL run nowhere photos 2>&1 > /dev/null; echo $? > code) | true")
    assert Path("code").read_text() == "3\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_harm_nothing(closed: str, bundle: Path, here: Path) -> None:
    done = terminal(f"$PIXTRAL run $B photos {' '.join(SHORT)} -o r.jsonl {closed}", B=bundle)
    assert done.returncode == 0
    assert all(json.loads(line)["answer"] is not None for line in Path("r.jsonl").read_text().splitlines())
    assert terminal(f"$PIXTRAL run $B - {closed} < /dev/null", B=bundle).returncode == 3


def test_names_of_any_bytes_are_printed_recorded_and_shown_on_pages(bundle: Path, here: Path) -> None:
    Path("photos", os.fsdecode(b"caf\xe9.png")).write_bytes(Path("photos/a.png").read_bytes())
    Path("photos", "two\nlines.png").write_bytes(Path("photos/a.png").read_bytes())
    run = "$PIXTRAL run $B photos --max-new-tokens 2 -o r.jsonl --format csv --report r.html"
    done = terminal(f"PYTHONIOENCODING=utf-8:strict {run}", B=bundle)
    assert done.returncode == 0, done.stderr
    assert b"photos/caf\\udce9.png: " in done.stdout
    assert b"photos/two\\nlines.png: " in done.stdout
    assert {json.loads(line)["id"] for line in Path("r.jsonl").read_text(encoding="utf-8").splitlines()} == {
        "photos/a.png", "photos/b.png", "photos/caf\udce9.png", "photos/two\nlines.png",
    }  # fmt: skip
    listed = terminal("find photos -name '*.png' -print0 | $PIXTRAL run $B - --max-new-tokens 2 -q --json", B=bundle)
    assert json.loads(listed.stdout)["answered"] == 4
    compared = terminal("$PIXTRAL compare $B $B --images photos --html c.html --max-new-tokens 2 --json", B=bundle)
    assert compared.returncode == 0, compared.stderr
    assert "caf\\udce9.png" in Path("c.html").read_text(encoding="utf-8")
