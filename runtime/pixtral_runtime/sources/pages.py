"""Which pages of a document are meant, and the items that they make: one a page, or one of all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pixtral_runtime.errors import Option, SettingError
from pixtral_runtime.inputs.conversation import StoredPicture
from pixtral_runtime.sources.file_item import Fit, file_item
from pixtral_runtime.sources.item import BrokenPicture, Item

RANGE = re.compile(r"([0-9]{1,9})(-([0-9]{1,9})?)?")
MOST_CHARACTERS = 100_000  # of an item's text; some thirty pages of a book
CUT = "…"


@dataclass(frozen=True)
class PageRange:
    """Pages from 1 on: (first, last) in the order they are wanted, the last None where it is the document's."""

    ranges: tuple[tuple[int, int | None], ...] = ((1, None),)

    def __str__(self) -> str:
        return ",".join(_written(first, last) for first, last in self.ranges)

    def of(self, count: int) -> tuple[list[int], list[tuple[int, int]]]:
        """The pages that a document of `count` has of them, each once, and the ranges of those that it lacks."""
        present, lacking = dict[int, None](), []
        for first, last in self.ranges:
            end = count if last is None else last
            present |= dict.fromkeys(range(first, min(end, count) + 1))
            if end > count:
                lacking.append((max(first, count + 1), end))
        return list(present), lacking


def parse_pages(text: str) -> PageRange:
    """`1-3,7,10-` as pages. Raises SettingError."""
    ranges = []
    for piece in text.split(","):
        found = RANGE.fullmatch(piece.strip())
        if found is None:
            raise SettingError(f"{piece.strip()!r} is no page and no range of pages", Option("pages", "1-3,7,10-"))
        first = int(found[1])
        last = first if found[2] is None else None if found[3] is None else int(found[3])
        if first < 1:
            raise SettingError(f"page {first}, the first one is 1", Option("pages", "1-3,7,10-"))
        if last is not None and last < first:
            raise SettingError(f"pages {first}-{last} end before they begin", Option("pages", f"{last}-{first}"))
        ranges.append((first, last))
    return PageRange(tuple(ranges))


@dataclass(frozen=True, kw_only=True)
class PageSettings:
    """What is made of a document. `wants_text` has the text read that a PDF holds, `fit` says how large pages get."""

    fit: Fit
    pages: PageRange = PageRange()
    per_document: bool = False
    wants_text: bool = False


def page_items(
    path: Path,
    count: int,
    settings: PageSettings,
    picture: Callable[[int], StoredPicture],
    text: Callable[[int], str] = lambda _: "",
) -> Iterator[Item]:
    """The items of a document with so many pages, of which page `number` is `picture(number)`.

    A page that is named and not there is a broken one, and so is a document none of whose pages is meant.
    """
    numbers, lacking = settings.pages.of(count)
    beyond = [_beyond(path, count, *pages) for pages in lacking]
    if not numbers and not beyond:
        beyond = [_beyond(path, count, count + 1, None)]
    if not settings.per_document:
        for number in numbers:
            yield file_item(path, page_name(path, number), [picture(number)], bounded(text(number)))
        yield from (file_item(path, page.name, [page]) for page in beyond)
        return
    texts = _until_full(map(text, numbers)) if settings.wants_text else ""
    yield file_item(path, str(path), [*map(picture, numbers), *beyond], texts)


def page_name(path: Path, number: int) -> str:
    return f"{path}#page={number}"


def bounded(text: str) -> str:
    """A text of `MOST_CHARACTERS` at most; one that was cut ends so that it shows."""
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + CUT


def _until_full(texts: Iterator[str]) -> str:
    """The texts of pages, no more of them than are needed."""
    found = ""
    for text in texts:
        found = f"{found}\n\n{text}".strip()
        if len(found) > MOST_CHARACTERS:
            break
    return bounded(found)


def _beyond(path: Path, count: int, first: int, last: int | None) -> BrokenPicture:
    """What stands for pages behind the end."""
    asked = f"page {first} was" if last == first else f"pages {_written(first, last)} were"
    has = "1 page" if count == 1 else f"{count} pages"
    all_of_them = Option("pages", "1-", "for as many as there are")
    return BrokenPicture(
        name=page_name(path, first), file=path, problem=f"{asked} asked for, and it has {has}", remedies=(all_of_them,)
    )


def _written(first: int, last: int | None) -> str:
    return str(first) if last == first else f"{first}-{last or ''}"
