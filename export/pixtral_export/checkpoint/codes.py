"""Weights that a checkpoint publishes as codes and scales: whole multiples of a scale, in fewer bits than a float has.

| who writes it | codes | scale | scale of the input |
| --- | --- | --- | --- |
| Mistral, `qformat_weight` | `weight` in E4M3 | `qscale_weight` | `qscale_act` |
| transformers, `quant_method` fp8 | `weight` in E4M3 | `weight_scale_inv` | `activation_scale` |
| compressed-tensors, 8 bits | `weight` in E4M3 or int8 | `weight_scale`, one or one an output | `input_scale` |
| compressed-tensors, pack-quantized | `weight_packed`: 8 of 4 bits in an int32 | `weight_scale`, one a group | |

In all of them a weight is its code times its scale, and an input its code times the input's scale. What a configuration
says decides whether there are codes; other schemes are refused by name.

Shapes: K inputs and N outputs of a linear layer, G scales along K.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixtral_export.checkpoint.config_file import QUANTIZATION_KEYS, Section, original_hint, read_json
from pixtral_export.checkpoint.headers import StoredTensor
from pixtral_export.checkpoint.tensor_data import mapped
from pixtral_runtime.errors import CheckpointError

FORMATS = {"F8_E4M3": "float8e4m3fn", "I8": "int8", "I32": "int4"}  # safetensors' codes, and what the tensors hold
SCALES = ("qscale_weight", "weight_scale_inv", "weight_scale")
INPUT_SCALES = ("qscale_act", "activation_scale", "input_scale")
PACKED, PACKED_SHAPE = "weight_packed", "weight_shape"
CODES_IN_INT32 = 8
ZERO_POINT = 8  # codes of 4 bits are stored as they are above the least, -8
UNUSED = ("fake_quantizer.qscale_act", "attn.k_scale", "attn.v_scale")  # of a cache in 8 bits, which ours need not be
COMPRESSED = "compressed-tensors"
COMPRESSED_FORMATS = {"float-quantized": 8, "int-quantized": 8, "naive-quantized": 8, "pack-quantized": 4}  # and bits


@dataclass(frozen=True)
class Codes:
    """Where a weight's codes and scales lie."""

    values: StoredTensor
    scale: StoredTensor
    input_scale: StoredTensor | None = None

    @property
    def format(self) -> str:
        """As ONNX calls the type of the codes."""
        return FORMATS[self.values.dtype]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight: (N, K)."""
        rows, columns = self.values.shape
        return rows, columns * (CODES_IN_INT32 if self.format == "int4" else 1)

    @property
    def group(self) -> int | None:
        """How many inputs share a scale; None: all of an output do."""
        groups = self.scale.shape[1] if len(self.scale.shape) == 2 else 1
        return self.shape[1] // groups if self.format == "int4" else None

    def stored(self, name: str) -> StoredTensor:
        """The codes as one tensor of the weight's name and shape."""
        return replace(self.values, name=name, shape=self.shape)

    def read(self) -> ReadCodes:
        scale = mapped(self.scale).float()
        rows = len(scale) if len(scale.shape) else 1
        values = unpacked(mapped(self.values)) if self.format == "int4" else mapped(self.values)
        return ReadCodes(values, scale.reshape(rows, -1).expand(self.shape[0], -1))

    def read_input_scale(self) -> float | None:
        """What a code of the input is multiplied by."""
        return None if self.input_scale is None else float(mapped(self.input_scale).float())


@dataclass(frozen=True)
class ReadCodes:
    """Codes (N, K) in their own type, and scales (N, G) in float32."""

    values: Tensor
    scale: Tensor

    def weight(self) -> Tensor:
        """The weight (N, K) in float32."""
        rows, groups = self.scale.shape
        return self.values.float().view(rows, groups, -1).mul_(self.scale[..., None]).view(rows, -1)


def unpacked(packed: Tensor) -> Tensor:
    """Codes (N, K) in int8 of an int32 tensor (N, K/8), the lowest bits first."""
    codes = torch.empty(*packed.shape, CODES_IN_INT32, dtype=torch.int8)
    for n in range(CODES_IN_INT32):
        codes[..., n] = (packed >> (4 * n) & 0xF) - ZERO_POINT
    return codes.flatten(1)


