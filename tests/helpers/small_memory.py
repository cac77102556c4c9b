"""A device whose memory runs out."""

from __future__ import annotations

from typing import Any

from pixtral_runtime.errors import MemoryShortageError


class Small:
    """A session on a device with room for few slots, or few images, at a time."""

    def __init__(self, session: Any, most: int, fed: str) -> None:
        self._session, self._most, self._fed = session, most, fed
        self.refused = 0

    def run(self, feeds: Any, cache: Any = None) -> Any:
        if len(feeds[self._fed]) > self._most:
            self.refused += 1
            raise MemoryShortageError("too little memory")
        return self._session.run(feeds, cache)

    def new_cache(self, slots: int, rows: int) -> Any:
        return self._session.new_cache(slots, rows)
