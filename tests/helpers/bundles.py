"""Export for tests: a checkpoint folder to a small bundle.

The demo checkpoint is exported once a test run for each of its settings, by whichever of the run's processes comes
first: tests get copies.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from helpers.places import DEMO, MADE
from pixtral_export.checkpoint.reader import open_checkpoint
from pixtral_export.export import export
from pixtral_export.plan import ExportSettings, plan_export
from pixtral_runtime.bundle.manifest import MANIFEST, Bundle, open_bundle
from pixtral_runtime.files import sha256_of_file
from pixtral_runtime.json_data import SEAL, sealed

CONTEXT = 1024


def exported(checkpoint: Path, target: Path, settings: ExportSettings | None = None, *, force: bool = False) -> Bundle:
    """Export with a short context unless `settings` have one, and with two samples where it is calibrated."""
    settings = settings or ExportSettings()
    settings = replace(settings, max_context=CONTEXT if settings.max_context is None else settings.max_context)
    if checkpoint != DEMO or force or target.exists() or MADE not in os.environ:
        return _export(checkpoint, target, settings, force=force)
    made = Path(os.environ[MADE]) / hashlib.sha256(repr(settings).encode()).hexdigest()
    with open(f"{made}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not made.is_dir():
            _export(checkpoint, made, settings, force=False)
    shutil.copytree(made, target)
    return open_bundle(target)


def _export(checkpoint: Path, target: Path, settings: ExportSettings, *, force: bool) -> Bundle:
    opened = open_checkpoint(checkpoint)
    plan = plan_export(opened, settings)
    if plan.recipe.calibrated:
        plan = replace(plan, settings=replace(settings, calibration_samples=2))
    return export(opened, plan, target, force=force, progress=lambda *_: None)


def export_tiny(checkpoint: Path, target: Path, *, dtype: str = "float16", force: bool = False) -> Path:
    """The folder of an unquantized bundle."""
    return exported(checkpoint, target, ExportSettings(dtype=dtype), force=force).path


def seal_again(folder: Path, **changes: Any) -> None:
    """Make a bundle whose files or manifest a test has changed one that an export might have written."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8")) | changes
    del manifest[SEAL]
    for name in manifest["files"]:
        path = folder / name
        manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest)), encoding="utf-8")
