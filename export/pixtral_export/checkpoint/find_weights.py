"""Which of a checkpoint's files are its weights, and in which format.

A folder without weights that can be read is refused by what it is instead: each kind has its own remedy.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from pixtral_export.checkpoint.config_file import (
    DOWNLOAD_HINT,
    SUPPORTED_MODEL,
    few,
    original_hint,
    read_json,
)
from pixtral_export.checkpoint.headers import Files
from pixtral_export.checkpoint.hf_config import HF_CONFIG
from pixtral_export.checkpoint.mistral_config import MISTRAL_CONFIG
from pixtral_runtime.bundle.manifest import MANIFEST, is_inside
from pixtral_runtime.errors import CheckpointError, Option

MISTRAL_STEM, HF_STEM = "consolidated", "model"
SAFETENSORS, INDEX = ".safetensors", ".safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS, MISTRAL_LORA = "adapter_model.safetensors", "lora.safetensors"  # PEFT's and Mistral's
ADAPTERS = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, "adapter_model.bin", MISTRAL_LORA)
PICKLES = (".bin", ".pth", ".pt", ".ckpt")


def find_weights(folder: Path, files: Files) -> tuple[bool, tuple[str, ...], tuple[str, ...]]:
    """Whether the format is Mistral's, the names of the weight files, and a warning where there are both formats."""
    names = files.names
    has_weights = {
        stem: f"{stem}{INDEX}" in names or any(_is_weight_file(name, stem) for name in names)
        for stem in (MISTRAL_STEM, HF_STEM)
    }
    is_mistral = has_weights[MISTRAL_STEM] and MISTRAL_CONFIG in names
    is_hf = has_weights[HF_STEM] and HF_CONFIG in names
    if not any(has_weights.values()):
        raise _of_another_kind(folder, names)
    if not is_mistral and not is_hf:
        config = MISTRAL_CONFIG if has_weights[MISTRAL_STEM] else HF_CONFIG
        raise CheckpointError(f"{folder} has weights but no {config}", f"put the model's {config} beside them")
    ambiguous = f"{folder} holds two formats: {MISTRAL_STEM}*.safetensors is read, {HF_STEM}*.safetensors is not"
    weights = _weight_files(folder, files, MISTRAL_STEM if is_mistral else HF_STEM)
    return is_mistral, weights, (ambiguous,) if is_mistral and is_hf else ()


def no_folder(path: Path) -> CheckpointError:
    """The error for a path that is no folder."""
    if path.suffix == SAFETENSORS:
        return CheckpointError(f"{path} is one file, expected the checkpoint's folder", f"pixtral export {path.parent}")
    if os.path.isfile(path):
        return _of_another_kind(path, [path.name])
    return CheckpointError(f"{path} is not a folder", f"pixtral export FOLDER, or pixtral export {SUPPORTED_MODEL}")


def _weight_files(folder: Path, files: Files, stem: str) -> tuple[str, ...]:
    """The single file, else the shards that an index names, else all that are there."""
    single, index = f"{stem}{SAFETENSORS}", f"{stem}{INDEX}"
    if single in files.names:
        return (single,)
    if index not in files.names:
        return tuple(sorted(name for name in files.names if _is_weight_file(name, stem)))
    places = read_json(folder / index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{folder / index} has no weight_map of file names", DOWNLOAD_HINT)
    shards = tuple(sorted(set(places.values())))
    if outside := [name for name in shards if not is_inside(name)]:
        raise CheckpointError(f"{folder / index} names files outside the folder: {few(outside)}", DOWNLOAD_HINT)
    absent = [name for name in shards if files.size(name) is None]
    if absent:
        message = f"{len(absent)} of the {len(shards)} files that {folder / index} names are absent: {few(absent)}"
        raise CheckpointError(message, DOWNLOAD_HINT)
    return shards


def _is_weight_file(name: str, stem: str) -> bool:
    return name.startswith(stem) and name.endswith(SAFETENSORS)


def _of_another_kind(path: Path, names: Collection[str]) -> CheckpointError:
    """The error for files among which there are no weights that can be read."""
    folder = path if path.is_dir() else path.parent
    if MANIFEST in names:
        return CheckpointError(f"{path} is a bundle, which an export has made", f"pixtral run {path} IMAGES")
    if any(name in names for name in ADAPTERS):
        config = folder / ADAPTER_CONFIG
        base = read_json(config).get("base_model_name_or_path") if config.is_file() else None
        return CheckpointError(
            f"{path} is an adapter (LoRA) of {base or 'another model'}, not a whole model",
            f"pixtral export {base or 'MODEL'} with this adapter",
            Option("lora", str(folder) if set(ADAPTERS[1:]) & set(os.listdir(folder)) else "FOLDER"),
        )
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return CheckpointError(
            f"{path} holds GGUF files, llama.cpp's own format ({few(sorted(gguf))})", original_hint(folder)
        )
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        return CheckpointError(
            f"{path} holds its weights as pickles, which can run any code when they are read ({few(sorted(pickles))})",
            "save them as safetensors, as save_pretrained('FOLDER') of transformers does, then pixtral export FOLDER",
            f"use {SUPPORTED_MODEL}",
        )
    return CheckpointError(
        f"{path} has no weights: neither {MISTRAL_STEM}*.safetensors nor {HF_STEM}*.safetensors", DOWNLOAD_HINT
    )
