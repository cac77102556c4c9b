"""A watch whose thread puts what it finds into a queue, and looks so often that tests need not wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

from PIL import Image

from pixtral_runtime.sources.watch import Watch

SHORT: dict[str, Any] = {"poll_s": 0.01, "settle_s": 0.05, "patience_s": 0.2}
GIVE_UP_S = 20.0


class Watching:
    """What a watch gave and said, as it comes."""

    def __init__(self, folders: Sequence[Path], **options: Any) -> None:
        self.notes: Queue[str] = Queue()
        self._given: Queue[str] = Queue()
        self.watch = Watch(folders, note=self.notes.put, **(SHORT | options))

    def run(self) -> None:
        for item in self.watch:
            self._given.put(item.id)

    def next(self, count: int = 1) -> list[str]:
        """The names of the next pictures, waited for."""
        return [Path(self._given.get(timeout=GIVE_UP_S)).name for _ in range(count)]

    def said(self) -> str:
        """The next note, waited for."""
        return self.notes.get(timeout=GIVE_UP_S)

    def nothing_before(self, marker: Path) -> None:
        """Put a picture there and see that it is the next one."""
        write_picture(marker)
        assert self.next() == [marker.name]


@contextmanager
def watching(*folders: Path, **options: Any) -> Iterator[Watching]:
    found = Watching(folders, **options)
    thread = threading.Thread(target=found.run, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        found.watch.close()
        thread.join(GIVE_UP_S)
        assert not thread.is_alive()


def write_picture(path: Path, colour: str = "red") -> Path:
    """A whole picture, put into its place at once."""
    made = path.with_name(f".{path.name}.making")
    Image.new("RGB", (48, 48), colour).save(made, "JPEG" if path.suffix == ".jpg" else "PNG")
    return made.replace(path)
