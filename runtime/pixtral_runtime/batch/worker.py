"""A bundle opened for jobs from plain values: in this process, or in a worker process of a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pixtral_runtime.batch.fit import choose_slots, most_rows
from pixtral_runtime.batch.item_requests import Requests, outline
from pixtral_runtime.batch.job import Job, JobOptions
from pixtral_runtime.batch.records import Record, Settings
from pixtral_runtime.batch.under_way import UnderWay
from pixtral_runtime.batch.watch_job import WatchJob
from pixtral_runtime.batch.watched_requests import WatchedRequests
from pixtral_runtime.bundle.manifest import open_bundle
from pixtral_runtime.errors import BundleError, HintWriter, python_hint
from pixtral_runtime.generation.feature_cache import DEFAULT_LIMIT_BYTES, FeatureCache
from pixtral_runtime.generation.json_schema import compile_schema
from pixtral_runtime.generation.model import Model, load_bundle
from pixtral_runtime.inputs.preprocess import default_preprocess
from pixtral_runtime.inputs.prompt import PromptBuilder


@dataclass(frozen=True)
class WorkerOptions:
    """How a worker works. None of it changes an answer, except `schema`, which `Settings` names by its hash.

    `batch` None takes as many slots as fit into `memory_bytes`, or as pay where that is None as well. `schema` is the
    text of a JSON schema.
    """

    backend: str = "auto"
    threads: int = 0
    batch: int | None = None
    memory_bytes: int | None = None
    drafts: int = 0
    schema: str | None = None
    embedding_cache: Path | None = None
    embedding_cache_bytes: int = DEFAULT_LIMIT_BYTES
    write_hint: HintWriter = python_hint  # a function of a module, so that it travels to other processes


class Worker:
    """A bundle with preprocessing, schema and caches; its graphs are loaded with the first job, and for its length.

    Raises InputError and MachineError as `open_bundle`, `Preprocess`, `compile_schema` and `load_bundle` do.
    """

    def __init__(self, bundle: Path, settings: Settings, options: WorkerOptions) -> None:
        self.settings, self._options = settings, options
        opened = open_bundle(bundle)
        if opened.fingerprint != settings.bundle:  # replaced since, or another one on this machine
            raise BundleError(
                f"{bundle} is {opened.fingerprint}, and the job is for {settings.bundle}", "the same command again"
            )
        preprocess = default_preprocess(
            opened, mode=settings.preprocess, max_side=settings.max_image_side, image_tokens=settings.image_tokens
        )
        self.prompts = PromptBuilder(opened, preprocess)
        self._rows = 0  # of the longest answer so far
        self._schema = None if options.schema is None else compile_schema(options.schema, self.prompts, "the schema")
        self._features = (
            None
            if options.embedding_cache is None
            else FeatureCache(options.embedding_cache, opened.fingerprint, options.embedding_cache_bytes)
        )

    @cached_property
    def model(self) -> Model:
        options = self._options
        bundle, slots = self.prompts.bundle, options.batch
        return load_bundle(
            bundle, self.prompts, threads=options.threads, backend=options.backend, slots=slots, rows=self._rows
        )

    def _make_room(self, rows: int) -> None:
        """Load engines of so many cache rows for a job: other ones where those of the job before have fewer."""
        before, self._rows = self._rows, max(rows, self._rows)
        if "model" in self.__dict__ and before <= (self.model.runner.sessions.context or before) < rows:
            del self.model

    def job(self, requests: Requests, done: Mapping[str, Record], under_way: UnderWay | None = None) -> Job:
        """A job of these requests; those whose record in `done`, by id, still holds are left out."""
        options, judged = self._options, outline(requests)
        if judged and self.prompts.bundle.engines:
            self._make_room(most_rows(self.prompts, judged))
        slots = choose_slots(self.model, judged, options.batch, options.memory_bytes)
        job_options = JobOptions(
            slots, options.drafts, self._schema, self._features, done, under_way, options.write_hint
        )
        if isinstance(requests, WatchedRequests):
            return WatchJob(self.model, requests, self.settings, job_options)
        return Job(self.model, requests, self.settings, job_options)
