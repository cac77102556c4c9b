"""Shards written by WebDataset itself, archives by tar, and whatever may have happened to them on their way."""

from __future__ import annotations

import gzip
import io
import os
import resource
import shutil
import subprocess
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.sources import contents, errors, noise, picture
from pixtral_runtime.errors import InputError
from pixtral_runtime.sources import tar as tar_module
from pixtral_runtime.sources.data_file import LocalFile
from pixtral_runtime.sources.tar import TarSource


def write_shard(path: Path, count: int = 3, compress: bool = False) -> Path:
    wds = pytest.importorskip("webdataset", reason="writes the shards that are read here")
    with wds.TarWriter(str(path), compress=compress) as writer:
        for n in range(count):
            writer.write({"__key__": f"{n:06d}", "png": picture(n), "txt": f"caption {n} ü", "json": {"n": n}})
    return path


def members(*named: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in named:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def source(path: Path, data: bytes | None = None) -> TarSource:
    if data is not None:
        path.write_bytes(data)
    return TarSource(LocalFile(str(path)))


@pytest.mark.parametrize("name", ["s/000.tar", "s/000.tar.gz"])
def test_a_shard_of_webdataset_gives_its_pictures_and_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s").mkdir()
    shard = source(write_shard(Path(name), compress=name.endswith("gz")))
    items = list(shard)
    assert contents(items) == {f"{name}/{n:06d}.png": [picture(n)] for n in range(3)}
    assert [(item.name, item.directory, item.tags) for item in items] == [
        (f"{n:06d}", "000", f"caption {n} ü") for n in range(3)
    ]
    assert shard.files == (Path(name),) and shard.total is None
    assert [item.id for item in shard] == [item.id for item in items]  # anew


def test_all_shards_of_a_shard_writer_are_read(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset", reason="writes the shards that are read here")
    with wds.ShardWriter(str(tmp_path / "s-%03d.tar"), maxcount=2, verbose=0) as writer:
        for n in range(5):
            writer.write({"__key__": f"a/{n}", "jpg": picture(n, "JPEG")})
    found = [item for path in sorted(tmp_path.iterdir()) for item in source(path)]
    assert [picture_data for (picture_data,) in contents(found).values()] == [picture(n, "JPEG") for n in range(5)]
    assert found[4].id == f"{tmp_path}/s-002.tar/a/4.jpg" and found[4].directory == "a" and found[4].tags == ""


@pytest.mark.parametrize("packed", ["--gzip", "--bzip2", "--xz", "--format=pax", "--format=v7", "--format=gnu"])
def test_folders_packed_by_tar(tmp_path: Path, packed: str) -> None:
    if shutil.which("tar") is None:
        pytest.skip("there is no program tar")
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "b.PNG").write_bytes(picture(2))
    (folder / "a.b.png").write_bytes(picture(1))
    (folder / "a.b.txt").write_text("\ufefftags of a.b\n")
    (folder / "a.txt").write_text("of the whole sample")
    (folder / "notes.md").write_text("no picture")
    (folder / "link.png").symlink_to("a.b.png")
    (folder / "._a.b.png").write_bytes(b"\0\5\x16\7")
    (folder / "folder.png").mkdir()
    names = ["--sort=name", "-C", str(folder), "."]
    subprocess.run(["tar", packed, "-cf", tmp_path / "p.tar", *names], check=True)
    items = {item.id.removeprefix(f"{tmp_path}/"): item for item in source(tmp_path / "p.tar")}
    assert items.keys() == {"p.tar/a.b.png", "p.tar/sub/b.PNG"}
    assert items["p.tar/a.b.png"].tags == "tags of a.b"
    assert (items["p.tar/a.b.png"].name, items["p.tar/a.b.png"].directory) == ("a.b", "p")
    assert (items["p.tar/sub/b.PNG"].name, items["p.tar/sub/b.PNG"].directory) == ("b", "sub")
    assert contents(items.values())[f"{tmp_path}/p.tar/a.b.png"] == [picture(1)]


def test_names_are_labels_and_nothing_is_lost_of_those_that_come_twice(tmp_path: Path) -> None:
    odd = os.fsdecode(b"\xff\xfe.png")
    data = members(
        ("../../etc/x.png", picture(1)), ("/abs.png", picture(2)), ("a.png", picture(3)), ("a.png", picture(4)),
        ("a.png (2)", b"no picture"), ("a.png", picture(5)), (odd, picture(6)), ("__MACOSX/a.png", b""),
    )  # fmt: skip
    path = tmp_path / "x.tar"
    found = {id.removeprefix(str(path)): content for id, content in contents(source(path, data)).items()}
    assert found == {
        "/../../etc/x.png": [picture(1)], "//abs.png": [picture(2)], "/a.png": [picture(3)],
        "/a.png (2)": [picture(4)], "/a.png (3)": [picture(5)], f"/{odd}": [picture(6)],
    }  # fmt: skip
    assert [file.name for file in tmp_path.iterdir()] == ["x.tar"]


def test_a_long_name_and_an_empty_picture(tmp_path: Path) -> None:
    long = "d/" * 150 + "x" * 200 + ".png"
    found = contents(source(tmp_path / "x.tar", members((long, picture(1)), ("empty.png", b""))))
    assert list(found.values()) == [[picture(1)], [b""]]


@pytest.mark.parametrize(
    ("damage", "whole", "words"),
    [
        (lambda data: data[: 512 * 4], 2, "there is no end"),  # between two members
        (lambda data: data[: 512 * 4 - 100], 2, "unexpected end of data"),  # behind a picture
        (lambda data: data[: 512 * 3 + 20], 1, "unexpected end of data"),  # within a picture
        (lambda data: data[: 512 * 3], 1, "unexpected end of data"),
        (lambda data: data[: 512 * 2 + 100], 1, "truncated header"),
        (lambda data: data[: 512 * 2] + b"junk" * 128 + data[512 * 3 :], 1, "invalid header"),
        (lambda data: data[:1100] + b"x" + data[1101:], 1, "bad checksum"),
        (lambda data: data + b"rubbish" * 100, 3, "invalid header"),
        (lambda data: data + bytes(1 << 21), 3, "bytes are zeros"),
    ],
)
def test_a_damaged_archive_gives_what_is_whole_and_says_the_rest(
    tmp_path: Path, damage: Callable[[bytes], bytes], whole: int, words: str
) -> None:
    data = members(*((f"{n}.png", picture(n)) for n in range(3)))
    assert len(picture(0)) < 512  # so that each member takes two blocks
    path = tmp_path / "x.tar"
    found = contents(source(path, damage(data)))
    *pictures, rest = found.items()
    assert pictures == [(f"{path}/{n}.png", [picture(n)]) for n in range(whole)]
    assert rest[0] == f"{path}#rest"
    (text,) = rest[1]
    assert isinstance(text, str) and words in text and "broken off after " in text
    assert "copy or download it again; resume=True" in text


def test_archives_that_were_joined_are_read_to_the_end(tmp_path: Path) -> None:
    data = members(("a.png", picture(1))) + members(("b.png", picture(2)))
    assert list(contents(source(tmp_path / "x.tar", data)).values()) == [[picture(1)], [picture(2)]]
    packed = gzip.compress(members(("a.png", picture(1)))) + gzip.compress(members(("b.png", picture(2))))
    assert list(contents(source(tmp_path / "x.tgz", packed)).values()) == [[picture(1)], [picture(2)]]


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.999])
def test_a_packed_archive_that_was_cut_off_says_so(tmp_path: Path, keep: float) -> None:
    pictures = [noise(3000, n) for n in range(20)]
    data = gzip.compress(members(*((f"{n}.png", data) for n, data in enumerate(pictures))))
    found = list(contents(source(tmp_path / "x.tar.gz", data[: int(len(data) * keep)])).items())
    assert [parts for _, parts in found[:-1]] == [[data] for data in pictures[: len(found) - 1]]
    assert found[-1][0].endswith("#rest") and "end-of-stream" in str(found[-1][1])


