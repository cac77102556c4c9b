"""From a checkpoint and a plan to a bundle.

Streams the weights, quantized as the recipe says, traces the graphs, copies the tokenizer and writes the manifest, all
in a folder within the target whose files move up at the very end: an interrupted export leaves no half bundle. An
interrupted calibration leaves that folder, and the same command goes on from there. The same input gives the same
bytes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pixtral_export.checkpoint.reader import Checkpoint
from pixtral_export.model.parameters import parameters
from pixtral_export.plan import ExportPlan
from pixtral_export.quantization.recipes import Recipe
from pixtral_export.quantization.samples import (
    DEFAULT_SAMPLES,
    MOST_IMAGE_TOKENS,
    build_samples,
    calibration_requests,
    packaged_pictures,
    packaged_requests,
    samples_fingerprint,
)
from pixtral_export.target_folder import check_space, filling
from pixtral_export.weights.layerwise import JOURNAL, SCRATCH, Journal, LayerwisePass
from pixtral_runtime.bundle.config import ModelConfig
from pixtral_runtime.bundle.manifest import SENTENCEPIECE, TOKENIZER, WEIGHTS, Bundle, FileEntry
from pixtral_runtime.bundle.spec import GRAPHS
from pixtral_runtime.files import sha256_of_file
from pixtral_runtime.inputs.preprocess import default_preprocess
from pixtral_runtime.inputs.prompt import Prompt, PromptBuilder

TOOLS = ("torch", "onnx", "onnxscript", "onnx-ir")


Progress = Callable[[str, int, int], None]
"""Called with the stage's name, steps done and steps in all."""


def export(
    checkpoint: Checkpoint,
    plan: ExportPlan,
    target: Path,
    *,
    force: bool,
    progress: Progress,
    warn: Callable[[str], None] = lambda _: None,
    certify: Callable[[Bundle], None] = lambda _: None,
) -> Bundle:
    """Write the bundle; `certify` may add to its folder before that takes its place.

    Raises InputError where the target exists, MachineError where the disk is too small.
    """
    check_before_download(plan, target)
    recipe = plan.recipe

    def is_resumable(partial: Path) -> bool:
        return recipe.calibrated and (partial / SCRATCH / JOURNAL).is_file()

    with filling(target, force, is_resumable) as folder:
        tokenizer = folder / (TOKENIZER if checkpoint.tokenizer.suffix == ".json" else SENTENCEPIECE)
        shutil.copyfile(checkpoint.tokenizer, tokenizer)
        listed = {tokenizer.name: FileEntry(tokenizer.stat().st_size, sha256_of_file(tokenizer))}
        unfinished = Bundle(
            path=folder,
            model=checkpoint.config,
            dtype=plan.settings.dtype,
            precision=recipe.name,
            limits=plan.limits,
            opset=plan.settings.opset,
            files=listed,
            kv_cache=recipe.kv_cache,
            lora=checkpoint.lora.id if checkpoint.lora else None,
            tools={name: importlib.metadata.version(name) for name in TOOLS},
            sampling=plan.sampling,
        )
        fitted = recipe.fitted_groups(parameters(checkpoint.config))
        if fitted:
            found = ", ".join(f"{size} in {layer}" for layer, size in fitted.items())
            warn(f"groups are smaller where the inputs are no multiple of the recipe's own: {found}")
        samples, notes = _samples(unfinished, plan, warn) if recipe.calibrated else ([], {})
        written = 0

        def advance(count: int) -> None:
            nonlocal written
            written += count
            progress("writing weights", written, plan.weight_bytes)

        key = _key(checkpoint, plan, notes)
        walk = LayerwisePass(checkpoint, recipe, plan.settings.dtype, plan.limits, samples, folder, key)
        stage = "calibrating" if samples else "reading layers"
        weights, journal = walk.run(advance, lambda done, total: progress(stage, done, total))
        progress("writing weights", weights.bytes, weights.bytes)
        if journal.rounded:
            warn(f"rounded, because GPTQ did worse on samples held out: {', '.join(journal.rounded)}")
        files: dict[str, FileEntry] = {}
        for done, graph in enumerate(GRAPHS):
            progress("tracing graphs", done, len(GRAPHS))
            files[f"{graph}.onnx"] = _write_graph(graph, checkpoint, plan, journal, folder)
        progress("tracing graphs", len(GRAPHS), len(GRAPHS))
        files[WEIGHTS] = weights
        files |= listed
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)
        bundle = replace(unfinished, files=files, quantization=_quantization(plan, journal, notes, fitted))
        bundle.write()
        certify(bundle)
    return replace(bundle, path=target)


