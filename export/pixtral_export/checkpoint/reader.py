"""Reads a Pixtral checkpoint in any published format, one tensor at a time.

Three spellings of one set of tensors: Mistral's (`consolidated*.safetensors`, `params.json`), and Hugging Face Llava's
with old and new names (`model*.safetensors`, `config.json`). Everything is checked when a folder is opened, from the
headers alone: a truncated download or a quantized copy is refused at once and not after minutes of export. Afterwards
`Checkpoint.read` gives tensors by canonical name, memory-mapped, with rotary rows in rotate-half order. Specification
section 1.5.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pixtral_export.checkpoint.config_file import DOWNLOAD_HINT, SUPPORTED_MODEL, read_json
from pixtral_export.checkpoint.headers import SAFETENSORS_DTYPES, StoredTensor, read_header
from pixtral_export.checkpoint.hf_config import HF_CONFIG, read_hf_config
from pixtral_export.checkpoint.kinds import refuse_other_dtypes
from pixtral_export.checkpoint.mistral_config import MISTRAL_CONFIG, read_mistral_config
from pixtral_export.checkpoint.picture_size import picture_side
from pixtral_export.checkpoint.tensor_names import hf_name, hf_new_name, pairs_to_halves
from pixtral_export.checkpoint.tokenizer import find_tokenizer
from pixtral_export.model.parameters import Parameter, parameters
from pixtral_runtime.bundle.config import ModelConfig
from pixtral_runtime.errors import CheckpointError

MISTRAL_STEM, HF_STEM = "consolidated", "model"
HARMLESS_SUFFIX = "inv_freq"  # rotary frequencies: some conversions saved them, the configuration already says them
LISTED_TENSORS = 3  # tensors an error names of each kind
SPELLINGS: dict[str, Callable[[str], str]] = {"mistral": lambda name: name, "hf": hf_name, "hf-new": hf_new_name}


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: known to be whole, with the configuration's shapes."""

    path: Path
    format: str  # a key of SPELLINGS
    config: ModelConfig
    tokenizer: Path  # the tekken.json that goes into a bundle
    image_side: int  # in pixels: what its own programs scale the longest side of a picture to
    warnings: tuple[str, ...]
    stored_dtype: str  # of most weights: float32, float16 or bfloat16
    files: tuple[Path, ...]
    total_bytes: int  # of all weight files
    tensors: dict[str, StoredTensor] = field(repr=False)  # by canonical name

    def read(self, parameter: Parameter) -> Tensor:
        """One tensor in its stored shape and dtype: linear weights (out, in), rotary rows in rotate-half order.

        The result is a view of the mapped file, or a copy where Mistral's rotary rows are put into order. Only the
        tensor's own span is mapped, so that a checkpoint may be larger than memory, and the pages go with the tensor.
        Raises CheckpointError where the file cannot be opened.
        """
        stored = self.tensors[parameter.name]
        tensor = _mapped(stored)
        if parameter.rotary_heads and self.format == "mistral":
            return pairs_to_halves(tensor, parameter.rotary_heads)
        return tensor


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a folder in any of the formats and check it against its configuration. Raises CheckpointError."""
    is_mistral, files, ambiguous = _find_weights(path)
    config, assumed = read_mistral_config(path / MISTRAL_CONFIG) if is_mistral else read_hf_config(path / HF_CONFIG)
    tokenizer = find_tokenizer(path, config, [file.name for file in path.iterdir()])
    image_side, scaled = picture_side(path, is_mistral, tokenizer, config.vision)
    stored = [tensor for file in files for tensor in read_header(file) if not tensor.name.endswith(HARMLESS_SUFFIX)]
    is_new = any(tensor.name.startswith("model.") for tensor in stored)
    format_ = "mistral" if is_mistral else "hf-new" if is_new else "hf"
    refuse_other_dtypes(stored, {SPELLINGS[format_](parameter.name) for parameter in parameters(config)})
    tensors = _match(parameters(config), SPELLINGS[format_], stored, files)
    for file in files:
        _check_header(file)
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[SAFETENSORS_DTYPES[tensor.dtype]] += prod(tensor.shape)
    return Checkpoint(
        path=path,
        format=format_,
        config=config,
        tokenizer=tokenizer.path,
        image_side=image_side,
        warnings=(*ambiguous, *assumed, *tokenizer.warnings, *scaled),
        stored_dtype=sizes.most_common(1)[0][0],
        files=files,
        total_bytes=sum(file.stat().st_size for file in files),
        tensors=tensors,
    )


def _find_weights(path: Path) -> tuple[bool, tuple[Path, ...], tuple[str, ...]]:
    """Whether a folder is in Mistral's format, its weight files, and a warning where it holds both formats."""
    if not path.is_dir():
        if path.suffix == ".safetensors":
            raise CheckpointError(
                f"{path} is one file, expected the checkpoint's folder", f"pixtral export {path.parent}"
            )
        raise CheckpointError(f"{path} is not a folder", f"pixtral export FOLDER, or pixtral export {SUPPORTED_MODEL}")
    has_weights = {
        stem: any(path.glob(f"{stem}*.safetensors")) or _index(path, stem).is_file() for stem in (MISTRAL_STEM, HF_STEM)
    }
    is_mistral = has_weights[MISTRAL_STEM] and (path / MISTRAL_CONFIG).is_file()
    is_hf = has_weights[HF_STEM] and (path / HF_CONFIG).is_file()
    if not any(has_weights.values()):
        raise CheckpointError(
            f"{path} has no weights: neither {MISTRAL_STEM}*.safetensors nor {HF_STEM}*.safetensors", DOWNLOAD_HINT
        )
    if not is_mistral and not is_hf:
        config = MISTRAL_CONFIG if has_weights[MISTRAL_STEM] else HF_CONFIG
        raise CheckpointError(f"{path} has weights but no {config}", f"put the model's {config} beside them")
    ambiguous = f"{path} holds two formats: {MISTRAL_STEM}*.safetensors is read, {HF_STEM}*.safetensors is not"
    files = _weight_files(path, MISTRAL_STEM if is_mistral else HF_STEM)
    return is_mistral, files, (ambiguous,) if is_mistral and is_hf else ()


