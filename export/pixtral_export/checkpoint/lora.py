"""LoRA adapters: what a training adds to some of a checkpoint's weights, merged while these are read.

An adapter stores for a weight W (out, in) two narrow matrices A (r, in) and B (out, r), and means W + scaling · B · A.
Two formats are published, and either goes with a checkpoint in any format:

    PEFT      adapter_config.json, adapter_model.safetensors: names of transformers' modules, old or new
    Mistral   lora.safetensors, params.json beside it: canonical names, rotary rows of B as adjacent pairs

Everything is checked when the folder is read. What peft can do beyond this sum is refused by its key: peft merges it.
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pixtral_export.checkpoint.config_file import DOWNLOAD_HINT, SUPPORTED_HINT, Section, few, read_json
from pixtral_export.checkpoint.find_weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MISTRAL_LORA, PICKLES
from pixtral_export.checkpoint.headers import SAFETENSORS_DTYPES, LocalFiles, StoredTensor, read_header
from pixtral_export.checkpoint.mistral_config import MISTRAL_CONFIG
from pixtral_export.checkpoint.tensor_data import check_header, mapped
from pixtral_export.checkpoint.tensor_names import hf_name, hf_new_name, mistral_name, pairs_to_halves
from pixtral_export.model.parameters import Parameter, parameters
from pixtral_runtime.bundle.config import ModelConfig
from pixtral_runtime.bundle.manifest import LoraId
from pixtral_runtime.errors import CheckpointError, Option
from pixtral_runtime.files import sha256_of_file

MERGE_HINT = (
    "merge it with peft, merge_and_unload() and save_pretrained('FOLDER'), then export FOLDER without an adapter"
)
COPY_HINT = "copy the adapter again from where it was trained or published"
HINTS = {DOWNLOAD_HINT: COPY_HINT, SUPPORTED_HINT: MERGE_HINT}  # those of checkpoints, and an adapter's
ELSEWHERE = Option("lora", "FOLDER")
PEFT_PREFIX = "base_model.model."  # of the names of peft's tensors; the module's path in its model follows
PARTS = PART_A, PART_B, PART_BASE = ".lora_A.weight", ".lora_B.weight", ".base_layer.weight"
REMEDIES = ("take the checkpoint that the adapter was trained on", MERGE_HINT)
ROWS = 1024  # of a weight that are summed at a time
DEFAULT_SCALING = 2.0  # mistral-finetune's, and what mistral-inference takes unless it is told

HARMLESS_KEYS = {
    *("alpha_pattern", "fan_in_fan_out", "lora_alpha", "r", "rank_pattern", "use_rslora", "peft_type", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),  # the tensors' names say it
    *("base_model_name_or_path", "revision", "auto_mapping", "task_type", "inference_mode", "peft_version"),
    *("lora_dropout", "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("megatron_core", "qalora_group_size", "ensure_weight_tying"),
}
"""Keys of adapter_config.json whose values are read, or matter in training only.

`fan_in_fan_out` is for layers that store their weights transposed; peft resets it for linear ones, all that there are.
"""
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")  # others change the weights below as well


@dataclass(frozen=True)
class Delta:
    """What an adapter stores for one weight."""

    a: StoredTensor  # (r, in)
    b: StoredTensor  # (out, r)
    scaling: float
    base: StoredTensor | None = None  # the weight itself: peft saves a head that it adapts, and loads it again


@dataclass(frozen=True)
class Lora:
    """An adapter that fits a checkpoint."""

    id: LoraId
    has_pairs: bool  # whether rotary rows of B are adjacent pairs, as Mistral's are
    warnings: tuple[str, ...]
    deltas: Mapping[str, Delta]  # by canonical name

    def merged(self, parameter: Parameter, weight: Tensor) -> Tensor:
        """The weight (out, in) with its correction in float32; itself where the adapter has none for it.

        Computed as peft does, to the bit.
        """
        delta = self.deltas.get(parameter.name)
        if delta is None:
            return weight
        # Copies, because products of matrices at odd addresses may have other last bits.
        a, b = (mapped(part).to(torch.float32, copy=True) for part in (delta.a, delta.b))
        if self.has_pairs and parameter.rotary_heads:
            b = pairs_to_halves(b, parameter.rotary_heads)
        merged = (b @ a).mul_(delta.scaling)  # (out, in)
        base = weight if delta.base is None else mapped(delta.base)
        for rows, some in zip(merged.split(ROWS), base.split(ROWS), strict=True):
            rows.add_(some)  # a sum of all rows at once would copy a base of another type as a whole
        return merged


def read_lora(folder: Path, config: ModelConfig) -> Lora:
    """Read an adapter's files and check them against the model. Raises CheckpointError."""
    try:
        names = _names(folder)
        is_peft = ADAPTER_WEIGHTS in names
        file = folder / (ADAPTER_WEIGHTS if is_peft else MISTRAL_LORA)
        if is_peft:
            settings = _peft_settings(folder / ADAPTER_CONFIG)
            modules = _modules(config, lambda name: PEFT_PREFIX + hf_name(name))
            modules |= _modules(config, lambda name: PEFT_PREFIX + hf_new_name(name))
            warnings: tuple[str, ...] = ()
        else:
            settings, warnings = _mistral_settings(folder / MISTRAL_CONFIG, file)
            modules = _modules(config, mistral_name)
        deltas = _match(file, modules, settings)
        _check_values(deltas.values())
    except CheckpointError as error:
        raise CheckpointError(str(error), *(HINTS.get(str(hint), hint) for hint in error.remedies)) from error
    name = Path(os.path.abspath(folder)).name
    return Lora(LoraId(name, sha256_of_file(file)), not is_peft, warnings, deltas)


