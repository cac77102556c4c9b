"""The weight file: every tensor of a bundle, streamed from the checkpoint.

Which tensors there will be follows from configuration and recipe alone (`plan_weights`), so sizes are known before any
work. The file is written front to back, each tensor at a page boundary, so that a runtime can map it. Parameters are
read, cast, quantized and transposed in slabs: memory does not grow with the checkpoint.

Shapes: K inputs and N outputs of a linear layer, V vocabulary, D hidden.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from pixtral_export.checkpoint.codes import ReadCodes
from pixtral_export.model.parameters import Parameter
from pixtral_export.model.rope import decoder_rope_tables, vision_rope_tables
from pixtral_export.quantization.calibrate import Quantized, e4m3_unit, quantize_weight
from pixtral_export.quantization.formats import (
    FORMATS,
    FP4,
    FP8,
    group_scales,
    round_to_nearest,
    stored_as,
    stored_as_e4m3,
)
from pixtral_export.quantization.recipes import EMBEDDING, Scheme, Stored, stored_tensors
from pixtral_export.weight_names import (
    ExternalWeight,
    global_scale_name,
    input_scale_name,
    scale_name,
)
from pixtral_export.weights.plan import aligned
from pixtral_export.weights.values import beyond_float16
from pixtral_runtime.bundle.config import ModelConfig
from pixtral_runtime.bundle.manifest import FileEntry, Limits
from pixtral_runtime.errors import Option, SettingError

SLAB_VALUES = 16 << 20

Advance = Callable[[int], None]
"""Called with the bytes just written."""


class WeightFile:
    """A weight file that grows tensor by tensor. Opened again, it goes on after the `places` it is given."""

    def __init__(self, path: Path, dtype: str, advance: Advance, places: Iterable[ExternalWeight] = ()) -> None:
        self.places = {place.name: place for place in places}
        self._dtype, self._advance = dtype, advance
        self._digest = hashlib.sha256()
        self._file = path.open("r+b" if self.places else "w+b")
        end = max((place.offset + place.nbytes for place in self.places.values()), default=0)
        self._file.truncate(end)
        for start in range(0, end, 1 << 24):
            data = self._file.read(min(1 << 24, end - start))
            self._digest.update(data)
            advance(len(data))

    def flush(self) -> None:
        """Bring what was written to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> FileEntry:
        size = self._file.tell()
        self._file.close()
        return FileEntry(size, self._digest.hexdigest())

    def add(self, item: Stored, chunks: Iterable[Tensor]) -> None:
        """Append a tensor, given as pieces of its flat contents. A name that is there already is passed over."""
        if item.name in self.places:
            return
        start = aligned(self._file.tell())
        self._write(b"\0" * (start - self._file.tell()))
        for chunk in chunks:
            self._write(chunk.contiguous().view(-1).view(torch.uint8).numpy().data)
        if self._file.tell() - start != item.nbytes:
            raise RuntimeError(f"{item.name} took {self._file.tell() - start} bytes, expected {item.nbytes}")
        self.places[item.name] = ExternalWeight(item.name, item.shape, item.dtype, start, item.nbytes)

    def add_values(self, item: Stored, tensor: Tensor) -> None:
        """Append a tensor in the item's float type. Raises InputError on overflow."""
        self.add(item, _cast(item, tensor))

    def add_parameter(self, parameter: Parameter, scheme: Scheme | None, source: Tensor) -> None:
        """Append a parameter, (out, in) as in a checkpoint, rounded to nearest where it has a scheme."""
        items = {item.name: item for item in stored_tensors(parameter, scheme, self._dtype)}
        if scheme is None:
            self.add_values(items[parameter.name], source.T if parameter.is_linear else source)
            return
        scales: list[Tensor] = []
        if parameter.name == EMBEDDING:
            self.add(items[parameter.name], self._rounded_rows(source, scheme, scales))
            self.add_values(items[scale_name(parameter.name)], torch.cat(scales))
            return
        unit = None
        if scheme.weight == FP4.name:
            unit = e4m3_unit(torch.stack([slab.float().abs().amax() for slab in slabs(source)]).amax(), self._dtype)
        self.add(items[parameter.name], self._rounded_linear(source.T, scheme, unit, scales))
        self._add_scales(items, parameter.name, torch.cat(scales) if scheme.group else scales[0], unit)

    def add_quantized(self, parameter: Parameter, quantized: Quantized) -> None:
        """Append a linear layer that calibration has quantized."""
        items = {item.name: item for item in stored_tensors(parameter, quantized.scheme, self._dtype)}
        format = FORMATS[quantized.scheme.weight]
        self.add(items[parameter.name], (format.pack(slab) for slab in slabs(quantized.codes)))
        self._add_scales(items, parameter.name, quantized.scales, quantized.unit)
        if quantized.input_scale is not None:
            self.add_values(items[input_scale_name(parameter.name)], quantized.input_scale)

    def add_codes(self, parameter: Parameter, scheme: Scheme, read: ReadCodes) -> None:
        """Append a linear layer's codes and scales as a checkpoint holds them. Raises SettingError where the file's
        dtype cannot hold the scales.
        """
        items = {item.name: item for item in stored_tensors(parameter, scheme, self._dtype)}
        format, scale = FORMATS[scheme.weight], items[scale_name(parameter.name)]
        stored = read.scale.T if scheme.group else read.scale[:, 0]
        if not torch.equal(stored.to(getattr(torch, scale.dtype)).float(), stored):
            raise SettingError(
                f"{parameter.name} is published with scales that {scale.dtype} does not hold exactly",
                Option("dtype", "float32"),
                Option("method", "gptq", "to choose codes anew"),
            )
        self.add(items[parameter.name], (format.pack(slab.float()) for slab in slabs(read.values.T)))
        self.add_values(scale, stored)

    def _add_scales(self, items: dict[str, Stored], name: str, scales: Tensor, unit: Tensor | None) -> None:
        if unit is None:
            self.add_values(items[scale_name(name)], scales)
        else:
            self.add(items[scale_name(name)], [FP8.pack(FP8.round(scales / unit))])
            self.add_values(items[global_scale_name(name)], unit)

    def _rounded_rows(self, table: Tensor, scheme: Scheme, scales: list[Tensor]) -> Iterator[Tensor]:
        """Codes of an embedding (V, D) whose scales (V, D/group) stand along D."""
        for slab in slabs(table):
            quantized = quantize_weight(slab.float().T, scheme, self._dtype)
            scales.append(quantized.scales.T)
            yield FORMATS[scheme.weight].pack(quantized.codes.T)

    def _rounded_linear(
        self, weight: Tensor, scheme: Scheme, unit: Tensor | None, scales: list[Tensor]
    ) -> Iterator[Tensor]:
        """Codes of a weight (K, N), a transposed view of the checkpoint's (N, K)."""
        format = FORMATS[scheme.weight]
        scale_dtype = "float32" if scheme.activation else self._dtype
        if scheme.group is None:
            largest = torch.cat([rows.float().abs().amax(1) for rows in slabs(weight.T)])
            scales.append(stored_as(scale_dtype)(largest / format.largest))
        for slab in slabs(weight, scheme.group or 1):
            values = slab.float()
            if scheme.group is None:
                yield format.pack(round_to_nearest(values, scales[0], format))
                continue
            storable = stored_as(scale_dtype) if unit is None else stored_as_e4m3(unit)
            scales.append(group_scales(values, format, scheme.group, storable))
            yield format.pack(round_to_nearest(values, scales[-1], format))

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._advance(len(data) if isinstance(data, bytes) else data.nbytes)


def slabs(tensor: Tensor, multiple: int = 1) -> Iterator[Tensor]:
    """Pieces of a tensor along its first axis, about SLAB_VALUES each, of whole multiples of rows."""
    if tensor.dim() == 0:
        yield tensor
        return
    rows = max(1, SLAB_VALUES // max(1, tensor[0].numel()) // multiple) * multiple
    for start in range(0, len(tensor), rows):
        yield tensor[start : start + rows]


def rope_tables(config: ModelConfig, limits: Limits) -> Iterator[Tensor]:
    """The tables of `rope_tensors`, in its order."""
    yield from vision_rope_tables(config.vision)
    yield from decoder_rope_tables(config.decoder, limits.max_context)


def _cast(item: Stored, tensor: Tensor) -> Iterator[Tensor]:
    for slab in slabs(tensor):
        values = slab.to(getattr(torch, item.dtype))
        if item.dtype == "float16" and not torch.isfinite(values).all():
            raise beyond_float16(item.name)
        yield values
