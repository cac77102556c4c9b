"""Rewrite a checkpoint as quantized ones are published: codes and scales in place of the decoder's weights.

    python scripts/make_synthetic_checkpoint.py artifacts/ministral --size ministral-3-3b
    python scripts/publish_codes.py artifacts/ministral artifacts/ministral-fp8 --scheme fp8
    python scripts/publish_codes.py CHECKPOINT FOLDER --scheme w4a16

| scheme | as |
| --- | --- |
| fp8 | mistralai's Ministral-3 Instruct: E4M3, a scale a tensor and one of its input, which is a guess here |
| fp8-dynamic | llm-compressor's FP8-dynamic: E4M3, a scale an output |
| w8a8 | llm-compressor's W8A8: int8, a scale an output |
| w4a16 | llm-compressor's W4A16: int4 in groups of 128 (`--group`), eight in an int32 |

Names are those of the checkpoint's own format, Mistral's or Hugging Face's; fp8 has other words in each, the rest is
compressed-tensors'. Codes are rounded to the nearest. Tensors are streamed, one weight file a source file. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixtral_export.checkpoint.headers import StoredTensor
from pixtral_export.checkpoint.reader import SPELLINGS, Checkpoint, open_checkpoint
from pixtral_export.checkpoint.tensor_data import mapped
from pixtral_export.model.parameters import parameters

LARGEST_INPUT = 24.0  # what fp8's static scale of an input covers
E4M3_LARGEST = 448.0
DTYPES = {
    torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8", torch.int32: "I32", torch.int64: "I64",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32",
}  # fmt: skip
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
PER_OUTPUT = {"num_bits": 8, "strategy": "channel", "group_size": None}
PER_TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}


@dataclass(frozen=True)
class Scheme:
    """Compressed-tensors' words for a scheme; mistralai's fp8 has none."""

    format: str = ""
    weights: tuple[tuple[str, Any], ...] = ()
    inputs: tuple[tuple[str, Any], ...] = ()


SCHEMES = {
    "fp8": Scheme(),
    "fp8-dynamic": Scheme(
        "float-quantized", (*PER_OUTPUT.items(), ("type", "float")), (*PER_TOKEN.items(), ("type", "float"))
    ),
    "w8a8": Scheme("int-quantized", (*PER_OUTPUT.items(), ("type", "int")), (*PER_TOKEN.items(), ("type", "int"))),
    "w4a16": Scheme("pack-quantized", (*INT4.items(),)),
}


def settings(scheme: str, format: str, group: int) -> dict[str, Any]:
    """What the configuration says: a key and its value."""
    words = SCHEMES[scheme]
    if not words.format and format == "mistral":
        return {"quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}}
    if not words.format:
        untouched = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
        return {
            "quantization_config": {
                "activation_scheme": "static", "dequantize": False, "modules_to_not_convert": untouched,
                "quant_method": "fp8", "weight_block_size": None,
            }
        }  # fmt: skip
    weights: dict[str, Any] = {"actorder": None, "dynamic": False, "observer": "minmax", "symmetric": True}
    weights |= dict(words.weights)
    if scheme == "w4a16":
        weights |= {"group_size": group, "actorder": "weight"}
    inputs = dict(words.inputs) or None
    return {
        "quantization_config": {
            "config_groups": {
                "group_0": {
                    "input_activations": inputs, "output_activations": None, "targets": ["Linear"], "weights": weights,
                },
            },
            "format": words.format, "global_compression_ratio": None, "kv_cache_scheme": None,
            "ignore": ["re:.*lm_head", "re:vision_tower.*", "re:multi_modal_projector.*"],
            "quant_method": "compressed-tensors", "quantization_status": "compressed",
        }
    }  # fmt: skip


def codes(weight: Tensor, scheme: str, group: int, is_mistral: bool) -> dict[str, Tensor]:
    """The tensors that stand for a weight (N, K), by the last word of their names."""
    weight = weight.float()
    if scheme == "fp8":
        scale = (weight.abs().amax() / E4M3_LARGEST).to(torch.bfloat16)
        words = ("qscale_weight", "qscale_act") if is_mistral else ("weight_scale_inv", "activation_scale")
        of_input = torch.tensor(LARGEST_INPUT / E4M3_LARGEST, dtype=torch.bfloat16)
        return {"weight": (weight / scale.float()).to(torch.float8_e4m3fn), words[0]: scale, words[1]: of_input}
    if scheme == "w4a16":
        groups = weight.unflatten(1, (-1, group))
        scale = (groups.abs().amax(2) / 7.5).to(torch.bfloat16)
        nibbles = (groups / scale.float()[..., None]).round().clamp(-8, 7).flatten(1).to(torch.int32) + 8
        packed = torch.zeros_like(nibbles[:, ::8])
        for n in range(8):
            packed |= nibbles[:, n::8] << (4 * n)
        return {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}
    largest, dtype = (E4M3_LARGEST, torch.float8_e4m3fn) if scheme == "fp8-dynamic" else (127.0, torch.int8)
    scale = (weight.abs().amax(1, keepdim=True) / largest).to(torch.bfloat16)
    whole = weight / scale.float()
    return {"weight": (whole if dtype.is_floating_point else whole.round()).to(dtype), "weight_scale": scale}


def tensors(
    checkpoint: Checkpoint, file: Path, scheme: str, group: int, read: Callable[[StoredTensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file as they are to be published."""
    spell = SPELLINGS[checkpoint.format]
    linear = {spell(p.name) for p in parameters(checkpoint.config) if p.is_linear and p.name.startswith("layers.")}
    stored: dict[str, StoredTensor] = {tensor.name: tensor for tensor in checkpoint.tensors.values()}
    for tensor in sorted((one for one in stored.values() if one.file == file), key=lambda one: one.offset):
        if tensor.name not in linear:
            yield tensor.name, read(tensor)
            continue
        layer = tensor.name.removesuffix("weight")
        for word, part in codes(read(tensor), scheme, group, checkpoint.format == "mistral").items():
            yield layer + word, part


