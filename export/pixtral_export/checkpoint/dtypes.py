"""Tensors of other types than weights have: of a quantized copy, or none of the model's at all."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pixtral_export.checkpoint.config_file import SUPPORTED_MODEL, original_hint
from pixtral_export.checkpoint.headers import SAFETENSORS_DTYPES, StoredTensor
from pixtral_runtime.errors import CheckpointError

NARROW_FLOATS = ("F8_", "F6_", "F4")  # how safetensors' codes of them start
PACKED_DTYPES = ("I8", "U8", "I16", "U16", "I32", "U32")  # that quantized weights are stored in
QUANTIZATION_PARTS = {
    *("qweight", "qzeros", "scales", "g_idx"),  # GPTQ, AWQ
    *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "input_scale"),
    *("weight_global_scale", "input_global_scale"),  # these and those above: compressed-tensors, ModelOpt
    *("weight_scale_inv", "activation_scale", "qscale_weight", "qscale_act"),  # block FP8, Mistral's FP8
    *("SCB", "weight_format", "absmax", "quant_map", "nested_absmax", "nested_quant_map"),  # bitsandbytes
    *("bitsandbytes__nf4", "bitsandbytes__fp4"),
    "biases",  # MLX, beside scales
}
"""Last parts of names of tensors that only quantized checkpoints hold."""


def refuse_other_dtypes(stored: Sequence[StoredTensor], wanted: Collection[str]) -> None:
    """Raise CheckpointError for a quantized checkpoint, and for tensors of other types than weights have.

    `wanted` are the model's tensors as the files spell them.
    """
    other = [tensor for tensor in stored if tensor.dtype not in SAFETENSORS_DTYPES]
    quantized = [tensor for tensor in (*other, *stored) if _is_quantized(tensor, wanted)]
    if quantized:
        raise CheckpointError(
            f"{quantized[0].file} is already quantized: it holds '{quantized[0].name}', stored as {quantized[0].dtype}",
            original_hint(quantized[0].file.parent),
        )
    if other:
        more = f" ({len(other)} such tensors)" if len(other) > 1 else ""
        is_weight = other[0].name in wanted
        raise CheckpointError(
            f"{other[0].file}: '{other[0].name}' is stored as {other[0].dtype}, "
            f"expected {' or '.join(SAFETENSORS_DTYPES)}{more}",
            "save the checkpoint in bfloat16" if is_weight else "save the checkpoint without it: it is no weight",
            f"use {SUPPORTED_MODEL}",
        )


def _is_quantized(tensor: StoredTensor, wanted: Collection[str]) -> bool:
    if tensor.dtype.startswith(NARROW_FLOATS) or tensor.name.rpartition(".")[2] in QUANTIZATION_PARTS:
        return True
    return tensor.dtype in PACKED_DTYPES and tensor.name in wanted
