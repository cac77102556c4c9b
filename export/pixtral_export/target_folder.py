"""The folder that an export fills: judged before the work, for one writer at a time, whole when its manifest is there.

A bundle is made in a folder within its target, whatever that is: an empty folder, a link to one, a mounted volume, the
working folder. Its files then move up, the manifest last: without one it is no bundle. Files in the target that are not
the bundle's own stay.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pixtral_runtime.bundle.manifest import LOCK, MANIFEST, PARTIAL, move_up, open_bundle, writing
from pixtral_runtime.errors import InputError, MachineError, Option, PixtralError, unwritable
from pixtral_runtime.files import check_folder, sync

NOT_CONTENT = {LOCK, PARTIAL, "lost+found"}
"""What an empty folder may hold; the last is how the root of a disk begins."""
ELSEWHERE = Option("output", "NEW_FOLDER")


def check_target(target: Path, force: bool) -> None:
    """Raises InputError where a bundle cannot be written there, or something is there that must not be replaced."""
    folder = Path(os.path.realpath(target))
    try:
        if folder.exists():
            if not folder.is_dir():
                raise InputError(f"{target} is a file", ELSEWHERE)
            _check_content(target, {entry.name for entry in folder.iterdir()}, force)
        check_folder(existing_parent(folder))
    except OSError as error:
        raise unwritable(target, error, ELSEWHERE) from error


def _check_content(target: Path, names: set[str], force: bool) -> None:
    if MANIFEST in names:
        if not force:
            raise InputError(f"{target} exists", Option("force", note="to replace it"), ELSEWHERE)
    elif names - NOT_CONTENT and PARTIAL not in names:
        raise InputError(f"{target} exists and is no bundle; it will not be overwritten", ELSEWHERE)


def check_space(target: Path, needed_bytes: int) -> None:
    """Raises MachineError where the disk is too small."""
    free = shutil.disk_usage(existing_parent(Path(os.path.realpath(target)))).free
    if free < needed_bytes:
        raise MachineError(
            f"{target} needs {needed_bytes / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free",
            Option("output", "ON_A_LARGER_DISK"),
        )


@contextmanager
def filling(target: Path, force: bool, is_resumable: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder to fill, whose files are the target's if all went well.

    Otherwise it vanishes, unless an interrupted export may go on from it, as `is_resumable` says. Raises InputError
    where another process writes there.
    """
    check_target(target, force)
    folder = Path(os.path.realpath(target))
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(target, error, ELSEWHERE) from error
    try:
        with writing(folder):
            if not (folder / MANIFEST).exists() and (folder / PARTIAL / MANIFEST).exists():
                move_up(folder)  # an export that was stopped at its last step
            check_target(target, force)  # again: who wrote before the lock was ours may have filled it
            partial = folder / PARTIAL
            if not is_resumable(partial):
                shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(exist_ok=True)
            try:
                yield partial
                _take_place(partial, folder)
            except KeyboardInterrupt as error:
                if is_resumable(partial):
                    done = f"the layers done so far are in {partial}; the same command goes on"
                    raise KeyboardInterrupt(done) from error
                raise
            finally:
                if not is_resumable(partial) and not (partial / MANIFEST).is_file():
                    shutil.rmtree(partial, ignore_errors=True)
    finally:
        if is_new:
            with suppress(OSError):
                folder.rmdir()  # only if nothing came of it


def _take_place(partial: Path, folder: Path) -> None:
    """The new files, brought to the disk, for those of the bundle that was there."""
    made = list(partial.iterdir())
    left = _own_files(folder) - {folder / path.name for path in made}
    for path in (*made, partial):
        sync(path)
    move_up(folder)
    for path in left:
        path.unlink(missing_ok=True)
        with suppress(OSError):
            path.parent.rmdir()  # of engines, where none is left


def _own_files(folder: Path) -> set[Path]:
    """What is the bundle's in a folder, and nowhere else; nothing where there is none that can be read."""
    try:
        files = open_bundle(folder).own_files
    except PixtralError:
        return set()
    return {path for path in files if Path(os.path.realpath(path)).is_relative_to(folder)}


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest folder above that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
