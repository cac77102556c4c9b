"""Requests made of items: lists and streams give the same ones, and so do their parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import pytest

from pixtral_runtime.batch.item_requests import (
    OUTLINE,
    Questions,
    StreamedRequests,
    outline,
    requests_of_images,
    requests_of_items,
    total_of,
)
from pixtral_runtime.batch.records import Request
from pixtral_runtime.batch.shards import share_of
from pixtral_runtime.inputs.image_files import picture_file
from pixtral_runtime.sources.datasets import JoinedSources
from pixtral_runtime.sources.item import BrokenPicture, Item, PictureData
from pixtral_runtime.sources.pictures import Pictures

PATHS = [Path(f"photos/{n}.png") for n in range(7)]
TWO = Questions(["What is {name}?", "Where in {directory}?"], "Be brief.", 9)


class Stream:
    """Items one by one; `given` counts them over all iterations."""

    def __init__(self, items: Sequence[Item], total: int | None) -> None:
        self._items, self.total, self.given = items, total, 0
        self.files: Sequence[Path] = ()

    def __iter__(self) -> Iterator[Item]:
        for item in self._items:
            self.given += 1
            yield item


def test_a_list_and_a_stream_give_the_same_requests_in_all_their_parts() -> None:
    listed = requests_of_items(Pictures(PATHS), TWO)
    streamed = requests_of_items(Stream(Pictures(PATHS), 7), TWO)
    assert isinstance(listed, Sequence) and isinstance(streamed, StreamedRequests)
    expected = requests_of_images(PATHS, TWO.texts, TWO.system, TWO.max_new_tokens)
    assert list(listed) == list(streamed) == list(streamed) == expected
    assert total_of(listed) == total_of(streamed) == 14
    for index, parts in ((1, 1), (2, 3), (7, 7), (3, 40)):
        for limit in (1, 3, 100):
            part, same = share_of(listed, index, parts)[:limit], share_of(streamed, index, parts)[:limit]
            assert list(part) == list(same) == expected[index - 1 :: parts][:limit]
            assert total_of(part) == total_of(same) == len(list(same))


def test_a_stream_is_read_no_further_than_it_is_wanted() -> None:
    source = Stream([Item(str(n), (PATHS[0],), str(n)) for n in range(100)], None)
    requests = requests_of_items(source, Questions(["What?"]))
    assert total_of(requests) is None and source.given == 0
    assert [request.id for request in outline(requests)] == [str(n) for n in range(OUTLINE)]
    assert source.given == OUTLINE
    assert [request.id for request in requests[:3]] == ["0", "1", "2"]
    assert source.given == OUTLINE + 3


def test_what_is_in_two_sources_is_asked_about_once() -> None:
    first, second = (Stream([Item(name, (Path(name),), name) for name in names], 3) for names in ("abc", "cda"))
    requests = requests_of_items(JoinedSources([first, second]), TWO)
    assert [request.id for request in requests] == [f"{name}#{n}" for name in "abcd" for n in (1, 2)]
    assert [request.id for request in requests[1::2]] == ["a#2", "b#2", "c#2", "d#2"]


def test_what_an_item_brings_stands_in_its_prompt() -> None:
    pages = [PictureData(name=f"page {n}", data=bytes([n])) for n in (1, 2)]
    item = Item("scan.pdf", ("Page 1:", pages[0], "Page 2:", pages[1]), "scan", "inbox", "a, b", "Total {name}: 5")
    questions = Questions(["{name} in {directory} ({tags}): [image] says {text}"])
    request = questions.request(item, 0)
    expected = ("scan in inbox (a, b):", "Page 1:", pages[0], "Page 2:", pages[1], "says Total {name}: 5")
    assert request.messages[-1].content == expected
    assert request.images == tuple(pages) and request.tags == "a, b"
    assert [picture_file(page) for page in pages] == [b"\1", b"\2"]


def test_tags_are_looked_for_only_beside_files_that_bring_none() -> None:
    number = count()

    def tags_of(id: str, picture: Path) -> str:
        return f"{id} {picture} {next(number)}"

    questions = Questions(["{tags}", "?"], tags_of=tags_of)
    file, archived = Item("a", (PATHS[0],), "a"), Item("b", (PictureData(name="b", data=b""),), "b")
    assert questions.request(file, 0).tags == f"a#1 {PATHS[0]} 0"
    assert questions.request(archived, 0).tags == ""
    assert questions.request(file, 1).tags is None


def test_a_broken_picture_says_why() -> None:
    picture = BrokenPicture(name="shard.tar", problem="it ends within c.png", remedies=("fetch it again",))
    with pytest.raises(Exception, match=r"shard\.tar: it ends within c\.png") as caught:
        picture.read()
    assert caught.value.hint == "fetch it again"  # type: ignore[attr-defined]
    assert Request("a", ()).images == ()
