"""From a checkpoint to a bundle.

Traces the graphs, streams the weights, copies the tokenizer and writes the manifest, all in a folder beside the target
that takes the target's name at the very end: an interrupted export leaves no half bundle. The same input gives the same
bytes.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pixtral_export.checkpoint import Checkpoint
from pixtral_export.ops import OPSET
from pixtral_export.weights import PlannedTensor, plan_weights, weight_file_bytes, write_weights
from pixtral_runtime.bundle import MANIFEST, TOKENIZER, WEIGHTS, Bundle, FileEntry, Limits
from pixtral_runtime.errors import InputError, MachineError
from pixtral_runtime.files import sha256_of_file
from pixtral_runtime.spec import ACTIVATION_DTYPES, GRAPHS

DEFAULT_CONTEXT = 16_384
TOOLS = ("torch", "onnx", "onnxscript", "onnx-ir")
GRAPH_FILE_BYTES = 2_000_000  # three graphs without weights; 0.7 MB seen for Pixtral-12B
TRACE_S = 10.0  # seen: 11 s for the three graphs of Pixtral-12B on 2 cores
COPY_BYTES_PER_S = 100e6  # seen 75 to 140: read, cast, transpose, hash and write, on 2 cores
BASE_MEMORY_BYTES = 950_000_000  # torch and onnx loaded, graphs traced; 2.27 GB seen in all for Pixtral-12B

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, steps done and steps in all."""


@dataclass(frozen=True)
class ExportSettings:
    dtype: str = "float16"
    max_context: int | None = None  # None: 16,384, or the model's own where that is less
    max_image_side: int | None = None  # None: the checkpoint's own
    opset: int = OPSET


@dataclass(frozen=True)
class ExportPlan:
    """What an export will take, known before any work."""

    settings: ExportSettings
    limits: Limits
    weights: list[PlannedTensor]
    weight_bytes: int
    bundle_bytes: int
    peak_memory_bytes: int
    seconds: float


def plan_export(checkpoint: Checkpoint, settings: ExportSettings) -> ExportPlan:
    """Check the settings against the checkpoint and estimate size, memory and time. Raises InputError."""
    config = checkpoint.config
    if settings.dtype not in ACTIVATION_DTYPES:
        raise InputError(f"no dtype '{settings.dtype}'", f"--dtype {'|'.join(ACTIVATION_DTYPES)}")
    if settings.opset != OPSET:
        raise InputError(
            f"opset {settings.opset} is not supported: the cache needs TensorScatter, which opset {OPSET} brought",
            f"--opset {OPSET}",
        )
    side = settings.max_image_side or config.vision.image_size
    if not config.vision.patch_size <= side <= config.vision.image_size:
        raise InputError(
            f"--max-image-side {side} is outside {config.vision.patch_size}..{config.vision.image_size} pixels, "
            "what the vision encoder's positions cover",
            f"--max-image-side {config.vision.image_size}",
        )
    default_context = min(DEFAULT_CONTEXT, config.decoder.max_position)
    context = settings.max_context or default_context
    if not 1 <= context <= config.decoder.max_position:
        raise InputError(
            f"--max-context {context} is outside 1..{config.decoder.max_position}, the model's positions",
            f"--max-context {default_context}",
        )
    limits = Limits(context, side)
    weights = plan_weights(config, settings.dtype, limits)
    weight_bytes = weight_file_bytes(weights)
    largest = max(item.place.nbytes for item in weights)
    return ExportPlan(
        settings,
        limits,
        weights,
        weight_bytes=weight_bytes,
        bundle_bytes=weight_bytes + GRAPH_FILE_BYTES + checkpoint.tokenizer.stat().st_size,
        peak_memory_bytes=BASE_MEMORY_BYTES + largest,
        seconds=TRACE_S + weight_bytes / COPY_BYTES_PER_S,
    )


def export(checkpoint: Checkpoint, plan: ExportPlan, target: Path, *, force: bool, progress: Progress) -> Bundle:
    """Write the bundle. Raises InputError where the target exists, MachineError where the disk is too small."""
    free = shutil.disk_usage(_existing_parent(target)).free
    if free < plan.bundle_bytes:
        raise MachineError(
            f"{target} needs {plan.bundle_bytes / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free",
            "pixtral export … -o ON_A_LARGER_DISK",
        )
    with _appears_when_whole(target, force) as folder:
        files: dict[str, FileEntry] = {}
        for done, graph in enumerate(GRAPHS):
            progress("tracing graphs", done, len(GRAPHS))
            files[f"{graph}.onnx"] = _write_graph(graph, checkpoint, plan, folder)
        progress("tracing graphs", len(GRAPHS), len(GRAPHS))

        written = 0

        def advance(count: int) -> None:
            nonlocal written
            written += count
            progress("writing weights", written, plan.weight_bytes)

        files[WEIGHTS] = write_weights(folder / WEIGHTS, plan.weights, checkpoint, plan.limits, advance)
        progress("writing weights", plan.weight_bytes, plan.weight_bytes)
        shutil.copyfile(checkpoint.tokenizer, folder / TOKENIZER)
        files[TOKENIZER] = FileEntry((folder / TOKENIZER).stat().st_size, sha256_of_file(folder / TOKENIZER))
        bundle = Bundle(
            path=folder,
            model=checkpoint.config,
            dtype=plan.settings.dtype,
            precision=plan.settings.dtype,
            limits=plan.limits,
            opset=plan.settings.opset,
            files=files,
            tools={name: importlib.metadata.version(name) for name in TOOLS},
        )
        bundle.write()
    return Bundle(**{**vars(bundle), "path": target})


def _write_graph(name: str, checkpoint: Checkpoint, plan: ExportPlan, folder: Path) -> FileEntry:
    import onnx
    import onnx_ir as ir

    from pixtral_export.graphs import build_graph

    places = {item.name: item.place for item in plan.weights}
    model = build_graph(name, checkpoint.config, plan.settings.dtype, places, WEIGHTS)
    path = folder / f"{name}.onnx"
    path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    _allocate(folder / WEIGHTS, plan.weight_bytes)
    onnx.checker.check_model(path, full_check=True)
    return FileEntry(path.stat().st_size, sha256_of_file(path))


def _allocate(path: Path, size: int) -> None:
    """Give the weight file its size before its bytes, so that the checker finds what the graphs point to."""
    with path.open("ab") as file:
        file.truncate(size)


@contextmanager
def _appears_when_whole(target: Path, force: bool) -> Iterator[Path]:
    """A folder to fill, which takes the target's name if all went well and vanishes otherwise."""
    if target.exists() and not _is_empty_folder(target):
        if not (target / MANIFEST).is_file():
            raise InputError(
                f"{target} exists and is no bundle; it will not be overwritten", "pixtral export … -o NEW_FOLDER"
            )
        if not force:
            raise InputError(f"{target} exists", "pixtral export … --force to replace it, or -o NEW_FOLDER")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror}", "pixtral export … -o NEW_FOLDER") from error
    try:
        yield partial
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and next(path.iterdir(), None) is None


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
