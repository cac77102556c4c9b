"""The Batch API of a service: its folder, what may lie there, and who works on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pixtral_runtime.batch.records import Settings
from pixtral_runtime.errors import InputError, Option, unwritable
from pixtral_runtime.files import open_locked
from pixtral_runtime.generation.model import Model
from pixtral_runtime.generation.sampling import sampling_of
from pixtral_runtime.server.batch_store import BatchStore
from pixtral_runtime.server.batch_worker import BatchWork, BatchWorker
from pixtral_runtime.server.file_store import FileStore
from pixtral_runtime.server.media import Media
from pixtral_runtime.server.model_loop import ModelLoop

FOLDER = Option("batch_api_dir", "DIR")


@dataclass(frozen=True)
class BatchOptions:
    """Where files and batches lie, and how many. OpenAI takes as many requests of a batch, and files as long."""

    folder: Path
    file_bytes: int = 200_000_000
    requests: int = 50_000
    files: int = 1_000
    batches: int = 1_000


class BatchApi:
    """Files and batches of a service, which are one server's at a time. Raises InputError, MachineError."""

    def __init__(
        self,
        options: BatchOptions,
        model: Model,
        media: Media,
        loop: ModelLoop,
        free_slots: Callable[[], int],
        max_new_tokens: int | None,
    ) -> None:
        """`free_slots` is how many slots live requests leave, `max_new_tokens` as in `ServiceOptions`."""
        self.options = options
        folder = options.folder
        try:
            self._lock = open_locked(folder / ".lock")
            self.files = FileStore(folder / "files")
            self.batches = BatchStore(folder / "batches")
        except BlockingIOError as error:
            raise InputError(f"{folder} is in use by another server", FOLDER) from error
        except OSError as error:
            raise unwritable(folder, error, FOLDER) from error
        look, drawn = model.prompts.preprocess, sampling_of(model.bundle)
        settings = Settings(
            model.bundle.fingerprint,
            *(look.mode, look.max_side, look.image_tokens, media.apply_exif, drawn.temperature, drawn.top_p),
        )
        limit = max_new_tokens or loop.scheduler.context
        work = BatchWork(model.prompts, settings, media, loop, free_slots, limit, options.requests)
        self.worker = BatchWorker(self.batches, self.files, work)

    def stop(self) -> None:
        self.worker.stop()
        self._lock.close()
