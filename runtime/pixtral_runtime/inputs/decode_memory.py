"""Pictures that several threads decode at a time: side by side where memory holds them all, else one after another."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from pixtral_runtime.inputs.image import BYTES_PER_PIXEL, stored_size, too_little_memory


class DecodeMemory:
    """Shared by so many threads."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self.alone = threading.Lock()

    @contextmanager
    def room_for(self, files: Sequence[bytes]) -> Iterator[None]:
        """While these files' pictures are decoded and scaled."""
        sizes = [size for data in files if (size := stored_size(data)) is not None]
        needed_bytes = self._threads * BYTES_PER_PIXEL * sum(width * height for width, height in sizes)
        with nullcontext() if too_little_memory(needed_bytes) is None else self.alone:
            yield
