"""Write a checkpoint of a published model's names and shapes with random weights, to measure without the real ones.

    python scripts/make_synthetic_checkpoint.py artifacts/synthetic --size pixtral-12b --format hf
    python scripts/make_synthetic_checkpoint.py artifacts/synthetic-4 --layers 4 --vision-layers 2
    python scripts/make_synthetic_checkpoint.py artifacts/ministral --size ministral-3-3b

Mistral's format in one file, or Hugging Face's in shards as mistral-community/pixtral-12b has them. Both hold the same
model for the same seed: their exports are equal byte for byte. bfloat16, streamed: memory stays at one tensor. Depth
can be cut; widths are the real ones unless `--vocab-size` says otherwise. The tokenizers are those mistral-common ships
for Pixtral and Pixtral-Large. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import mistral_common
import torch
from torch import Tensor

from pixtral_export.checkpoint.reader import SPELLINGS
from pixtral_export.checkpoint.tensor_names import pairs_to_halves
from pixtral_export.model.parameters import Parameter, parameters
from pixtral_runtime.bundle.config import DecoderConfig, ImageTokens, ModelConfig, QueryScale, VisionConfig, Yarn
from pixtral_runtime.bundle.manifest import SENTENCEPIECE, TOKENIZER

BLOCK = 1 << 24  # values drawn at a time
SENTENCEPIECE_IDS = ImageTokens(10, 14, 15)  # of pictures, breaks and ends in Pixtral-Large's vocabulary
SENTENCEPIECE_FILE = "mistral_instruct_tokenizer_241114.model.v7m1"  # that vocabulary, as mistral-common ships it
SHARD_BYTES = 5_000_000_000  # as the shards on the hub


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


def _mistral_3(dim: int, n_layers: int, hidden_dim: int, rope_theta: float, **decoder: Any) -> ModelConfig:
    """A model whose tower has patches of 14 pixels, merged by four (specification sections 4.1, 4.2 and 4.4)."""
    return ModelConfig(
        VisionConfig(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, head_dim=64, intermediate_size=4096,
            patch_size=14, image_size=1540, rope_theta=1e4, spatial_merge_size=2,
        ),
        DecoderConfig(
            dim=dim, n_layers=n_layers, head_dim=128, hidden_dim=hidden_dim, n_heads=32, n_kv_heads=8,
            vocab_size=131_072, rope_theta=rope_theta, **decoder,
        ),
        adapter_bias=False,
        adapter_norm=True,
    )  # fmt: skip


def pixtral_large() -> ModelConfig:
    """The configuration of Pixtral-Large-2411 (specification sections 4.1 and 4.2), with its tokenizer's ids."""
    return ModelConfig(
        VisionConfig(
            hidden_size=1408, num_hidden_layers=40, num_attention_heads=16, head_dim=88, intermediate_size=6144,
            patch_size=16, image_size=1024, rope_theta=1e4,
        ),
        DecoderConfig(
            dim=12_288, n_layers=88, head_dim=128, hidden_dim=28_672, n_heads=96, n_kv_heads=8, vocab_size=32_768,
            rope_theta=1e9,
        ),
        image_tokens=SENTENCEPIECE_IDS,
        adapter_bias=False,
    )  # fmt: skip


def _stretched(factor: float, length: int) -> dict[str, Any]:
    return {
        "yarn": Yarn(factor, length), "query_scale": QueryScale(0.1, length), "max_position": int(factor * length),
    }  # fmt: skip


SIZES: dict[str, Callable[[], ModelConfig]] = {
    "pixtral-12b": pixtral_12b,
    "pixtral-large": pixtral_large,
    "mistral-small-3.1": lambda: _mistral_3(5120, 40, 32_768, 1e9),  # 3.2 and Magistral-Small-2509 too
    "devstral-small-2": lambda: _mistral_3(5120, 40, 32_768, 1e8, **_stretched(48.0, 8192)),
    "ministral-3-3b": lambda: _mistral_3(3072, 26, 9216, 1e6, tied_embeddings=True, **_stretched(16.0, 16_384)),
    "ministral-3-8b": lambda: _mistral_3(4096, 34, 14_336, 1e6, **_stretched(16.0, 16_384)),
    "ministral-3-14b": lambda: _mistral_3(5120, 40, 16_384, 1e9, **_stretched(16.0, 16_384)),
}
"""Configurations of published models (specification sections 1.1 and 4)."""


