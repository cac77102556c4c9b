"""Random checkpoints of Pixtral's architecture, small enough to export and run within a test.

The same seed gives the same weights in every format, so tests can compare formats bit for bit. Weights are scaled so
that activations stay near 1 and tokens get different logits; sizes are chosen so that no two widths agree by accident.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from make_synthetic_checkpoint import hf_config, params_json, picture_sizes, stored, write_tokenizer
from pixtral_export.checkpoint.reader import open_checkpoint
from pixtral_export.checkpoint.tensor_names import hf_name, hf_new_name, mistral_name, pairs_to_halves
from pixtral_export.model.parameters import Parameter, parameters
from pixtral_runtime.bundle.config import DecoderConfig, ModelConfig, VisionConfig
from pixtral_runtime.errors import InputError

Change = Callable[[dict[str, Any]], Any]
SPECIAL = 32  # tekken has 1,000 special tokens; only the first 20 have a meaning
VOCABULARY = 512


def tiny_config(**changes: Any) -> ModelConfig:
    """A model of 0.4 million parameters. `changes` replace fields of ModelConfig."""
    config = ModelConfig(
        vision=VisionConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16, intermediate_size=96,
            patch_size=16, image_size=256, rope_theta=1e4,
        ),
        decoder=DecoderConfig(
            dim=96, n_layers=2, head_dim=32, hidden_dim=160, n_heads=4, n_kv_heads=2, vocab_size=VOCABULARY,
            rope_theta=1e9,
        ),
    )  # fmt: skip
    return replace(config, **changes)


def random_weights(config: ModelConfig, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    """A Mistral state dict: canonical names, linear weights (out, in), rotary rows as adjacent pairs."""
    generator = torch.Generator().manual_seed(seed)
    return {p.name: _scaled(p, torch.randn(p.shape, generator=generator)).to(dtype) for p in stored(config)}


def _scaled(parameter: Parameter, noise: Tensor) -> Tensor:
    if parameter.name.endswith("bias"):
        return 0.1 * noise
    if noise.dim() == 1:
        return 1 + 0.1 * noise
    if parameter.name == "tok_embeddings.weight":
        return noise
    fan_in = noise[0].numel()
    return noise / math.sqrt(fan_in)


def write_checkpoint(
    folder: Path,
    config: ModelConfig,
    *,
    format: str = "mistral",
    shards: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Path:
    """Write weights, configuration and tokenizer in the format "mistral", "hf" or "hf-new". Returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = random_weights(config, dtype, seed)
    if format == "mistral":
        (folder / "params.json").write_text(json.dumps(params_json(config), indent=2), encoding="utf-8")
        spelled = {mistral_name(name): tensor for name, tensor in weights.items()}
        _write_shards(folder, "consolidated", spelled, shards, index=False)
    else:
        spell = {"hf": hf_name, "hf-new": hf_new_name}[format]
        for parameter in parameters(config):
            if parameter.rotary_heads:
                weights[parameter.name] = pairs_to_halves(weights[parameter.name], parameter.rotary_heads)
        (folder / "config.json").write_text(json.dumps(hf_config(config, format), indent=2), encoding="utf-8")
        _write_shards(folder, "model", {spell(name): tensor for name, tensor in weights.items()}, shards, index=True)
    image = picture_sizes(config)
    write_tokenizer(folder / "tekken.json", config.decoder.vocab_size, special_tokens=SPECIAL, image=image)
    return folder


def _write_shards(folder: Path, stem: str, weights: dict[str, Tensor], shards: int, *, index: bool) -> None:
    if shards == 1:
        save_file(weights, folder / f"{stem}.safetensors", metadata={"format": "pt"})
        return
    places = {name: f"{stem}-{n % shards + 1:05}-of-{shards:05}.safetensors" for n, name in enumerate(weights)}
    for file in sorted(set(places.values())):
        part = {name: tensor for name, tensor in weights.items() if places[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    if index:
        content = {"metadata": {}, "weight_map": places}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")


def edit_json(path: Path, change: Change) -> Path:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def edit_weights(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(weights)
    save_file(weights, path)


def refusal(path: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    assert caught.value.hint
    return caught.value
