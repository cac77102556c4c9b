"""Files that are elsewhere: in `fsspec`'s memory, and on a real web server with its faults."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from helpers.file_server import FileServer
from helpers.sources import contents, errors, noise, picture
from pixtral_runtime.errors import ImageError, InputError, MissingPackageError
from pixtral_runtime.sources import remote, remote_system
from pixtral_runtime.sources.datasets import open_dataset
from pixtral_runtime.sources.item import Source
from pixtral_runtime.sources.remote import RemoteFile, RemotePicture, fetch_picture

fsspec = pytest.importorskip("fsspec", reason="the extra `remote` brings it")
pa = pytest.importorskip("pyarrow", reason="the extra `tables` brings it")
pq = pytest.importorskip("pyarrow.parquet")


def opened(name: str, **options: Any) -> Source:
    source = open_dataset(name, **options)
    assert source is not None
    return source


def tar_of(count: int, size: int = 100) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for n in range(count):
            data = bytes([n]) * size
            info = tarfile.TarInfo(f"{n}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def parquet_of(count: int) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"image": [{"bytes": picture(n), "path": None} for n in range(count)]}), file)
    return file.getvalue()


def zip_of(count: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for n in range(count):
            archive.writestr(f"{n}.png", picture(n))
    return file.getvalue()


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_system, "PAUSES_S", (0.0, 0.0))


# fsspec's own memory


@pytest.fixture
def memory() -> Iterator[Any]:
    """A file system without files."""
    system = fsspec.filesystem("memory")
    system.rm("/", recursive=True)
    yield system
    system.rm("/", recursive=True)


def test_every_kind_of_data_set_is_read_from_elsewhere(memory: Any) -> None:
    memory.pipe("/b/x.tar", tar_of(2))
    memory.pipe("/b/x.tar.gz", gzip.compress(tar_of(2)))
    memory.pipe("/b/x.parquet", parquet_of(2))
    memory.pipe("/b/x.zip", zip_of(2))
    for name in ("x.tar", "x.tar.gz"):
        found = contents(opened(f"memory://b/{name}"))
        assert found == {f"memory://b/{name}/{n}.png": [bytes([n]) * 100] for n in range(2)}
    assert contents(opened("memory://b/x.parquet")) == {f"memory://b/x.parquet/{n}": [picture(n)] for n in range(2)}
    assert list(contents(opened("memory://b/x.zip")).values()) == [[picture(0)], [picture(1)]]
    assert opened("memory://b/x.zip").files == ()


def test_globs_ranges_and_folders(memory: Any) -> None:
    for n in range(3):
        memory.pipe(f"/b/s-{n:02d}.tar", tar_of(1))
        memory.pipe(f"/b/photos/{n}.png", picture(n))
    memory.pipe("/b/photos/notes.txt", b"text")
    memory.pipe("/b/photos/sub/deep.png", picture(9))
    wanted = [f"memory://b/s-{n:02d}.tar/0.png" for n in range(3)]
    for name in ("s-*.tar", "s-{00..02}.tar", "s-0?.tar"):
        assert list(contents(opened(f"memory://b/{name}"))) == wanted
    assert list(contents(opened("memory://b/"))) == wanted
    pictures = {f"memory://b/photos/{n}.png": [picture(n)] for n in range(3)}
    for name in ("photos", "photos/", "photos/*.png"):
        folder = opened(f"memory://b/{name}")
        assert contents(folder) == pictures and folder.total == 3
    assert list(contents(opened("memory://b/photos/", recursive=True)))[-1] == "memory://b/photos/sub/deep.png"
    (item,) = opened("memory://b/photos/1.png")
    assert item.parts == (RemotePicture(name="memory://b/photos/1.png"),)
    assert (item.id, item.name, item.directory, item.tags) == ("memory://b/photos/1.png", "1", "photos", "")


@pytest.mark.parametrize("name", ["none/*.tar", "none/", "empty/"])
def test_what_is_not_there_is_refused(memory: Any, name: str) -> None:
    memory.mkdir("/b/empty")
    with pytest.raises(InputError, match="nothing"):
        opened(f"memory://b/{name}")


@pytest.mark.parametrize("name", ["0.tar", "{0..1}.tar", "0.parquet", "0.arrow", "0.zip", "0.csv"])
def test_a_file_that_is_not_there_is_refused_when_it_is_opened(memory: Any, name: str) -> None:
    memory.pipe("/b/1.tar", tar_of(1))
    with pytest.raises(InputError, match="there is nothing") as caught:
        opened(f"memory://b/{name}")
    assert caught.value.hint == "check the address"


def test_a_later_shard_or_a_picture_that_is_not_there_is_one_broken_item(memory: Any) -> None:
    memory.pipe("/b/1.tar", tar_of(1))
    memory.pipe("/b/1.parquet", parquet_of(1))
    found = contents(opened("memory://b/{1..2}.tar"))
    assert list(found) == ["memory://b/1.tar/0.png", "memory://b/2.tar#rest"]
    assert found["memory://b/2.tar#rest"] == ["memory://b/2.tar: there is nothing | check the address"]
    assert list(contents(opened("memory://b/{1..2}.parquet"))) == [
        "memory://b/1.parquet/0",
        "memory://b/2.parquet#rest",
    ]
    assert "there is nothing" in errors(opened("memory://b/0.png"))["memory://b/0.png"]


def test_rows_elsewhere_are_counted_where_it_is_one_table(memory: Any) -> None:
    memory.pipe("/b/1.parquet", parquet_of(3))
    memory.pipe("/b/2.parquet", parquet_of(3))
    assert opened("memory://b/1.parquet").total == 3
    assert opened("memory://b/").total is None


def test_a_list_elsewhere_names_pictures_beside_it_and_none_of_this_machine(memory: Any, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(picture(1))
    memory.pipe("/b/sub/a.png", picture(2))
    memory.pipe("/b/l.csv", f"path,n\nsub/a.png,1\n{tmp_path}/secret.png,2\n../x.png,3\n".encode())
    found = contents(opened("memory://b/l.csv"))
    assert found["memory://b/sub/a.png"] == [picture(2)]
    assert sum("beside or below" in str(text) for text in found.values()) == 2
    table = pa.table({"image": [{"bytes": None, "path": path} for path in ("sub/a.png", f"{tmp_path}/secret.png")]})
    with memory.open("/b/x.parquet", "wb") as file:
        pq.write_table(table, file)
    found = contents(opened("memory://b/x.parquet"))
    assert found["memory://b/x.parquet/0"] == [picture(2)] and "beside or below" in str(found["memory://b/x.parquet/1"])


def test_a_picture_beyond_the_limit_is_not_taken(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe("/b/a.png", bytes(3 << 20))
    monkeypatch.setattr(remote, "LARGEST_FILE_BYTES", 1000)
    with pytest.raises(ImageError, match="more than 1,000 bytes"):
        fetch_picture("memory://b/a.png")


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(scheme: str, **_: object) -> None:
        raise ImportError("Install it")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    for address, hint in (
        ("s3://b/x.tar", "pip install s3fs"),
        ("gs://b/x.tar", "pip install gcsfs"),
        ("hf://datasets/a/b/x.tar", "pip install 'pixtral[remote]'"),
    ):
        with pytest.raises(MissingPackageError) as caught:
            opened(address)
        assert caught.value.hint == hint


# A web server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    pytest.importorskip("aiohttp", reason="the extra `remote` brings it")
    (tmp_path / "web").mkdir()
    with FileServer(tmp_path / "web").running() as running:
        yield running


@pytest.mark.parametrize("ranges", [True, False])
def test_archives_of_a_web_server(
    server: FileServer, ranges: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 10_000)  # so that parts are asked for
    server.ranges = ranges
    (server.folder / "x.tar").write_bytes(tar_of(100, 20_000))
    (server.folder / "x.tgz").write_bytes(gzip.compress(tar_of(100, 20_000)))
    for name in ("x.tar", "x.tgz", "x.tar?signature=1"):
        found = contents(opened(f"{server.url}/{name}"))
        assert list(found.values()) == [[bytes([n]) * 20_000] for n in range(100)]
        assert next(iter(found)) == f"{server.url}/{name}/0.png"
    assert (server.asked["x.tar"] > 8) is ranges
    assert not caplog.text


def test_tables_and_zips_need_a_server_that_sends_parts(server: FileServer) -> None:
    (server.folder / "x.parquet").write_bytes(parquet_of(3))
    (server.folder / "x.zip").write_bytes(zip_of(3))
    for name in ("x.parquet", "x.zip"):
        assert list(contents(opened(f"{server.url}/{name}")).values()) == [[picture(n)] for n in range(3)]
    server.ranges = False
    for name in ("x.parquet", "x.zip"):
        with pytest.raises(InputError, match="sends whole files only"):
            opened(f"{server.url}/{name}")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_is_lost_is_said_and_nothing_taken_for_the_end(
    server: FileServer, ranges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 10_000)
    (server.folder / "x.tar").write_bytes(tar_of(100, 20_000))
    server.ranges, server.breaks_at = ranges, 20_992 * 50
    *whole, (id, (text,)) = contents(opened(f"{server.url}/x.tar")).items()
    assert [parts for _, parts in whole] == [[bytes([n]) * 20_000] for n in range(len(whole))]
    assert 30 < len(whole) <= 50
    assert id == f"{server.url}/x.tar#rest"
    assert f"broken off after {len(whole) - 1}.png: the connection was lost" in str(text) and "resume" in str(text)


def test_a_connection_that_comes_back_is_not_noticed(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 10_000)
    data = noise(1000)
    (server.folder / "x.tar").write_bytes(tar_of(100, 20_000))
    (server.folder / "a.png").write_bytes(data)
    source = opened(f"{server.url}/x.tar")
    items = iter(source)
    found = contents([next(items)])
    server.failures["x.tar"] = [503, 502]
    assert len(found | contents(items)) == 100
    assert server.failures == {"x.tar": []}
    server.failures["a.png"] = [500, 429]
    assert fetch_picture(f"{server.url}/a.png") == data


@pytest.mark.parametrize(
    ("statuses", "asked", "words", "hint"),
    [
        ([404], 1, "there is nothing", "check the address"),
        ([403], 1, "it may not be read from here", "check the credentials and permissions of this machine"),
        ([503] * 9, 3, "its server says 503", "try it again later"),
    ],
)
def test_pictures_that_cannot_be_fetched_say_why(
    server: FileServer, statuses: list[int], asked: int, words: str, hint: str
) -> None:
    (server.folder / "a.png").write_bytes(picture(1))
    server.failures["a.png"] = statuses
    address = f"{server.url}/a.png"
    with pytest.raises(ImageError) as caught:
        RemotePicture(name=address).read()
    assert (str(caught.value), caught.value.hint) == (f"{address}: {words}", hint)
    assert server.asked["a.png"] == asked


def test_a_picture_that_broke_off_is_none(server: FileServer) -> None:
    (server.folder / "a.png").write_bytes(picture(1))
    server.breaks_at = 20
    with pytest.raises(ImageError, match="cannot be read"):
        fetch_picture(f"{server.url}/a.png")


def test_many_threads_fetch_at_once(server: FileServer) -> None:
    for n in range(40):
        (server.folder / f"{n}.png").write_bytes(picture(n))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(fetch_picture, [f"{server.url}/{n}.png" for n in range(40)]))
    assert found == [picture(n) for n in range(40)]


def test_a_server_that_is_not_there(server: FileServer) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        opened("http://127.0.0.1:9/x.tar")
    with pytest.raises(ImageError, match="cannot be read"):
        fetch_picture("http://127.0.0.1:9/a.png")


def test_a_picture_of_a_server_beyond_the_limit_is_not_taken(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (server.folder / "a.png").write_bytes(bytes(64 << 20))
    monkeypatch.setattr(remote, "LARGEST_FILE_BYTES", 1000)
    with pytest.raises(ImageError, match="more than 1,000 bytes"):
        fetch_picture(f"{server.url}/a.png")


def test_a_folder_of_a_server_is_what_its_page_links(server: FileServer) -> None:
    (server.folder / "p").mkdir()
    for n in range(3):
        (server.folder / "p" / f"{n}.png").write_bytes(picture(n))
    assert contents(opened(f"{server.url}/p/")) == {f"{server.url}/p/{n}.png": [picture(n)] for n in range(3)}


def test_a_list_with_addresses_is_fetched_where_that_is_allowed(server: FileServer, tmp_path: Path) -> None:
    (server.folder / "a.png").write_bytes(picture(1))
    (tmp_path / "l.csv").write_text(f"url\n{server.url}/a.png\n{server.url}/none.png\n")
    found = contents(opened(str(tmp_path / "l.csv"), fetch=True))
    assert found[f"{server.url}/a.png"] == [picture(1)]
    assert "there is nothing" in str(found[f"{server.url}/none.png"])
    (server.folder / "l.csv").write_text("path\na.png\n")
    assert contents(opened(f"{server.url}/l.csv?x=1")) == {f"{server.url}/a.png": [picture(1)]}


def test_a_range_that_comes_short_is_no_end(server: FileServer) -> None:
    (server.folder / "x.tar").write_bytes(tar_of(3))
    with RemoteFile(f"{server.url}/x.tar").open(parts=True) as file:
        file.seek(0)
        (server.folder / "x.tar").write_bytes(tar_of(3)[:1000])
        with pytest.raises(OSError, match="ended after 1,000 of 10,240 bytes"):
            file.read()


def test_nothing_is_asked_of_anybody_for_local_names(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_of(1))
    (tmp_path / "l.csv").write_text(f"path,n\n{server.url}/a.png,1\nx.png,2\n")
    for name in ("x.tar", "l.csv"):
        contents(opened(str(tmp_path / name)))
    assert not server.asked
