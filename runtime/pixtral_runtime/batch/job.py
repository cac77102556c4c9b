"""Many requests through one model: threads read requests and images ahead, the scheduler keeps its slots busy.

Records come in the order in which they are done. A broken image gives a record with its error and stops nothing. The
same question about the same picture is asked once, whatever the picture is called, unless its answer is drawn.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from pixtral_runtime.batch.feed import POLL_S, Feed
from pixtral_runtime.batch.loading import READER_THREADS, Loaded, RequestLoader
from pixtral_runtime.batch.records import Record, Request, Settings
from pixtral_runtime.batch.under_way import UnderWay
from pixtral_runtime.errors import HintWriter, InputError, python_hint
from pixtral_runtime.generation.generation import Generation, StageTimes
from pixtral_runtime.generation.model import Model
from pixtral_runtime.generation.scheduler import Scheduler

if TYPE_CHECKING:
    from pixtral_runtime.generation.feature_cache import FeatureCache
    from pixtral_runtime.generation.json_schema import JsonSchema

T = TypeVar("T")


@dataclass(frozen=True)
class JobOptions:
    """How a job is worked off. None of it changes an answer, except `schema`, which `Settings` names."""

    slots: int = 1
    drafts: int = 0
    schema: JsonSchema | None = None
    features: FeatureCache | None = None
    done: Mapping[str, Record] = field(default_factory=dict)  # by id: records that need not be made again
    under_way: UnderWay | None = None  # where requests are noted that are begun, and what earlier runs died of
    write_hint: HintWriter = python_hint  # of records without an answer


class Job:
    """Requests to be answered.

    While and after `records` runs, `times` adds up the model's stages, `idle_s` is how long the model had nothing to do
    but wait for images, `kept` counts the records of `JobOptions.done` that still hold, and `order` has the ids of all
    requests so far, as they came.
    """

    def __init__(
        self, model: Model, requests: Iterable[Request], settings: Settings, options: JobOptions = JobOptions()
    ) -> None:
        self._model, self._requests, self._options = model, requests, options
        self._stopped = threading.Event()
        self._loader = RequestLoader(
            model.prompts, settings, options.schema, options.done, options.under_way, options.write_hint
        )
        self.times = StageTimes()
        self.idle_s = 0.0
        self.kept = 0
        self.order: list[str] = []
        self._under_way: dict[Generation, Loaded] = {}
        self._twins: dict[str | None, list[Record]] = {}  # by key: what waits for the same answer
        self._is_alone = False

    def stop(self) -> None:
        """Start no more answers; those that run are finished. May be called from a signal handler."""
        self._stopped.set()

    def records(self) -> Iterator[Record]:
        """Yield a record for each request, but for those that are done already.

        Raises what reading the requests raises, and InputError where one is not what a record in `done` answers.
        """
        options, requests = self._options, self._requests
        slots = min(options.slots, max(1, len(requests))) if isinstance(requests, Sized) else options.slots
        scheduler = Scheduler(
            self._model.bundle, self._model.runner, slots, drafts=options.drafts, features=options.features
        )
        self.times = scheduler.times
        loading: deque[Future[Loaded]] = deque()
        feed = Feed(requests)
        with ThreadPoolExecutor(READER_THREADS, "images") as pool:
            try:
                yield from self._work(feed, loading, scheduler, pool)
            finally:
                feed.close()
                _cancel(loading)

    def _work(
        self, feed: Feed, loading: deque[Future[Loaded]], scheduler: Scheduler, pool: ThreadPoolExecutor
    ) -> Iterator[Record]:
        while True:
            if self._stopped.is_set():
                _cancel(loading)
                scheduler.cancel()
            else:
                self._take(feed, loading, scheduler, pool)
            if not loading and not scheduler.busy:
                if feed.error is not None and not self._stopped.is_set():
                    raise feed.error
                if feed.ended or self._stopped.is_set():
                    return
                self._idle(lambda: feed.peek(POLL_S))
            while loading and scheduler.waiting < scheduler.slots:
                if scheduler.busy and not loading[0].done():
                    break
                loaded = self._idle(loading.popleft().result)
                if loaded.known:
                    self._keep(loaded.record)
                elif not self._waits_for_twin(loaded) and not self._submitted(loaded, scheduler):
                    yield loaded.record
            if scheduler.busy:
                for generation in scheduler.step():
                    yield from self._finished(generation)

    def _take(self, feed: Feed, loading: deque[Future[Loaded]], scheduler: Scheduler, pool: ThreadPoolExecutor) -> None:
        """Have requests read that are there. One that an earlier run may have died of is worked on by itself."""
        suspects = set() if self._options.under_way is None else self._options.under_way.suspects
        while len(loading) < 2 * scheduler.slots + READER_THREADS:
            request = feed.peek()
            if request is None:
                return
            if (self._is_alone or request.id in suspects) and (loading or scheduler.busy):
                return
            self._is_alone = request.id in suspects
            self.order.append(request.id)
            loading.append(pool.submit(self._loader.load, feed.take()))

    def _keep(self, record: Record) -> None:
        """The record of before still holds; this one has nothing but its question."""
        self.kept += 1

    def _waits_for_twin(self, loaded: Loaded) -> bool:
        """Whether the same is being answered already, so that this one need not be."""
        if not loaded.can_share or loaded.record.key not in self._twins:
            return False
        self._twins[loaded.record.key].append(loaded.record)
        return True

    def _finished(self, generation: Generation) -> Iterator[Record]:
        loaded = self._under_way.pop(generation)
        record = self._loader.finish(loaded.record, generation)
        yield record
        for twin in self._twins.pop(record.key, ()) if loaded.can_share else ():
            yield twin.with_answer_of(record)

    def _idle(self, wait: Callable[[], T]) -> T:
        started = time.perf_counter()
        try:
            return wait()
        finally:
            self.idle_s += time.perf_counter() - started

    def _submitted(self, loaded: Loaded, scheduler: Scheduler) -> bool:
        """Hand a prompt to the scheduler; not where there is none or it does not fit, as the record then says."""
        if loaded.can_share and (same := self._loader.answer_to(loaded.record.key)) is not None:
            loaded.record.with_answer_of(same)
            return False
        generation = self._loader.generation(loaded)
        if generation is None:
            return False
        try:
            scheduler.submit(generation)
        except InputError as error:
            self._loader.fail(loaded.record, error)
            return False
        self._under_way[generation] = loaded
        if loaded.can_share:
            self._twins[loaded.record.key] = []
        return True


def _cancel(loading: deque[Future[Loaded]]) -> None:
    for future in loading:
        future.cancel()
    loading.clear()