Settings = Callable[[str], tuple[int | None, float]]
"""The rank, None where any will do, and the scaling of the module with this name."""


def _names(folder: Path) -> Collection[str]:
    """The folder's files, once it is known to hold one adapter."""
    if not os.path.isdir(folder):
        if os.path.isfile(folder):
            raise CheckpointError(
                f"{folder} is one file, expected the adapter's folder", Option("lora", str(folder.parent))
            )
        raise CheckpointError(
            f"{folder}: no such folder here", ELSEWHERE, "for one of the hub: hf download OWNER/NAME --local-dir FOLDER"
        )
    names = LocalFiles(folder).names
    is_peft, is_mistral = ADAPTER_WEIGHTS in names, MISTRAL_LORA in names
    if is_mistral and (is_peft or ADAPTER_CONFIG in names):
        raise CheckpointError(
            f"{folder} holds two adapters, PEFT's {ADAPTER_WEIGHTS} and Mistral's {MISTRAL_LORA}",
            "leave the one that is meant in a folder of its own",
        )
    if is_peft and ADAPTER_CONFIG not in names:
        raise CheckpointError(f"{folder} has {ADAPTER_WEIGHTS} but no {ADAPTER_CONFIG}", COPY_HINT)
    if is_peft or is_mistral:
        return names
    if pickles := sorted(name for name in names if name.endswith(PICKLES)):
        raise CheckpointError(
            f"{folder} holds its weights as pickles, which can run any code when they are read ({few(pickles)})",
            "save the adapter as safetensors, as save_pretrained('FOLDER') of peft does",
        )
    raise CheckpointError(
        f"{folder} holds no adapter: neither {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} (PEFT) nor {MISTRAL_LORA} "
        "(Mistral)",
        ELSEWHERE,
    )


def _modules(config: ModelConfig, spell: Callable[[str], str]) -> dict[str, Parameter]:
    """The parameters that are weights, by the name of their module in the spelling of a format."""
    end = ".weight"
    return {spell(p.name).removesuffix(end): p for p in parameters(config) if p.name.endswith(end)}


def _peft_settings(file: Path) -> Settings:
    """What adapter_config.json says; refuses all that is more than a sum."""
    root = Section(file, read_json(file), {})
    root.only("peft_type", "LORA")
    root.only("use_dora", None, False, kind="a DoRA adapter")
    root.only("bias", None, "none")
    root.only("init_lora_weights", *PLAIN_STARTS)
    for key, value in root.values.items():
        if value and key not in HARMLESS_KEYS:
            root.only(key, None)
    rank, alpha = root.integer("r"), root.number("lora_alpha")
    root_of_rank = root.boolean("use_rslora", False)
    ranks, alphas = (root.section(key, {}) if root.get(key) else None for key in ("rank_pattern", "alpha_pattern"))

    def settings(module: str) -> tuple[int | None, float]:
        path = module.removeprefix(PEFT_PREFIX)
        r = rank if ranks is None or (key := _pattern(ranks, path)) is None else ranks.integer(key)
        top = alpha if alphas is None or (key := _pattern(alphas, path)) is None else alphas.number(key)
        return r, top / (math.sqrt(r) if root_of_rank else r)

    return settings