def params_json(config: ModelConfig) -> dict[str, object]:
    """A configuration as Mistral's `params.json` spells it."""
    decoder, vision = config.decoder, config.vision
    family: dict[str, Any] = {}
    if yarn := decoder.yarn:
        family["yarn"] = {
            "original_max_position_embeddings": yarn.original_max_position, "factor": yarn.factor,
            "apply_scale": False, "beta": yarn.beta_fast, "alpha": yarn.beta_slow,
        }  # fmt: skip
    if scale := decoder.query_scale:
        family["llama_4_scaling"] = {"original_max_position_embeddings": scale.length, "beta": scale.beta}
    if decoder.tied_embeddings:
        family["tied_embeddings"] = True
    merging: dict[str, Any] = {}
    if vision.spatial_merge_size > 1:
        merging = {"spatial_merge_size": vision.spatial_merge_size, "mm_projector_id": "patch_merge"}
    if config.adapter_norm:
        merging["add_pre_mm_projector_layer_norm"] = True
    return family | {
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
        } | merging,
    }  # fmt: skip


def hf_config(config: ModelConfig, format: str = "hf") -> dict[str, Any]:
    """The content of config.json in the words of transformers 4 ("hf") or 5 ("hf-new"), Llava's or Mistral 3's."""
    decoder, vision = config.decoder, config.vision
    is_mistral_3 = vision.spatial_merge_size > 1
    kind = "Mistral3" if is_mistral_3 else "Llava"

    def rope(theta: float, kind: str) -> dict[str, Any]:
        old = {"rope_theta": theta}
        return old if format == "hf" else {"rope_parameters": old | {"rope_type": kind}}

    text_rope, text_kind = rope(decoder.rope_theta, "default"), "mistral"
    if yarn := decoder.yarn:
        text_kind = "ministral3"
        text_rope = {
            "rope_parameters": {
                "rope_theta": decoder.rope_theta, "rope_type": "yarn", "type": "yarn", "factor": yarn.factor,
                "original_max_position_embeddings": yarn.original_max_position, "beta_fast": yarn.beta_fast,
                "beta_slow": yarn.beta_slow, "mscale": 1.0, "mscale_all_dim": 1.0,
                "max_position_embeddings": decoder.max_position,
                "llama_4_scaling_beta": decoder.query_scale.beta if decoder.query_scale else 0.0,
            },
        }  # fmt: skip
    return ({"spatial_merge_size": vision.spatial_merge_size} if is_mistral_3 else {}) | {
        "architectures": [f"{kind}ForConditionalGeneration"], "model_type": kind.lower(), "image_seq_length": 1,
        "image_token_index": config.image_tokens.image, "projector_hidden_act": "gelu",
        "multimodal_projector_bias": config.adapter_bias, "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full", "tie_word_embeddings": decoder.tied_embeddings,
        "text_config": {
            "model_type": text_kind, "hidden_size": decoder.dim, "head_dim": decoder.head_dim,
            "intermediate_size": decoder.hidden_dim, "num_hidden_layers": decoder.n_layers,
            "num_attention_heads": decoder.n_heads, "num_key_value_heads": decoder.n_kv_heads,
            "max_position_embeddings": decoder.max_position, "rms_norm_eps": decoder.norm_eps,
            "sliding_window": None, "vocab_size": decoder.vocab_size, "tie_word_embeddings": decoder.tied_embeddings,
        } | text_rope,
        "vision_config": {
            "model_type": "pixtral", "hidden_size": vision.hidden_size, "head_dim": vision.head_dim,
            "intermediate_size": vision.intermediate_size, "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads, "num_channels": vision.num_channels,
            "image_size": vision.image_size, "patch_size": vision.patch_size, "hidden_act": "silu",
        } | rope(vision.rope_theta, "axial"),
    }  # fmt: skip


def picture_sizes(config: ModelConfig) -> dict[str, int]:
    """What tekken.json says of pictures."""
    vision = config.vision
    sizes = {"image_patch_size": vision.patch_size, "max_image_size": vision.image_size}
    return sizes | ({"spatial_merge_size": vision.spatial_merge_size} if vision.spatial_merge_size > 1 else {})


@cache
def packaged_tokenizer() -> dict[str, Any]:
    source = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    data: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    return data


def write_tokenizer(
    path: Path, vocab_size: int, *, special_tokens: int = 1000, image: dict[str, int] | None = None
) -> None:
    """Pixtral's own tekken vocabulary, cut to its first entries; `image` replaces the patch and side it names."""
    packaged = packaged_tokenizer()
    vocab = packaged["vocab"][: vocab_size - special_tokens]
    sizes = {
        "num_vocab_tokens": len(vocab), "default_vocab_size": vocab_size, "default_num_special_tokens": special_tokens,
    }  # fmt: skip
    changed = {"vocab": vocab, "config": packaged["config"] | sizes, "image": image or packaged["image"]}
    path.write_text(json.dumps(packaged | changed, ensure_ascii=False, indent=0), encoding="utf-8")


