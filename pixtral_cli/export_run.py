"""An export with its progress on the terminal, for the commands that make bundles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pixtral_cli import output

if TYPE_CHECKING:
    from pixtral_export.checkpoint.reader import Checkpoint
    from pixtral_export.plan import ExportPlan
    from pixtral_runtime.bundle.manifest import Bundle


def run_export(
    checkpoint: Checkpoint,
    plan: ExportPlan,
    target: Path,
    *,
    force: bool,
    certificate: bool = True,
    made: Callable[[Bundle], None] = lambda _: None,
) -> Bundle:
    """Write a bundle, and its certificate. `made` is told of it once it is whole, before it takes its place."""
    from pixtral_export.certify import certify_export
    from pixtral_export.export import export

    with output.progress() as bars:

        def finish(bundle: Bundle) -> None:
            made(bundle)
            if certificate:
                bars.stage("certifying", 0, 1)
                certify_export(bundle, checkpoint, output.warn)
                bars.stage("certifying", 1, 1)

        return export(checkpoint, plan, target, force=force, progress=bars.stage, warn=output.warn, certify=finish)
