"""The bundles that `pixtral tune` compares: those it is given, and those it exports of checkpoints on the way.

Everything that can be judged is judged before the first export: words, disk, what runs here and on the named device,
and whether a bundle that is there already is the one that would be made. Beside each bundle lies a note, `NAME.json`,
of what it was made from: a bundle itself does not say.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pixtral_cli import output
from pixtral_cli.export_run import run_export
from pixtral_cli.options import refuse_unused
from pixtral_cli.tune_grid import ExportWishes, refuse_what_cannot_run

if TYPE_CHECKING:
    from pixtral_export.checkpoint.reader import Checkpoint
    from pixtral_export.plan import ExportPlan
    from pixtral_runtime.bundle.device_catalog import KnownDevice
    from pixtral_runtime.bundle.manifest import Bundle
    from pixtral_runtime.evaluation.task import Example

FOLDER = "bundles"  # within the folder of --output
FOR_SAMPLES = ("calibration", "calibration_samples")
FOR_EXPORTS = ("precision", "kv_cache", "max_context", *FOR_SAMPLES)
DIFFERENCES = {"checkpoint": "another checkpoint", "settings": "other settings", "samples": "other calibration samples"}


@dataclass(frozen=True)
class TuneExport:
    """A bundle to export, or one that is there already."""

    source: str
    checkpoint: Checkpoint
    plan: ExportPlan
    target: Path

    def run(self, force: bool) -> None:
        """Write the bundle, and its note right before it takes its place."""
        from pixtral_export.checkpoint.hub import fetch_weights
        from pixtral_export.origin import origin_of
        from pixtral_runtime.files import write_text_atomically

        checkpoint = fetch_weights(self.source, self.checkpoint)
        origin = origin_of(self.source, checkpoint, self.plan)

        def write_note(bundle: Bundle) -> None:
            note = {"fingerprint": bundle.fingerprint, **origin}
            write_text_atomically(self._note, f"{json.dumps(note, indent=2)}\n")

        run_export(checkpoint, self.plan, self.target, force=force, made=write_note)

    def is_made(self, resume: bool, force: bool) -> bool:
        """Whether the bundle is there, and may be taken. Raises InputError where it is in the way."""
        from pixtral_export.target_folder import check_target
        from pixtral_runtime.errors import InputError, Option

        if force or not is_bundle(self.target):
            check_target(self.target, force)
            return False
        elsewhere = Option("output", "ANOTHER_FOLDER")
        if not resume:
            go_on = Option("resume", note="to go on with it")
            raise InputError(f"{self.target} exists", go_on, Option("force", note="to replace it"), elsewhere)
        if difference := self._difference():
            raise InputError(f"{self.target} {difference}", elsewhere, "--force in the place of --resume replaces it")
        return True

    def _difference(self) -> str:
        """Of the bundle that is there to the one that would be made; nothing where they are the same."""
        from pixtral_export.origin import origin_of
        from pixtral_runtime.bundle.manifest import open_bundle

        note = _read_object(self._note)
        if note.get("fingerprint") != open_bundle(self.target).fingerprint:
            return "was not exported by tune: nothing says of which weights it is"
        wanted = origin_of(self.source, self.checkpoint, self.plan)
        others = [word for key, word in DIFFERENCES.items() if note.get(key) != wanted[key]]
        return f"was made from {' and '.join(others)}" if others else ""

    @property
    def _note(self) -> Path:
        return self.target.with_name(f"{self.target.name}.json")


@dataclass(frozen=True)
class TuneSources:
    """What `tune` compares, in the order of its settings, and what of that is to be exported first."""

    members: Sequence[Path | TuneExport]
    missing: Sequence[TuneExport] = ()

    def bundles(self, force: bool, examples: Sequence[Example]) -> list[Path]:
        """The folders of all bundles, to answer these examples. Exports what is missing, which may take hours."""
        _warn_of_shared_pictures(self.missing, examples)
        for number, one in enumerate(self.missing, 1):
            output.talk(f"exporting {one.target} ({number} of {len(self.missing)})")
            try:
                one.run(force)
            except KeyboardInterrupt as error:
                done = f"{number - 1} of {len(self.missing)} bundles were exported; --resume goes on with the next"
                raise KeyboardInterrupt(done) from error
        return [one.target if isinstance(one, TuneExport) else one for one in self.members]


def is_bundle(folder: str | Path) -> bool:
    """Whether a bundle is there, or one that only has to be moved to its place."""
    from pixtral_runtime.bundle.manifest import MANIFEST, PARTIAL

    return any(os.path.isfile(Path(folder, place, MANIFEST)) for place in ("", PARTIAL))


def plan_sources(
    called: typer.Context,
    sources: Sequence[str],
    wishes: ExportWishes,
    folder: Path | None,
    *,
    resume: bool,
    force: bool,
    backend: str,
    device: KnownDevice | None,
    batch: int,
) -> TuneSources:
    """Open bundles and checkpoints, and judge every export before the first. Raises InputError and MachineError.

    `batch` is the least number of requests that the device is to answer at a time.
    """
    from pixtral_runtime.bundle.manifest import open_bundle
    from pixtral_runtime.errors import InputError

    sources = list(dict.fromkeys(sources))
    checkpoints = [source for source in sources if not is_bundle(source)]
    if not checkpoints:
        refuse_unused(called, FOR_EXPORTS, "without a checkpoint to export", "pixtral tune CHECKPOINT")
    elif folder is None:
        raise InputError(
            f"{checkpoints[0]} is no bundle, and those of a checkpoint need a folder to be kept in", "--output tuning/"
        )
    for source in sources:
        if source not in checkpoints:
            open_bundle(Path(source))
    if folder is None or not checkpoints:
        return TuneSources([Path(source) for source in sources])
    exports = _plan_exports(checkpoints, wishes, folder / FOLDER)
    every = [one for some in exports.values() for one in some]
    refuse_what_cannot_run([(one.checkpoint, one.plan) for one in every], backend, device, batch)
    if not any(one.plan.recipe.calibrated for one in every):
        refuse_unused(called, FOR_SAMPLES, "where nothing is calibrated", "--precision int4")
    missing = [one for one in every if not one.is_made(resume, force)]
    _check_room(missing, wishes, folder / FOLDER)
    members = [exports.get(source, [Path(source)]) for source in sources]
    return TuneSources([one for some in members for one in some], missing)


def _plan_exports(checkpoints: Sequence[str], wishes: ExportWishes, folder: Path) -> dict[str, list[TuneExport]]:
    """By checkpoint. With several their names stand before those of the bundles."""
    from pixtral_export.checkpoint.hub import open_source
    from pixtral_runtime.errors import InputError

    output.require("torch", "export", "Exporting")
    names = [os.path.basename(os.path.realpath(source)) for source in checkpoints]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"two checkpoints are called {twice}, and so would be their bundles", "one of them at a time")
    exports: dict[str, list[TuneExport]] = {}
    grid = wishes.grid()
    for source, name in zip(checkpoints, names, strict=True):
        checkpoint = open_source(source)
        for warning in checkpoint.warnings:
            output.warn(warning)
        prefix = f"{name}-" if len(names) > 1 else ""
        exports[source] = [
            TuneExport(source, checkpoint, wishes.plan(checkpoint, settings), folder / f"{prefix}{kind}")
            for kind, settings in grid.items()
        ]
    return exports


def _check_room(missing: Sequence[TuneExport], wishes: ExportWishes, folder: Path) -> None:
    """What can be known of the exports before the weights are here. Raises InputError and MachineError."""
    from pixtral_export.quantization.samples import calibration_requests
    from pixtral_export.target_folder import check_space

    check_space(folder, sum(one.plan.bundle_bytes for one in missing))
    if wishes.calibration is not None:
        calibration_requests(wishes.calibration)


def _warn_of_shared_pictures(missing: Sequence[TuneExport], examples: Sequence[Example]) -> None:
    from pixtral_export.quantization.samples import calibration_requests

    asked = {os.path.realpath(path) for example in examples for path in example.images}
    sources = {one.plan.settings.calibration for one in missing}
    for source in (source for source in sources if source is not None):
        seen = {os.path.realpath(path) for request in calibration_requests(source) for path in request.images}
        if shared := len(asked & seen):
            output.warn(
                f"{shared} of the pictures to calibrate with are asked about as well: the scores of what is calibrated "
                "may be too good; calibrate with others"
            )


def _read_object(path: Path) -> dict[str, Any]:
    """What a file of JSON says; nothing where there is none that can be read."""
    try:
        read = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}
