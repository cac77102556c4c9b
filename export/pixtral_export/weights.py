"""The weight file: every tensor of a bundle, streamed from the checkpoint.

The plan (names, shapes, offsets) follows from the configuration alone, so graphs can be written before, after or
without the bytes. Each tensor starts at a page boundary, so that a runtime can map it. Tensors are read, cast and
transposed in slabs: memory does not grow with the checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pixtral_export import decoder, vision
from pixtral_export.graphs import DECODER_ROPE, VISION_ROPE
from pixtral_export.layout import Parameter, parameters
from pixtral_export.trace import ExternalWeight
from pixtral_runtime.bundle import FileEntry, Limits
from pixtral_runtime.config import ModelConfig
from pixtral_runtime.errors import InputError

if TYPE_CHECKING:
    from pixtral_export.checkpoint import Checkpoint

ALIGNMENT = 4096
SLAB_BYTES = 64 << 20


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the weight file: a checkpoint's parameter, or a rotary table where `parameter` is None."""

    name: str
    place: ExternalWeight
    parameter: Parameter | None


def plan_weights(config: ModelConfig, dtype: str, limits: Limits) -> list[PlannedTensor]:
    """Lay out the weight file for activations of `dtype`."""
    itemsize = getattr(torch, dtype).itemsize
    entries: list[tuple[str, tuple[int, ...], Parameter | None]] = []
    for parameter in parameters(config):
        shape = parameter.shape[::-1] if parameter.is_linear else parameter.shape
        entries.append((parameter.name, shape, parameter))
    entries += [(name, (config.vision.max_grid**2, config.vision.head_dim // 2), None) for name in VISION_ROPE]
    entries += [(name, (limits.max_context, config.decoder.head_dim // 2), None) for name in DECODER_ROPE]
    planned, offset = [], 0
    for name, shape, source in entries:
        nbytes = itemsize * torch.Size(shape).numel()
        planned.append(PlannedTensor(name, ExternalWeight(shape, dtype, offset, nbytes), source))
        offset = -(-(offset + nbytes) // ALIGNMENT) * ALIGNMENT
    return planned


def weight_file_bytes(plan: list[PlannedTensor]) -> int:
    return plan[-1].place.offset + plan[-1].place.nbytes


def write_weights(
    path: Path,
    plan: list[PlannedTensor],
    checkpoint: Checkpoint,
    limits: Limits,
    advance: Callable[[int], None],
) -> FileEntry:
    """Stream all tensors into `path`. Calls `advance` with the bytes just written. Raises InputError on overflow."""
    tables = _rope_tables(checkpoint.config, limits)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for item in plan:
            padding = b"\0" * (item.place.offset - file.tell())
            file.write(padding)
            digest.update(padding)
            dtype = getattr(torch, item.place.dtype)
            source = tables[item.name] if item.parameter is None else checkpoint.read(item.parameter)
            transposed = item.parameter is not None and item.parameter.is_linear
            for slab in _slabs(source.T if transposed else source, dtype):
                if dtype == torch.float16 and not torch.isfinite(slab).all():
                    raise InputError(
                        f"{item.name} holds values beyond float16's range (65504)",
                        "pixtral export … --dtype bfloat16 (TensorRT) or --dtype float32 (CPU)",
                    )
                data = slab.contiguous().view(-1).view(torch.uint8).numpy().data
                file.write(data)
                digest.update(data)
                advance(data.nbytes)
    return FileEntry(path.stat().st_size, digest.hexdigest())


def _slabs(tensor: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Cast pieces of a tensor along its first axis, each of about SLAB_BYTES."""
    row_bytes = max(1, dtype.itemsize * tensor[0].numel())
    rows = max(1, SLAB_BYTES // row_bytes)
    for start in range(0, len(tensor), rows):
        yield tensor[start : start + rows].to(dtype)


def _rope_tables(config: ModelConfig, limits: Limits) -> dict[str, Tensor]:
    return dict(
        [
            *zip(VISION_ROPE, vision.rope_tables(config.vision), strict=True),
            *zip(DECODER_ROPE, decoder.rope_tables(config.decoder, limits.max_context), strict=True),
        ]
    )
