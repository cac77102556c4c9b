"""Kernels that TensorRT-RTX compiled for this GPU, kept in the user's cache folder for the next process.

An engine of TensorRT-RTX is compiled for the GPU at hand while it runs, anew for each shape that comes. TensorRT itself
refuses what another GPU, driver or version left behind, and compiles again, as it does where the file cannot be read or
written: nothing here stops a run. Not yet run on a device.
"""

from __future__ import annotations

import weakref
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from pixtral_runtime.files import cache_folder, write_atomically

FOLDER = "tensorrt-rtx"
DIGITS = 16  # of an engine's sha256


def compiles_kernels(trt: ModuleType) -> bool:
    """Whether engines of a package are compiled further while they run."""
    return hasattr(trt, "IRuntimeCache")


def kernel_file(graph: str, sha256: str, gpu: str) -> Path | None:
    """Where the kernels of an engine for a GPU of this name are kept; None where the user has no such place."""
    name = "".join(letter if letter.isalnum() else "-" for letter in gpu)
    folder = cache_folder()
    return folder and folder / FOLDER / f"{graph}-{sha256[:DIGITS]}-{name}.kernels"


def keep_kernels(owner: object, config: Any, path: Path) -> None:
    """Give a runtime configuration what was kept, and keep what it has once `owner` is gone or the process ends."""
    cache = config.create_runtime_cache()
    if cache is None:
        return
    kept = b""
    with suppress(OSError):
        kept = path.read_bytes()
    if kept and not cache.deserialize(kept):
        kept = b""
    if config.set_runtime_cache(cache):
        weakref.finalize(owner, _save, cache, path, kept)


def _save(cache: Any, path: Path, kept: bytes) -> None:
    with suppress(OSError, RuntimeError):  # RuntimeError: of a device that is gone
        made = cache.serialize()
        if made is not None and bytes(made) != kept:
            write_atomically(path, bytes(made), durable=False)
