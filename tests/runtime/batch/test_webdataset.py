"""Shards of WebDataset: what samples are called and hold, and that each run writes the same bytes."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers.answers import answered
from pixtral_runtime.batch import webdataset
from pixtral_runtime.batch.item_requests import Questions, requests_of_images, requests_of_items
from pixtral_runtime.batch.records import Request, SidecarNote
from pixtral_runtime.batch.webdataset import sample_key, shards_beside, write_webdataset
from pixtral_runtime.errors import ImageError, InputError
from pixtral_runtime.inputs.conversation import user_message
from pixtral_runtime.sources.item import Item, PictureData

needs_webdataset = pytest.mark.skipif(find_spec("webdataset") is None, reason="needs the package 'webdataset'")


def picture_bytes(format: str = "PNG", color: str = "red", size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), color).save(file, format)
    return file.getvalue()


def requests_of(folder: Path, *names: str, questions: tuple[str, ...] = ("What?",), **data: bytes) -> list[Request]:
    """Questions about files of these names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data.get("data", picture_bytes()))
    return requests_of_images([folder / name for name in names], questions, None, 8)


def stored(id: str, data: bytes = b"", questions: tuple[str, ...] = ("What?",)) -> list[Request]:
    """Questions about a picture that is within another file."""
    item = Item(id, (PictureData(name=id, data=data or picture_bytes()),), "name")
    return list(requests_of_items([item], Questions(questions)))  # type: ignore[arg-type]


