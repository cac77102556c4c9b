"""Files of a bundle: right before they are opened, the same after it, and hashed no more often than it takes."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.bundles import export_tiny, seal_again
from helpers.tiny import edit_json, tiny_config, write_checkpoint
from pixtral_runtime import load
from pixtral_runtime.batch.records import Settings
from pixtral_runtime.batch.worker import Worker, WorkerOptions
from pixtral_runtime.bundle import integrity
from pixtral_runtime.bundle.integrity import unchanged, verify_bundle
from pixtral_runtime.bundle.manifest import MANIFEST, open_bundle
from pixtral_runtime.errors import BundleError
from pixtral_runtime.files import sha256_of_file

FILES = ("decoder.onnx", "embed.onnx", "tekken.json", "vision.onnx", "weights.bin")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("integrity")
    return export_tiny(write_checkpoint(folder / "checkpoint", tiny_config()), folder / "bundle")


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the files that are hashed; those that are remembered are any, in a cache folder of the test's own."""
    names: list[str] = []

    def counted(path: Path) -> str:
        names.append(path.name)
        return sha256_of_file(path)

    monkeypatch.setattr(integrity, "sha256_of_file", counted)
    monkeypatch.setattr(integrity, "REMEMBERED_BYTES", 1)
    monkeypatch.setattr(integrity, "SETTLED_S", -1.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return names


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_found_at_every_load(bundle: Path, name: str) -> None:
    flip(bundle / name, (bundle / name).stat().st_size // 2)
    with pytest.raises(BundleError, match=rf"{name}: the file was changed: sha256") as caught:
        load(bundle).generate("What?")
    assert "--force" in caught.value.hint


def test_a_flip_anywhere_in_the_manifest_is_found_or_harmless(bundle: Path) -> None:
    before, data = open_bundle(bundle), (bundle / MANIFEST).read_bytes()
    chosen = random.Random(0)
    found = 0
    for place in chosen.sample(range(len(data)), 200):
        damaged = bytearray(data)
        damaged[place] ^= 1 << chosen.randrange(8)
        (bundle / MANIFEST).write_bytes(damaged)
        try:
            assert open_bundle(bundle) == before
        except BundleError:
            found += 1
    assert found > 150


def test_a_manifest_edited_by_hand_is_refused_and_one_of_the_first_exports_read(bundle: Path) -> None:
    edit_json(bundle / MANIFEST, lambda data: data["limits"].update(max_context=512))
    with pytest.raises(BundleError, match="was changed"):
        open_bundle(bundle)
    edit_json(bundle / MANIFEST, lambda data: data.pop("seal"))
    assert open_bundle(bundle).limits.max_context == 512


@pytest.mark.parametrize("name", ["../weights.bin", "/etc/passwd", "rtx/../../x", "", "a\0b"])
def test_a_file_outside_the_bundle_is_refused(bundle: Path, name: str) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    entry = manifest["files"]["weights.bin"]
    edit_json(bundle / MANIFEST, lambda data: (data["files"].update({name: entry}), data.pop("seal")))
    with pytest.raises(BundleError, match="is no file in the bundle's folder"):
        open_bundle(bundle)


def test_an_engine_outside_the_bundle_is_refused(bundle: Path) -> None:
    seal_again(bundle, engines={"rtx:sm89": {"graphs": {"vision": {"file": "../x.engine"}}}})
    with pytest.raises(BundleError, match=r"'\.\./x\.engine' is no file in the bundle's folder"):
        open_bundle(bundle)


def test_what_was_found_right_is_not_hashed_again_until_it_is_another_file(bundle: Path, hashed: list[str]) -> None:
    opened = open_bundle(bundle)

    def load_it() -> list[str]:
        hashed.clear()
        with unchanged(opened):
            pass
        return sorted(hashed)

    assert load_it() == list(FILES)
    assert load_it() == []
    os.utime(bundle / "weights.bin")
    assert load_it() == ["weights.bin"]
    assert load_it() == []
    shutil.copy2(bundle / "vision.onnx", bundle / "copy")  # the same bytes and the same time, another file
    (bundle / "copy").replace(bundle / "vision.onnx")
    assert load_it() == ["vision.onnx"]
    status = (bundle / "weights.bin").stat()
    flip(bundle / "weights.bin", 0)
    os.utime(bundle / "weights.bin", ns=(status.st_atime_ns, status.st_mtime_ns))  # as if nobody had been there
    with pytest.raises(BundleError, match="was changed"):
        load_it()


def test_verifying_reads_every_byte_whatever_is_remembered(bundle: Path, hashed: list[str]) -> None:
    opened = open_bundle(bundle)
    for _ in range(2):
        hashed.clear()
        assert sorted(verify_bundle(opened)) == sorted(hashed) == list(FILES)


@pytest.mark.parametrize("place", ["/proc/self", "{}/file"])
def test_without_a_cache_folder_everything_is_hashed_again(
    bundle: Path, hashed: list[str], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", place.format(tmp_path))
    for _ in range(2):
        with unchanged(open_bundle(bundle)):
            pass
    assert len(hashed) == 2 * len(FILES)


def test_a_file_that_was_only_just_written_is_not_remembered(
    bundle: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrity, "SETTLED_S", 1e6)
    for _ in range(2):
        with unchanged(open_bundle(bundle)):
            pass
    assert len(hashed) == 2 * len(FILES)


def overwrite(path: Path) -> None:
    path.write_bytes(path.read_bytes())


def exchange(path: Path) -> None:
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)


@pytest.mark.parametrize("harm", [overwrite, exchange, Path.unlink])
@pytest.mark.parametrize("name", ["weights.bin", "decoder.onnx", "tekken.json"])
def test_a_bundle_replaced_while_it_is_loaded_is_noticed(
    bundle: Path, name: str, harm: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pixtral_runtime.backends import choose, ort_session

    real = ort_session.OrtSession

    def late(*arguments: object) -> object:
        made = real(*arguments)  # type: ignore[arg-type]
        if arguments[1] == "decoder":
            harm(bundle / name)
        return made

    monkeypatch.setattr(choose, "OrtSession", late)
    with pytest.raises(BundleError, match=rf"{name} was replaced while it was loaded"):
        load(bundle)


def test_a_job_for_another_bundle_than_the_one_that_is_there_is_refused(bundle: Path) -> None:
    """As where it is exported anew while a run starts, or where a worker of a cluster has another one."""
    with pytest.raises(BundleError, match="the job is for 0123"):
        Worker(bundle, Settings("0123"), WorkerOptions())
