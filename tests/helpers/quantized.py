"""A small random checkpoint to quantize, and its quantized exports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pixtral_export.checkpoint.reader import open_checkpoint
from pixtral_export.export import export
from pixtral_export.plan import ExportSettings, plan_export
from pixtral_runtime.bundle.config import DecoderConfig, ModelConfig, VisionConfig
from pixtral_runtime.bundle.manifest import Bundle, open_bundle

SAMPLES = 4


def narrow_config() -> ModelConfig:
    """Widths that groups of 32 divide and that differ from each other, with grouped queries."""
    return ModelConfig(
        VisionConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16, intermediate_size=96,
            patch_size=16, image_size=256, rope_theta=1e4,
        ),
        DecoderConfig(
            dim=96, n_layers=2, head_dim=32, hidden_dim=160, n_heads=4, n_kv_heads=2, vocab_size=512, rope_theta=1e9
        ),
    )  # fmt: skip


def quantized(
    checkpoint: Path, target: Path, *, warn: Callable[[str], None] = lambda _: None, **settings: object
) -> Bundle:
    defaults = ExportSettings(
        dtype="float32", max_context=1024, group_size=32 if settings["precision"] == "int4" else None
    )
    opened = open_checkpoint(checkpoint)
    plan = plan_export(opened, replace(defaults, **settings))  # type: ignore[arg-type]
    if plan.recipe.calibrated:
        plan = replace(plan, settings=replace(plan.settings, calibration_samples=SAMPLES))
    bundle = export(opened, plan, target, force=True, progress=lambda *_: None, warn=warn)
    assert plan.weight_bytes == bundle.files["weights.bin"].bytes or bundle.quantization["unquantized_inputs"]
    return open_bundle(target)
