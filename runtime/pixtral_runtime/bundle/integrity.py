"""Whether a bundle's files are, byte by byte, what its manifest says, and stay so while they are loaded.

All are hashed at every load, but large ones only once: that a file was right is remembered under its inode, size and
times. The memory is an empty file in the user's cache folder, whose name stands for all of that, so nothing in it can
be damaged; where there is no such folder, the file is hashed again next time. What a disk does to bytes that nobody
wrote goes unnoticed until `verify_bundle` reads them all.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from pixtral_runtime.bundle.manifest import Bundle, FileEntry, remake_hint
from pixtral_runtime.errors import BundleError, InputError
from pixtral_runtime.files import cache_folder, sha256_of_file

REMEMBERED_BYTES = 1 << 26  # from here on; smaller files are hashed before anybody notices
SETTLED_S = 1.0  # after a write: sooner, another one may leave the same times

Identity = tuple[int, ...]


@contextmanager
def unchanged(bundle: Bundle) -> Iterator[None]:
    """Open a bundle's files within: they are found right before, and the same after. Raises BundleError."""
    with unchanged_files(bundle.path, bundle.files, remake_hint(bundle.path), BundleError):
        yield


@contextmanager
def unchanged_files(
    folder: Path, files: Mapping[str, FileEntry], remake: str, kind: type[InputError]
) -> Iterator[None]:
    """As `unchanged`, for files whose hashes are in `files`. Raises `kind`; `remake` is the command that helps."""
    before = {folder / name: check_file(folder / name, entry, remake, kind) for name, entry in files.items()}
    yield
    for path, identity in before.items():
        if _identity(path) != identity:
            raise kind(f"{path} was replaced while it was loaded", "the same command again", remake)


def verify_bundle(bundle: Bundle) -> Iterator[str]:
    """Read every file and compare its hash. Yields each name once it is found right; raises BundleError."""
    for name, entry in bundle.files.items():
        check_file(bundle.path / name, entry, remake_hint(bundle.path), BundleError, trusting=False)
        yield name


def check_file(
    path: Path, entry: FileEntry, remake: str, kind: type[InputError], *, trusting: bool = True
) -> Identity | None:
    """What a file is for the system, once its hash is right, or `trusting` was found right before. Raises `kind`."""
    identity, started_s = _identity(path), time.time()
    marker = _marker(identity, entry)
    if trusting and marker is not None and marker.exists():
        return identity
    try:
        seen = sha256_of_file(path)
    except OSError as error:
        raise kind(f"{path} cannot be read: {error.strerror}", "check the disk") from error
    if seen != entry.sha256:
        raise kind(f"{path}: the file was changed: sha256 {seen[:16]}…, expected {entry.sha256[:16]}…", remake)
    if marker is not None and identity and started_s - identity[-1] / 1e9 > SETTLED_S:
        with suppress(OSError):
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
    return identity


def _identity(path: Path) -> Identity | None:
    """Another one after every write, and for another file of that name; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _marker(identity: Identity | None, entry: FileEntry) -> Path | None:
    """The file that is there if one of this identity was found right; None for what is not remembered."""
    folder = cache_folder()
    if folder is None or entry.bytes < REMEMBERED_BYTES:
        return None
    return folder / "verified" / hashlib.sha256(repr((identity, entry.sha256)).encode()).hexdigest()
