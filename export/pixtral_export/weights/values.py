"""Can a checkpoint's values be stored at all? Asked of every tensor before anything is made of it.

A NaN or an infinity would spoil every answer, and calibration would find it only after an hour, in a sum that no longer
shows where it came from.
"""

from __future__ import annotations

import math

import torch

from pixtral_export.checkpoint.reader import Checkpoint
from pixtral_export.model.parameters import Parameter
from pixtral_export.quantization.formats import FORMATS
from pixtral_export.quantization.recipes import Scheme
from pixtral_runtime.errors import CheckpointError, Option, SettingError

FLOAT16_LARGEST = 65504


def check_values(checkpoint: Checkpoint, parameter: Parameter, scheme: Scheme | None, dtype: str) -> None:
    """Raise CheckpointError for values that are not finite, SettingError for those that `dtype` cannot hold."""
    tensor, stored = checkpoint.read(parameter), checkpoint.tensors[parameter.name]
    largest = float(torch.stack(tensor.aminmax()).abs().max())  # aminmax passes NaN on, in one pass without copies
    if not math.isfinite(largest):
        kind = "NaN" if math.isnan(largest) else "an infinite value"
        raise CheckpointError(
            f"{stored.file}: '{stored.name}' holds {kind}",
            "the weights are damaged, or were saved after a training that diverged: "
            "download them again, or take an earlier save",
        )
    if scheme is not None and scheme.activation is not None:
        return  # its scales are float32
    if dtype == "float16" and largest / (FORMATS[scheme.weight].largest if scheme else 1) > FLOAT16_LARGEST:
        raise beyond_float16(parameter.name)


def beyond_float16(name: str) -> SettingError:
    """The error for a tensor that float16 cannot hold."""
    return SettingError(
        f"{name} holds values beyond float16's range ({FLOAT16_LARGEST})",
        Option("dtype", "bfloat16", "(TensorRT)"),
        Option("dtype", "float32", "(CPU)"),
    )
