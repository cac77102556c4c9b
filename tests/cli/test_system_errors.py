"""What the system says while something is written: never called a bug, and always with the next step."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from helpers.bundles import export_tiny
from helpers.tiny import tiny_config, write_checkpoint
from pixtral_cli.main import app

EXITS = {errno.EDQUOT: 4, errno.ENOSPC: 4, errno.EIO: 4, errno.ESTALE: 4, errno.EROFS: 3, errno.EFBIG: 3}
RUN = "run BUNDLE photos --max-new-tokens 2 -q"
COMMANDS = {
    "results": f"{RUN} -o new.jsonl",
    "forced results": f"{RUN} -o old.jsonl --force",
    "table": f"{RUN} -o old.jsonl --resume --format csv",
    "page": f"{RUN} --report page.html",
    "merged": "merge old.jsonl -o new.jsonl",
    "merged table": "merge old.jsonl -o new.parquet",
    "evaluation": "eval BUNDLE --task custom --data data --max-new-tokens 2 --save new.json -q",
    "bench": "bench BUNDLE --image-side 16 --runs 1 --warmup 0 --decode-tokens 2 --save new.json -q",
    "bundle": "export CHECKPOINT -o new --max-context 512 -q",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    export_tiny(write_checkpoint(folder / "checkpoint", tiny_config()), folder / "bundle")
    for name in ("photos", "data"):
        (folder / name).mkdir()
    Image.new("RGB", (32, 16)).save(folder / "photos/a.png")
    row = {"question": "Which?", "answer": "red", "image": "../photos/a.png"}
    (folder / "data/rows.jsonl").write_text(json.dumps(row) + "\n")
    return folder


@pytest.mark.parametrize(
    ("command", "number"),
    [(command, errno.EIO) for command in COMMANDS]
    + [(command, number) for command in ("results", "merged") for number in EXITS if number != errno.EIO],
)
def test_a_disk_that_fails_has_its_exit_and_leaves_nothing_half(
    command: str, number: int, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("photos", "data"):
        (tmp_path / name).symlink_to(world / name)
    monkeypatch.chdir(tmp_path)
    line = COMMANDS[command].replace("BUNDLE", str(world / "bundle")).replace("CHECKPOINT", str(world / "checkpoint"))
    if "old.jsonl" in line:
        earlier = f"run {world / 'bundle'} photos --max-new-tokens 2 -q -o old.jsonl"
        assert CliRunner().invoke(app, earlier.split()).exit_code == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    done = CliRunner().invoke(app, line.split())
    assert done.exit_code == EXITS[number], done.stderr
    assert "hint: " in done.stderr and "bug" not in done.stderr
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    made = {path.name for path in after.keys() - before.keys()}
    assert {path: after[path] for path in before} == before
    assert made <= {"new.jsonl", "new.answers.jsonl"}  # whose lines were written whole
    assert all(json.loads(line) for path in after if path.name in made for line in after[path].splitlines())
