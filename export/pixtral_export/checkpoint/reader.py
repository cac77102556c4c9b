"""Reads a Pixtral checkpoint in any published format, one tensor at a time.

Three spellings of one set of tensors: Mistral's (`consolidated*.safetensors`, `params.json`), and Hugging Face Llava's
with old and new names (`model*.safetensors`, `config.json`). Everything is checked when a folder is opened, from the
headers alone: a truncated download or a quantized copy is refused at once and not after minutes of export. Afterwards
`Checkpoint.read` gives tensors by canonical name, memory-mapped, with rotary rows in rotate-half order. Specification
section 1.5.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

from torch import Tensor

from pixtral_export.checkpoint.codes import FORMATS, Codes, ReadCodes, has_codes, take_codes
from pixtral_export.checkpoint.config_file import DOWNLOAD_HINT, few
from pixtral_export.checkpoint.dtypes import refuse_other_dtypes
from pixtral_export.checkpoint.find_weights import find_weights, no_folder
from pixtral_export.checkpoint.headers import SAFETENSORS_DTYPES, Files, LocalFiles, StoredTensor
from pixtral_export.checkpoint.hf_config import HF_CONFIG, read_hf_config
from pixtral_export.checkpoint.lora import Lora
from pixtral_export.checkpoint.mistral_config import MISTRAL_CONFIG, read_mistral_config
from pixtral_export.checkpoint.picture_size import picture_side
from pixtral_export.checkpoint.tensor_data import check_header, mapped
from pixtral_export.checkpoint.tensor_names import hf_name, hf_new_name, mistral_name, pairs_to_halves
from pixtral_export.checkpoint.tokenizer import find_tokenizer
from pixtral_export.model.parameters import Parameter, parameters
from pixtral_runtime.bundle.config import ModelConfig
from pixtral_runtime.errors import CheckpointError, SettingError

HARMLESS_SUFFIX = "inv_freq"  # rotary frequencies: some conversions saved them, the configuration already says them
SPELLINGS: dict[str, Callable[[str], str]] = {"mistral": mistral_name, "hf": hf_name, "hf-new": hf_new_name}


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: known to be whole, with the configuration's shapes."""

    path: Path
    format: str  # a key of SPELLINGS
    config: ModelConfig
    tokenizer: Path  # the file that goes into a bundle
    image_side: int  # in pixels: what its own programs scale the longest side of a picture to
    warnings: tuple[str, ...]
    stored_dtype: str  # of most weights: float32, float16 or bfloat16, or a format of codes
    files: tuple[Path, ...]
    total_bytes: int  # of all weight files
    tensors: dict[str, StoredTensor] = field(repr=False)  # by canonical name
    codes: dict[str, Codes] = field(repr=False)  # of the weights that are stored as codes and scales
    lora: Lora | None = None  # an adapter to merge

    def read(self, parameter: Parameter) -> Tensor:
        """One tensor in its stored shape and dtype: linear weights (out, in), rotary rows in rotate-half order.

        The result is a view of the mapped file, or a copy where Mistral's rotary rows are put into order, and where
        codes become float32 or an adapter is merged in it. Only the tensor's own span is mapped, so that a checkpoint
        may be larger than memory, and the pages go with the tensor. Raises CheckpointError where the file cannot be
        opened.
        """
        if parameter.name in self.codes:
            weight = self.read_codes(parameter).weight()
        else:
            weight = self._in_halves(parameter, mapped(self.tensors[parameter.name]))
        return weight if self.lora is None else self.lora.merged(parameter, weight)

    def read_codes(self, parameter: Parameter) -> ReadCodes:
        """A weight of `codes` as it is stored, rotary rows in rotate-half order. Raises CheckpointError."""
        read = self.codes[parameter.name].read()
        values, scale = (self._in_halves(parameter, tensor) for tensor in (read.values, read.scale))
        return replace(read, values=values, scale=scale)

    def _in_halves(self, parameter: Parameter, tensor: Tensor) -> Tensor:
        if parameter.rotary_heads and self.format == "mistral":
            return pairs_to_halves(tensor, parameter.rotary_heads)
        return tensor


def open_checkpoint(path: Path, files: Files | None = None, *, keep_activations: bool = False) -> Checkpoint:
    """Open a folder in any of the formats and check it against its configuration. Raises CheckpointError.

    `files` are there for a checkpoint whose weights are elsewhere as yet; `keep_activations` is that of
    `read_hf_config`.
    """
    if not os.path.isdir(path):
        raise no_folder(path)
    files = LocalFiles(path) if files is None else files
    is_mistral, names, ambiguous = find_weights(path, files)
    if is_mistral and keep_activations:
        raise SettingError(
            f"keeping activations would do nothing: {path / MISTRAL_CONFIG} names none", "leave keep activations away"
        )
    is_coded = has_codes(path / (MISTRAL_CONFIG if is_mistral else HF_CONFIG))
    if is_mistral:
        config, assumed = read_mistral_config(path / MISTRAL_CONFIG)
    else:
        config, assumed = read_hf_config(path / HF_CONFIG, keep_activations=keep_activations)
    tokenizer = find_tokenizer(path, config, files.names)
    config = replace(config, image_tokens=tokenizer.image_tokens or config.image_tokens)
    image_side, scaled = picture_side(path, is_mistral, tokenizer, config.vision)
    stored = [tensor for tensor in files.tensors(names) if not tensor.name.endswith(HARMLESS_SUFFIX)]
    coded: dict[str, Codes] = {}
    if is_coded:
        stored, coded = take_codes(stored)
    is_new = any(tensor.name.startswith("model.") for tensor in stored)
    format_ = "mistral" if is_mistral else "hf-new" if is_new else "hf"
    if config.decoder.tied_embeddings and SPELLINGS[format_]("output.weight") in {tensor.name for tensor in stored}:
        config = replace(config, decoder=replace(config.decoder, tied_embeddings=False))  # its own head counts
    spelled = {parameter.name: SPELLINGS[format_](parameter.name) for parameter in parameters(config)}
    refuse_other_dtypes(stored, {*spelled.values()})
    stored += [codes.stored(name) for name, codes in coded.items()]
    places = tuple(path / name for name in names)
    tensors = _match(parameters(config), SPELLINGS[format_], stored, places)
    for file in places:
        if file.is_file():
            check_header(file)
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[(SAFETENSORS_DTYPES | FORMATS)[tensor.dtype]] += prod(tensor.shape)
    return Checkpoint(
        path=path,
        format=format_,
        config=config,
        tokenizer=tokenizer.path,
        image_side=image_side,
        warnings=(*ambiguous, *assumed, *tokenizer.warnings, *scaled),
        stored_dtype=sizes.most_common(1)[0][0],
        files=places,
        total_bytes=sum(files.size(name) or 0 for name in names),
        tensors=tensors,
        codes={name: coded[file_name] for name, file_name in spelled.items() if file_name in coded},
    )


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
    tensors: dict[str, StoredTensor] = {}
    missing, misshapen = [], []
    for parameter in wanted:
        if parameter.copy_of:
            if parameter.copy_of in tensors:
                tensors[parameter.name] = tensors[parameter.copy_of]
            continue
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
    lines = [f"{len(names)} {kind}: {few(names)}" for kind, names in kinds.items() if names]
    if lines:
        where = str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} weight files)"
        message = "\n  ".join([f"{where} does not hold the tensors that its configuration describes", *lines])
        raise CheckpointError(message, f"weights and configuration must be of one model; {DOWNLOAD_HINT}")
    return tensors