def has_codes(file: Path) -> bool:
    """Whether a configuration says that weights are stored as codes. Raises CheckpointError for other schemes."""
    root = Section(file, read_json(file), {})
    for key in QUANTIZATION_KEYS:
        value = root.get(key)
        if not value:
            continue
        if not isinstance(value, dict):
            raise _other_scheme(root, str(value))
        section = root.section(key, {})
        method = value.get("quant_method")
        if method == COMPRESSED or "config_groups" in value:
            _check_compressed(section)
        elif method == "fp8":
            _only(section, "weight_block_size", None)
        elif value.get("qformat_weight") == "fp8_e4m3":
            _only(section, "qscheme_act", None, "TENSOR", "NO_SCALES")
        else:
            raise _other_scheme(root, str(method or value.get("qformat_weight") or key))
        return True
    return False


def _check_compressed(section: Section) -> None:
    """Refuse what the scheme of compressed-tensors asks for beyond codes and scales."""
    _only(section, "format", *COMPRESSED_FORMATS)
    _only(section, "sparsity_config", None, {})
    bits = COMPRESSED_FORMATS[section.get("format")]
    groups = section.section("config_groups", {})
    for name in groups.values:
        group = groups.section(name, {})
        _only(group, "format", None, *COMPRESSED_FORMATS)
        weights = group.section("weights", {})
        _only(weights, "num_bits", bits)
        _only(weights, "type", "int", *(("float",) if bits == 8 else ()))
        _only(weights, "symmetric", True)
        _only(weights, "strategy", *(("group",) if bits == 4 else ("tensor", "channel")))
        _only(weights, "actorder", None, "weight", "static", False)


def _only(section: Section, key: str, *allowed: Any) -> None:
    if section.get(key) not in allowed:
        raise _other_scheme(section, section.shown(key))


def _other_scheme(section: Section, scheme: str) -> CheckpointError:
    return CheckpointError(
        f"{section.file}: the weights are already quantized ({scheme}); read are E4M3 and int8 with a scale a tensor "
        "or an output and int4 with one a group, all symmetric",
        original_hint(section.file.parent),
    )


def take_codes(stored: Iterable[StoredTensor]) -> tuple[list[StoredTensor], dict[str, Codes]]:
    """The tensors that are no part of codes, and the codes by the name of their weight. Raises CheckpointError.

    What only describes codes is left out; scales that belong to none are left in, to be found unexpected.
    """
    named = [tensor for tensor in stored if not tensor.name.endswith(UNUSED)]
    by_name = {tensor.name: tensor for tensor in named}
    weights: dict[str, Codes] = {}
    parts: set[StoredTensor] = set()
    for name, tensor in by_name.items():
        layer, _, last = name.rpartition(".")
        if last != (PACKED if tensor.dtype == "I32" else "weight") or tensor.dtype not in FORMATS:
            continue
        scales, of_inputs, shapes = (
            [by_name[f"{layer}.{word}"] for word in words if f"{layer}.{word}" in by_name]
            for words in (SCALES, INPUT_SCALES, (PACKED_SHAPE,))
        )
        if len(tensor.shape) != 2 or len(scales) != 1 or len(of_inputs) > 1:
            raise _unfit(tensor, f"is stored as {tensor.dtype} with {len(scales)} scales, expected a matrix with one")
        codes = Codes(tensor, scales[0], *of_inputs)
        _check_scales(codes)
        weights[f"{layer}.weight"] = codes
        parts |= {tensor, *scales, *of_inputs, *shapes}
    return [tensor for tensor in named if tensor not in parts], weights


def _check_scales(codes: Codes) -> None:
    rows, columns = codes.shape
    shape = codes.scale.shape
    if codes.format == "int4":
        fits = len(shape) == 2 and shape[0] == rows and shape[1] and columns % shape[1] == 0
    else:
        fits = prod(shape) == 1 or shape in ((rows,), (rows, 1))
    if not fits:
        raise _unfit(codes.scale, f"has the shape {shape}, which does not fit codes of {rows} by {columns}")
    if codes.input_scale is not None and prod(codes.input_scale.shape) != 1:
        raise _unfit(codes.input_scale, f"has the shape {codes.input_scale.shape}, expected one scale")


def _unfit(tensor: StoredTensor, what: str) -> CheckpointError:
    return CheckpointError(f"{tensor.file}: '{tensor.name}' {what}", original_hint(tensor.file.parent))
