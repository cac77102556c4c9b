"""A job at work, as `run` and `eval` show it: progress, failures as they come, and Ctrl-C that loses nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import typer

from pixtral_cli import output

if TYPE_CHECKING:
    from types import FrameType

    from pixtral_cli.job_files import JobFiles
    from pixtral_runtime.batch.item_requests import Requests
    from pixtral_runtime.batch.job import Job
    from pixtral_runtime.batch.ray_job import RayJob
    from pixtral_runtime.batch.records import Record, Settings
    from pixtral_runtime.batch.results_file import ResultsFile
    from pixtral_runtime.batch.run import Tally
    from pixtral_runtime.batch.sidecars import Sidecars
    from pixtral_runtime.errors import Option


def tell_nothing(record: Record) -> None:
    """Where a document at the end says it all."""


def tell_answer(record: Record) -> None:
    """For people."""
    if record.error is None:
        output.print_answer(record.id, record.answer or "")


def tell_record(record: Record) -> None:
    """For programs."""
    output.print_json_line(record.to_dict())


@contextmanager
def _open_results(
    path: Path | None, asked: Requests, settings: Settings, *, resume: bool, force: bool
) -> Iterator[ResultsFile | None]:
    """The file that records go to, or nothing where there is no path. An interruption says how to go on."""
    from pixtral_runtime.batch.results_file import ResultsFile

    if path is None:
        yield None
        return
    known = asked if isinstance(asked, Sequence) else ()
    opened = ResultsFile.resume(path, known, settings) if resume else ResultsFile.create(path, force)
    with opened as file:
        try:
            yield file
        except KeyboardInterrupt as error:
            if not file.done:  # nothing of this run is there to go on with
                raise
            raise KeyboardInterrupt(f"{len(file.done)} records are in {path}; add --resume to go on") from error


@contextmanager
def writing_to(elsewhere: Option) -> Iterator[None]:
    """Errors name the command's own option for another place to write to, where a job's would be --output."""
    from pixtral_runtime.batch.record_lines import ANOTHER_OUTPUT
    from pixtral_runtime.errors import PixtralError

    try:
        yield
    except PixtralError as error:
        error.remedies = tuple(elsewhere if remedy == ANOTHER_OUTPUT else remedy for remedy in error.remedies)
        raise


def answer_requests(
    start: Callable[[Requests, ResultsFile | None], Job | RayJob],
    asked: Requests,
    settings: Settings,
    path: Path | None,
    *,
    resume: bool,
    force: bool,
    bars: output.Bars,
    tell: Callable[[Record], None] = tell_nothing,
    sidecars: Sidecars | None = None,
    is_endless: bool = False,
) -> Tally:
    """Run a job: write each record to `path`, where there is one, and `tell` it as it comes.

    `start` makes the job of the requests and of the file at `path`, which may have records already. The first Ctrl-C
    finishes what runs; then, or at the second one, this raises KeyboardInterrupt. The end of a job that `is_endless` is
    the first one.
    """
    from pixtral_runtime.batch.item_requests import total_of
    from pixtral_runtime.batch.run import run_job

    def show(record: Record, tally: Tally) -> None:
        if record.error is not None:
            output.error_line(record.error, record.hint or "")
        try:
            tell(record)
        except BrokenPipeError:
            if file is None:
                raise
            output.discard(sys.stdout)  # its reader has left, and the file has the answers
        bars.stage("requests", tally.done, total, _rates(tally))

    total = total_of(asked)
    with _open_results(path, asked, settings, resume=resume, force=force) as file:
        job = start(asked, file)
        bars.stage("requests", 0, total)
        with _stopping(job) as stopped:
            tally = run_job(job, total if isinstance(asked, Sequence) else None, file, show, sidecars)
        if stopped.is_set() and not is_endless:
            raise KeyboardInterrupt
    return tally


def finish(
    tally: Tally,
    asked: Requests,
    files: JobFiles,
    *,
    title: str,
    as_json: bool,
) -> None:
    """Write table and page, then say what became of the job. Raises typer.Exit where something failed."""
    from pixtral_runtime.batch.asked_pictures import PicturesAgain
    from pixtral_runtime.batch.page import write_report

    if not tally.requests:
        output.warn("nothing was asked about: there are no pictures in what was named, or not for this part of it")
    records = tally.in_order()
    files.write_table(asked, tally)
    summary = tally.summary(records) | {"output": None if files.results is None else str(files.results)}
    if files.sidecars is not None:
        summary["sidecars"] = files.sidecars.summary()
    if files.report is not None:
        captions = None if files.sidecars is None else files.sidecars.settings
        with output.progress() as bars:
            write_report(
                records, files.report, title=title, summary=summary, sidecars=captions, picture_of=PicturesAgain(asked),
                progress=lambda done: bars.stage("page", done, len(records)),
            )  # fmt: skip
    if as_json:
        output.print_json(summary)
    else:
        text = f"{summary['answered']} of {summary['requests']} requests answered"
        if summary["cut_off"]:
            text += f", {summary['cut_off']} of them cut off at the limit of new tokens"
        if summary["kept"]:
            text += f", {summary['kept']} were done before"
        if summary["shared"]:
            text += f", {summary['shared']} of them with the answer to the same picture"
        if summary["new_tokens"]:
            text += f"; {summary['requests_per_s']:.2f} requests and {summary['tokens_per_s']:.0f} tokens a second"
        output.talk(text)
        if files.sidecars is not None:
            output.talk(f"sidecars: {files.sidecars}")
    if summary["failed"]:
        raise typer.Exit(5)


def _rates(tally: Tally) -> str:
    """`1.40/s, 35 tokens/s, 2 failed, 1.2 GB`."""
    from pixtral_runtime.device.memory import resident_memory_bytes

    parts = [f"{tally.made / tally.seconds:.2f}/s", f"{tally.new_tokens / tally.seconds:.0f} tokens/s"]
    if tally.failures:
        parts.append(f"{tally.failures} failed")
    return ", ".join([*parts, output.size(resident_memory_bytes())])


@contextmanager
def _stopping(job: Job | RayJob) -> Iterator[Event]:
    """A signal to stop ends the job the first time, which the event says, and interrupts at once the second time."""
    stopped = Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()
        job.stop()
        output.talk("finishing the answers that are under way; Ctrl-C again stops at once")

    with output.on_signals(interrupt):
        yield stopped
