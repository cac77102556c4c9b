"""A job at work, as `run` and `eval` show it: progress, failures as they come, and Ctrl-C that loses nothing."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pixtral_cli import output

if TYPE_CHECKING:
    from types import FrameType

    from pixtral_runtime.batch.job import Job
    from pixtral_runtime.batch.ray_job import RayJob
    from pixtral_runtime.batch.records import Record, Request, Settings
    from pixtral_runtime.batch.results_file import ResultsFile

TABLE_FORMATS = ("csv", "parquet")


@dataclass
class Tally:
    """What became of a job. `kept` counts records of an earlier run, `records` has them as well."""

    requests: int
    kept: int = 0
    made: int = 0
    failures: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    stopped: bool = False
    records: dict[str, Record] = field(default_factory=dict)  # by id

    @property
    def done(self) -> int:
        return self.kept + self.made

    def add(self, record: Record, kept: int, seconds: float) -> None:
        self.records[record.id] = record
        self.kept, self.seconds = kept, seconds
        self.made += 1
        self.failures += record.error is not None
        self.new_tokens += record.new_tokens or 0

    def in_order(self, asked: Sequence[Request]) -> list[Record]:
        """The records of these requests, in their order."""
        return [self.records[request.id] for request in asked if request.id in self.records]

    def summary(self, records: Sequence[Record]) -> dict[str, Any]:
        """Counts over `records`; rates over what this run made."""
        seconds = max(self.seconds, 1e-9)
        return {
            "requests": self.requests,
            "answered": sum(record.error is None for record in records),
            "cut_off": sum(record.finish_reason == "length" for record in records),
            "failed": [{"id": record.id, "error": record.error} for record in records if record.error is not None],
            "kept": self.kept,
            "new_tokens": self.new_tokens,
            "seconds": round(self.seconds, 3),
            "requests_per_s": round(self.made / seconds, 3),
            "tokens_per_s": round(self.new_tokens / seconds, 2),
        }


def check_outputs(results: Path | None, *, resume: bool, table: str | None, report: Path | None) -> None:
    """Refuse what could not be written at the end, before the hours that it may take. Raises InputError."""
    from pixtral_runtime.errors import InputError

    if results is None and (resume or table):
        raise InputError(f"{'--resume' if resume else '--format'} needs an output file", "-o results.jsonl")
    if table not in (None, *TABLE_FORMATS):
        raise InputError(f"no table format '{table}'", f"--format {'|'.join(TABLE_FORMATS)}")
    if table == "parquet":
        output.require("pyarrow", "tables", "Writing parquet")
    if report is not None and (report.is_dir() or not report.absolute().parent.is_dir()):
        raise InputError(f"{report} cannot be written: it is a folder, or in none", "--report answers.html")


@contextmanager
def open_results(
    path: Path | None, asked: Sequence[Request], settings: Settings, *, resume: bool, force: bool
) -> Iterator[ResultsFile | None]:
    """The file that records go to, or nothing where there is no path. An interruption says how to go on."""
    from pixtral_runtime.batch.results_file import ResultsFile

    if path is None:
        yield None
        return
    opened = ResultsFile.resume(path, asked, settings) if resume else ResultsFile.create(path, force)
    with opened as file:
        try:
            yield file
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(f"{len(file.done)} records are in {path}; add --resume to go on") from error


def work_off(job: Job | RayJob, total: int, file: ResultsFile | None, *, print_answers: bool) -> Tally:
    """Run a job: write, count and show each record as it comes.

    The first Ctrl-C finishes what runs; then, or at the second one, this raises KeyboardInterrupt.
    """
    tally = Tally(total)
    started = time.monotonic()
    with output.progress() as bars, _stopping(job, tally):
        bars.stage("requests", 0, total)
        for record in job.records():
            if file is not None:
                file.append(record)
            tally.add(record, job.kept, time.monotonic() - started)
            if record.error is not None:
                output.error_line(record.error, record.hint or "")
            elif print_answers:
                output.print_answer(record.id, record.answer or "")
            bars.stage("requests", tally.done, total, _rates(tally))
    tally.kept = job.kept  # all of them may have been, without a record to tell
    if tally.stopped:
        raise KeyboardInterrupt
    if file is not None:
        tally.records = dict(file.done)
    return tally


def finish(summary: dict[str, Any], *, as_json: bool) -> None:
    """Say what became of the job. Raises typer.Exit where something failed."""
    if as_json:
        output.print_json(summary)
    else:
        text = f"{summary['answered']} of {summary['requests']} requests answered"
        if summary["kept"]:
            text += f", {summary['kept']} were done before"
        if summary["new_tokens"]:
            text += f"; {summary['requests_per_s']:.2f} requests and {summary['tokens_per_s']:.0f} tokens a second"
        output.talk(text)
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
def _stopping(job: Job | RayJob, tally: Tally) -> Iterator[None]:
    """SIGINT stops the job the first time, and interrupts at once the second time."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        if tally.stopped:
            raise KeyboardInterrupt
        tally.stopped = True
        job.stop()
        output.talk("finishing the answers that are under way; Ctrl-C again stops at once")

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