def write_checkpoint(
    folder: Path,
    config: ModelConfig,
    *,
    format: str = "mistral",
    seed: int | None = 0,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Stream a checkpoint of random bfloat16 tensors into `folder`, in the format "mistral", "hf" or "hf-new".

    A shard of Hugging Face's format holds at most `shard_bytes` of tensors, or one tensor that is larger. Mistral's has
    one file. Without a seed there are headers and holes, which take no disk. Returns the bytes of the weight files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if config.image_tokens == SENTENCEPIECE_IDS:
        shutil.copyfile(Path(mistral_common.__file__).parent / "data" / SENTENCEPIECE_FILE, folder / SENTENCEPIECE)
    else:
        write_tokenizer(
            folder / TOKENIZER,
            config.decoder.vocab_size,
            special_tokens=min(1000, config.decoder.vocab_size // 4),  # tekken's 1,000 unless the vocabulary is tiny
            image=picture_sizes(config),
        )
    if format == "mistral":
        _write_json(folder / "params.json", params_json(config))
        return write_weights(folder / "consolidated.safetensors", config, seed)
    _write_json(folder / "config.json", hf_config(config, format))
    shards = list(_shards(stored(config), shard_bytes))
    random = None if seed is None else torch.Generator().manual_seed(seed)
    places: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        places |= {SPELLINGS[format](parameter.name): file for parameter in shard}
        total += _write_shard(folder / file, shard, config, random, format)
    tensor_bytes = sum(_nbytes(parameter) for shard in shards for parameter in shard)
    index = {"metadata": {"total_size": tensor_bytes}, "weight_map": places}
    _write_json(folder / "model.safetensors.index.json", index)
    return total


def write_weights(path: Path, config: ModelConfig, seed: int | None) -> int:
    """Stream random bfloat16 tensors into one safetensors file in Mistral's format. Returns its bytes."""
    random = None if seed is None else torch.Generator().manual_seed(seed)
    return _write_shard(path, stored(config), config, random, "mistral")


def stored(config: ModelConfig) -> list[Parameter]:
    """The parameters that a checkpoint has a tensor for."""
    return [parameter for parameter in parameters(config) if not parameter.copy_of]


def _nbytes(parameter: Parameter) -> int:
    return 2 * math.prod(parameter.shape)


def _shards(wanted: Iterable[Parameter], limit: int) -> Iterator[list[Parameter]]:
    """Parameters in their order, as many to a shard as its limit holds, but at least one."""
    shard: list[Parameter] = []
    held = 0
    for parameter in wanted:
        if shard and held + _nbytes(parameter) > limit:
            yield shard
            shard, held = [], 0
        shard.append(parameter)
        held += _nbytes(parameter)
    yield shard


def _write_shard(
    path: Path, shard: list[Parameter], config: ModelConfig, random: torch.Generator | None, format: str
) -> int:
    """Draw and write a file's tensors in turn; without `random` leave a hole for them. Returns its bytes."""
    header: dict[str, object] = {} if format == "mistral" else {"__metadata__": {"format": "pt"}}
    offset = 0
    for parameter in shard:
        end = offset + _nbytes(parameter)
        header[SPELLINGS[format](parameter.name)] = {
            "dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        if random is None:
            return file.truncate(file.tell() + offset)
        for parameter in shard:
            pieces: Iterable[Tensor] = _random_values(parameter, config, random)
            if parameter.rotary_heads and format != "mistral":
                whole = torch.cat(list(pieces)).view(parameter.shape)
                pieces = [pairs_to_halves(whole, parameter.rotary_heads)]
            for piece in pieces:
                file.write(piece.contiguous().view(torch.uint8).numpy().data)
        return file.tell()


def _random_values(parameter: Parameter, config: ModelConfig, random: torch.Generator) -> Iterator[Tensor]:
    """A tensor's values in Mistral's order, in flat pieces of `BLOCK`."""
    mean, std = _moments(parameter, config)
    for start in range(0, math.prod(parameter.shape), BLOCK):
        count = min(BLOCK, math.prod(parameter.shape) - start)
        yield (torch.randn(count, generator=random) * std + mean).to(torch.bfloat16)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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
    parser.add_argument("--size", choices=SIZES, default="pixtral-12b")
    parser.add_argument("--format", choices=SPELLINGS, default="mistral")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the size has")
    parser.add_argument("--vision-layers", type=int, help="fewer vision layers than the size has")
    parser.add_argument("--vocab-size", type=int, help="fewer tokens than the size has")
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, help="largest shard of --format hf")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = SIZES[args.size]()
    vision, decoder = config.vision, config.decoder
    vision = replace(vision, num_hidden_layers=args.vision_layers or vision.num_hidden_layers)
    n_layers, vocab_size = args.layers or decoder.n_layers, args.vocab_size or decoder.vocab_size
    config = replace(config, vision=vision, decoder=replace(decoder, n_layers=n_layers, vocab_size=vocab_size))
    started = time.monotonic()
    size = write_checkpoint(args.out, config, format=args.format, seed=args.seed, shard_bytes=args.shard_bytes)
    print(json.dumps({"path": str(args.out), "weight_bytes": size, "wall_s": round(time.monotonic() - started, 1)}))


if __name__ == "__main__":
    main()
