"""Workers that ask one bundle with several budgets of image tokens, and load its model once for all of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pixtral_runtime.batch.records import Settings
from pixtral_runtime.batch.worker import Worker, WorkerOptions
from pixtral_runtime.bundle.manifest import open_bundle
from pixtral_runtime.generation.model import Model


class SharedWorkers:
    """Makes workers one after the other. One model is loaded at a time, and workers of a bundle share it."""

    def __init__(self, options: WorkerOptions) -> None:
        self._options = options
        self._last: _SharingWorker | None = None

    @property
    def backend(self) -> str:
        """What runs the last worker's bundle, and why."""
        return "" if self._last is None else self._last.model.backend

    def worker(self, bundle: Path, settings: Settings, batch: int | None = None) -> Worker:
        """A worker of a bundle; the last one where it is asked for again. Raises what `Worker` raises.

        One with a smaller `batch` than that of the options is made for a while, and is not the last one.
        """
        last = self._last
        if last is not None and last.prompts.bundle.path != open_bundle(bundle).path:
            last = self._last = None  # lets go of its model before another one is loaded
        if last is None or last.settings != settings:
            self._last = last = _SharingWorker(bundle, settings, self._options, last)
        if batch in (None, self._options.batch):
            return last
        return _SharingWorker(bundle, settings, replace(self._options, batch=batch), last)


class _SharingWorker(Worker):
    """A worker with the model of another one of the same bundle, whose pictures had another budget."""

    def __init__(self, bundle: Path, settings: Settings, options: WorkerOptions, other: _SharingWorker | None) -> None:
        super().__init__(bundle, settings, options)
        if other is not None and "model" in other.__dict__:
            self._rows = other._rows
            model = other.model
            self.model = Model(model.bundle, model.runner.sessions, self.prompts, model.backend)
