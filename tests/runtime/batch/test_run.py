"""Running a job to its end: what is counted, what is handed on, and what a results file had before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pixtral_runtime.batch.records import Record, Request, Settings, record_of
from pixtral_runtime.batch.results_file import ResultsFile
from pixtral_runtime.batch.run import Tally, run_job
from pixtral_runtime.inputs.conversation import user_message


class MadeJob:
    """Records that come one after the other, the first `kept` of an earlier run; a stop ends them."""

    def __init__(self, records: list[Record], kept: int = 0, order: Sequence[str] = ()) -> None:
        self._records, self.kept, self._stopped = records, kept, False
        self.order = order
        self.idle_s = 0.25

    def stop(self) -> None:
        self._stopped = True

    def records(self) -> Iterator[Record]:
        for record in self._records:
            if self._stopped:
                return
            yield record


def record(name: str, error: str | None = None) -> Record:
    made = Record(name, "q", "0" * 16, error=error)
    if error is None:
        made.answer, made.new_tokens, made.finish_reason, made.times_ms = "yes", 3, "stop", {"decode": 1.0}
    return made


def asked(*names: str) -> list[Request]:
    return [Request(name, user_message("q")) for name in names]


def test_every_record_is_counted_and_handed_on_once() -> None:
    seen: list[tuple[str, int]] = []
    shared = record("d").with_answer_of(record("c"))
    made = [record("b"), record("a", "broken"), record("c"), shared]
    job: Any = MadeJob(made, order=("a", "b", "c", "d", "never made"))
    tally = run_job(job, 3, on_record=lambda one, tally: seen.append((one.id, tally.done)))
    assert seen == [("b", 1), ("a", 2), ("c", 3), ("d", 4)]
    assert (tally.made, tally.failures, tally.shared, tally.new_tokens, tally.kept) == (4, 1, 1, 6, 0)
    records = tally.in_order()
    assert [one.id for one in records[1:]] == ["b", "c", "d"]
    assert [one.id for one in records] == ["a", "b", "c", "d"]
    summary = tally.summary(records)
    assert (summary["requests"], summary["answered"], summary["shared"], summary["new_tokens"]) == (3, 3, 1, 6)
    assert summary["image_wait_s"] == 0.25
    assert summary["failed"] == [{"id": "a", "error": "broken"}]


def test_a_stopped_job_keeps_what_it_has() -> None:
    job: Any = MadeJob([record("a"), record("b"), record("c")])

    def stop(one: Record, tally: Tally) -> None:
        job.stop()

    assert list(run_job(job, 3, on_record=stop).records) == ["a"]


def test_a_results_file_is_written_and_its_earlier_records_count(tmp_path: Path) -> None:
    path, settings = tmp_path / "r.jsonl", Settings("bundle")
    requests = asked("a", "b")
    made = record_of(requests[0], settings)
    made.answer = "yes"
    with ResultsFile.create(path) as file:
        first: Any = MadeJob([made])
        run_job(first, 2, file)
    with ResultsFile.resume(path, requests, settings) as file:
        second: Any = MadeJob([record("b")], kept=1, order=("a", "b"))
        tally = run_job(second, 2, file)
    assert (tally.kept, tally.made, tally.done) == (1, 1, 2)
    assert [one.id for one in tally.in_order()] == ["a", "b"]
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2
