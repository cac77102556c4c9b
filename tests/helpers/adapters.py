"""LoRA adapters of tiny models, in the files that peft and mistral-finetune write."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pixtral_export.checkpoint.tensor_names import halves_to_pairs, hf_name, hf_new_name, mistral_name
from pixtral_export.model.parameters import Parameter, parameters
from pixtral_runtime.bundle.config import ModelConfig

Pairs = dict[str, tuple[Tensor, Tensor]]
"""A (r, in) and B (out, r) of weights by canonical name, rotary rows of B as two halves."""

RANK = 4
EVERY_KIND = (
    *("layers.0.attention.wq.weight", "layers.0.attention.wk.weight", "layers.1.attention.wv.weight"),
    *("layers.1.feed_forward.w2.weight", "vision_encoder.transformer.layers.1.attention.wk.weight"),
    *("vision_encoder.transformer.layers.0.feed_forward.w1.weight", "vision_language_adapter.w_in.weight"),
    "vision_language_adapter.merging_layer.weight",
)
"""Weights of each part of a model, rotary ones among them."""


def peft_config(**changes: Any) -> dict[str, Any]:
    """An adapter_config.json as peft 0.21 writes it."""
    config: dict[str, Any] = {
        "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None,
        "auto_mapping": {
            "base_model_class": "Mistral3ForConditionalGeneration",
            "parent_library": "transformers.models.mistral3.modeling_mistral3",
        },
        "base_model_name_or_path": "mistralai/Ministral-3-8B-Instruct-2512-BF16", "bias": "none", "corda_config": None,
        "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "kasa_config": None, "layer_replication": None,
        "layers_pattern": None, "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 8, "lora_bias": False,
        "lora_dropout": 0.0, "lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core",
        "modules_to_save": None, "monteclora_config": None, "peft_type": "LORA", "peft_version": "0.21.2",
        "qalora_group_size": 16, "r": RANK, "rank_pattern": {}, "revision": None, "target_modules": ["q_proj"],
        "target_parameters": None, "task_type": None, "trainable_token_indices": None, "use_bdlora": None,
        "use_dora": False, "use_qalora": False, "use_rslora": False, "velora_config": None,
    }  # fmt: skip
    return config | changes


def random_pairs(config: ModelConfig, names: Collection[str] = EVERY_KIND, rank: int = RANK) -> Pairs:
    """Corrections as large as the weights, of those of the names that the model has."""
    generator = torch.Generator().manual_seed(7)
    shapes = {parameter.name: parameter.shape for parameter in parameters(config) if parameter.name in names}
    return {
        name: (
            torch.randn(rank, columns, generator=generator) / columns**0.5,
            torch.randn(rows, rank, generator=generator) / rank,
        )
        for name, (rows, columns) in shapes.items()
    }


def write_peft(folder: Path, pairs: Pairs, *, format: str = "hf-new", **changes: Any) -> Path:
    """An adapter in PEFT's format, named as in a model of this family of names. `changes` are to its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    spell = {"hf": hf_name, "hf-new": hf_new_name}[format]
    layers = sorted({spell(name).split(".")[-2] for name in pairs})
    config = peft_config(**{"target_modules": layers, **changes})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in pairs.items():
        module = f"base_model.model.{spell(name).removesuffix('.weight')}"
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def write_mistral_lora(folder: Path, config: ModelConfig, pairs: Pairs, lora: dict[str, Any] | None) -> Path:
    """An adapter in Mistral's format. `lora` is what params.json says of it, which is not there for None."""
    folder.mkdir(parents=True, exist_ok=True)
    known: dict[str, Parameter] = {parameter.name: parameter for parameter in parameters(config)}
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in pairs.items():
        module, heads = mistral_name(name).removesuffix(".weight"), known[name].rotary_heads
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": halves_to_pairs(b, heads) if heads else b}
    save_file(tensors, folder / "lora.safetensors")
    if lora is not None:
        params = {"dim": config.decoder.dim, "n_layers": config.decoder.n_layers, "lora": lora, "moe": None}
        (folder / "params.json").write_text(json.dumps(params, indent=4), encoding="utf-8")
    return folder
