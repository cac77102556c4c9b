"""A job whose pictures and documents come while it runs, and may go or change before their turn."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

from pixtral_runtime.batch.job import Job, JobOptions
from pixtral_runtime.batch.records import Record, Settings
from pixtral_runtime.batch.watched_requests import WatchedRequests
from pixtral_runtime.generation.model import Model
from pixtral_runtime.sources.documents import file_of


class WatchJob(Job):
    """Requests about pictures as they come. One whose file has gone before it was read gets no record.

    `order` begins with the records of earlier runs, whose pictures may have gone. Raises as `WatchedRequests.go_on`.
    """

    def __init__(self, model: Model, requests: WatchedRequests, settings: Settings, options: JobOptions) -> None:
        super().__init__(model, requests, settings, options)
        self._watched = requests
        self._loader.check_same = partial(requests.check_same, settings)
        self._made = set[str]()
        self.order = requests.go_on(options.done, settings)
        requests.order = self.order

    def records(self) -> Iterator[Record]:
        try:
            for record in super().records():
                if _has_gone(record):
                    self._watched.watch.pass_over(file_of(record.images[0].path))
                else:
                    self._made.add(record.id)
                    yield record
                self._watched.under_way.pop(record.id, None)
        finally:
            self._watched.watch.close()

    def _keep(self, record: Record) -> None:
        if record.id not in self._made:
            self._made.add(record.id)
            super()._keep(record)
        if self._watched.sidecars is not None:
            self._watched.sidecars.restore_of(record.id)
        self._watched.under_way.pop(record.id, None)


def _has_gone(record: Record) -> bool:
    """Whether its pictures could not be read because their file is not there any more."""
    is_unread = record.error is not None and any(image.sha256 is None for image in record.images)
    return is_unread and not os.path.lexists(file_of(record.images[0].path))
