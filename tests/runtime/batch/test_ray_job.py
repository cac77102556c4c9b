"""Two workers of a local Ray cluster give the records of one process."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from PIL import Image
from typer.testing import CliRunner

from helpers.bundles import exported
from helpers.job_records import by_id
from helpers.places import DEMO
from pixtral_cli.main import app
from pixtral_export.plan import ExportSettings
from pixtral_runtime.batch.ray_job import RayJob
from pixtral_runtime.batch.records import Settings
from pixtral_runtime.batch.worker import WorkerOptions
from pixtral_runtime.errors import MachineError, Option


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


def test_workers_ask_for_a_gpu_each_where_there_are_any() -> None:
    def gpus(there: float, backend: str = "auto", workers: int = 2) -> int | None:
        job = RayJob(Path("b"), [], settings, WorkerOptions(backend), {}, workers=workers)
        return job._gpus_of_worker(SimpleNamespace(cluster_resources=lambda: {"CPU": 8.0, "GPU": there}))

    settings = cast(Settings, None)  # of the answers, which are not looked at
    assert (gpus(0.0), gpus(2.0), gpus(2.0, "ort-cpu", 4)) == (None, 1, None)
    with pytest.raises(MachineError, match="3 workers are to have a GPU each, and the cluster has 2") as raised:
        gpus(2.0, workers=3)
    assert raised.value.options == (Option("ray_workers", 2), Option("backend", "ort-cpu"))