def check_before_download(plan: ExportPlan, target: Path) -> None:
    """What can be known before the weights are here: does the disk hold the bundle, can the samples be read?

    Raises InputError and MachineError.
    """
    check_space(target, plan.bundle_bytes)
    if plan.settings.calibration is not None:
        calibration_requests(plan.settings.calibration)


def _samples(bundle: Bundle, plan: ExportPlan, warn: Callable[[str], None]) -> tuple[list[Prompt], dict[str, object]]:
    """The calibration samples, and what the manifest says of them."""
    source, count = plan.settings.calibration, plan.settings.calibration_samples
    count = DEFAULT_SAMPLES if count is None else count
    if source is None:
        warn("calibrating with the packaged samples; a calibration folder of your own images fits better")
    requests = packaged_requests() if source is None else calibration_requests(source)
    preprocess = default_preprocess(bundle, image_tokens=MOST_IMAGE_TOKENS)
    whole = replace(bundle, limits=replace(bundle.limits, max_context=bundle.model.decoder.max_position))
    prompts = PromptBuilder(whole, preprocess)
    samples, refused = build_samples(requests, prompts, count)
    for reason in refused:
        warn(f"left out of the calibration: {reason}")
    if _sees_pictures(plan.recipe, bundle.model) and not any(sample.images for sample in samples):
        warn("the calibration samples hold no image; the packaged pictures are added for the vision tower")
        samples += build_samples(packaged_pictures(), prompts, count)[0]
    tokens = sum(len(sample.token_ids) for sample in samples)
    return samples, {
        "calibration": "packaged" if source is None else "own",
        "samples": len(samples),
        "sample_tokens": tokens,
        "samples_fingerprint": samples_fingerprint(samples),
    }


def _sees_pictures(recipe: Recipe, config: ModelConfig) -> bool:
    """Whether samples decide how weights of the vision tower or its adapter are stored."""
    vision = (parameter for parameter in parameters(config) if parameter.name.startswith("vision_"))
    return any(recipe.needs_samples(recipe.scheme(parameter)) for parameter in vision)


def _quantization(
    plan: ExportPlan, journal: Journal, notes: dict[str, object], fitted: dict[str, int]
) -> dict[str, object]:
    """What the manifest says of the recipe; nothing where there was none."""
    recipe = plan.recipe
    if recipe.name == plan.settings.dtype and recipe.kv_cache is None and not recipe.keep:
        return {}
    scheme = recipe.decoder
    return {
        "group_size": scheme.group if scheme else None,
        "fitted_groups": fitted,
        "method": recipe.method,
        "keep": list(plan.settings.keep),
        "cache_scales": journal.cache_scales,
        "unquantized_inputs": journal.fallbacks,
        "rounded_layers": journal.rounded,
        "zero_points": True,  # of int8 weights that products of int8 do not read; see GraphBuilder
        **notes,
    }


def _key(checkpoint: Checkpoint, plan: ExportPlan, notes: dict[str, object]) -> str:
    """Stands for all that decides the weight file, so that an interrupted export is not continued as another one."""
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.files]
    decides = repr((str(checkpoint.path), files, checkpoint.lora, plan.recipe, plan.weights, notes))
    return hashlib.sha256(decides.encode()).hexdigest()


def _write_graph(name: str, checkpoint: Checkpoint, plan: ExportPlan, journal: Journal, folder: Path) -> FileEntry:
    import onnx
    import onnx_ir as ir

    from pixtral_export.graphs.assemble import build_graph

    places = {place.name: place for place in journal.places}
    model = build_graph(
        name, checkpoint.config, plan.settings.dtype, plan.recipe.kv_cache, places, journal.input_scales, WEIGHTS
    )
    path = folder / f"{name}.onnx"
    path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    onnx.checker.check_model(path, full_check=True)
    return FileEntry(path.stat().st_size, sha256_of_file(path))