def test_a_packed_archive_with_a_wrong_check_sum_says_so(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(members(("a.png", picture(1)))))
    data[-6] ^= 1
    assert "CRC check failed" in errors(source(tmp_path / "x.tgz", bytes(data)))[f"{tmp_path}/x.tgz#rest"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"no archive at all" * 100, "is no tar archive"),
        (picture(1), "is no tar archive"),
        (bytes(10240), "a tar archive of no files"),
        (gzip.compress(b"", mtime=0), "is empty"),
        (gzip.compress(b"text" * 500, mtime=0), "is no tar archive"),
        (gzip.compress(members(("a.png", b"")), mtime=0)[:20], "is no tar archive"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "is no tar archive"),
    ],
)
def test_what_is_no_archive_is_refused_when_it_is_opened(tmp_path: Path, data: bytes, words: str) -> None:
    with pytest.raises(InputError, match=words):
        source(tmp_path / "x.tar", data)


def test_an_archive_that_is_not_there_or_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        source(tmp_path / "x.tar")
    with pytest.raises(InputError, match="not a regular file"):
        source(tmp_path)


def test_an_archive_that_vanished_since_is_one_broken_item(tmp_path: Path) -> None:
    opened = source(tmp_path / "x.tar", members(("a.png", picture(1))))
    (tmp_path / "x.tar").unlink()
    assert list(errors(opened)) == [f"{tmp_path}/x.tar#rest"]


