"""Data sets that `pixtral run` writes: what the libraries of others read of them, and what interruptions cost."""

from __future__ import annotations

import base64
import csv
import json
import shutil
import tarfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from helpers import kohya
from helpers.bundles import exported
from helpers.job_records import by_id
from helpers.places import DEMO, IMAGES
from pixtral_cli.main import app
from pixtral_export.plan import ExportSettings

needs_datasets = pytest.mark.skipif(find_spec("datasets") is None, reason="needs the package 'datasets'")
needs_webdataset = pytest.mark.skipif(find_spec("webdataset") is None, reason="needs the package 'webdataset'")
UNSTABLE = ("reused_tokens", "image_ms", "preprocess_ms", "vision_ms", "prefill_ms", "decode_ms")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(DEMO, tmp_path_factory.mktemp("bundles") / "bundle", ExportSettings(dtype="float32")).path


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(IMAGES, "photos")
    return Path("photos")


def invoke(*arguments: object) -> Any:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done


def load(builder: str, files: list[str]) -> Any:
    from datasets import load_dataset

    return load_dataset(builder, data_files=files, split="train", cache_dir="cache")


@needs_datasets
@needs_webdataset
def test_both_libraries_read_pictures_and_captions_of_shards(bundle: Path, photos: Path) -> None:
    from webdataset import WebDataset

    invoke("run", bundle, photos, "-o", "r.jsonl", "--format", "webdataset")
    records = by_id(Path("r.jsonl"))
    expected = {id.removesuffix(".png"): (Path(id).read_bytes(), record["answer"]) for id, record in records.items()}
    samples = list(WebDataset("r-000000.tar", shardshuffle=False))
    assert {sample["__key__"]: (sample["png"], sample["txt"].decode()) for sample in samples} == expected
    decoded = next(iter(WebDataset("r-000000.tar", shardshuffle=False).decode("pil").to_tuple("png", "txt", "json")))
    assert (decoded[0].size, decoded[2]["answer"]) == ((64, 136), decoded[1])
    data = load("webdataset", ["r-000000.tar"])
    assert {row["__key__"]: row["txt"] for row in data} == {key: text for key, (_, text) in expected.items()}
    assert data[0]["png"].size == (64, 136)
    assert data[0]["json"]["sha256"] == [image["sha256"] for image in records[data[0]["json"]["id"]]["images"]]


@needs_webdataset
def test_shards_keep_the_keys_of_the_shards_that_were_read(bundle: Path, photos: Path) -> None:
    from webdataset import ShardWriter, WebDataset

    with ShardWriter("in-%06d.tar", maxcount=5, verbose=0) as writer:
        for number, file in enumerate(sorted(photos.iterdir())):
            writer.write({"__key__": f"deep/{number:09d}", "png": file.read_bytes(), "txt": "old"})
    shards = ["in-000000.tar", "in-000001.tar"]
    invoke("run", bundle, *shards, "-o", "new.jsonl", "--format", "webdataset", "--max-new-tokens", 40)
    old, new = (list(WebDataset(files, shardshuffle=False)) for files in (shards, "new-000000.tar"))
    assert [(one["__key__"], one["png"]) for one in new] == [(one["__key__"], one["png"]) for one in old]
    answers = [record["answer"] for record in sorted(by_id(Path("new.jsonl")).values(), key=lambda one: one["id"])]
    assert [one["txt"].decode() for one in new] == answers
    invoke(
        "run", bundle, *shards, "-o", "new.jsonl", "--format", "parquet", "--embed", "--resume", "--max-new-tokens", 40
    )
    pictures = pq.read_table("new.parquet")["image"].to_pylist()
    assert [picture["bytes"] for picture in pictures] == [one["png"] for one in old]


@needs_datasets
def test_datasets_read_pictures_within_parquet(bundle: Path, photos: Path) -> None:
    invoke("run", bundle, photos, "-o", "r.jsonl", "--format", "parquet", "--embed")
    data = load("parquet", ["r.parquet"])
    records = by_id(Path("r.jsonl"))
    assert list(data["id"]) == sorted(records)
    for row in data:
        with Image.open(row["id"]) as picture:
            assert (row["image"].size, row["answer"]) == (picture.size, records[row["id"]]["answer"])


def test_a_lora_trainer_reads_the_captions(bundle: Path, photos: Path) -> None:
    Path("train").mkdir()
    photos.rename("train/10_shape")
    Path("train/10_shape/red_triangle_64x64.caption").write_text("sharp, ")
    asked = ("run", bundle, "train/10_shape", "-o", "r.jsonl", "--sidecar")
    invoke(*asked, ".caption", "--existing", "append")
    answers = {Path(id).name: record["answer"] for id, record in by_id(Path("r.jsonl")).items()}
    answers["red_triangle_64x64.png"] = f"sharp, {answers['red_triangle_64x64.png']}"
    assert kohya.subsets(Path("train")) == {"10_shape": (10, answers)}
    assert kohya.subsets(Path("train"), ".txt") == {"10_shape": (10, dict.fromkeys(answers, "shape"))}


