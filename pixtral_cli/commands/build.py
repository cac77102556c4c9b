"""`pixtral build`: TensorRT engines of a bundle, for one or several GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pixtral_cli import output
from pixtral_cli.options import BundleArgument, JsonOption, refuse_unused

EPILOG = "Example: pixtral build bundle --target rtx:sm89,rtx:sm120 --batch 4"


def build(
    called: typer.Context,
    bundle: BundleArgument,
    target: Annotated[
        str, typer.Option(help="rtx:sm75 … rtx:sm121 (no GPU needed), trt (the GPU of this machine); comma-separated.")
    ],
    context: Annotated[
        str | None,
        typer.Option(
            metavar="ROWS[,ROWS…]",
            help="Cache rows a slot: prompt and answer. Of several a job takes the fewest that suffice. "
            "Default: largest image + 512.",
        ),
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
    workspace: Annotated[
        str | None,
        typer.Option(help="What a layer may take to compute in, such as 2GB. Default: TensorRT's, and what is free."),
    ] = None,
    parts: Annotated[
        int | None,
        typer.Option(min=1, help="Engines of the decoder: more take less memory to build. Default: what memory asks."),
    ] = None,
    compat: Annotated[
        str | None, typer.Option(help="trt10.3: graphs in the form that JetPack 6's TensorRT reads.")
    ] = None,
    save_onnx: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Also write the graphs as TensorRT gets them, for trtexec: a new folder."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print profiles and sizes, build nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compile a bundle's graphs into TensorRT engines, kept beside them."""
    from pixtral_engines.targets import parse_targets
    from pixtral_runtime.bundle.manifest import open_bundle

    if all(chosen.flavor != "trt" for chosen in parse_targets(target)):
        refuse_unused(called, ("timing_cache",), f"for {target}: TensorRT-RTX measures no kernels", "--target trt")
    opened = open_bundle(bundle)
    output.require("onnx", "rtx", "Building engines")
    from pixtral_engines.build import BuildSettings, build_targets
    from pixtral_engines.build_plan import build_summary, plan_targets
    from pixtral_engines.certify import certify_engines
    from pixtral_engines.lowered_graph import save_graphs
    from pixtral_engines.profiles import Shapes

    limit = None if workspace is None else output.parse_size(workspace, "--workspace")
    settings = BuildSettings(opt_level, timing_cache, compat, limit)
    contexts = [None] if context is None else list(dict.fromkeys(_numbers(context)))
    shapes = [Shapes.of(opened, number, batch, chunk) for number in contexts]
    plans = plan_targets(opened, target, shapes, profile or (), parts)
    if save_onnx is not None:
        save_graphs(opened, save_onnx, plans[0].shapes.context, compat=compat is not None, cuts=plans[0].cuts)
    if not dry_run:
        with output.progress() as bars, output.building(bars) as stage:
            opened = build_targets(opened, plans, settings, stage)
            certify_engines(opened, [plan.target.name for plan in plans], output.talk)
    summary = build_summary(opened, plans, is_built=not dry_run)
    if as_json:
        output.print_json(summary)
        return
    output.print_pairs({name: value for name, value in summary.items() if name != "targets"})
    for built in summary["targets"]:
        rows = [
            (name, f"{size:,}", _text(built["profiles"][name.partition(".")[0]]))
            for name, size in built["engine_bytes"].items()
        ]
        output.print_table((built["target"], "bytes", "profiles"), rows)


def _numbers(context: str) -> list[int]:
    from pixtral_runtime.errors import InputError

    try:
        return [int(text) for text in context.split(",")]
    except ValueError as error:
        raise InputError(
            f"--context {context} is no number of rows", "--context 4864 or --context 1280,4864"
        ) from error


def _text(profiles: list[dict[str, tuple[int, int, int]]]) -> str:
    """`B=1,T=1..256 | B=1..4,T=1`, as `--profile` takes them."""

    def span(sizes: tuple[int, int, int]) -> str:
        smallest, usual, largest = sizes
        different = [smallest, *([usual] if usual != largest else []), largest]
        return str(largest) if smallest == largest else "..".join(map(str, different))

    return " | ".join(",".join(f"{letter}={span(sizes)}" for letter, sizes in one.items()) for one in profiles)
