"""What a source of pictures gives: one item for each request that is to be made of it, in a stable order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pixtral_runtime.errors import ImageError, Remedy
from pixtral_runtime.inputs.conversation import StoredPicture


@dataclass(frozen=True)
class Item:
    """A picture, or several that belong together: the pages of a document, the frames of a video.

    `id` names it within its job: `photos/a.jpg`, `shard-000.tar/000123.jpg`, `rows.parquet/17`, `scan.pdf#page=3`.
    `parts` stand where the prompt shows the picture, with texts between them where those belong there. A prompt may ask
    for `name` and `directory`, for `tags`, None where they are to be looked for beside the picture, and for `text`, as
    a document holds it.
    """

    id: str
    parts: tuple[str | Path | StoredPicture, ...]
    name: str
    directory: str = ""
    tags: str | None = None
    text: str = ""


class Source(Protocol):
    """Items in their order, as often as somebody asks: each iteration begins anew.

    Opening a source raises InputError where nothing can come of it. What turns out broken on the way becomes an item
    whose picture is a `BrokenPicture`, so that its record says so and the rest is worked off.
    """

    @property
    def files(self) -> Sequence[Path]:
        """The files on the disk that it reads, which nobody may write meanwhile."""

    @property
    def total(self) -> int | None:
        """How many items there are; None where only reading it all would tell."""

    def __iter__(self) -> Iterator[Item]: ...


@dataclass(frozen=True, kw_only=True)
class PictureData(StoredPicture):
    """A picture's file that was read already, from a stream."""

    data: bytes

    def read(self) -> bytes:
        return self.data


@dataclass(frozen=True, kw_only=True)
class BrokenPicture(StoredPicture):
    """What cannot be read, and why."""

    problem: str
    remedies: tuple[Remedy, ...] = ()

    def read(self) -> bytes:
        raise ImageError(f"{self.name}: {self.problem}", *self.remedies)