def _weight_files(folder: Path, stem: str) -> tuple[Path, ...]:
    """The single file, else the shards that an index names, else all that are there."""
    single, index = folder / f"{stem}.safetensors", _index(folder, stem)
    if single.is_file():
        return (single,)
    if not index.is_file():
        return tuple(sorted(folder.glob(f"{stem}*.safetensors")))
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index} has no weight_map of file names", DOWNLOAD_HINT)
    shards = tuple(folder / name for name in sorted(set(places.values())))
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        message = f"{len(absent)} of the {len(shards)} files that {index} names are absent: {_few(absent)}"
        raise CheckpointError(message, DOWNLOAD_HINT)
    return shards


def _index(folder: Path, stem: str) -> Path:
    return folder / f"{stem}.safetensors.index.json"


def _match(
    wanted: Iterable[Parameter], spell: Callable[[str], str], stored: Iterable[StoredTensor], files: Sequence[Path]
) -> dict[str, StoredTensor]:
    """Stored tensors by canonical name. Raises CheckpointError if one is missing, unexpected, doubled or misshapen."""
    found: dict[str, StoredTensor] = {}
    unexpected = []
    for tensor in stored:
        if tensor.name in found:
            unexpected.append(f"{tensor.name} twice, in {found[tensor.name].file.name} and {tensor.file.name}")
        found[tensor.name] = tensor
    tensors, missing, misshapen = {}, [], []
    for parameter in wanted:
        name = spell(parameter.name)
        candidate = found.pop(name, None)
        if candidate is None:
            missing.append(f"{name} {parameter.shape}")
        elif candidate.shape != parameter.shape:
            misshapen.append(f"{name} in {candidate.file.name}: expected {parameter.shape}, seen {candidate.shape}")
        else:
            tensors[parameter.name] = candidate
    unexpected += [f"{tensor.name} {tensor.shape} in {tensor.file.name}" for tensor in found.values()]
    kinds = {"missing": missing, "of another shape": misshapen, "unexpected": unexpected}
    lines = [f"{len(names)} {kind}: {_few(names)}" for kind, names in kinds.items() if names]
    if lines:
        where = str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} weight files)"
        message = "\n  ".join([f"{where} does not hold the tensors that its configuration describes", *lines])
        raise CheckpointError(message, f"weights and configuration must be of one model; {DOWNLOAD_HINT}")
    return tensors


def _few(names: Sequence[str]) -> str:
    more = len(names) - LISTED_TENSORS
    return "; ".join(names[:LISTED_TENSORS]) + (f"; and {more} more" if more > 0 else "")


def _check_header(file: Path) -> None:
    """The library's own checks: offsets without gaps, sizes that fit the shapes."""
    try:
        with safe_open(file, framework="np"):  # torch's way would map the whole file for writing
            pass
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}", DOWNLOAD_HINT) from error


def _mapped(stored: StoredTensor) -> Tensor:
    """A view of a tensor's bytes in its file."""
    start = stored.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    dtype = getattr(torch, SAFETENSORS_DTYPES[stored.dtype])
    count = prod(stored.shape)
    end = stored.offset + count * dtype.itemsize
    try:
        with stored.file.open("rb") as file:
            span = mmap.mmap(file.fileno(), end - start, access=mmap.ACCESS_COPY, offset=start)
    except (OSError, ValueError) as error:  # ValueError: the file has become shorter
        raise CheckpointError(f"{stored.file} cannot be read: {error}", DOWNLOAD_HINT) from error
    return torch.frombuffer(span, dtype=dtype, count=count, offset=stored.offset - start).view(stored.shape)