def members(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        files = [(member.name, tar.extractfile(member)) for member in tar]
        return {name: b"" if file is None else file.read() for name, file in files}


def read_by_webdataset(*shards: Path) -> list[dict[str, Any]]:
    from webdataset import WebDataset

    return list(WebDataset([str(shard) for shard in shards], shardshuffle=False))


@pytest.mark.parametrize(
    ("id", "key"),
    [
        ("shards/000.tar/000123.jpg", "000123"),
        ("shards/000.tar.gz/a.b/000123.left.jpg", "a.b/000123"),
        ("hf://datasets/x/y/train-0.tar/deep/000123.jpg", "deep/000123"),
        ("photos.zip/holiday/sea.v2.jpg", "holiday/sea"),
        ("rows.parquet/17", "rows.parquet/17"),
        ("scans/scan.v2.pdf#page=3", "scans/scan_v2_page=3"),
        ("clip.mp4#t=2.0", "clip_t=2_0"),
        ("/tmp/../a/.hidden", "tmp/a/_hidden"),
        ("x.tar/__MACOSX__/a.png", "_MACOSX__/a"),
        ("a\nb\0.png", "a_b_"),
        ("\udcff.png", "?"),
        ("#5", "_5"),
        ("../..", "_"),
    ],
)
def test_a_sample_is_called_as_in_its_archive_or_after_its_id(id: str, key: str) -> None:
    (request,) = stored(id)
    assert sample_key(request) == key


@pytest.mark.parametrize("id", ["x.tar/000123.jpg", "photos/a.png", "scan.pdf#page=3"])
def test_several_questions_about_one_picture_are_told_apart(id: str) -> None:
    (alone,) = map(sample_key, stored(id))
    assert [sample_key(one) for one in stored(id, questions=("What?", "Where?"))] == [f"{alone}_1", f"{alone}_2"]


def test_a_file_in_a_folder_that_is_called_like_an_archive_keeps_its_folder() -> None:
    (request,) = requests_of_images([Path("old.tar/a.b.png")], ["What?"], None, 8)
    assert sample_key(request) == "old.tar/a_b"


def test_a_sample_has_the_picture_the_caption_and_what_was_asked(tmp_path: Path) -> None:
    requests = requests_of(tmp_path / "p", "a.v1.png", data=picture_bytes("JPEG"))
    all = answered(requests, {requests[0].id: "  A red square,\nlarge. "})
    write_webdataset(all, tmp_path / "r.jsonl")
    contents = members(tmp_path / "r-000000.tar")
    key = sample_key(requests[0])
    assert key.endswith("p/a_v1")
    assert list(contents) == [f"{key}.jpg", f"{key}.txt", f"{key}.json"]
    assert contents[f"{key}.jpg"] == picture_bytes("JPEG")
    assert contents[f"{key}.txt"] == b"A red square,\nlarge."
    record = all.records[requests[0].id]
    assert json.loads(contents[f"{key}.json"]) == {
        "id": requests[0].id, "question": "What?", "answer": "  A red square,\nlarge. ", "finish_reason": "stop",
        "prompt_tokens": 20, "image_tokens": 16, "new_tokens": 4, "sha256": [record.images[0].sha256],
        "settings": record.settings,
    }  # fmt: skip
    with tarfile.open(tmp_path / "r-000000.tar") as tar:
        headers = {(member.mtime, member.uid, member.gid, member.uname, member.mode) for member in tar}
    assert headers == {(0, 0, 0, "", 0o644)}


def test_only_whole_answers_have_a_sample_and_a_sidecar_s_text_is_the_caption(tmp_path: Path) -> None:
    requests = requests_of(tmp_path, "a.png", "b.png", "c.png", "d.png")
    all = answered(requests, {requests[1].id: " "})
    records: Mapping[str, Any] = all.records
    records[requests[0].id].finish_reason = "length"
    records[requests[2].id].error = "broken"
    records[requests[3].id].sidecar = SidecarNote("d.txt", "tag, caption")
    write_webdataset(all, tmp_path / "r.jsonl")
    contents = members(tmp_path / "r-000000.tar")
    assert [Path(name).name for name in contents] == ["d.png", "d.txt", "d.json"]
    assert contents[f"{sample_key(requests[3])}.txt"] == b"tag, caption"


def test_a_taken_key_gets_a_number_whatever_became_of_the_other(tmp_path: Path) -> None:
    requests = requests_of(tmp_path, "a.png", "a.jpg", "a_2.png", "a.gif")
    all = answered(requests)
    write_webdataset(all, tmp_path / "r.jsonl")
    names = [Path(name).name for name in members(tmp_path / "r-000000.tar") if name.endswith(".txt")]
    assert names == ["a.txt", "a_2.txt", "a_2_2.txt", "a_3.txt"]
    all.records[requests[0].id].finish_reason = "length"
    write_webdataset(all, tmp_path / "r.jsonl")
    assert [Path(name).name for name in members(tmp_path / "r-000000.tar") if name.endswith(".txt")] == names[1:]


def test_several_pictures_are_numbered_and_none_is_no_matter(tmp_path: Path) -> None:
    pictures = [PictureData(name=f"{n}", data=picture_bytes(format)) for n, format in enumerate(("PPM", "JPEG"))]
    requests = [Request("two", user_message("What?", pictures)), Request("none", user_message("What?"))]
    write_webdataset(answered(requests), tmp_path / "r.jsonl")
    contents = members(tmp_path / "r-000000.tar")
    assert list(contents) == ["two.0.png", "two.1.jpg", "two.txt", "two.json", "none.txt", "none.json"]
    page = Image.open(io.BytesIO(contents["two.0.png"]))
    assert (page.format, page.getpixel((0, 0))) == ("PNG", (255, 0, 0))


def test_shards_are_full_in_number_or_size_and_those_of_before_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request for n in range(7) for request in stored(f"x.tar/{n:03d}.png", picture_bytes(size=8 + n))]
    for name in ("r-000001.tar", "r-000009.tar", "r-9.tar", "r-000009.tar.bak", "rr-000009.tar"):
        (tmp_path / name).write_bytes(b"old")
    monkeypatch.setattr(webdataset, "MOST_SAMPLES", 3)
    write_webdataset(answered(requests), tmp_path / "r.jsonl")
    shards = shards_beside(tmp_path / "r.jsonl")
    assert [path.name for path in shards] == ["r-000000.tar", "r-000001.tar", "r-000002.tar"]
    assert [len(members(shard)) // 3 for shard in shards] == [3, 3, 1]
    assert {path.name for path in tmp_path.iterdir()} - {shard.name for shard in shards} == {
        "r-9.tar", "r-000009.tar.bak", "rr-000009.tar",
    }  # fmt: skip
    monkeypatch.setattr(webdataset, "MOST_BYTES", 1)
    write_webdataset(answered(requests), tmp_path / "r.jsonl")
    shards = shards_beside(tmp_path / "r.jsonl")
    assert [sorted(members(shard))[-1] for shard in shards] == [f"{n:03d}.txt" for n in range(7)]


def test_no_answer_leaves_one_shard_without_samples(tmp_path: Path) -> None:
    write_webdataset(answered([]), tmp_path / "new" / "r.jsonl")
    assert members(tmp_path / "new" / "r-000000.tar") == {}


def test_another_run_writes_the_same_bytes(tmp_path: Path) -> None:
    requests = requests_of(tmp_path, "b.png", "ü" * 100 + ".png", "a.png")
    for name, ms in (("one", 1.0), ("two", 2.0)):
        all = answered(requests)
        for record in all.records.values():
            record.times_ms, record.reused_tokens = {"decode": ms}, int(ms)
        write_webdataset(all, tmp_path / f"{name}.jsonl")
    assert (tmp_path / "one-000000.tar").read_bytes() == (tmp_path / "two-000000.tar").read_bytes()


def test_a_picture_that_is_gone_or_changed_is_named_with_what_to_do(tmp_path: Path) -> None:
    requests = requests_of(tmp_path, "a.png", "b.png")
    all = answered(requests)
    write_webdataset(all, tmp_path / "r.jsonl")
    before = (tmp_path / "r-000000.tar").read_bytes()
    (tmp_path / "b.png").write_bytes(picture_bytes(color="blue"))
    with pytest.raises(ImageError, match=re.escape(f"{tmp_path / 'b.png'}: it has changed since")) as changed:
        write_webdataset(all, tmp_path / "r.jsonl")
    (tmp_path / "b.png").unlink()
    with pytest.raises(ImageError, match=re.escape(f"{tmp_path / 'b.png'}: No such file")) as gone:
        write_webdataset(all, tmp_path / "r.jsonl")
    assert all_hints_say("resume=True", changed.value, gone.value)
    assert (tmp_path / "r-000000.tar").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def all_hints_say(words: str, *errors: InputError) -> bool:
    return all(words in error.hint for error in errors)


@needs_webdataset
def test_webdataset_reads_the_same_keys_long_and_odd_ones_too(tmp_path: Path) -> None:
    source = tmp_path / "in.tar"
    keys = ["000001", "deep/" * 40 + "000002", "äöü/€😀" + "x" * 120, "__three", "spaces in it/ 4"]
    from webdataset import TarWriter

    with TarWriter(str(source), format="PAX_FORMAT") as tar:
        for key in keys:
            tar.write({"__key__": key, "png": picture_bytes(), "txt": "tags"})
    assert [sample["__key__"] for sample in read_by_webdataset(source)] == keys
    requests = [request for key in keys for request in stored(f"{source}/{key}.png")]
    write_webdataset(answered(requests), tmp_path / "r.jsonl")
    samples = read_by_webdataset(tmp_path / "r-000000.tar")
    assert [sample["__key__"] for sample in samples] == keys
    assert {tuple(sorted(name for name in sample if name[0] != "_")) for sample in samples} == {("json", "png", "txt")}
    assert [sample["txt"].decode() for sample in samples] == [f"About {request.id}." for request in requests]


@needs_webdataset
def test_samples_of_odd_files_are_all_read(tmp_path: Path) -> None:
    names = [".hidden.png", "__init__.png", "__pycache__/a.png", "a.tar.png", "b", "c..png", "%d.png", "a b.png"]
    requests = [replace(request, id=str(name)) for name in names for request in requests_of(tmp_path, name)]
    write_webdataset(answered(requests), tmp_path / "r.jsonl")
    assert len(read_by_webdataset(tmp_path / "r-000000.tar")) == len(names)
