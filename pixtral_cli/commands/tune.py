"""`pixtral tune`: how few image tokens are enough for the user's own pictures and questions."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pixtral_cli import output
from pixtral_cli.options import (
    BackendOption,
    CalibrationOption,
    CalibrationSamplesOption,
    JsonOption,
    MaxContextOption,
    MaxNewTokensOption,
    PreprocessOption,
    ThreadsOption,
    output_file,
    refuse_unused,
    refuse_unused_by_backend,
    token_budgets,
    warn_of_unused,
)
from pixtral_cli.tune_exports import plan_sources
from pixtral_cli.tune_files import TuneFiles, batch_sizes, known_device, work_bound
from pixtral_cli.tune_grid import ExportWishes

EPILOG = "Example: pixtral tune bundle --images photos/ --questions questions.jsonl -o tuning/ --html tune.html"


def tune(
    context: typer.Context,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="BUNDLE|CHECKPOINT...", help="Bundles, and checkpoints to export first: folders, hub ids."
        ),
    ],
    images: Annotated[Path, typer.Option(metavar="DIR", help="The folder with the pictures.")],
    questions: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="JSONL with question, image and answers as in 'eval --task custom', or a question a line.",
        ),
    ],
    image_tokens: Annotated[
        str | None, typer.Option(metavar="N,N,full", help="Budgets to try. Default: 64, 128, … and full.")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="How answers are scored; by default exact, or mistral_anls without answers; divergence for logits."
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="P,P", help="Export checkpoints in each of float16, float32, int8, fp8, int4. Default: float16."
        ),
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(metavar="C,C", help="And with each cache: same (as activations), int8. Default: same."),
    ] = None,
    calibration: CalibrationOption = None,
    calibration_samples: CalibrationSamplesOption = None,
    max_context: MaxContextOption = None,
    tolerance: Annotated[float, typer.Option(help="Points of 100 that the score may be below the best.")] = 2.0,
    budget: Annotated[
        str | None,
        typer.Option(metavar="N|TIME", help="The most requests, of all settings, or the time: 30min, 8h."),
    ] = None,
    predicted_for: Annotated[
        str | None, typer.Option("--device", metavar="NAME", help="Predict costs for a device that 'plan' knows.")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FOLDER", help="Keep records, tune.json and exported bundles here."),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(parser=output_file, metavar="PATH", help="Write a page with a plot and what changed."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in --output.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace existing records, results and bundles.")] = False,
    max_new_tokens: MaxNewTokensOption = 128,
    batch: Annotated[
        str, typer.Option(metavar="N,N", help="Requests answered at a time: the sizes to try for speed.")
    ] = "1",
    preprocess: PreprocessOption = "mistral",
    threads: ThreadsOption = 0,
    backend: BackendOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Find how few image tokens are enough for your pictures.

    The same questions are put to every setting in rounds; what is worse beyond luck is asked no further.
    """
    from pixtral_cli.tune_tables import line_to_type, print_tuning
    from pixtral_runtime.batch.worker import WorkerOptions
    from pixtral_runtime.bundle.manifest import open_bundle
    from pixtral_runtime.errors import InputError
    from pixtral_runtime.evaluation import tuning
    from pixtral_runtime.evaluation.tuning_page import tuning_page
    from pixtral_runtime.evaluation.tuning_questions import read_tune_questions
    from pixtral_runtime.evaluation.tuning_result import TuneResult
    from pixtral_runtime.evaluation.tuning_run import Trial, settings_grid
    from pixtral_runtime.files import write_text_atomically
    from pixtral_runtime.inputs.preprocess import check_mode

    if folder is None:
        if resume:
            raise InputError("--resume needs a folder to go on with", "--output tuning/")
        if html is None:
            refuse_unused(context, ("force",), "without --output", "--output tuning/")
    if resume:
        refuse_unused(context, ("force",), "with --resume, which keeps the answers")
    refuse_unused_by_backend(context, backend)
    budgets, device, batches = token_budgets(image_tokens), known_device(predicted_for), batch_sizes(batch)
    bound = None if budget is None else work_bound(budget)
    share = tuning.checked_tolerance(tolerance / 100)
    check_mode(preprocess)
    wishes = ExportWishes(precision, kv_cache, max_context, calibration, calibration_samples)
    planned = plan_sources(
        context, sources, wishes, folder,
        resume=resume, force=force, backend=backend, device=device, batch=min(batches),
    )  # fmt: skip
    files = TuneFiles(folder, html, resume, force)
    asked = read_tune_questions(questions, images, files.images, metric)
    files.check((), [questions])
    bundles = planned.bundles(force, asked.examples)
    settings = settings_grid(bundles, asked.examples, budgets, preprocess)
    read = [questions, *(path for one in map(open_bundle, bundles) for path in one.own_files)]
    files.check(settings, [*read, *(picture for example in asked.examples for picture in example.images)])
    options = WorkerOptions(backend, threads, write_hint=output.hint_of)
    with files.kept_when_interrupted(), output.progress() as bars:
        trial = Trial(
            settings, asked, options, partial(files.ask, bars),
            preprocess=preprocess, max_new_tokens=max_new_tokens, device=device, batches=batches,
            measured=files.measured, progress=bars.stage,
        )  # fmt: skip
        tuned = tuning.tune(
            len(settings), len(asked.examples), trial, trial.cost,
            tolerance=share, kept=trial.reference, afford=None if bound is None else bound(trial),
        )  # fmt: skip
    warn_of_unused(context, trial.backend)
    costs = "measured here" if device is None else f"predicted for {device.name}, at best"
    chosen = None if tuned.recommended is None else settings[tuned.recommended]
    size = None if tuned.recommended is None or batches == [1] else trial.batch(tuned.recommended)
    command = None if chosen is None else line_to_type(context, chosen, images, questions, size)
    result = TuneResult(trial, tuned, share, costs, command)
    if files.result is not None:
        result.save(files.result)
    if html is not None:
        write_text_atomically(html, tuning_page(result))
    print_tuning(result, as_json=as_json)
    if asked.broken or trial.unanswered:
        raise typer.Exit(5)
