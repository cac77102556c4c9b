"""Jobs of hundreds of images: killed at any moment nothing is lost; broken files cost neither answers nor memory."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from helpers.bundles import exported
from helpers.job_records import by_id
from helpers.places import DEMO
from pixtral_cli.main import app
from pixtral_export.plan import ExportSettings
from pixtral_runtime import load
from pixtral_runtime.batch.item_requests import requests_of_images
from pixtral_runtime.batch.job import Job, JobOptions
from pixtral_runtime.batch.records import Settings
from pixtral_runtime.device.memory import resident_memory_bytes

KILLS = 6
PICTURES = 120
GROWTH = 1.05  # resident memory after 1,000 images over that after 100; seen 1.01


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    return exported(DEMO, folder, ExportSettings(dtype="float32")).path


def write_pictures(folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = [folder / f"{index:04}.png" for index in range(count)]
    for index, path in enumerate(paths):
        pixels = np.full((40 + 8 * (index % 3), 64, 3), rng.integers(0, 256, 3), np.uint8)
        pixels[8:24, 8 : 16 + index % 40] = rng.integers(0, 256, 3)
        Image.fromarray(pixels).save(path)
    return paths


def test_a_job_killed_again_and_again_gives_the_records_of_an_undisturbed_one(bundle: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "photos", PICTURES)
    (tmp_path / "photos" / "0100.png").write_bytes(b"broken")
    asked = ["run", str(bundle), str(tmp_path / "photos"), "--max-new-tokens", "12", "--batch", "4", "-o"]
    assert CliRunner().invoke(app, [*asked, str(tmp_path / "whole.jsonl")]).exit_code == 5
    whole = by_id(tmp_path / "whole.jsonl")
    assert len(whole) == PICTURES

    out, rng = tmp_path / "killed.jsonl", random.Random(0)
    command = [sys.executable, "-m", "pixtral_cli", *asked, str(out), "--resume"]
    sizes = []
    for _ in range(KILLS):
        before, more = size_of(out), rng.randrange(14_000)  # bytes: a record has some 700
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and size_of(out) < before + more:
            time.sleep(0.001)
        process.kill()
        process.wait()
        sizes.append(size_of(out))
    assert len(set(sizes)) > KILLS // 2
    done = len(out.read_bytes().splitlines())
    assert done < PICTURES, "the job was over before the last kill"
    last = subprocess.run(command, capture_output=True, text=True, check=False)
    assert last.returncode == 5, last.stderr
    assert by_id(out) == whole


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # pytest undoes the filters that image.py sets
def test_a_thousand_files_a_tenth_of_them_broken_take_no_more_memory_than_a_hundred(
    bundle: Path, tmp_path: Path, shared_images: Path
) -> None:
    good = write_pictures(tmp_path / "photos", 900)
    broken = ("bad_truncated.jpg", "bad_data_stream.png", "bad_missing_g4.tif", "bomb_64kx64k.gif", "nasty_photo.heic")
    nasty = [shared_images / name for name in broken]
    paths = []
    for index in range(100):
        copy = tmp_path / "photos" / f"{index:04}_{nasty[index % 5].name}"
        copy.symlink_to(nasty[index % 5])
        paths += [*good[9 * index : 9 * index + 9], copy]
    model = load(bundle)
    requests = requests_of_images(paths, ["What is shown?"], None, 2)
    job = Job(model, requests, Settings(model.bundle.fingerprint), JobOptions(slots=4))
    records = job.records()
    first = list(islice(records, 100))
    resident_bytes = resident_memory_bytes()
    rest = list(records)
    growth = resident_memory_bytes() / resident_bytes
    errors = {Path(record.id).name.partition("_")[2] for record in (*first, *rest) if record.error}
    assert errors == set(broken)
    assert sum(record.error is not None for record in (*first, *rest)) == 100
    assert sum(record.answer is not None for record in (*first, *rest)) == 900
    assert growth <= GROWTH
