"""Checkpoints of another kind are refused by the name of their kind, with the remedy that fits it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.tiny import edit_weights, refusal

WQ = "layers.1.attention.wq.weight"


@pytest.mark.parametrize(
    ("name", "tensor", "code"),
    [
        ("vision_encoder.position_ids", torch.arange(10), "I64"),
        ("layers.0.attention.masked_bias", torch.ones(1, dtype=torch.bool), "BOOL"),
        ("training_step", torch.zeros((), dtype=torch.int32), "I32"),
        ("image_mean", torch.zeros(3, dtype=torch.uint8), "U8"),
        ("empty", torch.zeros(0, dtype=torch.int16), "I16"),
    ],
)
def test_a_tensor_that_is_no_weight_is_named_and_not_called_quantized(
    mistral: Path, name: str, tensor: Tensor, code: str
) -> None:
    edit_weights(mistral / "consolidated.safetensors", lambda weights: weights.update({name: tensor}))
    error = refusal(mistral)
    assert f"'{name}' is stored as {code}, expected F32 or F16 or BF16" in str(error)
    assert "quantized" not in str(error) and "quantize" not in error.hint and "no weight" in error.hint


@pytest.mark.parametrize(("dtype", "code"), [(torch.float64, "F64"), (torch.int64, "I64"), (torch.bool, "BOOL")])
def test_a_weight_of_another_type_is_named(mistral: Path, dtype: torch.dtype, code: str) -> None:
    def convert(weights: dict[str, Tensor]) -> None:
        weights["norm.weight"] = weights["norm.weight"].to(dtype)

    edit_weights(mistral / "consolidated.safetensors", convert)
    error = refusal(mistral)
    assert f"'norm.weight' is stored as {code}" in str(error)
    assert "quantized" not in str(error) and "save the checkpoint in bfloat16" in error.hint


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.attention.wq.qscale_weight",  # Mistral's own FP8
        "language_model.model.layers.0.self_attn.q_proj.weight_scale_inv",  # FP8 in blocks
        "language_model.model.layers.0.self_attn.q_proj.scales",  # AWQ, MLX
        "language_model.model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4",
    ],
)
def test_scales_betray_a_quantized_checkpoint(mistral: Path, name: str) -> None:
    edit_weights(mistral / "consolidated.safetensors", lambda weights: weights.update({name: torch.ones(1)}))
    error = refusal(mistral)
    assert f"is already quantized: it holds '{name}'" in str(error) and "bfloat16" in error.hint
