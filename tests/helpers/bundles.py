"""Export for tests: a checkpoint folder to a small bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pixtral_export.checkpoint.reader import open_checkpoint
from pixtral_export.export import export
from pixtral_export.plan import ExportSettings, plan_export
from pixtral_runtime.bundle.manifest import Bundle

CONTEXT = 1024


def exported(checkpoint: Path, target: Path, settings: ExportSettings | None = None, *, force: bool = False) -> Bundle:
    """Export with a short context unless `settings` have one, and with two samples where it is calibrated."""
    settings = settings or ExportSettings()
    settings = replace(settings, max_context=CONTEXT if settings.max_context is None else settings.max_context)
    opened = open_checkpoint(checkpoint)
    plan = plan_export(opened, settings)
    if plan.recipe.calibrated:
        plan = replace(plan, settings=replace(settings, calibration_samples=2))
    return export(opened, plan, target, force=force, progress=lambda *_: None)


def export_tiny(checkpoint: Path, target: Path, *, dtype: str = "float16", force: bool = False) -> Path:
    """The folder of an unquantized bundle."""
    return exported(checkpoint, target, ExportSettings(dtype=dtype), force=force).path