def _pattern(patterns: Section, path: str) -> str | None:
    """The first pattern that the end of a module's path matches, as peft looks for it."""
    for pattern in patterns.values:
        try:
            if re.match(rf"(.*\.)?({pattern})$", path):
                return pattern
        except (re.error, OverflowError, RecursionError) as error:
            raise CheckpointError(
                f"{patterns.file}: '{patterns.prefix}{pattern}' is no regular expression: {error}", COPY_HINT
            ) from error
    return None


def _mistral_settings(file: Path, weights: Path) -> tuple[Settings, tuple[str, ...]]:
    """What the params.json that mistral-finetune writes says of its adapter, and a warning where it says nothing."""
    root = Section(file, read_json(file) if file.is_file() else {}, {})
    if root.get("lora") is None:
        assumed = f"{weights} comes without a {MISTRAL_CONFIG} that names its scaling, assumed: {DEFAULT_SCALING}"
        return lambda _: (None, DEFAULT_SCALING), (assumed,)
    lora = root.section("lora", {})
    lora.only("enable", None, True)
    rank, scaling = lora.integer("rank"), lora.number("scaling")
    return lambda _: (rank, scaling), ()


def _match(file: Path, modules: Mapping[str, Parameter], settings: Settings) -> dict[str, Delta]:
    """The adapter's tensors by the weights that they correct. Raises CheckpointError where they fit no weight."""
    layers: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    faults: dict[str, list[str]] = defaultdict(list)
    for tensor in read_header(file):
        part = next((part for part in PARTS if tensor.name.endswith(part)), None)
        if part is None:
            faults["no LoRA of a layer"].append(f"{tensor.name} {tensor.shape}")
        else:
            layers[tensor.name.removesuffix(part)][part] = tensor
    check_header(file)
    deltas = {}
    for module, parts in layers.items():
        parameter = modules.get(module)
        if parameter is None:
            faults["of layers that this model does not have"].append(module)
        elif not parameter.is_linear:
            faults["of layers that are not linear"].append(module)
        elif parameter.copy_of:
            faults["of a head that shares its weights with the embeddings"].append(module)
        elif parameter.name in deltas:
            faults["of layers that are there by another name as well"].append(module)
        elif PART_A not in parts or PART_B not in parts:
            faults["without their other half"] += [tensor.name for tensor in parts.values()]
        else:
            rank, scaling = settings(module)
            shapes = _shapes(parts[PART_A], parameter, rank)
            faults["of another shape or rank"] += [
                f"{tensor.name}: expected {shapes[part]}, seen {tensor.shape}"
                for part, tensor in parts.items()
                if tensor.shape != shapes[part]
            ]
            deltas[parameter.name] = Delta(parts[PART_A], parts[PART_B], scaling, parts.get(PART_BASE))
    if lines := [f"{len(names)} {fault}: {few(names)}" for fault, names in faults.items() if names]:
        raise CheckpointError("\n  ".join([f"{file} holds tensors that do not go with this model", *lines]), *REMEDIES)
    if not deltas:
        raise CheckpointError(f"{file} holds no tensor", COPY_HINT)
    return deltas


def _shapes(a: StoredTensor, parameter: Parameter, rank: int | None) -> dict[str, tuple[int, ...]]:
    """What the parts of a layer's correction must be; where no rank is known, of the rank that A has."""
    rows, columns = parameter.shape
    rank = rank or next(iter(a.shape), 0) or 1
    return {PART_A: (rank, columns), PART_B: (rows, rank), PART_BASE: (rows, columns)}


def _check_values(deltas: Iterable[Delta]) -> None:
    """Raise CheckpointError for types of numbers that weights do not have, and for values that are not finite."""
    for stored in (part for delta in deltas for part in (delta.a, delta.b, delta.base) if part is not None):
        if stored.dtype not in SAFETENSORS_DTYPES:
            raise CheckpointError(
                f"{stored.file}: '{stored.name}' is stored as {stored.dtype}, "
                f"expected {' or '.join(SAFETENSORS_DTYPES)}",
                "save the adapter in float32",
            )
        if not bool(torch.stack(mapped(stored).aminmax()).isfinite().all()):  # aminmax passes NaN on
            raise CheckpointError(
                f"{stored.file}: '{stored.name}' holds values that are not finite",
                "the training that made it diverged, or the file is damaged: take an earlier save, or copy it again",
            )
