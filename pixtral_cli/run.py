"""`pixtral run`: one prompt over files and folders of images."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from pixtral_cli import output
from pixtral_cli.options import (
    BackendOption,
    BundleArgument,
    ExifOption,
    ImageTokensOption,
    JsonOption,
    MaxImageSideOption,
    MaxNewTokensOption,
    PreprocessOption,
    PromptOption,
    SeedOption,
    SystemOption,
    TemperatureOption,
    ThreadsOption,
    TopPOption,
    open_model,
    open_prompts,
    read_prompt,
)

EPILOG = "Example: pixtral run bundle photos/ -p 'What is shown?' -o results.jsonl"


def run(
    bundle: BundleArgument,
    paths: Annotated[list[str], typer.Argument(help="Images, folders, globs; '-' reads a list from standard input.")],
    prompt: PromptOption = "Describe this image in one short sentence.",
    system: SystemOption = None,
    results: Annotated[Path | None, typer.Option("-o", "--output", help="Write one JSON record a line.")] = None,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Look into sub-folders.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after this many images.")] = None,
    max_new_tokens: MaxNewTokensOption = 128,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 0.8,
    seed: SeedOption = 0,
    max_image_side: MaxImageSideOption = None,
    image_tokens: ImageTokensOption = None,
    preprocess: PreprocessOption = "mistral",
    exif: ExifOption = True,
    threads: ThreadsOption = 0,
    backend: BackendOption = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output file.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Answer one prompt for each image of files and folders; broken images are recorded and the run goes on."""
    from pixtral_runtime.errors import InputError
    from pixtral_runtime.inputs import collect_images
    from pixtral_runtime.job import Job, check_fit, run_job
    from pixtral_runtime.sampling import Sampling

    job = Job(read_prompt(prompt), system, max_new_tokens, Sampling(temperature, top_p, seed), exif)
    images = collect_images(paths, sys.stdin, recursive=recursive)[:limit]
    if results is not None and results.exists() and not force:
        raise InputError(f"{results} exists", "--force to replace it, or another name after -o")
    prompts = open_prompts(bundle, preprocess, max_image_side, image_tokens)
    check_fit(prompts, images, job)
    model = open_model(prompts, backend, threads)

    started = time.monotonic()
    failed: list[dict[str, Any]] = []
    tokens = 0
    with output.open_results(results) as lines, output.progress() as bars:
        bars.stage("images", 0, len(images))
        for done, record in enumerate(run_job(model, images, job), start=1):
            if lines is not None:
                _write(lines, record.to_dict())
            if record.error is not None:
                failed.append({"path": record.path, "error": record.error})
                output.error_line(record.error, record.hint or "")
            elif not as_json:
                output.print_answer(record.path, record.answer or "")
            tokens += record.new_tokens or 0
            bars.stage("images", done, len(images))
    seconds = time.monotonic() - started
    summary = {
        "images": len(images),
        "answered": len(images) - len(failed),
        "failed": failed,
        "new_tokens": tokens,
        "seconds": round(seconds, 3),
        "output": None if results is None else str(results),
    }
    if as_json:
        output.print_json(summary)
    else:
        output.talk(f"{summary['answered']} of {len(images)} images answered in {seconds:.1f} s")
    if failed:
        raise typer.Exit(5)


def _write(lines: TextIO, record: dict[str, Any]) -> None:
    lines.write(json.dumps(record, ensure_ascii=False) + "\n")
    lines.flush()
