"""Write a checkpoint of Pixtral-12B's exact names and shapes with random weights, to measure without the real ones.

    python scripts/make_synthetic_checkpoint.py artifacts/synthetic-4 --layers 4 --vision-layers 2

Mistral format, bfloat16, streamed: memory stays at one tensor. Depth can be cut; widths are the real ones unless
`--vocab-size` says otherwise. The tokenizer is the one mistral-common ships for Pixtral. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import time
from functools import cache
from pathlib import Path
from typing import Any

import mistral_common
import torch

from pixtral_export.layout import Parameter, parameters
from pixtral_runtime.config import DecoderConfig, ModelConfig, VisionConfig

BLOCK = 1 << 24  # values drawn at a time


def pixtral_12b(layers: int = 40, vision_layers: int = 24, vocab_size: int = 131_072) -> ModelConfig:
    """The configuration of Pixtral-12B-2409 (specification section 1.1), perhaps with fewer layers or tokens."""
    return ModelConfig(
        VisionConfig(
            hidden_size=1024, num_hidden_layers=vision_layers, num_attention_heads=16, head_dim=64,
            intermediate_size=4096, patch_size=16, image_size=1024, rope_theta=1e4,
        ),
        DecoderConfig(
            dim=5120, n_layers=layers, head_dim=128, hidden_dim=14336, n_heads=32, n_kv_heads=8,
            vocab_size=vocab_size, rope_theta=1e9,
        ),
    )  # fmt: skip


def params_json(config: ModelConfig) -> dict[str, object]:
    """A configuration as Mistral's `params.json` spells it."""
    decoder, vision = config.decoder, config.vision
    return {
        "dim": decoder.dim, "n_layers": decoder.n_layers, "head_dim": decoder.head_dim,
        "hidden_dim": decoder.hidden_dim, "n_heads": decoder.n_heads, "n_kv_heads": decoder.n_kv_heads,
        "rope_theta": decoder.rope_theta, "norm_eps": decoder.norm_eps, "vocab_size": decoder.vocab_size,
        "max_position_embeddings": decoder.max_position,
        "vision_encoder": {
            "hidden_size": vision.hidden_size, "num_channels": vision.num_channels,
            "image_size": vision.image_size, "patch_size": vision.patch_size, "rope_theta": vision.rope_theta,
            "intermediate_size": vision.intermediate_size, "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads, "image_token_id": config.image_tokens.image,
            "adapter_bias": config.adapter_bias,
            "image_break_token_id": config.image_tokens.image_break,
            "image_end_token_id": config.image_tokens.image_end,
        },
    }  # fmt: skip


@cache
def _packaged_tokenizer() -> dict[str, Any]:
    source = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    data: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    return data


def write_tokenizer(
    path: Path, vocab_size: int, *, special_tokens: int = 1000, image: dict[str, int] | None = None
) -> None:
    """Pixtral's own tekken vocabulary, cut to its first entries; `image` replaces the patch and side it names."""
    packaged = _packaged_tokenizer()
    vocab = packaged["vocab"][: vocab_size - special_tokens]
    sizes = {
        "num_vocab_tokens": len(vocab), "default_vocab_size": vocab_size, "default_num_special_tokens": special_tokens,
    }  # fmt: skip
    changed = {"vocab": vocab, "config": packaged["config"] | sizes, "image": image or packaged["image"]}
    path.write_text(json.dumps(packaged | changed, ensure_ascii=False, indent=0), encoding="utf-8")


def write_weights(path: Path, config: ModelConfig, seed: int) -> int:
    """Stream random bfloat16 tensors into one safetensors file. Returns its bytes."""
    header: dict[str, object] = {}
    offset = 0
    for parameter in parameters(config):
        nbytes = 2 * math.prod(parameter.shape)
        header[parameter.name] = {
            "dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [offset, offset + nbytes],
        }  # fmt: skip
        offset += nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    random = torch.Generator().manual_seed(seed)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for parameter in parameters(config):
            mean, std = _moments(parameter, config)
            for start in range(0, math.prod(parameter.shape), BLOCK):
                count = min(BLOCK, math.prod(parameter.shape) - start)
                values = torch.randn(count, generator=random) * std + mean
                file.write(values.to(torch.bfloat16).view(torch.uint8).numpy().data)
    return path.stat().st_size


def _moments(parameter: Parameter, config: ModelConfig) -> tuple[float, float]:
    """Mean and deviation that keep activations near 1 through any depth."""
    if len(parameter.shape) == 1:
        return (0.0, 0.02) if parameter.name.endswith("bias") else (1.0, 0.02)
    std = math.prod(parameter.shape[1:]) ** -0.5
    depth = max(config.decoder.n_layers, config.vision.num_hidden_layers)
    return 0.0, std / math.sqrt(2 * depth) if (".wo." in parameter.name or ".w2." in parameter.name) else std


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--vision-layers", type=int, default=24)
    parser.add_argument("--vocab-size", type=int, default=131_072)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = pixtral_12b(args.layers, args.vision_layers, args.vocab_size)
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    (args.out / "params.json").write_text(json.dumps(params_json(config), indent=2) + "\n", encoding="utf-8")
    write_tokenizer(args.out / "tekken.json", config.decoder.vocab_size)
    size = write_weights(args.out / "consolidated.safetensors", config, args.seed)
    print(json.dumps({"path": str(args.out), "weight_bytes": size, "wall_s": round(time.monotonic() - started, 1)}))


if __name__ == "__main__":
    main()
