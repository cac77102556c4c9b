"""What an export is asked for and what it will take, known before any work."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

from pixtral_export.checkpoint.generation_config import read_sampling
from pixtral_export.checkpoint.reader import Checkpoint
from pixtral_export.model.ops import OPSET
from pixtral_export.model.parameters import parameters
from pixtral_export.quantization.recipes import RECIPES, STORED, Recipe, Scheme, Stored, check_patterns, make_recipe
from pixtral_export.weights.plan import plan_weights, weight_file_bytes
from pixtral_runtime.bundle.footprint import Footprint
from pixtral_runtime.bundle.manifest import Limits, SamplingDefaults
from pixtral_runtime.bundle.spec import ACTIVATION_DTYPES, kv_cache_bytes_per_token
from pixtral_runtime.errors import Option, SettingError

DEFAULT_CONTEXT = 16_384
GRAPH_BYTES_PER_LAYER = 20_000  # three graphs without weights; 11 to 19 kB a layer seen
TRACE_S = 10.0  # seen: 11 s for the three graphs of Pixtral-12B on 2 cores
COPY_BYTES_PER_S = 100e6  # seen 75 to 140: read, cast, transpose, hash and write, on 2 cores
EXPORTER_MEMORY_BYTES = 950_000_000  # torch and onnx loaded, graphs traced; 2.27 GB seen in all for Pixtral-12B
MERGE_BYTES_PER_WEIGHT = 6  # of an adapter: the sum in float32 and the mapped weight; 5.3 seen in the head of the 12B
MERGE_S_PER_WEIGHT = 4e-8  # at rank 16: 8e-8 and 14e-8 seen beside other work, where a copy took three times as long
CALIBRATION_S_PER_WEIGHT = 5e-7  # 32 samples of 7,500 tokens, 2 busy cores: 29 s a layer of the 12B and 14 ms a token


@dataclass(frozen=True)
class ExportSettings:
    dtype: str = "float16"
    max_context: int | None = None  # None: 16,384, or the model's own where that is less
    max_image_side: int | None = None  # None: what the checkpoint's own programs scale pictures to
    opset: int = OPSET
    precision: str | None = None  # a key of RECIPES; None: weights in the dtype
    group_size: int | None = None  # weights of a scale; None: the recipe's own
    method: str | None = None  # how codes are chosen: gptq, awq, smoothquant or rtn; None: the recipe's own
    keep: tuple[str, ...] = ()  # PATTERN=DTYPE
    kv_cache: str | None = None  # int8; None: the dtype
    calibration: Path | None = None  # folder of images or JSON Lines; None: the packaged samples
    calibration_samples: int | None = None  # None: DEFAULT_SAMPLES


@dataclass(frozen=True)
class ExportPlan:
    """What an export will take, known before any work."""

    settings: ExportSettings
    limits: Limits
    recipe: Recipe
    weights: list[Stored] = field(repr=False)
    weight_bytes: int
    bundle_bytes: int
    peak_memory_bytes: int
    seconds: float
    sampling: SamplingDefaults | None


def plan_export(checkpoint: Checkpoint, settings: ExportSettings) -> ExportPlan:
    """Check the settings against the checkpoint and estimate size, memory and time. Raises SettingError."""
    config = checkpoint.config
    if settings.dtype not in ACTIVATION_DTYPES:
        raise SettingError(f"no dtype '{settings.dtype}'", Option("dtype", tuple(ACTIVATION_DTYPES)))
    if settings.opset != OPSET:
        raise SettingError(
            f"opset {settings.opset} is not supported: the cache needs TensorScatter, which opset {OPSET} brought",
            Option("opset", OPSET),
        )
    side, patch = settings.max_image_side, config.vision.token_edge
    side = checkpoint.image_side if side is None else side
    if not patch <= side <= config.vision.image_size:
        raise SettingError(
            f"a longest image side of {side} px is outside {patch}..{config.vision.image_size} px, "
            "what the vision encoder's positions cover",
            Option("max_image_side", config.vision.image_size),
        )
    if side % patch:  # a picture of that side has one patch more
        raise SettingError(
            f"a longest image side of {side} px is no multiple of the {patch} px of a patch",
            Option("max_image_side", side // patch * patch),
        )
    default_context = min(DEFAULT_CONTEXT, config.decoder.max_position)
    context = default_context if settings.max_context is None else settings.max_context
    if not 1 <= context <= config.decoder.max_position:
        raise SettingError(
            f"a context of {context} tokens is outside 1..{config.decoder.max_position}, the model's positions",
            Option("max_context", default_context),
        )
    limits = Limits(context, side)
    recipe = make_recipe(
        settings.precision or settings.dtype,
        settings.dtype,
        group_size=settings.group_size,
        method=settings.method,
        keep=settings.keep,
        kv_cache=settings.kv_cache,
        published=_published(checkpoint),
    )
    check_patterns(recipe, parameters(config))
    _refuse_unused_samples(settings, recipe)
    weights = plan_weights(config, settings.dtype, limits, recipe)
    weight_bytes = weight_file_bytes(weights)
    graph_bytes = GRAPH_BYTES_PER_LAYER * (config.vision.num_hidden_layers + config.decoder.n_layers)
    peak_memory_bytes, seconds = _cost(checkpoint, recipe, weight_bytes)
    return ExportPlan(
        settings,
        limits,
        recipe,
        weights,
        weight_bytes=weight_bytes,
        bundle_bytes=weight_bytes + graph_bytes + checkpoint.tokenizer.stat().st_size,
        peak_memory_bytes=peak_memory_bytes,
        seconds=seconds,
        sampling=read_sampling(checkpoint.path),
    )


def plan_footprint(checkpoint: Checkpoint, plan: ExportPlan) -> Footprint:
    """What the planned bundle would take on a device, with the weights of each precision it could have instead."""
    settings = plan.settings
    others = replace(settings, group_size=None, method=None, calibration=None, calibration_samples=None)
    names = (settings.dtype, *RECIPES)
    weights = {name: plan_export(checkpoint, replace(others, precision=name)).weight_bytes for name in names}
    return Footprint(
        checkpoint.config,
        settings.dtype,
        plan.recipe.name,
        plan.limits,
        weights | {plan.recipe.name: plan.weight_bytes},
        kv_cache_bytes_per_token(checkpoint.config, settings.kv_cache or settings.dtype),
    )


def _published(checkpoint: Checkpoint) -> dict[str, Scheme]:
    """The schemes of the codes that a checkpoint holds; where an adapter is merged, they are no longer its weights."""
    if checkpoint.lora is not None:
        return {}
    return {
        name: Scheme(codes.format, codes.group, codes.format if codes.input_scale else None)
        for name, codes in checkpoint.codes.items()
    }


def _refuse_unused_samples(settings: ExportSettings, recipe: Recipe) -> None:
    """Raise SettingError for calibration options where nothing looks at samples."""
    if recipe.calibrated:
        return
    is_plain = recipe.name == settings.dtype
    unused = {"calibration": settings.calibration, "calibration_samples": settings.calibration_samples}
    for option, wish in unused.items():
        if wish is not None:
            words = option.replace("_", " ")
            how = "" if is_plain else " of the checkpoint's own codes" if recipe.method == STORED else " by rounding"
            raise SettingError(
                f"{words} {wish} would do nothing: {recipe.name}{how} needs no samples",
                f"leave the {words} away",
                Option("precision", "int4") if is_plain else Option("method", "gptq"),
                Option("kv_cache", "int8"),
            )


def _cost(checkpoint: Checkpoint, recipe: Recipe, weight_bytes: int) -> tuple[int, float]:
    """Peak memory in bytes and time in seconds.

    Memory is the largest tensor of the checkpoint, mapped, or while calibrating one block in float32 with three more
    copies of its largest layer and the second moments of its inputs. A layer that an adapter corrects is in float32.
    """
    config = checkpoint.config
    counts = {parameter.name: prod(parameter.shape) for parameter in parameters(config)}
    memory, seconds = EXPORTER_MEMORY_BYTES + 2 * max(counts.values()), TRACE_S + weight_bytes / COPY_BYTES_PER_S
    if checkpoint.lora is not None:
        merged = [counts[name] for name in checkpoint.lora.deltas]
        memory = max(memory, EXPORTER_MEMORY_BYTES + MERGE_BYTES_PER_WEIGHT * max(merged))
        seconds += MERGE_S_PER_WEIGHT * sum(merged)
    if recipe.calibrated:
        block = [count for name, count in counts.items() if name.startswith("layers.0.")]
        memory = max(memory, EXPORTER_MEMORY_BYTES + 4 * (sum(block) + 3 * max(block)))
        seconds += CALIBRATION_S_PER_WEIGHT * sum(block) * config.decoder.n_layers
    return memory, seconds
