"""Which tensors the weight file will hold, and its size: known from configuration and recipe alone."""

from __future__ import annotations

from collections.abc import Iterable

from pixtral_export.model.parameters import parameters
from pixtral_export.quantization.recipes import Recipe, Stored, stored_tensors
from pixtral_export.weight_names import DECODER_ROPE, QUERY_ROPE, VISION_ROPE, scale_name
from pixtral_runtime.bundle.config import ModelConfig
from pixtral_runtime.bundle.manifest import Limits
from pixtral_runtime.bundle.spec import cache_names

ALIGNMENT_BYTES = 4096


def plan_weights(config: ModelConfig, dtype: str, limits: Limits, recipe: Recipe) -> list[Stored]:
    """All tensors of the weight file. Raises InputError where the recipe does not fit a layer."""
    planned: dict[str, Stored] = {}
    for parameter in parameters(config):
        if recipe.is_copy(parameter):
            continue
        planned |= {item.name: item for item in stored_tensors(parameter, recipe.scheme(parameter), dtype)}
    caches = cache_names("past", config.decoder.n_layers) if recipe.kv_cache else ()
    cache_scales = [Stored(scale_name(name), (), dtype) for name in caches]
    return [*planned.values(), *cache_scales, *rope_tensors(config, dtype, limits)]


def rope_tensors(config: ModelConfig, dtype: str, limits: Limits) -> list[Stored]:
    vision = (config.vision.max_grid**2, config.vision.head_dim // 2)
    decoder = (limits.max_context, config.decoder.head_dim // 2)
    of_queries = QUERY_ROPE if config.decoder.query_scale else ()
    return [
        *(Stored(name, vision, dtype) for name in VISION_ROPE),
        *(Stored(name, decoder, dtype) for name in (*DECODER_ROPE, *of_queries)),
    ]


def weight_file_bytes(plan: Iterable[Stored]) -> int:
    end = 0
    for item in plan:
        end = aligned(end) + item.nbytes
    return end


def aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
