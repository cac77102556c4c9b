"""`pixtral build`: TensorRT engines of a bundle, for one or several GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pixtral_cli import output
from pixtral_cli.options import BundleArgument, JsonOption

if TYPE_CHECKING:
    from pixtral_runtime.bundle.manifest import Bundle

EPILOG = "Example: pixtral build bundle --target rtx:sm89,rtx:sm120 --batch 4"


def build(
    bundle: BundleArgument,
    target: Annotated[
        str, typer.Option(help="rtx:sm75 … rtx:sm121 (no GPU needed), trt (the GPU of this machine); comma-separated.")
    ],
    context: Annotated[
        int | None, typer.Option(min=1, help="Cache rows a slot: prompt and answer. Default: largest image + 512.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Requests decoded, and small images encoded, at a time.")] = 1,
    chunk: Annotated[int, typer.Option(min=1, help="Prompt tokens of a prefill step.")] = 256,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GRAPH:LETTER=SIZES,…",
            help="Sizes of vision, embed or decoder to tune for, as in 'vision:H=16..512..1024,W=512'; repeatable.",
        ),
    ] = None,
    opt_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="How long TensorRT looks for fast kernels. Default: its own.")
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            help="File that keeps kernels' times for the next build, target trt. Default: beside the engines."
        ),
    ] = None,
    compat: Annotated[
        str | None, typer.Option(help="trt10.3: graphs in the form that JetPack 6's TensorRT reads.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print profiles and sizes, build nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compile a bundle's graphs into TensorRT engines, kept beside them."""
    from pixtral_runtime.bundle.manifest import open_bundle

    summary = build_targets(
        open_bundle(bundle),
        target,
        context=context,
        batch=batch,
        chunk=chunk,
        profiles=profile or (),
        opt_level=opt_level,
        timing_cache=timing_cache,
        compat=compat,
        dry_run=dry_run,
    )
    if as_json:
        output.print_json(summary)
        return
    output.print_pairs({name: value for name, value in summary.items() if name != "targets"})
    for built in summary["targets"]:
        rows = [(graph, f"{size:,}", _text(built["profiles"][graph])) for graph, size in built["engine_bytes"].items()]
        output.print_table((built["target"], "bytes", "profiles"), rows)


def build_targets(
    bundle: Bundle,
    target: str,
    *,
    context: int | None = None,
    batch: int = 1,
    chunk: int = 256,
    profiles: Sequence[str] = (),
    opt_level: int | None = None,
    timing_cache: Path | None = None,
    compat: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Build for each target in turn. Returns what was built, or would be."""
    output.require("onnx", "rtx", "Building engines")
    from pixtral_engines.build import BuildSettings, plan_build
    from pixtral_engines.build import build as build_engines
    from pixtral_engines.lowering_trt10_3 import COMPAT
    from pixtral_engines.profiles import Shapes
    from pixtral_engines.targets import parse_targets
    from pixtral_runtime.errors import InputError

    if compat not in (None, COMPAT):
        raise InputError(f"no form of the graphs for '{compat}'", f"--compat {COMPAT}")
    shapes = Shapes.of(bundle, context, batch, chunk)
    plans = [plan_build(bundle, chosen, shapes, profiles) for chosen in parse_targets(target)]
    summary: dict[str, Any] = {
        "bundle": str(bundle.path),
        "precision": bundle.precision,
        "context": shapes.context,
        "batch": shapes.batch,
        "chunk": shapes.chunk,
        "peak_memory_bytes": max(plan.peak_memory_bytes for plan in plans),
        "built": not dry_run,
        "targets": [],
    }
    for plan in plans:
        sizes = dict(plan.engine_bytes)
        if not dry_run:
            with output.progress() as bars:
                bundle = build_engines(bundle, plan, BuildSettings(opt_level, timing_cache, compat), bars.stage)
            sizes = {graph: entry["bytes"] for graph, entry in bundle.engines[plan.target.name]["graphs"].items()}
        summary["targets"].append(
            {
                "target": plan.target.name,
                "engine_bytes": sizes,
                "profiles": {g: list(p) for g, p in plan.profiles.items()},
            }
        )
    return summary


def _text(profiles: list[dict[str, tuple[int, int, int]]]) -> str:
    """`B=1,T=1..256 | B=1..4,T=1`, as `--profile` takes them."""

    def span(sizes: tuple[int, int, int]) -> str:
        smallest, usual, largest = sizes
        different = [smallest, *([usual] if usual != largest else []), largest]
        return str(largest) if smallest == largest else "..".join(map(str, different))

    return " | ".join(",".join(f"{letter}={span(sizes)}" for letter, sizes in one.items()) for one in profiles)
