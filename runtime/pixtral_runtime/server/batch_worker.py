"""Batches at work, beside live requests and behind them.

One thread works off one batch after the other. It hands a request to the model only while there is a slot that no live
request has or waits for, so a batch takes nobody's place in the queue, and a live request waits for one answer of it at
most. Each answer is in the batch's results file before the next is begun; whenever the process dies, the next one goes
on from there.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from queue import Empty, SimpleQueue

from pixtral_runtime.batch.loading import READER_THREADS, Loaded, RequestLoader
from pixtral_runtime.batch.openai_output import line_of, not_asked, output_of
from pixtral_runtime.batch.record_lines import read_results
from pixtral_runtime.batch.records import Record, Request, Settings
from pixtral_runtime.batch.results_file import ResultsFile
from pixtral_runtime.errors import PixtralError
from pixtral_runtime.generation.generation import Generation
from pixtral_runtime.inputs.prompt import PromptBuilder
from pixtral_runtime.server.batch_input import check_input, ids_in, read_input
from pixtral_runtime.server.batch_store import ENDED, Batch, BatchStore, LineProblem
from pixtral_runtime.server.file_store import FileStore
from pixtral_runtime.server.media import Media
from pixtral_runtime.server.model_loop import ModelLoop
from pixtral_runtime.server.problems import client_hint

logger = logging.getLogger(__name__)
AHEAD = 2 * READER_THREADS  # requests that are read before there is a slot


class Paused(Exception):
    """The server stops, or its model has failed. Another process goes on."""


@dataclass(frozen=True)
class BatchWork:
    """What answering takes. `free_slots` is how many slots no live request has or waits for."""

    prompts: PromptBuilder
    settings: Settings
    media: Media
    loop: ModelLoop
    free_slots: Callable[[], int]
    max_new_tokens: int
    most_requests: int
    clock: Callable[[], float] = time.time


class BatchWorker:
    """Works batches off, from `start` to `stop`. `in_flight` answers of them have a slot."""

    def __init__(self, batches: BatchStore, files: FileStore, work: BatchWork) -> None:
        self._batches, self._files, self._with = batches, files, work
        self.in_flight = 0
        self._events: SimpleQueue[Generation | None] = SimpleQueue()  # what is done, or None: look again
        self._is_stopping = False
        self._checks = ThreadPoolExecutor(1, "batch check")
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)

    def start(self) -> None:
        for batch in self._batches.all():
            if batch.status == "validating":
                self.check(batch)
        self._thread.start()

    def stop(self) -> None:
        """Give up what is under way; it is asked again when there is a worker again."""
        self._is_stopping = True
        self.wake()
        self._checks.shutdown(cancel_futures=True)
        if self._thread.ident is not None:
            self._thread.join()

    def wake(self) -> None:
        """Something has changed: a slot is free, a batch is there or is cancelled."""
        self._events.put(None)

    def check(self, batch: Batch) -> None:
        """Look through a new batch's file soon."""
        self._checks.submit(self._check, batch)

    def _check(self, batch: Batch) -> None:
        try:
            path = self._files.path(batch.input_file_id)
            total, problems = check_input(path, batch.model, self._with.most_requests)
            status, gone = ("failed", {"errors": problems}) if problems else ("in_progress", {"total": total})
            self._batches.change(batch.id, status, unless=("cancelling", *ENDED), **gone)
        except OSError:  # a disk that is full: it is checked again at the next start
            logger.exception("a batch could not be checked")
        except Exception:  # a bug, for which nobody should wait
            logger.exception("a batch could not be checked")
            reason = "the server failed to read the file; its log says more, and another batch may try again"
            self._batches.change(batch.id, "failed", unless=ENDED, errors=(LineProblem("server_error", reason),))
        self.wake()

    # In the thread

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                waiting = [one for one in self._batches.all() if one.status not in ("validating", *ENDED)]
                if not waiting:
                    self._events.get()
                    continue
                self._work_off(waiting[0])
        except Paused:
            pass
        except Exception:
            logger.exception("batches are not worked on any more until the next start")

    def _work_off(self, batch: Batch) -> None:
        try:
            if batch.status == "in_progress":
                self._answer(batch)
                batch = self._batches.change(batch.id, "finalizing", unless=("cancelling",))
            self._finish(batch)
        except PixtralError as error:
            hint = client_hint(error)
            message = f"{error} ({hint})" if hint else str(error)
            logger.error("batch %s: %s", batch.id, message)
            self._batches.change(batch.id, "failed", errors=(LineProblem("server_error", message),))

    def _answer(self, batch: Batch) -> None:
        """Get a record for each request, unless the batch is cancelled or its time is over."""
        work = self._with
        path = self._files.path(batch.input_file_id)
        requests, refused = read_input(path, work.settings, work.media, work.max_new_tokens)
        with ResultsFile.resume(self._batches.results(batch.id), requests, work.settings) as file:
            file.under_way.open()
            failed = sum(record.error is not None for record in file.done.values())
            self._batches.count(batch.id, len(file.done) - failed, failed)
            for record in refused:
                if record.id not in file.done:
                    self._write(batch, file, record)
            left = [request for request in requests if request.id not in file.done]
            suspects = file.under_way.suspects
            alone = [[request] for request in left if request.id in suspects]
            others = [request for request in left if request.id not in suspects]
            loader = RequestLoader(
                work.prompts, work.settings, under_way=file.under_way, write_hint=client_hint, memory=work.media.memory
            )
            with ThreadPoolExecutor(READER_THREADS, "batch images") as pool:
                for group in (*alone, others):
                    self._answer_some(batch, group, loader, file, pool)

    def _answer_some(
        self, batch: Batch, asked: Sequence[Request], loader: RequestLoader, file: ResultsFile, pool: ThreadPoolExecutor
    ) -> None:
        flying: dict[Generation, Record] = {}
        loading: deque[Future[Loaded]] = deque()
        requests = iter(asked)
        try:
            while not self._is_over(batch):
                for request in islice(requests, AHEAD - len(loading)):
                    loading.append(pool.submit(loader.load, request))
                    loading[-1].add_done_callback(lambda _: self.wake())
                if not loading and not flying:
                    return
                if loading and loading[0].done() and self._with.free_slots() > len(flying):
                    loaded = loading.popleft().result()
                    generation = loader.generation(loaded)
                    if generation is None:
                        self._write(batch, file, loaded.record)
                        continue
                    flying[generation] = loaded.record
                    self.in_flight = len(flying)
                    self._with.loop.submit(generation, self._listen)
                    continue
                done = self._next_event(batch)
                if done is not None and done in flying:
                    self._write(batch, file, loader.finish(flying.pop(done), done))
                    self.in_flight = len(flying)
        finally:
            for future in loading:
                future.cancel()
            for generation in flying:
                self._with.loop.cancel(generation)
            self.in_flight = 0

    def _is_over(self, batch: Batch) -> bool:
        """Whether nothing of a batch is to be asked any more. Raises Paused."""
        if self._is_stopping or not self._with.loop.is_alive:
            raise Paused
        now = self._batches.get(batch.id)
        return now is None or now.status != "in_progress" or self._with.clock() >= batch.expires_at

    def _next_event(self, batch: Batch) -> Generation | None:
        try:
            return self._events.get(timeout=max(0.0, batch.expires_at - self._with.clock()))
        except Empty:  # its time is over
            return None

    def _listen(self, generation: Generation) -> None:
        """In the model's thread."""
        if generation.finish_reason is not None:
            self._events.put(generation)

    def _write(self, batch: Batch, file: ResultsFile, record: Record) -> None:
        file.append(record)
        self._batches.add(batch.id, int(record.error is None), int(record.error is not None))

    def _finish(self, batch: Batch) -> None:
        """Write the files of a batch that is over, from its records. Doing it twice gives the same files."""
        path = self._batches.results(batch.id)
        records = read_results(path).records if path.exists() else {}
        ids = list(ids_in(self._files.path(batch.input_file_id))) if records or batch.total else []
        is_cancelled = batch.status == "cancelling"
        is_whole = all(id in records for id in ids)
        end = "cancelled" if is_cancelled else "completed" if is_whole else "expired"

        def lines(*, of_errors: bool) -> Iterator[bytes]:
            for id in ids:
                record = records.get(id)
                if record is not None and (record.error is not None) == of_errors:
                    made = output_of(record, created_s=batch.created_at, batch=batch.id, model=batch.model)
                    yield line_of(made)
                elif record is None and of_errors and not is_cancelled:
                    yield line_of(not_asked(id, batch.id, "batch_expired", "the batch's time was over before its turn"))

        number = batch.id.removeprefix("batch_")
        output = self._files.put(_file_id(number, 0), f"{batch.id}_output.jsonl", lines(of_errors=False))
        errors = self._files.put(_file_id(number, 1), f"{batch.id}_error.jsonl", lines(of_errors=True))
        failed = sum(record.error is not None for record in records.values())
        self._batches.change(
            batch.id,
            end,
            output_file_id=None if output is None else output.id,
            error_file_id=None if errors is None else errors.id,
            total=len(ids) or batch.total,
            completed=len(records) - failed,
            failed=failed,
        )


def _file_id(number: str, kind: int) -> str:
    """The same for the same batch: a batch that is finished again replaces its files."""
    return f"file-{int(number, 16) ^ (kind + 1):024x}"