def hole(tensor: StoredTensor) -> Tensor:
    """A tensor's shape and dtype without values."""
    return torch.empty(tensor.shape, dtype=torch.bfloat16, device="meta")


def publish(source: Path, target: Path, scheme: str, group: int = 128, *, sparse: bool = False) -> int:
    """Write the checkpoint at `source` anew; `sparse`: headers and holes. Returns the bytes of its weight files."""
    checkpoint = open_checkpoint(source)
    target.mkdir(parents=True)
    weight_files = {file.name for file in checkpoint.files}
    for file in source.iterdir():
        if file.name not in weight_files:
            shutil.copyfile(file, target / file.name)
    name = "params.json" if checkpoint.format == "mistral" else "config.json"
    config = json.loads((source / name).read_text(encoding="utf-8")) | settings(scheme, checkpoint.format, group)
    (target / name).write_text(json.dumps(config, indent=2), encoding="utf-8")
    places: dict[str, str] = {}
    total = 0
    for file in checkpoint.files:
        header: dict[str, Any] = {}
        end = 0
        data = target / f"{file.name}.data"
        with data.open("wb") as stream:
            for key, tensor in tensors(checkpoint, file, scheme, group, hole if sparse else mapped):
                if not sparse:
                    stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                start, end = end, end + tensor.nbytes
                header[key] = {"dtype": DTYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]}
                places[key] = file.name
        encoded = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
        encoded += b" " * (-len(encoded) % 8)
        with (target / file.name).open("wb") as whole, data.open("rb") as stream:
            whole.write(struct.pack("<Q", len(encoded)) + encoded)
            shutil.copyfileobj(stream, whole, 1 << 24)
            whole.truncate(8 + len(encoded) + end)
        data.unlink()
        total += (target / file.name).stat().st_size
    index = target / "model.safetensors.index.json"
    if index.is_file():
        index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}), encoding="utf-8")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--scheme", choices=SCHEMES, required=True)
    parser.add_argument("--group", type=int, default=128, help="inputs that share a scale of w4a16")
    args = parser.parse_args()
    size = publish(args.source, args.target, args.scheme, args.group)
    print(json.dumps({"path": str(args.target), "scheme": args.scheme, "weight_bytes": size}))


if __name__ == "__main__":
    main()
