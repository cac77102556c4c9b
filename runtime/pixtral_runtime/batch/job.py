"""Many requests through one model: threads read images ahead, the scheduler keeps its slots busy.

Records come in the order in which they are done. A broken image gives a record with its error and stops nothing.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

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
    but wait for images, and `kept` counts the records of `JobOptions.done` that still hold.
    """

    def __init__(
        self, model: Model, requests: Sequence[Request], settings: Settings, options: JobOptions = JobOptions()
    ) -> None:
        self._model, self._requests, self._options = model, requests, options
        self._stopped = threading.Event()
        self._loader = RequestLoader(
            model.prompts, settings, options.schema, options.done, options.under_way, options.write_hint
        )
        self.times = StageTimes()
        self.idle_s = 0.0
        self.kept = 0

    def stop(self) -> None:
        """Start no more answers; those that run are finished. May be called from a signal handler."""
        self._stopped.set()

    def records(self) -> Iterator[Record]:
        """Yield a record for each request, but for those that are done already."""
        options = self._options
        slots = min(options.slots, max(1, len(self._requests)))
        scheduler = Scheduler(
            self._model.bundle, self._model.runner, slots, drafts=options.drafts, features=options.features
        )
        self.times = scheduler.times
        suspects = set() if options.under_way is None else options.under_way.suspects
        alone = [[request] for request in self._requests if request.id in suspects]
        others = [request for request in self._requests if request.id not in suspects]
        with ThreadPoolExecutor(READER_THREADS, "images") as pool:
            for requests in (*alone, others):
                yield from self._work(requests, scheduler, pool)

    def _work(self, asked: Iterable[Request], scheduler: Scheduler, pool: ThreadPoolExecutor) -> Iterator[Record]:
        """Work off some requests, until nothing of them is under way."""
        records: dict[Generation, Record] = {}
        loading: deque[Future[Loaded]] = deque()
        requests = iter(asked)
        try:
            while True:
                if self._stopped.is_set():
                    _cancel(loading)
                    scheduler.cancel()
                else:
                    ahead = max(0, 2 * scheduler.slots + READER_THREADS - len(loading))  # slots may become fewer
                    loading += [pool.submit(self._loader.load, request) for request in islice(requests, ahead)]
                if not loading and not scheduler.busy:
                    return
                while loading and scheduler.waiting < scheduler.slots:
                    if scheduler.busy and not loading[0].done():
                        break
                    loaded = self._wait_for(loading.popleft())
                    if loaded.known:
                        self.kept += 1
                    elif (generation := self._submitted(loaded, scheduler)) is None:
                        yield loaded.record
                    else:
                        records[generation] = loaded.record
                if scheduler.busy:
                    for generation in scheduler.step():
                        yield self._loader.finish(records.pop(generation), generation)
        finally:
            _cancel(loading)

    def _wait_for(self, loading: Future[Loaded]) -> Loaded:
        started = time.perf_counter()
        try:
            return loading.result()
        finally:
            self.idle_s += time.perf_counter() - started

    def _submitted(self, loaded: Loaded, scheduler: Scheduler) -> Generation | None:
        """Hand a prompt to the scheduler; None where there is none or it does not fit, as the record then says."""
        generation = self._loader.generation(loaded)
        if generation is not None:
            try:
                scheduler.submit(generation)
            except InputError as error:
                self._loader.fail(loaded.record, error)
                return None
        return generation


def _cancel(loading: deque[Future[Loaded]]) -> None:
    for future in loading:
        future.cancel()
    loading.clear()
