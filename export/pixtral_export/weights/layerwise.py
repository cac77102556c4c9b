"""One pass over the model that writes its weights, and shows samples to each layer on the way.

The model is a row of units: patch embedding, vision blocks, adapter, token embedding, decoder blocks, head. One unit's
weights are in memory at a time. Where the recipe needs calibration, the samples' activations stand between two units on
disk; a unit reads them, is quantized by what it saw, and passes on what the quantized unit computes, so that later
layers are calibrated with the errors of earlier ones. A journal is written after each unit: an interrupted walk
continues where it stopped.

Shapes: P patches of an image, T tokens of a prompt, D hidden.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from pixtral_export.checkpoint.reader import Checkpoint
from pixtral_export.model import decoder, vision
from pixtral_export.model.ops import group_rows
from pixtral_export.model.parameters import Parameter, parameters
from pixtral_export.model.rope import decoder_rope_tables, vision_rope_tables
from pixtral_export.quantization.calibrate import ADAPTER_GROUPS, BLOCK_GROUPS, judges, quantize_block, watch
from pixtral_export.quantization.formats import FORMATS
from pixtral_export.quantization.gptq import one_thread
from pixtral_export.quantization.recipes import Recipe, Stored
from pixtral_export.weight_names import ExternalWeight, input_scale_name, scale_name
from pixtral_export.weights.activations import Activations, overflow
from pixtral_export.weights.plan import rope_tensors
from pixtral_export.weights.values import check_values
from pixtral_export.weights.weight_file import Advance, WeightFile, rope_tables
from pixtral_runtime.bundle.config import ModelConfig
from pixtral_runtime.bundle.manifest import WEIGHTS, FileEntry, Limits
from pixtral_runtime.bundle.spec import cache_names
from pixtral_runtime.files import write_atomically
from pixtral_runtime.inputs.prompt import Prompt
from pixtral_runtime.json_data import from_json

LEAST_STEADY_ROWS = 16  # products of 5 to 11 rows have other last bits in two threads than in one

SCRATCH, JOURNAL = "calibration", "journal.json"
PATCHES_UNIT, ADAPTER_UNIT = "vision_encoder", "vision_language_adapter"
EMBEDDING_UNIT, HEAD_UNIT = "tok_embeddings", "head"
UNIT_PREFIX = re.compile(
    rf"(vision_encoder\.transformer\.layers\.\d+|layers\.\d+|{PATCHES_UNIT}|{ADAPTER_UNIT}|{EMBEDDING_UNIT})\."
)

Stage = Callable[[int, int], None]
"""Called with the units done and the units in all."""
Forward = Callable[[range | None], Iterator[Tensor]]
"""A unit's outputs for all samples, or for those whose numbers are named."""


@dataclass
class Journal:
    """What a walk has done so far. `key` says of what: another checkpoint, recipe or samples start anew."""

    key: str
    units: list[str] = field(default_factory=list)
    places: list[ExternalWeight] = field(default_factory=list)
    input_scales: dict[str, str] = field(default_factory=dict)  # of weights with quantized inputs
    fallbacks: dict[str, float] = field(default_factory=dict)  # layers that keep their inputs after all, and SNR in dB
    rounded: dict[str, tuple[float, float]] = field(
        default_factory=dict
    )  # SNR where GPTQ was worse: its own, rounding's
    cache_scales: list[float] = field(default_factory=list)  # of the tensors of a quantized cache

    @classmethod
    def load(cls, path: Path, key: str) -> Journal:
        """The journal at `path`, or an empty one where there is none for `key`."""
        try:
            journal = from_json(cls, json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError, RecursionError):
            return cls(key)
        return journal if journal.key == key else cls(key)

    def save(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json.dumps(asdict(self)).encode())


def units(config: ModelConfig) -> list[tuple[str, list[Parameter]]]:
    """The model's units in the order of computation, with their parameters."""

    def unit(parameter: Parameter) -> str:
        match = UNIT_PREFIX.match(parameter.name)
        return match[1] if match else HEAD_UNIT

    return [(name, list(group)) for name, group in groupby(parameters(config), unit)]


def steady(rows: int) -> AbstractContextManager[None]:
    """Where products of so many rows give the same bits at any number of threads: short ones were seen to differ."""
    return one_thread() if rows < LEAST_STEADY_ROWS else nullcontext()


