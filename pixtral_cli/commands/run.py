"""`pixtral run`: questions about files and folders of images, or a list of requests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pixtral_cli import job_options, output
from pixtral_cli.job_files import JobFiles, read_asked, read_captions, read_source_settings
from pixtral_cli.job_progress import answer_requests, finish, tell_answer, tell_nothing, tell_record
from pixtral_cli.job_watch import read_watched
from pixtral_cli.options import (
    STDOUT,
    BackendOption,
    BatchOption,
    BundleArgument,
    DeviceOption,
    DraftsOption,
    EmbeddingCacheOption,
    ExifOption,
    FormulasOption,
    ImageTokensOption,
    JsonOption,
    MaxImageSideOption,
    MaxNewTokensOption,
    MemoryLimitOption,
    PreprocessOption,
    SeedOption,
    SystemOption,
    TemperatureOption,
    ThreadsOption,
    TopPOption,
    read_sampling,
    refuse_unused,
    refuse_unused_by_backend,
    slots_wanted,
    start_job,
    warn_of_unused,
)

if TYPE_CHECKING:
    from pixtral_runtime.batch.item_requests import Requests
    from pixtral_runtime.batch.job import Job
    from pixtral_runtime.batch.ray_job import RayJob
    from pixtral_runtime.batch.results_file import ResultsFile

EPILOG = "Example: pixtral run bundle photos/ -p 'What is shown?' -o results.jsonl"
QUESTION = "Describe this image in one short sentence."


def run(
    context: typer.Context,
    bundle: BundleArgument,
    paths: Annotated[
        list[str] | None,
        typer.Argument(help="Images, folders, globs, documents, archives, tables; '-' reads a list from stdin."),
    ] = None,
    prompt: job_options.PromptsOption = None,
    requests: job_options.RequestsOption = None,
    system: SystemOption = None,
    results: job_options.RecordsOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the output file where it ended.")] = False,
    table: job_options.TableOption = None,
    embed: job_options.EmbedOption = False,
    formulas: FormulasOption = False,
    report: job_options.PageOption = None,
    sidecar: job_options.SidecarOption = None,
    sidecar_dir: job_options.SidecarDirOption = None,
    existing: job_options.ExistingOption = "skip",
    prefix: job_options.PrefixOption = "",
    suffix: job_options.SuffixOption = "",
    as_written: job_options.AsWrittenOption = False,
    json_schema: Annotated[Path | None, typer.Option(help="Answers are JSON of the schema in this file.")] = None,
    shard: Annotated[str | None, typer.Option(help="i/n: do this share of the requests; join with 'merge'.")] = None,
    ray: job_options.RayOption = None,
    ray_workers: Annotated[int, typer.Option(min=1, help="Copies of the model on the cluster.")] = 1,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Look into sub-folders.")] = False,
    watch: job_options.WatchOption = False,
    column: job_options.ColumnOption = None,
    fetch: job_options.FetchOption = False,
    pages: job_options.PagesOption = None,
    per: job_options.PerOption = None,
    every: job_options.EveryOption = None,
    frames: job_options.FramesOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after this many requests.")] = None,
    batch: BatchOption = "auto",
    memory_limit: MemoryLimitOption = None,
    drafts: DraftsOption = 0,
    embedding_cache: EmbeddingCacheOption = None,
    max_new_tokens: MaxNewTokensOption = 128,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = 0,
    max_image_side: MaxImageSideOption = None,
    image_tokens: ImageTokensOption = None,
    preprocess: PreprocessOption = "mistral",
    exif: ExifOption = True,
    threads: ThreadsOption = 0,
    backend: BackendOption = "auto",
    device: DeviceOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output file.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Answer questions about images, many at a time.

    A broken image is recorded, and the run goes on.
    """
    from hashlib import sha256

    from pixtral_runtime.batch.fit import check_fit
    from pixtral_runtime.batch.ray_job import RayJob
    from pixtral_runtime.batch.records import Settings
    from pixtral_runtime.batch.worker import Worker, WorkerOptions
    from pixtral_runtime.bundle.manifest import open_bundle
    from pixtral_runtime.errors import InputError
    from pixtral_runtime.inputs.text_file import read_text

    job_options.refuse_what_does_nothing(context)
    refuse_unused_by_backend(context, backend)
    as_lines = results == STDOUT
    results = None if as_lines else results
    captions = read_captions(context, sidecar, sidecar_dir, existing, prefix, suffix, as_written, results)
    schema = None if json_schema is None else read_text(json_schema, "--json-schema FILE.json")
    digest = None if schema is None else sha256(schema.encode()).hexdigest()
    opened = open_bundle(bundle)
    sampling = read_sampling(opened, temperature, top_p, seed)
    settings = Settings(
        opened.fingerprint,
        *(preprocess, max_image_side, image_tokens, exif, sampling.temperature, sampling.top_p, sampling.seed, digest),
    )
    wanted, memory_bytes = slots_wanted(batch, memory_limit)
    options = WorkerOptions(
        backend, threads, wanted, memory_bytes, drafts, schema, embedding_cache, write_hint=output.hint_of
    )
    worker = Worker(bundle, settings, options)
    before = results if resume else None
    sources = read_source_settings(worker.prompts, recursive, column, fetch, pages, per or (), every, frames)
    names, questions = paths or [], prompt or [QUESTION]
    copies = "--embed" if embed else "--format webdataset" if table == "webdataset" else None
    asked = (
        read_watched(names, questions, system, max_new_tokens, sources, limit, captions, results, report, table, copies)
        if watch
        else read_asked(names, questions, requests, system, max_new_tokens, sources, shard, limit, captions, before)
    )
    if not asked.has_documents:
        refuse_unused(context, ("pages", "per", "every", "frames"), "where nothing has pages or frames")
    if not asked.has_datasets:
        refuse_unused(context, ("column", "fetch"), "where nothing is a table")
    read = [Path(text[1:]) for text in prompt or () if text.startswith("@")]
    read += [*worker.prompts.bundle.own_files, *asked.files, *([json_schema] if json_schema else ())]
    files = JobFiles(results, table, report, resume, force, formulas, embed, asked.sidecars)
    files.check(asked.requests, read)
    check_fit(worker.prompts, asked.requests)

    def start(requests: Requests, file: ResultsFile | None) -> Job | RayJob:
        if ray is None:
            job = start_job(worker, requests, file)
            warn_of_unused(context, worker.model.backend)
            return job
        if not isinstance(requests, Sequence):
            raise InputError("a cluster reads pictures that are files, and no archives", "leave --ray away")
        done = {} if file is None else file.done
        return RayJob(bundle, requests, settings, options, done, address=ray, workers=ray_workers)

    tell = tell_record if as_lines else tell_nothing if as_json else tell_answer
    with output.progress() as bars:
        tally = answer_requests(
            start,
            asked.requests,
            settings,
            results,
            resume=resume,
            force=force,
            bars=bars,
            tell=tell,
            sidecars=asked.sidecars,
            is_endless=watch,
        )
    finish(tally, asked.requests, files, title=f"pixtral run {bundle}", as_json=as_json)