def test_a_member_beyond_the_limit_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_module, "LARGEST_FILE_BYTES", 5000)
    data = members(("a.png", picture(1)), ("big.png", bytes(6000)), ("video.mp4", bytes(60_000)), ("c.png", picture(3)))
    path = tmp_path / "x.tar"
    found = contents(source(path, data))
    assert found[f"{path}/a.png"] == [picture(1)] and found[f"{path}/c.png"] == [picture(3)]
    assert found[f"{path}/big.png"] == [
        f"{path}/big.png: 6,000 bytes, expected 5,000 at most | a smaller copy of the picture"
    ]


def test_a_header_that_claims_gigabytes_takes_none(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.png")
    info.type, info.size = tarfile.XHDTYPE, 7 << 30
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = members(("ok.png", picture(1)))[:1024] + info.tobuf() + bytes(2048)
    found = list(contents(source(tmp_path / "x.tar", data)).values())
    assert found[0] == [picture(1)] and "7,516,192,768 bytes" in str(found[1])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_a_sparse_member_is_whole(tmp_path: Path) -> None:
    if shutil.which("tar") is None:
        pytest.skip("there is no program tar")
    file = tmp_path / "a.bmp"
    with file.open("wb") as hole:
        hole.write(b"BM")
        hole.seek(1 << 20)
        hole.write(b"end")
    subprocess.run(["tar", "-S", "-cf", tmp_path / "x.tar", "-C", tmp_path, "a.bmp"], check=True)
    assert list(contents(source(tmp_path / "x.tar")).values()) == [[file.read_bytes()]]


def test_texts_of_a_sample_that_is_larger_than_what_waits_go_to_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar_module, "MOST_SAMPLE_BYTES", 1000)
    data = members(("a.1.png", bytes(900)), ("a.2.png", bytes(900)), ("a.3.png", b"x"), ("a.3.txt", b"text"))
    assert [item.tags for item in source(tmp_path / "x.tar", data)] == ["", "", "text"]


def test_the_file_is_closed_when_nobody_goes_on(tmp_path: Path) -> None:
    opened = source(tmp_path / "x.tar", members(*((f"{n}.png", picture(n)) for n in range(3))))
    before = len(os.listdir("/proc/self/fd"))
    items = iter(opened)
    next(items)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    items.close()  # type: ignore[attr-defined]
    assert len(os.listdir("/proc/self/fd")) == before


def test_memory_does_not_grow_with_the_archive(tmp_path: Path) -> None:
    opened = source(tmp_path / "x.tar", members(*((f"{n}.png", bytes(10_000)) for n in range(2000))))
    tracemalloc.start()
    assert sum(1 for _ in opened) == 2000
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2_000_000 < (tmp_path / "x.tar").stat().st_size / 5
