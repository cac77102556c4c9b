"""What a bundle is made from, as hashes: whether one that is there is the one that an export would make again.

A bundle's manifest has no word of it, so that the same weights give the same bytes wherever they lay.
"""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path

from pixtral_export.checkpoint.reader import Checkpoint
from pixtral_export.plan import ExportPlan
from pixtral_export.quantization.samples import DEFAULT_SAMPLES, calibration_requests
from pixtral_runtime.errors import CheckpointError
from pixtral_runtime.files import sha256_of_file

PACKAGED = "packaged"


def origin_of(source: str, checkpoint: Checkpoint, plan: ExportPlan) -> dict[str, str]:
    """Hashes of the `checkpoint` that `source` names, of the `settings` and of the `samples` to calibrate with.

    Reads all of a local folder's weight files; a hub's are known by their commit. Raises CheckpointError, and
    InputError for samples that cannot be read.
    """
    settings = plan.settings
    samples: object = None
    if plan.recipe.calibrated:
        samples = _samples(settings.calibration), settings.calibration_samples or DEFAULT_SAMPLES
    return {
        "checkpoint": _digest((_weights(source, checkpoint), checkpoint.config, _sha256(checkpoint.tokenizer))),
        "settings": _digest((settings.dtype, settings.opset, plan.limits, plan.recipe, plan.weights, plan.sampling)),
        "samples": _digest(samples),
    }


def _weights(source: str, checkpoint: Checkpoint) -> object:
    if not os.path.exists(os.path.expanduser(source)):
        return source, checkpoint.path.name  # of a hub's snapshot that is the commit
    return [(file.name, _sha256(file)) for file in sorted(checkpoint.files)], checkpoint.lora and checkpoint.lora.id


def _samples(source: Path | None) -> object:
    """Prompts, and which pictures they go with."""
    if source is None:
        return PACKAGED
    return [(request.prompt, [_version(image) for image in request.images]) for request in calibration_requests(source)]


def _version(path: Path) -> object:
    """Of a picture; one that is not there is for the calibration to complain of."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return os.path.realpath(path), status.st_size, status.st_mtime_ns


def _sha256(path: Path) -> str:
    try:
        status = path.stat()
        return _hashed(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", f"ls -l {path}") from error


@cache
def _hashed(path: Path, size: int, written_ns: int) -> str:
    """Once for all bundles of a checkpoint: size and time are for a file that was written meanwhile."""
    return sha256_of_file(path)


def _digest(what: object) -> str:
    return hashlib.sha256(repr(what).encode("utf-8", "surrogateescape")).hexdigest()
