"""`pixtral bench`: how fast a bundle is on this machine, against what the machine could do."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pixtral_cli import output
from pixtral_cli.bench_tables import check_bench_outputs, show
from pixtral_cli.options import (
    BackendOption,
    BundleArgument,
    DeviceOption,
    JsonOption,
    ThreadsOption,
    open_model,
    open_prompts,
    output_file,
    refuse_unused,
    refuse_unused_by_backend,
    warn_of_unused,
)

if TYPE_CHECKING:
    from pixtral_runtime.bench.cases import Case

EPILOG = "Example: pixtral bench bundle --image-side 512,1024 --decode-tokens 64 --save today.json"


def bench(
    context: typer.Context,
    bundle: BundleArgument,
    image_side: Annotated[str, typer.Option(help="Square pictures of these sides in pixels, comma-separated.")] = "512",
    images: Annotated[Path | None, typer.Option(help="Pictures of your own instead, a folder.")] = None,
    prompt_tokens: Annotated[str, typer.Option(help="Text tokens of the prompt; 0 is a short question.")] = "0",
    decode_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 32,
    batch: Annotated[str, typer.Option(help="Requests at a time, comma-separated.")] = "1",
    mode: Annotated[str, typer.Option(help="latency, throughput or serve.")] = "latency",
    request_rate: Annotated[str, typer.Option(help="Requests a second for serve, comma-separated.")] = "1",
    runs: Annotated[int, typer.Option(min=1, help="Runs that count.")] = 10,
    min_seconds: Annotated[float, typer.Option(min=0, help="Measure each case at least this long.")] = 0.0,
    warmup: Annotated[int, typer.Option(min=0, help="Runs before that do not count.")] = 2,
    save: Annotated[
        Path | None,
        typer.Option(parser=output_file, metavar="PATH", help="Write every sample and the setting to this JSON file."),
    ] = None,
    compare: Annotated[Path | None, typer.Option(help="A saved report: exit 6 where this run is slower.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="DIR", help="Write plots as SVG and PNG here.")] = None,
    html: Annotated[
        Path | None, typer.Option(parser=output_file, metavar="PATH", help="Write a page with tables and plots.")
    ] = None,
    threshold: Annotated[float, typer.Option(min=0, help="Slower by more than this many per cent is too much.")] = 5.0,
    table: Annotated[str, typer.Option("--format", help="table, md, csv or json.")] = "table",
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
    threads: ThreadsOption = 0,
    backend: BackendOption = "auto",
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure every stage against what this machine could do.

    Each figure comes with its spread and the setting it was measured in.
    """
    from pixtral_runtime.bench.cases import Effort
    from pixtral_runtime.bench.report import compare_reports, read_report, setting_changes
    from pixtral_runtime.bench.run import run_benchmark
    from pixtral_runtime.inputs.image_files import collect_images

    if images is not None:
        refuse_unused(context, ("image_side",), "with --images")
    if mode == "serve":
        refuse_unused(context, ("runs", "min_seconds", "warmup"), "with --mode serve")
    if mode != "serve":
        refuse_unused(context, ("request_rate",), f"with --mode {mode}", "--mode serve")
    if mode == "throughput":
        refuse_unused(context, ("min_seconds",), "with --mode throughput", "--runs")
    if compare is None:
        refuse_unused(context, ("threshold",), "without --compare", "--compare SAVED.json")
    if as_json and table != "json":
        refuse_unused(context, ("table",), "with --json")
    if save is None and plot is None and html is None:
        refuse_unused(context, ("force",), "without --save", "--save today.json")
    refuse_unused_by_backend(context, backend)
    cases = _cases(mode, image_side, images, prompt_tokens, decode_tokens, batch, request_rate)
    old = None if compare is None else read_report(compare)
    prompts = open_prompts(bundle, "", None, None)
    pictures = [] if images is None else collect_images([str(images)], note=output.talk)
    read = (*prompts.bundle.own_files, *pictures, *([compare] if compare else []))
    check_bench_outputs(table, save, plot, html, force=force, inputs=read)
    started = time.perf_counter()
    model = open_model(prompts, backend, threads, max(case.batch for case in cases))
    load_s = time.perf_counter() - started
    warn_of_unused(context, model.backend)
    effort = Effort(runs, min_seconds, warmup)
    with output.progress() as bars:
        report = run_benchmark(model, cases, effort, threads=threads, pictures=pictures, progress=bars.stage)
    report.load_s = load_s
    if save is not None:
        report.save(save)
    changes = [] if old is None else compare_reports(old, report, threshold / 100)
    show(report, changes, "json" if as_json else table, plot, html)
    for remark in (*report.remarks, *(setting_changes(old.setting, report.setting) if old else ())):
        output.warn(remark)
    if any(change.regressed for change in changes):
        raise typer.Exit(6)


def _cases(
    mode: str, sides: str, images: Path | None, prompts: str, decode_tokens: int, batches: str, rates: str
) -> list[Case]:
    """Every combination that was asked for. Raises InputError."""
    from pixtral_runtime.bench.cases import MODES, case_combinations
    from pixtral_runtime.errors import InputError

    if mode not in MODES:
        raise InputError(f"no mode '{mode}'", f"--mode {'|'.join(MODES)}")
    chosen: list[int] | list[None] = _numbers(sides, "--image-side", int, 1) if images is None else [None]
    speeds: list[float] | list[None] = _numbers(rates, "--request-rate", float, 1e-6) if mode == "serve" else [None]
    return case_combinations(
        mode,
        decode_tokens,
        image_sides_px=chosen,
        prompt_tokens=_numbers(prompts, "--prompt-tokens", int, 0),
        batches=_numbers(batches, "--batch", int, 1),
        rates=speeds,
    )


def _numbers(text: str, option: str, kind: Any, least: float) -> list[Any]:
    from pixtral_runtime.errors import InputError

    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(least <= number < float("inf") for number in numbers):
        raise InputError(f"{option} {text} is no list of numbers from {least:g} on", f"{option} 1,2")
    return numbers
