"""`pixtral bench`: how fast a bundle is, against what this machine could do, or how fast a server."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pixtral_cli import output
from pixtral_cli.bench_cases import check_bench_options, read_cases
from pixtral_cli.bench_tables import check_bench_outputs, show
from pixtral_cli.options import (
    BackendOption,
    DeviceOption,
    JsonOption,
    ThreadsOption,
    open_model,
    open_prompts,
    output_file,
    refuse_unused,
    warn_of_unused,
)

if TYPE_CHECKING:
    from pixtral_runtime.bench.cases import Case, Effort
    from pixtral_runtime.bench.report import Report
    from pixtral_runtime.inputs.prompt import PromptBuilder

EPILOG = "Example: pixtral bench bundle --image-side 512,1024 --decode-tokens 64 --save today.json"


def bench(
    context: typer.Context,
    bundle: Annotated[Path | None, typer.Argument(help="Bundle folder; none with --url.")] = None,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="A running server of OpenAI's chat API instead of a bundle.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="With --url: the model to ask. Default: its only one.")] = None,
    image_side: Annotated[str, typer.Option(help="Square pictures of these sides in pixels, comma-separated.")] = "512",
    images: Annotated[Path | None, typer.Option(help="Pictures of your own instead, a folder.")] = None,
    prompt_tokens: Annotated[str, typer.Option(help="Text tokens of the prompt; 0 is a short question.")] = "0",
    decode_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 32,
    batch: Annotated[str, typer.Option(help="Requests at a time, comma-separated.")] = "1",
    mode: Annotated[str, typer.Option(help="latency, throughput or serve.")] = "latency",
    request_rate: Annotated[str, typer.Option(help="Requests a second for serve, comma-separated.")] = "1",
    seed: Annotated[int, typer.Option(min=0, help="With --url: other pictures, new to its cache.")] = 0,
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

    Each figure comes with its spread and the setting it was measured in. With --url a server is measured, whoever's it
    is: latency asks one request at a time, throughput --batch at a time, serve as many as come.
    """
    from pixtral_runtime.bench.cases import Effort
    from pixtral_runtime.bench.report import compare_reports, read_report, setting_changes
    from pixtral_runtime.inputs.image_files import collect_images

    named = {"compare": compare, "save": save, "plot": plot, "html": html, "images": images}
    if as_json and table != "json":
        refuse_unused(context, ("table",), "with --json")
    check_bench_options(context, bundle, url, mode, backend, {name for name, path in named.items() if path is not None})
    cases = read_cases(
        mode, image_side, prompt_tokens, decode_tokens, batch, request_rate,
        own_pictures=images is not None, of_a_server=url is not None,
    )  # fmt: skip
    old = None if compare is None else read_report(compare)
    prompts = None if bundle is None else open_prompts(bundle, "", None, None)
    pictures = [] if images is None else collect_images([str(images)], note=output.talk)
    own = () if prompts is None else prompts.bundle.own_files
    read = (*own, *pictures, *([compare] if compare else []))
    check_bench_outputs(table, save, plot, html, force=force, inputs=read)
    effort = Effort(runs, min_seconds, warmup)
    if prompts is None:
        report = measure_server(url or "", model, cases, effort, pictures, seed)
    else:
        report = measure_bundle(context, prompts, cases, effort, pictures, backend, threads)
    if save is not None:
        report.save(save)
    changes = [] if old is None else compare_reports(old, report, threshold / 100)
    show(report, changes, "json" if as_json else table, plot, html)
    for remark in (*report.remarks, *(setting_changes(old.setting, report.setting) if old else ())):
        output.warn(remark)
    if any(change.regressed for change in changes):
        raise typer.Exit(6)
    if any(result.server.get("failed") for result in report.results):
        raise typer.Exit(5)


def measure_bundle(
    context: typer.Context,
    prompts: PromptBuilder,
    cases: list[Case],
    effort: Effort,
    pictures: list[Path],
    backend: str,
    threads: int,
) -> Report:
    """Load a bundle and measure it."""
    from pixtral_runtime.bench.run import run_benchmark

    started = time.perf_counter()
    model = open_model(prompts, backend, threads, max(case.batch for case in cases))
    load_s = time.perf_counter() - started
    warn_of_unused(context, model.backend)
    with output.progress() as bars:
        report = run_benchmark(model, cases, effort, threads=threads, pictures=pictures, progress=bars.stage)
    report.load_s = load_s
    return report


def measure_server(
    url: str, model: str | None, cases: list[Case], effort: Effort, pictures: list[Path], seed: int
) -> Report:
    """Ask a server of OpenAI's chat API, by its only model where none is named."""
    from pixtral_runtime.bench.chat_client import ChatServer
    from pixtral_runtime.bench.serving import run_server_benchmark

    server = ChatServer(url)
    name = model or server.only_model()
    with output.progress() as bars:
        return run_server_benchmark(server, name, cases, effort, folder=pictures, seed=seed, progress=bars.stage)
