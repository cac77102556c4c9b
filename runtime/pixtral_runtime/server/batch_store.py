"""Batches and what has become of them, in a folder: a JSON and a results file for each."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pixtral_runtime.files import write_atomically
from pixtral_runtime.json_data import from_json
from pixtral_runtime.server.file_store import new_id
from pixtral_runtime.server.problems import Problem

BATCH_ID = re.compile(r"batch_[0-9a-f]{24}")
WINDOW_S = 24 * 60 * 60
OPEN = ("validating", "in_progress", "finalizing", "cancelling")
ENDED = ("completed", "failed", "expired", "cancelled")


@dataclass(frozen=True)
class LineProblem:
    """Why a batch could not be done: OpenAI's name of the mistake, and where it is."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True)
class Batch:
    """Fields as OpenAI's API has them. Moments in seconds of Unix time."""

    id: str
    input_file_id: str
    endpoint: str
    completion_window: str
    created_at: int
    expires_at: int
    model: str
    metadata: dict[str, str] | None = None
    status: str = "validating"
    errors: tuple[LineProblem, ...] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As OpenAI's API shows it."""
        fields = asdict(self)
        counts = {name: fields.pop(name) for name in ("total", "completed", "failed")}
        errors = [asdict(error) for error in self.errors]
        return fields | {
            "object": "batch",
            "errors": {"object": "list", "data": errors} if errors else None,
            "request_counts": counts,
        }


class BatchStore:
    """Batches by id, the oldest first. May be used by many threads."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._lock = threading.Lock()
        found = [batch for path in folder.glob("*.json") if (batch := _read(path)) is not None]
        self._batches = {batch.id: batch for batch in sorted(found, key=lambda batch: (batch.created_at, batch.id))}

    def all(self) -> list[Batch]:
        with self._lock:
            return list(self._batches.values())

    def get(self, id: str) -> Batch | None:
        return self._batches.get(id)

    def results(self, id: str) -> Path:
        return self._folder / f"{id}.results.jsonl"

    def create(
        self, input_file_id: str, endpoint: str, model: str, metadata: dict[str, str] | None, most: int
    ) -> Batch:
        """A new one. Of `most` that are kept the oldest that has ended is forgotten. Raises Problem, OSError."""
        now = int(time.time())
        batch = Batch(new_id("batch_"), input_file_id, endpoint, "24h", now, now + WINDOW_S, model, metadata)
        with self._lock:
            while len(self._batches) >= most:
                ended = next((one for one in self._batches.values() if one.status in ENDED), None)
                if ended is None:
                    raise Problem(429, f"{most} batches are not done yet, and no more may wait", code="queue_full")
                del self._batches[ended.id]
                for path in (self._state(ended.id), self.results(ended.id)):
                    path.unlink(missing_ok=True)
            self._save(batch)
        return batch

    def change(self, id: str, status: str, *, unless: Sequence[str] = (), **values: Any) -> Batch:
        """Give a batch another status, and note when; not one of `unless`. Raises OSError."""
        with self._lock:
            batch = self._batches[id]
            if batch.status in unless:
                return batch
            moment = {f"{status}_at": int(time.time())}
            batch = replace(batch, **{"status": status, **moment, **values})
            self._save(batch)
            return batch

    def count(self, id: str, completed: int, failed: int) -> None:
        """How far it is; the results file knows it for good."""
        with self._lock:
            self._batches[id] = replace(self._batches[id], completed=completed, failed=failed)

    def add(self, id: str, completed: int, failed: int) -> None:
        batch = self._batches[id]
        self.count(id, batch.completed + completed, batch.failed + failed)

    def _state(self, id: str) -> Path:
        return self._folder / f"{id}.json"

    def _save(self, batch: Batch) -> None:
        write_atomically(self._state(batch.id), json.dumps(asdict(batch)).encode())
        self._batches[batch.id] = batch


def _read(path: Path) -> Batch | None:
    with suppress(OSError, ValueError, TypeError, RecursionError):
        batch = from_json(Batch, json.loads(path.read_bytes()))
        if batch.id == path.stem and BATCH_ID.fullmatch(batch.id):
            return batch
    return None
