"""The bytes of safetensors files: checked by the library, mapped a tensor at a time."""

from __future__ import annotations

import mmap
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pixtral_export.checkpoint.config_file import DOWNLOAD_HINT
from pixtral_export.checkpoint.headers import SAFETENSORS_DTYPES, StoredTensor
from pixtral_runtime.errors import CheckpointError

CODE_DTYPES = {"F8_E4M3": "float8_e4m3fn", "I8": "int8", "I32": "int32"}  # that quantized weights are stored in


def check_header(file: Path) -> None:
    """The library's own checks: offsets without gaps, sizes that fit the shapes. Raises CheckpointError."""
    try:
        with safe_open(file, framework="np"):  # torch's way would map the whole file for writing
            pass
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}", DOWNLOAD_HINT) from error


def mapped(stored: StoredTensor) -> Tensor:
    """A view of a tensor's bytes in its file. Raises CheckpointError where they cannot be read."""
    start = stored.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    dtype = getattr(torch, (SAFETENSORS_DTYPES | CODE_DTYPES)[stored.dtype])
    count = prod(stored.shape)
    end = stored.offset + count * dtype.itemsize
    try:
        with stored.file.open("rb") as file:
            span = mmap.mmap(file.fileno(), end - start, access=mmap.ACCESS_COPY, offset=start)
    except (OSError, ValueError) as error:  # ValueError: the file has become shorter
        raise CheckpointError(f"{stored.file} cannot be read: {error}", DOWNLOAD_HINT) from error
    return torch.frombuffer(span, dtype=dtype, count=count, offset=stored.offset - start).view(stored.shape)
