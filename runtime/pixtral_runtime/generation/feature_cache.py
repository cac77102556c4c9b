"""Image features on disk: a picture that was encoded once need not be encoded again, in this job or the next.

One file an image, named by a hash of its pixels and of the bundle that encoded it. A file is its content's sha256
followed by the content, so that whatever a crash or a disk did to it is noticed: such a file counts as absent and is
written anew. Several processes may share a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import time
from pathlib import Path

import numpy as np

from pixtral_runtime.backends.session import Array
from pixtral_runtime.errors import InputError, Option
from pixtral_runtime.files import check_folder, write_atomically

FILE_FORMAT = b"1"
SUFFIX, UNFINISHED = ".features", ".tmp"  # the latter as `files.replacing` writes
DEFAULT_LIMIT_BYTES = 20_000_000_000
ABANDONED_S = 3600.0  # an unfinished file this old is nobody's
KEPT_SHARE = 0.9  # of the limit, once it is passed: files are counted now and then, not at every image


class FeatureCache:
    """A folder with at most `limit_bytes` of features of one bundle's vision encoder, the last used staying longest.

    Raises InputError where the folder cannot be written.
    """

    def __init__(self, folder: Path, bundle_fingerprint: str, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self._folder, self._bundle, self._limit = folder, bundle_fingerprint.encode(), limit_bytes
        self.hits = self.misses = self.corrupt = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            check_folder(folder)
            self._size = self._trim()
        except OSError as error:
            raise InputError(
                f"{folder} cannot be written: {error.strerror}", Option("embedding_cache", "another/folder")
            ) from error

    def get(self, image_key: bytes) -> Array | None:
        """Features (P, D) of the image with this hash (`Prompt.image_keys`), or None."""
        path = self._path(image_key)
        try:
            data = path.read_bytes()
        except OSError:
            self.misses += 1
            return None
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            self.corrupt += 1
            return None
        self.hits += 1
        with contextlib.suppress(OSError):  # another process may have removed it meanwhile
            os.utime(path)
        name, _, content = data[32:].partition(b"\n")
        raw: Array = np.load(io.BytesIO(content), allow_pickle=False)
        return raw.view(_dtype(name.decode()))

    def put(self, image_key: bytes, features: Array) -> None:
        """Keep an image's features. A full disk is no error: the image is then encoded again next time."""
        content = io.BytesIO()
        np.save(content, features.view(f"V{features.itemsize}"), allow_pickle=False)  # NumPy's files know no bfloat16
        data = features.dtype.name.encode() + b"\n" + content.getvalue()
        try:
            write_atomically(self._path(image_key), hashlib.sha256(data).digest() + data, durable=False)
        except OSError:
            return
        self._size += 32 + len(data)
        if self._size > self._limit:
            with contextlib.suppress(OSError):  # whoever else may write there took our permissions away
                self._size = self._trim()

    def _path(self, image_key: bytes) -> Path:
        digest = hashlib.sha256(b"\0".join((FILE_FORMAT, self._bundle, image_key)))
        return self._folder / f"{digest.hexdigest()[:40]}{SUFFIX}"

    def _trim(self) -> int:
        """Remove what is abandoned and, beyond the limit, what was not used for longest. Returns the bytes left."""
        files = []
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if path.suffix == UNFINISHED and time.time() - status.st_mtime > ABANDONED_S:
                    path.unlink()
                elif path.suffix == SUFFIX:
                    files.append((status.st_mtime, path, status.st_size))
        size = sum(bytes_ for *_, bytes_ in files)
        if size > self._limit:
            for _, path, bytes_ in sorted(files):
                if size <= KEPT_SHARE * self._limit:
                    break
                path.unlink(missing_ok=True)
                size -= bytes_
        return size


def _dtype(name: str) -> np.dtype[np.generic]:
    if name == "bfloat16":
        import ml_dtypes  # noqa: F401 - makes NumPy know the name
    return np.dtype(name)
