"""`pixtral export`: a checkpoint becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pixtral_cli import output
from pixtral_cli.export_run import run_export
from pixtral_cli.options import (
    CalibrationOption,
    CalibrationSamplesOption,
    GroupSizeOption,
    KeepActivationsOption,
    LoraOption,
    MaxContextOption,
    MethodOption,
)

if TYPE_CHECKING:
    from pixtral_runtime.bundle.manifest import Bundle

EPILOG = "Example: pixtral export mistralai/Pixtral-12B-2409 -o pixtral-12b --dtype float16"


def export(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder (Mistral or Hugging Face format) or a hub id.")],
    bundle: Annotated[Path, typer.Option("-o", "--output", help="Folder to write the bundle to.")],
    lora: LoraOption = None,
    dtype: Annotated[str, typer.Option(help="Weights and activations: float32, float16 or bfloat16.")] = "float16",
    max_context: MaxContextOption = None,
    max_image_side: Annotated[
        int | None, typer.Option(help="Longest image edge in pixels. Default: the model's own.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Quantize: int4, int8, fp8 or nvfp4. Default: weights in --dtype.")
    ] = None,
    group_size: GroupSizeOption = None,
    method: MethodOption = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN=DTYPE", help="Store layers otherwise, as in 'layers.0.*=float16'; repeatable."),
    ] = None,
    kv_cache: Annotated[
        str | None, typer.Option(help="Keep keys and values in int8: half the cache. Default: in --dtype.")
    ] = None,
    calibration: CalibrationOption = None,
    calibration_samples: CalibrationSamplesOption = None,
    keep_activations: KeepActivationsOption = False,
    opset: Annotated[int, typer.Option(help="ONNX opset of the graphs.")] = 24,
    build: Annotated[
        str | None, typer.Option(metavar="TARGET", help="Build engines as well, as 'pixtral build --target' does.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    certificate: Annotated[
        bool, typer.Option(help="Run the bundle once, for 'pixtral verify' to compare with elsewhere.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print sizes and estimates, write and build nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Turn a checkpoint into a bundle: portable ONNX graphs and weights."""
    output.require("torch", "export", "Exporting")
    from pixtral_export.checkpoint.hub import fetch_weights, open_source
    from pixtral_export.export import check_before_download
    from pixtral_export.plan import ExportPlan, ExportSettings, plan_export
    from pixtral_export.target_folder import check_target
    from pixtral_runtime.bundle.certificate import has_certificate

    settings = ExportSettings(
        dtype, max_context, max_image_side, opset, precision, group_size, method, tuple(keep or ()), kv_cache,
        calibration, calibration_samples,
    )  # fmt: skip
    if build is not None:  # a wrong name is found before the hours of work, not after
        from pixtral_engines.targets import parse_targets

        parse_targets(build)
        output.require("onnx", "rtx", "Building engines")
    if not dry_run:
        check_target(bundle, force)
    opened = open_source(checkpoint, keep_activations=keep_activations, lora=lora)
    for warning in opened.warnings:
        output.warn(warning)
    plan: ExportPlan = plan_export(opened, settings)
    summary: dict[str, Any] = {
        "checkpoint": str(opened.path),
        "format": opened.format,
        "lora": opened.lora and str(opened.lora.id),
        "bundle": str(bundle),
        "dtype": dtype,
        "precision": plan.recipe.name,
        "method": plan.recipe.decoder and plan.recipe.method,
        "kv_cache": plan.recipe.kv_cache or dtype,
        "max_context": plan.limits.max_context,
        "max_image_side": plan.limits.max_image_side,
        "bundle_bytes": plan.bundle_bytes,
    }
    if dry_run:
        summary |= {"peak_memory_bytes": plan.peak_memory_bytes, "seconds": round(plan.seconds, 1)}
    else:
        check_before_download(plan, bundle)
        opened = fetch_weights(checkpoint, opened)
        written = run_export(opened, plan, bundle, force=force, certificate=certificate)
        summary |= {
            "bundle_bytes": sum(entry.bytes for entry in written.files.values()),
            "fingerprint": written.fingerprint,
            "certificate": has_certificate(written),
        }
        if build is not None:
            summary["engines"] = _build(written, build)
    if as_json:
        output.print_json(summary)
    else:
        output.print_pairs(summary)


def _build(bundle: Bundle, targets: str) -> list[dict[str, Any]]:
    """Engines as `pixtral build --target` makes them by default."""
    from pixtral_engines.build import BuildSettings, build_targets
    from pixtral_engines.build_plan import build_summary, plan_targets
    from pixtral_engines.certify import certify_engines
    from pixtral_engines.profiles import Shapes

    plans = plan_targets(bundle, targets, [Shapes.of(bundle)])
    with output.progress() as bars, output.building(bars) as stage:
        built = build_targets(bundle, plans, BuildSettings(), stage)
        certify_engines(built, [plan.target.name for plan in plans], output.talk)
    summary: list[dict[str, Any]] = build_summary(built, plans, is_built=True)["targets"]
    return summary
