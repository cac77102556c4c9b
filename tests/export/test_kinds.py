"""Checkpoints of another kind are refused by the name of their kind, with the remedy that fits it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.tiny import edit_json, edit_weights, refusal

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


CARD = "---\nlicense: apache-2.0\n{}\n---\n# Pixtral-12B, quantized\n"


@pytest.mark.parametrize(
    ("card", "remedy"),
    [
        (CARD.format("base_model: mistral-community/pixtral-12b"), "pixtral export mistral-community/pixtral-12b"),
        (CARD.format("base_model:\n- mistralai/Pixtral-12B-2409"), "pixtral export mistralai/Pixtral-12B-2409"),
        (CARD.format("base_model:\n  - 'mistralai/Pixtral-12B-2409'"), "pixtral export mistralai/Pixtral-12B-2409"),
        (CARD.format('base_model: ["a/b"]'), "pixtral export a/b"),
        (CARD.format("base_model: pixtral"), "original bfloat16 weights"),
        ("no metadata", "original bfloat16 weights"),
    ],
)
def test_a_quantized_copy_is_refused_with_the_original_that_its_card_names(hf: Path, card: str, remedy: str) -> None:
    (hf / "README.md").write_text(card, encoding="utf-8")
    edit_json(hf / "config.json", lambda data: data.update(quantization_config={"quant_method": "awq"}))
    error = refusal(hf)
    assert "already quantized (awq)" in str(error) and remedy in error.hint


@pytest.mark.parametrize(
    ("names", "words", "remedy"),
    [
        (["pixtral-12b-Q4_K_M.gguf", "mmproj-F16.gguf"], "GGUF", "original bfloat16 weights"),
        (["consolidated.00.pth", "params.json"], "pickles, which can run any code", "as safetensors"),
        (["pytorch_model-00001-of-00006.bin", "config.json"], "(pytorch_model-00001-of-00006.bin)", "as safetensors"),
        (["lora.safetensors", "params.json"], "adapter (LoRA) of another model", "pixtral export MODEL"),
        (["bundle.json", "weights.bin"], "is a bundle", "pixtral run"),
        (["config.json", "tekken.json"], "no weights: neither", "hf download"),
    ],
)
def test_folders_without_readable_weights_are_named_by_what_they_hold(
    tmp_path: Path, names: list[str], words: str, remedy: str
) -> None:
    for name in names:
        (tmp_path / name).write_text("{}", encoding="utf-8")
    error = refusal(tmp_path)
    assert str(tmp_path) in str(error) and words in str(error) and remedy in error.hint


def test_an_adapter_is_refused_with_the_model_it_belongs_to(tmp_path: Path) -> None:
    config = {"base_model_name_or_path": "mistral-community/pixtral-12b", "peft_type": "LORA", "r": 16}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "adapter_model.safetensors").touch()
    error = refusal(tmp_path)
    assert "adapter (LoRA) of mistral-community/pixtral-12b, not a whole model" in str(error)
    assert error.hint == f"pixtral export mistral-community/pixtral-12b with this adapter; lora={tmp_path}"


@pytest.mark.parametrize(("name", "words"), [("model.gguf", "GGUF"), ("consolidated.00.pth", "pickles")])
def test_a_single_file_of_another_kind_is_named(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).touch()
    assert words in str(refusal(tmp_path / name))
