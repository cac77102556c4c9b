"""A job from its first record to its last: each is written to the results file and counted as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pixtral_runtime.batch.job import Job
from pixtral_runtime.batch.ray_job import RayJob
from pixtral_runtime.batch.records import Record, Request
from pixtral_runtime.batch.results_file import ResultsFile
from pixtral_runtime.batch.sidecars import Sidecars


@dataclass
class Tally:
    """What became of a job. `kept` counts records of an earlier run, `records` has them where a file has.

    `image_wait_s` is how long the model had nothing to do but wait for images; None on a cluster, where nobody counts.
    """

    requests: int
    kept: int = 0
    made: int = 0
    failures: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    image_wait_s: float | None = None
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
            "image_wait_s": None if self.image_wait_s is None else round(self.image_wait_s, 3),
            "requests_per_s": round(self.made / seconds, 3),
            "tokens_per_s": round(self.new_tokens / seconds, 2),
        }


def run_job(
    job: Job | RayJob,
    requests: int,
    file: ResultsFile | None = None,
    on_record: Callable[[Record, Tally], None] = lambda *_: None,
    sidecars: Sidecars | None = None,
) -> Tally:
    """Run a job of so many requests to its end, or until somebody calls `job.stop()`.

    `on_record` is called with each record, written and counted already, its sidecar too. Raises what the job and the
    files raise.
    """
    tally = Tally(requests)
    started = time.monotonic()
    if file is not None:
        file.under_way.open()
        if sidecars is not None:
            sidecars.catch_up(file)
    for record in job.records():
        if sidecars is not None:
            sidecars.note(record)
        if file is not None:
            file.append(record)
        if sidecars is not None:
            if file is not None:
                file.sync()  # a caption that outlived its record would be appended again
            sidecars.write(record)
        tally.add(record, job.kept, time.monotonic() - started)
        on_record(record, tally)
    tally.kept = job.kept  # all of them may have been, without a record to tell
    tally.image_wait_s = job.idle_s
    if file is not None:
        tally.records = dict(file.done)
    return tally
