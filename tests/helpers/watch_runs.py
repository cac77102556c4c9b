"""Jobs over a watched folder, in a thread, as one run after the other of a command."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue

from helpers.watching import GIVE_UP_S, SHORT
from pixtral_runtime.batch.job import Job
from pixtral_runtime.batch.records import Record
from pixtral_runtime.batch.results_file import ResultsFile
from pixtral_runtime.batch.run import run_job
from pixtral_runtime.batch.sidecars import SidecarSettings
from pixtral_runtime.batch.watched_requests import WatchedRequests
from pixtral_runtime.batch.watched_sidecars import WatchedSidecars
from pixtral_runtime.batch.worker import Worker
from pixtral_runtime.inputs.preprocess import Preprocess
from pixtral_runtime.sources.documents import DocumentSettings, watched_suffixes
from pixtral_runtime.sources.watch import Watch

QUESTION = "Describe this image in one short sentence."
DOCUMENTS = DocumentSettings(fit=Preprocess(patch_size=16, max_side=128).drawn_size)


@dataclass
class Run:
    """A job over `cam` in a thread of its own; what it has said and answered is read as it comes."""

    worker: Worker
    texts: tuple[str, ...] = (QUESTION,)
    captions: SidecarSettings | None = None
    documents: DocumentSettings = DOCUMENTS
    with_videos: bool = False
    sidecars: WatchedSidecars | None = None
    notes: Queue[str] = field(default_factory=Queue)
    job: Job | None = None
    _records: Queue[Record | BaseException] = field(default_factory=Queue)

    def __enter__(self) -> Run:
        wanted = watched_suffixes(with_videos=self.with_videos)
        watch = Watch([Path("cam")], wanted, note=self.notes.put, **SHORT)
        self.sidecars = None if self.captions is None else WatchedSidecars(self.captions, watch)
        self.requests = WatchedRequests(watch, self.texts, self.documents, None, 24, self.sidecars)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        self.wait_for(lambda: self.job is not None or not self._thread.is_alive() or not self._records.empty())
        return self

    @property
    def kept(self) -> int:
        return 0 if self.job is None else self.job.kept

    def file_ids(self) -> list[str]:
        """The ids of the records that the job has."""
        return list(self.requests._records)

    def _work(self) -> None:
        try:
            with ResultsFile.resume(Path("r.jsonl"), (), self.worker.settings) as file:
                self.job = self.worker.job(self.requests, file.done, file.under_way)
                run_job(self.job, None, file, lambda record, _: self._records.put(record), self.sidecars)
        except BaseException as error:  # for the test to raise
            self._records.put(error)

    def next(self) -> Record:
        found = self._records.get(timeout=GIVE_UP_S)
        if isinstance(found, BaseException):
            raise found
        return found

    def wait_for(self, is_so: Callable[[], bool]) -> None:
        for _ in range(int(GIVE_UP_S / 0.02)):
            if is_so():
                return
            threading.Event().wait(0.02)
        raise AssertionError("it never was so")

    def __exit__(self, *_: object) -> None:
        if self.job is not None:
            self.job.stop()
        self._thread.join(GIVE_UP_S)
        assert self._records.empty()


def put(source: Path, place: Path) -> None:
    shutil.copy(source, place.with_name(f".{place.name}"))
    place.with_name(f".{place.name}").replace(place)
