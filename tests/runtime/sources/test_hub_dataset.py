"""Data sets of the Hub by name, on a stand-in that answers what its library asks."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from helpers.hub_server import HubRepository, hub_handler
from helpers.sources import contents, picture
from pixtral_runtime.errors import InputError
from pixtral_runtime.sources import remote_system
from pixtral_runtime.sources.datasets import open_dataset

pytest.importorskip("huggingface_hub", reason="the extra `remote` brings it")
pa = pytest.importorskip("pyarrow", reason="the extra `tables` brings it")
pq = pytest.importorskip("pyarrow.parquet")
NAME = "hf://datasets/owner/name"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubRepository]:
    """An empty data set `owner/name`, on a server that the hub library asks."""
    from huggingface_hub import HfFileSystem, close_session, constants

    repository = HubRepository(tmp_path / "main", kind="dataset")
    with ThreadingHTTPServer(("127.0.0.1", 0), hub_handler(repository)) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(remote_system, "PAUSES_S", (0.0, 0.0))
        HfFileSystem.clear_instance_cache()
        close_session()
        yield repository
        HfFileSystem.clear_instance_cache()
        close_session()
        server.shutdown()


def write(folder: Path, name: str, *numbers: int) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [{"bytes": picture(n), "path": None} for n in numbers]}), path)


def read(name: str, **options: Any) -> dict[str, list[bytes | str]]:
    source = open_dataset(name, **options)
    assert source is not None
    return contents(source)


def test_the_parquet_files_of_a_repository(hub: HubRepository) -> None:
    write(hub.folder, "data/train-00000-of-00001.parquet", 1, 2)
    write(hub.folder, "data/test-00000-of-00001.parquet", 3)
    (hub.folder / "README.md").write_text("---\n")
    wanted = {
        f"{NAME}/data/test-00000-of-00001.parquet/0": [picture(3)],
        f"{NAME}/data/train-00000-of-00001.parquet/0": [picture(1)],
        f"{NAME}/data/train-00000-of-00001.parquet/1": [picture(2)],
    }
    assert read(NAME) == read(f"{NAME}/") == read(f"{NAME}/data/*.parquet") == read(f"{NAME}/data/") == wanted
    one = read(f"{NAME}/data/test-00000-of-00001.parquet")
    assert list(one.values()) == [[picture(3)]]
    assert list(read(f"{NAME}@main").values()) == list(wanted.values())


def test_of_several_sets_one_is_to_be_named(hub: HubRepository) -> None:
    write(hub.folder, "en/train.parquet", 1)
    write(hub.folder, "fr/train.parquet", 2)
    with pytest.raises(InputError, match=f"several sets: {NAME}/en/, {NAME}/fr/"):
        read(NAME)
    assert list(read(f"{NAME}/fr/").values()) == [[picture(2)]]


def test_shards_and_single_pictures(hub: HubRepository) -> None:
    hub.folder.mkdir()
    with tarfile.open(hub.folder / "train-0.tar", "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = len(picture(1))
        tar.addfile(info, io.BytesIO(picture(1)))
    (hub.folder / "b.png").write_bytes(picture(2))
    assert read(NAME) == {f"{NAME}/train-0.tar/a.png": [picture(1)]}
    assert read(f"{NAME}/b.png") == {f"{NAME}/b.png": [picture(2)]}


def test_what_the_hub_converted_is_read_where_there_is_nothing_else(hub: HubRepository, tmp_path: Path) -> None:
    hub.folder.mkdir()
    (hub.folder / "script.py").write_text("")
    with pytest.raises(InputError, match="nor a conversion by the Hub"):
        read(NAME)
    hub.branches["refs/convert/parquet"] = tmp_path / "converted"
    write(tmp_path / "converted", "default/train/0000.parquet", 1)
    write(tmp_path / "converted", "default/test/0000.parquet", 2)
    refresh()
    found = read(NAME)
    assert list(found.values()) == [[picture(2)], [picture(1)]]
    assert all(id.startswith(f"{NAME}@refs%2Fconvert%2Fparquet/default/") for id in found)
    assert read(f"{NAME}@refs/convert/parquet").values()


def test_a_part_of_a_data_set_is_not_taken_for_the_whole(hub: HubRepository, tmp_path: Path) -> None:
    hub.folder.mkdir()
    (hub.folder / "script.py").write_text("")
    hub.branches["refs/convert/parquet"] = tmp_path / "converted"
    write(tmp_path / "converted", "default/partial-train/0000.parquet", 1)
    with pytest.raises(InputError, match="converted only a part") as caught:
        read(NAME)
    glob = caught.value.hint.partition(",")[0]
    assert list(read(glob).values()) == [[picture(1)]]


def refresh() -> None:
    from huggingface_hub import HfFileSystem

    HfFileSystem.clear_instance_cache()


@pytest.mark.parametrize("name", ["hf://datasets/owner/other", "hf://datasets/owner/other/data/*.parquet"])
def test_a_data_set_that_is_not_there(hub: HubRepository, name: str) -> None:
    with pytest.raises(InputError, match="nothing") as caught:
        read(name)
    assert "check the address" in caught.value.hint


def test_what_its_owner_keeps_says_how_to_get_it(hub: HubRepository) -> None:
    write(hub.folder, "data/train.parquet", 1)
    hub.gated = True
    with pytest.raises(InputError, match="those who accept the conditions") as caught:
        read(NAME)
    assert "hf auth login" in caught.value.hint
