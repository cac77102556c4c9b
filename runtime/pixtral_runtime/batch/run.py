"""A job from its first record to its last: each is written to the results file and counted as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pixtral_runtime.batch.job import Job
from pixtral_runtime.batch.ray_job import RayJob
from pixtral_runtime.batch.record_store import InOrder, temporary_store
from pixtral_runtime.batch.records import Record
from pixtral_runtime.batch.results_file import ResultsFile
from pixtral_runtime.batch.sidecars import Sidecars


@dataclass
class Tally:
    """What became of a job. `kept` counts records of an earlier run, `records` has them where a file has.

    `requests` is None as long as nobody knows how many there are, `order` has their ids as they were asked.
    `image_wait_s` is how long the model had nothing to do but wait for images; None on a cluster, where nobody counts.
    """

    requests: int | None
    kept: int = 0
    made: int = 0
    failures: int = 0
    shared: int = 0  # of those made, with the answer of another record
    new_tokens: int = 0
    seconds: float = 0.0
    image_wait_s: float | None = None
    records: Mapping[str, Record] = field(default_factory=dict)  # by id
    order: Sequence[str] = ()

    @property
    def done(self) -> int:
        return self.kept + self.made

    def add(self, record: Record, kept: int, seconds: float) -> None:
        self.kept, self.seconds = kept, seconds
        self.made += 1
        self.failures += record.error is not None
        self.shared += record.is_shared
        self.new_tokens += 0 if record.is_shared else record.new_tokens or 0

    def in_order(self) -> InOrder:
        """The records of what was asked, in the order in which it was."""
        return InOrder(self.records, [id for id in dict.fromkeys(self.order) if id in self.records])

    def summary(self, records: Iterable[Record]) -> dict[str, Any]:
        """Counts over `records`; rates over what this run made."""
        seconds = max(self.seconds, 1e-9)
        answered = cut_off = 0
        failed = []
        for record in records:
            answered += record.error is None
            cut_off += record.finish_reason == "length"
            if record.error is not None:
                failed.append({"id": record.id, "error": record.error})
        return {
            "requests": self.requests,
            "answered": answered,
            "cut_off": cut_off,
            "failed": failed,
            "kept": self.kept,
            "shared": self.shared,
            "new_tokens": self.new_tokens,
            "seconds": round(self.seconds, 3),
            "image_wait_s": None if self.image_wait_s is None else round(self.image_wait_s, 3),
            "requests_per_s": round(self.made / seconds, 3),
            "tokens_per_s": round(self.new_tokens / seconds, 2),
        }


def run_job(
    job: Job | RayJob,
    requests: int | None,
    file: ResultsFile | None = None,
    on_record: Callable[[Record, Tally], None] = lambda *_: None,
    sidecars: Sidecars | None = None,
) -> Tally:
    """Run a job of so many requests, None for nobody knows, to its end, or until somebody calls `job.stop()`.

    `on_record` is called with each record, written and counted already, its sidecar too. Raises what the job and the
    files raise.
    """
    records = temporary_store() if file is None else file.done
    tally = Tally(requests, records=records, order=job.order)
    started = time.monotonic()
    if file is not None:
        file.under_way.open()
        if sidecars is not None:
            sidecars.catch_up(file)
    for record in job.records():
        if sidecars is not None:
            sidecars.note(record)
        if file is None:
            records.add(record)
        else:
            file.append(record)
        if sidecars is not None:
            if file is not None:
                file.sync()  # a caption that outlived its record would be appended again
            sidecars.write(record)
        tally.add(record, job.kept, time.monotonic() - started)
        on_record(record, tally)
    tally.kept = job.kept  # all of them may have been, without a record to tell
    tally.image_wait_s = job.idle_s
    tally.requests = len(tally.in_order()) if requests is None else requests
    return tally
