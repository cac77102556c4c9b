"""Every question about every item of a source, made when it is wanted: a list of them, or a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from pixtral_runtime.batch.prompt_template import PromptTemplate, read_tags
from pixtral_runtime.batch.records import Request
from pixtral_runtime.inputs.conversation import Message
from pixtral_runtime.sources.item import Item, Source
from pixtral_runtime.sources.pictures import Pictures

OUTLINE = 8  # requests of a stream, of which each may hold a picture's file

ReadTags = Callable[[str, Path], str]
"""The tags of a picture, from the id of the request and the picture's path."""


@dataclass(frozen=True)
class Questions:
    """What is asked about each item. The id of a request is its item's, with `#1`, `#2`, … behind it for several.

    Placeholders are filled in (`PromptTemplate`), tags that an item does not bring from `tags_of`. Raises SettingError
    for a question that shows its pictures twice.
    """

    texts: Sequence[str]
    system: str | None = None
    max_new_tokens: int = 128
    tags_of: ReadTags = lambda _, picture: read_tags(picture, None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_templates", [PromptTemplate(text) for text in self.texts])

    @property
    def templates(self) -> Sequence[PromptTemplate]:
        templates: list[PromptTemplate] = self.__dict__["_templates"]
        return templates

    def request(self, item: Item, index: int) -> Request:
        """Question `index` about an item. Raises InputError where tags cannot be read."""
        template = self.templates[index]
        id = f"{item.id}#{index + 1}" if len(self.texts) > 1 else item.id
        tags = None
        if template.has_tags:
            first = item.parts[0]
            tags = item.tags if item.tags is not None else self.tags_of(id, first) if isinstance(first, Path) else ""
        instructions = () if self.system is None else (Message("system", (self.system,)),)
        asked = Message("user", template.content(item if tags is None else replace(item, tags=tags)))
        return Request(id, (*instructions, asked), self.max_new_tokens, tags=tags)


class ListedRequests(Sequence[Request]):
    """Every question about items of which there is a list. Questions about one item follow each other."""

    def __init__(self, items: Sequence[Item], questions: Questions, picked: range | None = None) -> None:
        self._items, self._questions = items, questions
        self._picked = range(len(items) * len(questions.texts)) if picked is None else picked

    def __len__(self) -> int:
        return len(self._picked)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return ListedRequests(self._items, self._questions, self._picked[index])
        item, question = divmod(self._picked[index], len(self._questions.texts))
        return self._questions.request(self._items[item], question)


class StreamedRequests:
    """Every question about items that come one after the other; each iteration begins anew. A slice is a stream too."""

    def __init__(self, source: Source, questions: Questions, parts: Sequence[slice] = ()) -> None:
        self._source, self._questions, self._parts = source, questions, parts

    @property
    def total(self) -> int | None:
        """How many there are; None where nobody knows yet."""
        if self._source.total is None:
            return None
        numbers = range(self._source.total * len(self._questions.texts))
        for part in self._parts:
            numbers = numbers[part]
        return len(numbers)

    def __getitem__(self, part: slice) -> StreamedRequests:
        return StreamedRequests(self._source, self._questions, (*self._parts, part))

    def __iter__(self) -> Iterator[Request]:
        requests: Iterator[Request] = (request for item in self._source for request in self._requests_of(item))
        for part in self._parts:
            requests = islice(requests, part.start, part.stop, part.step)
        return requests

    def _requests_of(self, item: Item) -> Iterable[Request]:
        return (self._questions.request(item, index) for index in range(len(self._questions.texts)))

    def outline(self) -> Sequence[Request]:
        """Some that stand for all."""
        return list(islice(self, OUTLINE))


Requests = Sequence[Request] | StreamedRequests
"""What a job is asked, as often as somebody iterates."""


def requests_of_items(source: Source, questions: Questions) -> Requests:
    """Every question about every item: a list where the items are one."""
    return ListedRequests(source, questions) if isinstance(source, Sequence) else StreamedRequests(source, questions)


def total_of(requests: Requests) -> int | None:
    """How many they are; None where nobody knows yet."""
    return len(requests) if isinstance(requests, Sequence) else requests.total


def requests_of_images(
    paths: Iterable[Path],
    questions: Sequence[str],
    system: str | None,
    max_new_tokens: int,
    tags_of: ReadTags = lambda _, picture: read_tags(picture, None),
) -> list[Request]:
    """Every question about every file of a picture. Raises as `Questions` does, and for tags that cannot be read."""
    return list(ListedRequests(Pictures(paths), Questions(questions, system, max_new_tokens, tags_of)))


def outline(requests: Requests) -> Sequence[Request]:
    """The requests that stand for all where something is judged beforehand: all of a list, the first of a stream."""
    return requests if isinstance(requests, Sequence) else requests.outline()
