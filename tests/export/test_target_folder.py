from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers.bundles import export_tiny
from pixtral_export import target_folder
from pixtral_export.target_folder import check_target, filling
from pixtral_runtime.bundle import manifest
from pixtral_runtime.bundle.integrity import verify_bundle
from pixtral_runtime.bundle.manifest import MANIFEST, PARTIAL, open_bundle, writing
from pixtral_runtime.errors import BundleError, InputError


def never(partial: Path) -> bool:
    return False


@contextmanager
def filled(target: Path, *, force: bool = False) -> Iterator[Path]:
    with filling(target, force, never) as folder:
        yield folder


def test_the_working_folder_a_link_and_the_root_of_a_disk_are_filled(
    mistral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {path.name for path in export_tiny(mistral, tmp_path / "new").iterdir()}
    here, real, link = (tmp_path / name for name in ("here", "real", "link"))
    for folder in (here, real):
        folder.mkdir()
    link.symlink_to(real)
    (here / "lost+found").mkdir()
    monkeypatch.chdir(here)
    export_tiny(mistral, Path("."))
    export_tiny(mistral, link)
    assert {path.name for path in here.iterdir()} == names | {"lost+found"}
    assert {path.name for path in real.iterdir()} == names
    assert link.is_symlink()
    assert open_bundle(Path(".")).fingerprint == open_bundle(link).fingerprint


def test_a_link_to_nothing_makes_the_folder_it_names(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("later")
    with filled(tmp_path / "link") as folder:
        (folder / MANIFEST).touch()
    assert (tmp_path / "later" / MANIFEST).is_file()


def test_a_forced_export_replaces_the_bundle_and_keeps_what_is_not_of_it(mistral: Path, tmp_path: Path) -> None:
    bundle = export_tiny(mistral, tmp_path / "b")
    (bundle / "results.jsonl").write_text("mine")
    before = open_bundle(bundle).fingerprint
    export_tiny(mistral, bundle, dtype="float32", force=True)
    assert open_bundle(bundle).fingerprint != before
    assert (bundle / "results.jsonl").read_text() == "mine"


def test_a_bundle_that_lists_files_elsewhere_takes_none_of_them_along(mistral: Path, tmp_path: Path) -> None:
    bundle = export_tiny(mistral, tmp_path / "b")
    (tmp_path / "mine").write_text("mine")
    text = (bundle / MANIFEST).read_text()
    engine = '{"graphs": {"vision": {"file": "../mine"}}}'
    (bundle / MANIFEST).write_text(text.replace('"engines": {}', f'"engines": {{"trt": {engine}}}'))
    with pytest.raises(BundleError, match="no file in the bundle's folder"):
        open_bundle(bundle)
    export_tiny(mistral, bundle, force=True)
    assert (tmp_path / "mine").read_text() == "mine"


def test_what_goes_wrong_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    def fail(target: Path) -> None:
        with filled(target) as folder:
            (folder / "half").touch()
            raise RuntimeError

    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "new", tmp_path / "empty"):
        with pytest.raises(RuntimeError):
            fail(target)
    assert not (tmp_path / "new").exists()
    assert not list((tmp_path / "empty").iterdir())


@pytest.mark.parametrize("moved", [0, 1, 3, 5])
def test_a_bundle_is_the_old_or_the_new_one_wherever_its_move_is_stopped(
    moved: int, mistral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = open_bundle(export_tiny(mistral, tmp_path / "new", dtype="float32")).fingerprint
    bundle = export_tiny(mistral, tmp_path / "b")
    done: list[Path] = []
    replace = Path.replace

    def stop(path: Path, target: Path) -> Path:
        if len(done) == moved:
            raise KeyboardInterrupt
        done.append(path)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        export_tiny(mistral, bundle, dtype="float32", force=True)
    monkeypatch.undo()
    assert not (bundle / MANIFEST).exists()
    if moved == 3:
        with pytest.raises(InputError, match="exists"):  # by now
            export_tiny(mistral, bundle)
    assert open_bundle(bundle).fingerprint == new
    assert all(verify_bundle(open_bundle(bundle)))
    assert not (bundle / PARTIAL).exists()


def test_all_files_are_on_the_disk_before_the_first_takes_its_place(
    mistral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def move(folder: Path) -> None:
        seen.append("moved")
        manifest.move_up(folder)

    monkeypatch.setattr(target_folder, "sync", lambda path: seen.append(path.name))
    monkeypatch.setattr(target_folder, "move_up", move)
    bundle = export_tiny(mistral, tmp_path / "b")
    assert sorted(seen[:-2]) == sorted(path.name for path in bundle.iterdir())
    assert seen[-2:] == [PARTIAL, "moved"]


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_with_other_things_or_a_file_is_refused_before_the_work(tmp_path: Path, force: bool) -> None:
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(InputError, match="is no bundle"):
        check_target(tmp_path, force)
    with pytest.raises(InputError, match="is a file"):
        check_target(tmp_path / "photo.jpg", force)
    with pytest.raises(InputError, match="Not a directory"):
        check_target(tmp_path / "photo.jpg" / "b", force)
    with pytest.raises(InputError, match="cannot be written"):
        check_target(Path("/proc/self/b"), force)


def test_two_exports_to_one_place_exclude_each_other_and_so_does_a_build(tmp_path: Path) -> None:
    with filled(tmp_path / "b") as folder:
        (tmp_path / "link").symlink_to("b")
        for other in (tmp_path / "b", tmp_path / "link"):
            with pytest.raises(InputError, match="being written by another"), filled(other):
                pytest.fail("the lock was taken twice")
        with pytest.raises(InputError, match="being written by another"), writing(tmp_path / "b"):
            pytest.fail("the lock was taken twice")
        (folder / MANIFEST).write_text("{}")
    assert [path.name for path in (tmp_path / "b").iterdir()] == [MANIFEST]


def test_the_command_judges_its_target_before_it_looks_at_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    command = [sys.executable, "-m", "pixtral_cli", "export", "nobody/nothing", "-o", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, "is no bundle" in done.stderr) == (3, True)
