"""`pixtral plan`: what an export takes and where its result fits, before any work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pixtral_cli import output
from pixtral_cli.device_rows import device_rows, print_device_rows
from pixtral_cli.options import (
    GroupSizeOption,
    JsonOption,
    KeepActivationsOption,
    LoraOption,
    MethodOption,
    refuse_unused,
)
from pixtral_cli.recipe_costs import cost_lines, recipe_costs

if TYPE_CHECKING:
    from pixtral_runtime.bundle.footprint import Footprint

    Planned = tuple[Footprint, dict[str, Any], dict[str, Any] | None]
    """What a bundle takes on devices, the summary, and what its recipe costs; None where there is none."""

EPILOG = "Example: pixtral plan mistralai/Pixtral-12B-2409 --precision int4 --device orin-nx-16"
UNUSED = ("dtype", "group_size", "method", "keep_activations", "lora")  # of a bundle, which has them already


def plan(
    called: typer.Context,
    source: Annotated[str, typer.Argument(metavar="CHECKPOINT|BUNDLE", help="Checkpoint folder, hub id or bundle.")],
    precision: Annotated[
        str | None, typer.Option(help="int4, int8, fp8 or nvfp4, as in export. Default: weights in --dtype.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Weights and activations, as in export.")] = "float16",
    group_size: GroupSizeOption = None,
    method: MethodOption = None,
    kv_cache: Annotated[str | None, typer.Option(help="int8, as in export. Default: in --dtype.")] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of prompt and answer. Default: the bundle's, or export's.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Requests answered at the same time.")] = 1,
    keep_activations: KeepActivationsOption = False,
    lora: LoraOption = None,
    device: Annotated[
        list[str] | None, typer.Option(help="A device's name, or cpu for this machine; repeatable. Default: all.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what an export takes and costs in quality, and where it fits."""
    from pixtral_runtime.bundle.manifest import MANIFEST

    if os.path.isfile(Path(source, MANIFEST)):  # False, too, for a name that no file can have
        refuse_unused(called, UNUSED, "for a bundle", "pixtral plan CHECKPOINT")
        footprint, summary, costs = _of_bundle(Path(source), precision, kv_cache)
    else:
        footprint, summary, costs = _of_checkpoint(
            source, precision, dtype, group_size, method, kv_cache, context, keep_activations, lora
        )
    tokens = context or footprint.limits.max_context
    summary |= {
        "engine_bytes": footprint.loaded_bytes(),
        "kv_cache_bytes_per_token": footprint.cache_bytes_per_token,
        "context": tokens,
        "batch": batch,
    }
    rows = device_rows(footprint, device, tokens, batch)
    if as_json:
        output.print_json(summary | {"costs": costs, "devices": rows})
        return
    output.print_pairs(summary | (cost_lines(costs) if costs else {}))
    print_device_rows(rows)


def _of_bundle(path: Path, precision: str | None, kv_cache: str | None) -> Planned:
    from pixtral_runtime.bundle.footprint import Footprint
    from pixtral_runtime.bundle.manifest import open_bundle
    from pixtral_runtime.bundle.recipe_costs import bundle_key
    from pixtral_runtime.errors import InputError

    bundle = open_bundle(path)
    if precision not in (None, bundle.precision) or kv_cache not in (None, bundle.cache_dtype):
        raise InputError(
            f"{path} is {bundle.precision} with a cache in {bundle.cache_dtype}; others are made from the checkpoint",
            f"pixtral plan CHECKPOINT --precision {precision or bundle.precision}",
        )
    key = bundle_key(bundle.precision, bundle.kv_cache, bundle.quantization)
    summary = {
        "bundle": str(path),
        "lora": bundle.lora and str(bundle.lora),
        "precision": bundle.precision,
        "bundle_bytes": sum(entry.bytes for entry in bundle.files.values()),
    }
    return Footprint.of(bundle), summary, recipe_costs(key, bundle.dtype, bundle.quantization.get("keep") or ())


def _of_checkpoint(
    source: str,
    precision: str | None,
    dtype: str,
    group_size: int | None,
    method: str | None,
    kv_cache: str | None,
    context: int | None,
    keep_activations: bool,
    lora: Path | None,
) -> Planned:
    output.require("torch", "export", "Planning an export")
    from pixtral_export.checkpoint.hub import open_source
    from pixtral_export.plan import ExportSettings, plan_export, plan_footprint
    from pixtral_runtime.bundle.recipe_costs import RecipeKey

    checkpoint = open_source(source, keep_activations=keep_activations, lora=lora)
    settings = ExportSettings(
        dtype, context, precision=precision, kv_cache=kv_cache, group_size=group_size, method=method
    )
    chosen = plan_export(checkpoint, settings)
    recipe = chosen.recipe
    group_size = recipe.decoder.group if recipe.decoder else None
    key = RecipeKey(recipe.name, recipe.method, group_size, recipe.kv_cache)
    summary = {
        "checkpoint": str(checkpoint.path),
        "lora": checkpoint.lora and str(checkpoint.lora.id),
        "precision": recipe.name,
        "method": recipe.decoder and recipe.method,
        "checkpoint_bytes": checkpoint.total_bytes,
        "bundle_bytes": chosen.bundle_bytes,
        "export_memory_bytes": chosen.peak_memory_bytes,
        "export_seconds": round(chosen.seconds),
    }
    return plan_footprint(checkpoint, chosen), summary, recipe_costs(key, dtype)