@dataclass(frozen=True)
class LayerwisePass:
    """A pass over a checkpoint. `folder` takes the weight file, and, while calibrating, journal and activations."""

    checkpoint: Checkpoint
    recipe: Recipe
    dtype: str
    limits: Limits
    prompts: Sequence[Prompt]  # samples; empty where the recipe needs no calibration
    folder: Path
    key: str  # stands for everything that decides the result

    def run(self, advance: Advance, stage: Stage) -> tuple[FileEntry, Journal]:
        """Write the weight file. Raises InputError where a weight is not finite or does not fit its dtype."""
        config, scratch = self.checkpoint.config, self.folder / SCRATCH
        if self.prompts:  # found now, and not after the hour that the layers before it are calibrated
            for parameter in parameters(config):
                check_values(self.checkpoint, parameter, self.recipe.scheme(parameter), self.dtype)
        journal = Journal.load(scratch / JOURNAL, self.key)
        file = WeightFile(self.folder / WEIGHTS, self.dtype, advance, journal.places)
        row, before = units(config), ""
        with torch.inference_mode():
            for done, (unit, members) in enumerate(row):
                stage(done, len(row))
                if unit not in journal.units:
                    if self.prompts:
                        Activations(scratch).save(unit, self._pass(file, journal, unit, members, before))
                    for parameter in members:
                        self._copy(file, journal, parameter)
                    if self.prompts:
                        file.flush()
                        journal.units.append(unit)
                        journal.places = list(file.places.values())
                        journal.save(scratch / JOURNAL)
                        if before:
                            Activations(scratch).drop(before)
                before = unit
            if self.recipe.kv_cache:
                names = cache_names("past", config.decoder.n_layers)
                for name, scale in zip(names, journal.cache_scales, strict=True):
                    file.add_values(Stored(scale_name(name), (), self.dtype), torch.tensor(scale))
            for item, table in zip(
                rope_tensors(config, self.dtype, self.limits), rope_tables(config, self.limits), strict=True
            ):
                file.add_values(item, table)
            stage(len(row), len(row))
        journal.places = list(file.places.values())
        return file.close(), journal

    def _copy(self, file: WeightFile, journal: Journal, parameter: Parameter) -> None:
        """Write a parameter that no sample decides. Its pages are let go on return."""
        if parameter.name not in file.places and not self.recipe.is_copy(parameter):
            scheme = self.recipe.scheme(parameter)
            if not self.prompts:
                check_values(self.checkpoint, parameter, scheme, self.dtype)
            if scheme is not None and self.recipe.takes_codes(parameter):
                file.add_codes(parameter, scheme, self.checkpoint.read_codes(parameter))
                if scheme.activation is not None:
                    name = input_scale_name(parameter.name)
                    file.add_values(Stored(name, (), "float32"), torch.tensor(self._published_input_scale(name)))
                    journal.input_scales[parameter.name] = name
                return
            file.add_parameter(parameter, scheme, self.checkpoint.read(parameter))

    def _published_input_scale(self, name: str) -> float:
        """The largest of the scales that layers which share one input are published with: nothing saturates more."""
        codes = self.checkpoint.codes
        scales = [one.read_input_scale() for parameter, one in codes.items() if input_scale_name(parameter) == name]
        return max(scale for scale in scales if scale is not None)

    def _pass(
        self, file: WeightFile, journal: Journal, unit: str, members: Sequence[Parameter], before: str
    ) -> Iterator[Tensor]:
        """A unit's outputs for all samples, once those of its weights that depend on the samples are written."""
        config = self.checkpoint.config
        inputs = Activations(self.folder / SCRATCH)
        if unit == PATCHES_UNIT:
            yield from self._patches(members)
        elif unit == EMBEDDING_UNIT:
            yield from self._embedded(members[0], inputs.load(before))
        elif unit == ADAPTER_UNIT:
            adapter = self._load(lambda: vision.Adapter(config), unit, members)

            def run(only: range | None = None) -> Iterator[Tensor]:
                return self._adapted(adapter, inputs.load(before, only))

            self._quantize(file, journal, unit, adapter, members, run)
            yield from run()
        elif unit.startswith(PATCHES_UNIT):
            block = self._load(lambda: vision.vision_block(config.vision), unit, members)

            def run(only: range | None = None) -> Iterator[Tensor]:
                return self._vision(block, inputs.load(before, only), only)

            self._quantize(file, journal, unit, block, members, run)
            yield from run()
        elif unit != HEAD_UNIT:
            block = self._load(lambda: decoder.decoder_block(config.decoder), unit, members)
            largest = [0.0, 0.0]

            def run(only: range | None = None) -> Iterator[Tensor]:
                return self._decoder(block, inputs.load(before, only), largest)

            self._quantize(file, journal, unit, block, members, run)
            yield from run()
            if self.recipe.kv_cache:
                steps = FORMATS[self.recipe.kv_cache].largest
                journal.cache_scales += [max(magnitude, 1e-5) / steps for magnitude in largest]

    def _load(self, build: Callable[[], nn.Module], unit: str, members: Sequence[Parameter]) -> nn.Module:
        """A module with the unit's weights in float32."""
        with torch.device("meta"):
            module = build()
        state = {}
        for parameter in members:
            tensor = self.checkpoint.read(parameter).float()
            state[parameter.name.removeprefix(f"{unit}.")] = tensor.T.contiguous() if parameter.is_linear else tensor
        module.load_state_dict(state, assign=True)
        return module

    def _quantize(
        self,
        file: WeightFile,
        journal: Journal,
        unit: str,
        module: nn.Module,
        members: Sequence[Parameter],
        forward: Forward,
    ) -> None:
        """Quantize and write a unit by what its layers see in `forward`, where the recipe asks for that."""
        names = {parameter.name.removeprefix(f"{unit}.").removesuffix(".weight"): parameter for parameter in members}
        schemes = {
            name: scheme for name, parameter in names.items() if (scheme := self.recipe.scheme(parameter)) is not None
        }
        if not any(self.recipe.needs_samples(scheme) for scheme in schemes.values()):
            return
        listed = ADAPTER_GROUPS if unit == ADAPTER_UNIT else BLOCK_GROUPS
        groups = [group for group in listed if names.keys() >= {*group.layers}]
        gptq = [name for name, scheme in schemes.items() if scheme.is_coarse and self.recipe.method == "gptq"]
        images = sum(len(prompt.images) for prompt in self.prompts)
        sequences = images if unit.startswith("vision_") else len(self.prompts)
        statistics, handles = watch(module, groups, sequences, gptq)
        for _ in forward(None):
            pass
        for handle in handles:
            handle.remove()
        for name, seen in statistics.items():
            if not seen.largest.isfinite().all():
                raise overflow(f"the input of {unit}.{name}")
        for outcome in quantize_block(
            module, groups, schemes, statistics, self.dtype, self.recipe.method, self.recipe.smooth,
            lambda: list(forward(judges(sequences))),
        ):  # fmt: skip
            parameter, layer = names[outcome.name], f"{unit}.{outcome.name}"
            file.add_quantized(parameter, outcome.quantized)
            if outcome.quantized.input_scale is not None:
                journal.input_scales[parameter.name] = input_scale_name(parameter.name)
            elif schemes[outcome.name].activation is not None:
                journal.fallbacks[layer] = round(outcome.snr_db, 1)
            if outcome.rounded is not None:
                by_gptq, by_rounding = outcome.rounded
                journal.rounded[layer] = (round(by_gptq, 1), round(by_rounding, 1))
        for name, tensor in module.named_parameters():  # norms and kept layers, some rescaled
            parameter = next(p for p in members if p.name == f"{unit}.{name}")
            if parameter.name not in file.places:
                file.add_parameter(parameter, None, tensor.T if parameter.is_linear else tensor)

    def _images(self, only: range | None = None) -> Iterator[Tensor]:
        images = (image for prompt in self.prompts for image in prompt.images)
        yield from (torch.from_numpy(image)[None] for n, image in enumerate(images) if only is None or n in only)

    def _patches(self, members: Sequence[Parameter]) -> Iterator[Tensor]:
        module = self._load(lambda: vision.PatchEmbedding(self.checkpoint.config.vision), PATCHES_UNIT, members)
        for pixels in self._images():
            yield module(pixels)[0]  # (1, P, D)

    def _vision(self, block: nn.Module, inputs: Iterator[Tensor], only: range | None) -> Iterator[Tensor]:
        config = self.checkpoint.config.vision
        cos, sin = (table.float() for table in vision_rope_tables(config))
        for x, pixels in zip(inputs, self._images(only), strict=True):
            rows, columns = (side // config.patch_size for side in pixels.shape[2:])
            positions = vision.position_ids(rows, columns, config)[None]
            with steady(x.shape[1]):
                y = block(x, cos, sin, positions)[0]
            yield y

    def _adapted(self, adapter: nn.Module, inputs: Iterator[Tensor]) -> Iterator[Tensor]:
        for x in inputs:
            with steady(x.shape[1]):
                y = adapter(x)
            yield y

    def _embedded(self, table: Parameter, features: Iterator[Tensor]) -> Iterator[Tensor]:
        for prompt in self.prompts:
            x = self.checkpoint.read(table)[torch.from_numpy(prompt.token_ids)].float()  # (T, D)
            if prompt.images:
                index = torch.from_numpy(prompt.feature_index)
                x[index >= 0] = torch.cat([next(features)[0] for _ in prompt.images])
            yield x[None]

    def _decoder(self, block: nn.Module, inputs: Iterator[Tensor], largest: list[float]) -> Iterator[Tensor]:
        """Outputs of a block. `largest` keeps the magnitudes of its keys and values."""
        longest = max(len(prompt.token_ids) for prompt in self.prompts)
        config = self.checkpoint.config.decoder
        cos, sin, *of_queries = (table.float() for table in decoder_rope_tables(config, longest))
        for x in inputs:
            positions = torch.arange(x.shape[1])
            mask = group_rows((positions[:, None] >= positions)[None, None], config.n_heads // config.n_kv_heads)
            with steady(x.shape[1]):
                y, *cached = block(x, cos, sin, positions[None], mask, None, None, None, *of_queries)
            largest[:] = [max(old, float(new.abs().max())) for old, new in zip(largest, cached, strict=True)]
            yield y
