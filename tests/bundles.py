"""Export for tests: a checkpoint folder to a small bundle."""

from __future__ import annotations

from pathlib import Path

from pixtral_export.checkpoint import open_checkpoint
from pixtral_export.export import ExportSettings, export, plan_export

CONTEXT = 1024


def export_tiny(checkpoint: Path, target: Path, *, dtype: str = "float16", force: bool = False) -> Path:
    """Export with a short context. Returns the bundle's folder."""
    opened = open_checkpoint(checkpoint)
    plan = plan_export(opened, ExportSettings(dtype=dtype, max_context=CONTEXT))
    return export(opened, plan, target, force=force, progress=lambda *_: None).path
