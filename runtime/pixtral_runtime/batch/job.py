"""Many requests through one model: threads read images ahead, the scheduler keeps its slots busy.

Records come in the order in which they are done. A broken image gives a record with its error and stops nothing.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from pixtral_runtime.batch.records import Record, Request, Settings, record_key, record_of
from pixtral_runtime.batch.under_way import MOST_DEATHS, UnderWay
from pixtral_runtime.errors import HintWriter, ImageMemoryError, InputError, PixtralError, RequestError, python_hint
from pixtral_runtime.generation.generation import Generation, StageTimes
from pixtral_runtime.generation.model import Model
from pixtral_runtime.generation.scheduler import Scheduler
from pixtral_runtime.inputs.decode_memory import DecodeMemory
from pixtral_runtime.inputs.image import decode_image
from pixtral_runtime.inputs.image_files import read_image_file
from pixtral_runtime.inputs.prompt import Prompt

if TYPE_CHECKING:
    from pixtral_runtime.generation.feature_cache import FeatureCache
    from pixtral_runtime.generation.json_schema import JsonSchema

READER_THREADS = 2  # threads; decoding and scaling one image takes a few per cent of encoding it


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


@dataclass
class _Loaded:
    """A request whose images were read. Without a prompt its record is finished: an error, or `known` from before."""

    request: Request
    record: Record
    prompt: Prompt | None = None
    known: bool = False


class Job:
    """Requests to be answered.

    While and after `records` runs, `times` adds up the model's stages, `idle_s` is how long the model had nothing to do
    but wait for images, and `kept` counts the records of `JobOptions.done` that still hold.
    """

    def __init__(
        self, model: Model, requests: Sequence[Request], settings: Settings, options: JobOptions = JobOptions()
    ) -> None:
        self._model, self._requests, self._settings, self._options = model, requests, settings, options
        self._stopped = threading.Event()
        self._memory = DecodeMemory(READER_THREADS)
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
        loading: deque[Future[_Loaded]] = deque()
        requests = iter(asked)
        try:
            while True:
                if self._stopped.is_set():
                    _cancel(loading)
                    scheduler.cancel()
                else:
                    ahead = max(0, 2 * scheduler.slots + READER_THREADS - len(loading))  # slots may become fewer
                    loading += [pool.submit(self._load, request) for request in islice(requests, ahead)]
                if not loading and not scheduler.busy:
                    return
                while loading and scheduler.waiting < scheduler.slots:
                    if scheduler.busy and not loading[0].done():
                        break
                    loaded = self._wait_for(loading.popleft())
                    if loaded.known:
                        self.kept += 1
                    elif (generation := self._generation(loaded, scheduler)) is None:
                        yield loaded.record
                    else:
                        records[generation] = loaded.record
                if scheduler.busy:
                    for generation in scheduler.step():
                        yield self._finish(records.pop(generation), generation)
        finally:
            _cancel(loading)

    def _wait_for(self, loading: Future[_Loaded]) -> _Loaded:
        started = time.perf_counter()
        try:
            return loading.result()
        finally:
            self.idle_s += time.perf_counter() - started

    def _load(self, request: Request) -> _Loaded:
        """In a thread: from files to a prompt."""
        record = record_of(request, self._settings)
        before, under_way = self._options.done.get(request.id), self._options.under_way
        if under_way is not None:
            under_way.begin(request.id)
        try:
            started = time.perf_counter()
            files = []
            for image in record.images:
                files.append(read_image_file(Path(image.path)))
                image.sha256 = hashlib.sha256(files[-1]).hexdigest()
            record.key = record_key(record.asked, [str(image.sha256) for image in record.images])
            if before is not None and before.key == record.key:
                return _Loaded(request, record, known=True)
            if under_way is not None and request.id in under_way.accused:
                raise RequestError(
                    f"pixtral died {MOST_DEATHS} times while it worked on this, the last time on nothing else",
                    "a smaller picture or a shorter prompt",
                    "delete its line from the results, and resume on a machine with more memory",
                )
            with self._memory.room_for(files):
                prompt = self._prompt(request, record, files, started)
        except InputError as error:
            self._fail(record, error)
            if isinstance(error, ImageMemoryError):
                record.key = None  # so that the next run tries again
                return _Loaded(request, record)
            return _Loaded(request, record, known=before is not None and before.key == record.key)
        return _Loaded(request, record, prompt)

    def _prompt(self, request: Request, record: Record, files: Sequence[bytes], started: float) -> Prompt:
        pictures = []
        for image, data in zip(record.images, files, strict=True):
            pictures.append(decode_image(data, image.path, apply_exif=self._settings.exif).pixels)
            image.width, image.height = pictures[-1].size
        record.times_ms["image"] = _ms_since(started)
        started = time.perf_counter()
        left = iter(pictures)
        messages = [
            replace(m, content=tuple(part if isinstance(part, str) else next(left) for part in m.content))
            for m in request.messages
        ]
        prompt = self._model.prompts.build(messages)
        _ = prompt.row_keys  # hashed here, where there is time
        record.image_tokens, record.prompt_tokens = prompt.image_tokens, len(prompt.token_ids)
        record.times_ms["preprocess"] = _ms_since(started)
        return prompt

    def _generation(self, loaded: _Loaded, scheduler: Scheduler) -> Generation | None:
        """Hand a prompt to the scheduler; None where there is none or it does not fit, as the record then says."""
        if loaded.prompt is None:
            return None
        constraint = self._options.schema.constraint() if self._options.schema else None
        generation = Generation(
            loaded.prompt, loaded.request.max_new_tokens, self._settings.sampling(loaded.request), constraint
        )
        try:
            scheduler.submit(generation)
        except InputError as error:
            self._fail(loaded.record, error)
            return None
        return generation

    def _finish(self, record: Record, generation: Generation) -> Record:
        if generation.error is not None:
            self._fail(record, generation.error)
            return record
        record.answer, record.thinking = self._model.prompts.read_answer(generation.token_ids)
        record.finish_reason, record.new_tokens = generation.finish_reason, len(generation.token_ids)
        record.reused_tokens = generation.reused_tokens
        times = generation.times
        stages = {"vision": times.vision_ms, "prefill": times.prefill_ms, "decode": times.decode_ms}
        record.times_ms |= {name: round(value, 3) for name, value in stages.items()}
        return record

    def _fail(self, record: Record, error: PixtralError) -> None:
        record.error, record.hint = str(error), self._options.write_hint(error)


def _cancel(loading: deque[Future[_Loaded]]) -> None:
    for future in loading:
        future.cancel()
    loading.clear()


def _ms_since(started: float) -> float:
    return round((time.perf_counter() - started) * 1e3, 3)