@pytest.mark.parametrize("format", [("webdataset",), ("parquet", "--embed"), ("imagefolder",), ("csv",)])
def test_a_stopped_job_that_goes_on_writes_what_an_undisturbed_one_does(
    bundle: Path, photos: Path, format: tuple[str, ...]
) -> None:
    results = photos / "metadata-of.jsonl"
    asked = ("run", bundle, photos, "-o", results, "--format", *format)
    invoke(*asked)
    written = [path for path in photos.iterdir() if path.suffix not in (".png", ".jsonl") or path.stem == "metadata"]
    whole = {path: contents(path) for path in written}
    assert len(whole) == 1
    lines = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(b"".join(lines[5:2:-1]) + lines[0][:40])  # in another order, and torn
    for path in whole:
        path.write_bytes(b"half of it")
    invoke(*asked, "--resume")
    assert {path: contents(path) for path in written} == whole
    for path in whole:
        path.unlink()
    done = invoke(*asked, "--resume")
    assert "8 were done before" in done.stderr
    assert {path: contents(path) for path in written} == whole


def test_what_came_to_a_watched_folder_is_on_the_page_and_later_in_shards(bundle: Path, photos: Path) -> None:
    asked = "-o", "r.jsonl", "--report", "r.html", "--limit", 2
    invoke("run", bundle, photos, "--watch", *asked)
    invoke("run", bundle, photos, *asked, "--resume", "--format", "webdataset")
    keys = [id.removesuffix(".png") for id in by_id(Path("r.jsonl"))]
    with tarfile.open("r-000000.tar") as tar:
        assert sorted(tar.getnames()) == sorted(f"{key}.{name}" for key in keys for name in ("png", "txt", "json"))
    jpeg = base64.b64encode(b"\xff\xd8\xff\xe0").decode()[:5]
    assert Path("r.html").read_text().count(f">{jpeg}") == len(keys) == 2


def test_an_answer_outlives_its_picture_and_shards_say_which_is_gone(bundle: Path, photos: Path) -> None:
    asked = "run", bundle, "red.png", "blue.png", "-o", "r.jsonl"
    for name in ("red", "blue"):
        next(photos.glob(f"{name}_*")).rename(f"{name}.png")
    invoke(*asked)
    records = by_id(Path("r.jsonl"))
    Path("red.png").rename("elsewhere.png")
    again = "run", bundle, "-", "-o", "r.jsonl", "--resume", "--format", "webdataset"
    done = CliRunner().invoke(app, [str(argument) for argument in again], input="red.png\nblue.png\n")
    assert done.exit_code == 3, done.output
    assert "red.png: No such file or directory; it was there when it was asked about" in done.stderr
    assert by_id(Path("r.jsonl")) == records
    Path("elsewhere.png").rename("red.png")
    invoke(*asked, "--resume", "--format", "webdataset")
    with tarfile.open("r-000000.tar") as tar:
        assert tar.getnames()[::3] == ["red.png", "blue.png"]


def contents(path: Path) -> object:
    """What is the same in every run of a job: of shards and captions the bytes, of tables all but measured columns."""
    if path.suffix == ".parquet":
        return pq.read_table(path).drop_columns(UNSTABLE).to_pylist()
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            return [{name: row[name] for name in row if name not in UNSTABLE} for row in csv.DictReader(file)]
    return path.read_bytes()


def test_one_two_and_seven_shards_join_to_the_same(bundle: Path, photos: Path) -> None:
    joined = {}
    for count in (1, 2, 7):
        parts = [f"{count}-{index}.jsonl" for index in range(1, count + 1)]
        for index, part in enumerate(parts, start=1):
            invoke("run", bundle, photos, "-o", part, "--shard", f"{index}/{count}", "--max-new-tokens", 16)
        folder = photos / str(count)
        for name in ("all.jsonl", "all.parquet"):
            invoke("merge", *parts, "-o", folder / name)
        invoke("merge", *parts, "-o", photos / "metadata.jsonl", "--format", "imagefolder", "--force")
        lines = (photos / "metadata.jsonl").read_text().splitlines()
        rows = pq.read_table(folder / "all.parquet").drop_columns(UNSTABLE).sort_by("id").to_pylist()
        joined[count] = by_id(folder / "all.jsonl"), rows, sorted(map(str, map(json.loads, lines)))
    assert len(joined[1][0]) == len(joined[1][1]) == 8
    assert joined[1] == joined[2] == joined[7]
