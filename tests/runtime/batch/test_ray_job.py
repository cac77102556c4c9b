"""Two workers of a local Ray cluster give the records of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from helpers.bundles import exported
from helpers.job_records import by_id
from helpers.places import DEMO
from pixtral_cli.main import app
from pixtral_export.plan import ExportSettings


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(DEMO, tmp_path_factory.mktemp("bundles") / "bundle", ExportSettings(dtype="float32")).path


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_two_ray_workers_give_the_records_of_one_process(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(40):
        Image.new("RGB", (64, 64), (6 * index, 255 - 6 * index, 40)).save(photos / f"{index:02}.png")
    (photos / "05.png").write_bytes(b"broken")
    monkeypatch.chdir(tmp_path)  # relative paths must mean the same to the workers
    asked = ("run", bundle, "photos", "-p", "what color is the shape?", "--max-new-tokens", 8, "--batch", 2)
    assert invoke(*asked, "-o", "one.jsonl").exit_code == 5
    one = by_id(tmp_path / "one.jsonl")

    lines = (tmp_path / "one.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "two.jsonl").write_text("".join(lines[:7]), encoding="utf-8")
    shared = ("--ray", "local", "--ray-workers", 2, "-o", "two.jsonl", "--resume", "--json")
    done = invoke(*asked, *shared)
    assert done.exit_code == 5, done.stderr
    assert json.loads(done.stdout)["kept"] == 7
    assert by_id(tmp_path / "two.jsonl") == one


def test_a_cluster_that_is_not_there_is_refused(bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    done = invoke("run", bundle, tmp_path / "a.png", "--ray", "127.0.0.1:1", "-o", tmp_path / "r.jsonl")
    assert done.exit_code == 4, done.stderr
    assert "127.0.0.1:1" in done.stderr
    assert "ray start --head" in done.stderr
