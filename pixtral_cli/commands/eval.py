"""`pixtral eval`: a benchmark's score for a bundle, and what another bundle's score differs by."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from pixtral_cli import output
from pixtral_cli.eval_curve import evaluate_curve, print_curve
from pixtral_cli.eval_files import Files, evaluate_bundle, image_cache, judge_options, refuse_unused_by_task
from pixtral_cli.eval_tables import print_evaluation, write_page
from pixtral_cli.options import (
    BackendOption,
    BatchOption,
    BundleArgument,
    DeviceOption,
    JsonOption,
    MaxImageSideOption,
    MemoryLimitOption,
    PreprocessOption,
    ThreadsOption,
    TokenBudgetsOption,
    output_file,
    refuse_unused,
    refuse_unused_by_backend,
    slots_wanted,
    token_budgets,
    warn_of_unused,
)

EPILOG = "Example: pixtral eval bundle-int4 --task chartqa --data ChartQA/ --save int4.json --against float16.json"


def eval(
    context: typer.Context,
    bundle: BundleArgument,
    task: Annotated[
        str,
        typer.Option(
            help="Of pictures: mm_mt_bench, mmmu, mathvista, chartqa, docvqa, vqav2, easy_vqa, custom. "
            "Of texts: perplexity, mmlu, gsm8k, math, ifeval."
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(help="The dataset's folder, as published, or JSONL, or your texts; else it is downloaded."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after this many rows, or windows of texts.")] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Solved questions before each, of mmlu and gsm8k; 5 by default.")
    ] = None,
    window: Annotated[int | None, typer.Option(help="Tokens that perplexity reads at a time; 2048 by default.")] = None,
    save: Annotated[
        Path | None,
        typer.Option(parser=output_file, metavar="PATH", help="Write scores and answers to this JSON file."),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="JSON|BUNDLE", help="Compare with this result, or evaluate this bundle too.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            parser=output_file, metavar="PATH", help="Write a page with pictures, answers, and what is wrong."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the answers beside --save.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing result.")] = False,
    judge_url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible endpoint that rates; its key is in PIXTRAL_JUDGE_KEY.")
    ] = None,
    judge_model: Annotated[str, typer.Option(help="The judge.")] = "gpt-4o-2024-05-13",
    cache: Annotated[Path | None, typer.Option(metavar="DIR", help="Where images of parquet files are put.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer in tokens, if not the task's own.")
    ] = None,
    batch: BatchOption = "auto",
    memory_limit: MemoryLimitOption = None,
    max_image_side: MaxImageSideOption = None,
    image_tokens: TokenBudgetsOption = None,
    preprocess: PreprocessOption = "mistral",
    threads: ThreadsOption = 0,
    backend: BackendOption = "auto",
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score a bundle on a benchmark, and test it against another.

    Every score has an interval; a loss that is no luck ends with exit 6.
    """
    from pixtral_runtime.batch.worker import WorkerOptions
    from pixtral_runtime.bundle.manifest import open_bundle
    from pixtral_runtime.evaluation.comparison import compare_evaluations
    from pixtral_runtime.evaluation.curve import saved_results
    from pixtral_runtime.evaluation.curve_page import curve_page
    from pixtral_runtime.evaluation.dataset import download_dataset, image_folder, read_examples, with_shots
    from pixtral_runtime.evaluation.result import read_evaluation
    from pixtral_runtime.evaluation.row_images import ImageStore
    from pixtral_runtime.evaluation.run import EvaluationOptions, Questions
    from pixtral_runtime.evaluation.tasks.registry import task_named
    from pixtral_runtime.files import write_text_atomically

    if save is None and html is None:
        refuse_unused(context, ("force",), "without --save", "--save result.json")
    if resume:
        refuse_unused(context, ("force",), "with --resume, which keeps the answers")
    if judge_url is None:
        refuse_unused(context, ("judge_model",), "without --judge-url", "--judge-url URL")
    refuse_unused_by_backend(context, backend)
    chosen = task_named(task)
    refuse_unused_by_task(context, chosen)
    wanted, memory_bytes = slots_wanted(batch, memory_limit)
    worker = WorkerOptions(backend, threads, wanted, memory_bytes, write_hint=output.hint_of)
    files = Files(save, html, resume, force)
    judge = judge_options(chosen, judge_url, judge_model, save)
    budgets = token_budgets(image_tokens) or [None]
    results = saved_results(against, budgets) if against is not None and not os.path.isdir(against) else []
    old = [read_evaluation(path) for path in results]
    other = against if against is not None and not old else None
    read = [path for opened in (bundle, other) if opened for path in open_bundle(opened).own_files]
    read += [against, *results] if against else []
    files.check(read, data, budgets=budgets, is_rated=judge is not None, against_bundle=other is not None)
    folder = download_dataset(chosen) if data is None else data
    chosen = with_shots(chosen, folder, shots)
    is_text = chosen.asks == "tokens"
    images = ImageStore(cache or image_cache(), image_folder(folder))
    found, broken = read_examples(chosen, folder, images, None if is_text else limit)
    files.check_pictures(picture for example in found for picture in example.images)
    questions = Questions(chosen, found, broken, max_new_tokens, window, limit if is_text else None)
    options = EvaluationOptions(preprocess, max_image_side, budgets[0], worker, judge)
    if len(budgets) > 1:
        curve = evaluate_curve(bundle, questions, options, budgets, files, against=against, old=old)
        warn_of_unused(context, curve.points[-1].evaluation.setting["backend"])
        print_curve(curve, as_json=as_json)
        if html is not None:
            write_text_atomically(html, curve_page(curve))
            output.talk(f"the page is {html}")
        missing, regressed = any(point.evaluation.missing for point in curve.points), curve.regressed
    else:
        evaluation, records = evaluate_bundle(bundle, questions, options, files)
        warn_of_unused(context, evaluation.setting["backend"])
        if other is not None:
            old = [evaluate_bundle(other, questions, options, files.of_reference())[0]]
        comparison = compare_evaluations(old[0], evaluation) if old else None
        print_evaluation(evaluation, comparison, as_json=as_json)
        if html is not None:
            write_page(html, evaluation, comparison, records)
        missing, regressed = bool(evaluation.missing), comparison is not None and comparison.regressed
    if regressed:
        raise typer.Exit(6)
    if missing:
        raise typer.Exit(5)
