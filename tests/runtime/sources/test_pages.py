from __future__ import annotations

from pathlib import Path

import pytest

from pixtral_runtime.errors import ImageError, SettingError
from pixtral_runtime.inputs.conversation import StoredPicture
from pixtral_runtime.sources.item import Item, PictureData
from pixtral_runtime.sources.pages import CUT, MOST_CHARACTERS, PageRange, PageSettings, page_items, parse_pages

SCAN = Path("desk/scan.pdf")


def items(count: int, pages: str = "1-", *, per_document: bool = False, text: str = "") -> list[Item]:
    settings = PageSettings(
        fit=lambda width, height: (16, 16),
        pages=parse_pages(pages),
        per_document=per_document,
        wants_text=bool(text),
    )
    return list(
        page_items(SCAN, count, settings, lambda number: PictureData(name=str(number), data=b""), lambda _: text)
    )


def problem(part: object) -> str:
    assert isinstance(part, StoredPicture)
    with pytest.raises(ImageError) as caught:
        part.read()
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "count", "present"),
    [
        ("1-3,7,10-", 12, [1, 2, 3, 7, 10, 11, 12]),
        ("1-3, 7 ,10-", 9, [1, 2, 3, 7]),
        ("7,1-3", 9, [7, 1, 2, 3]),  # the order counts: it is the prompt's
        ("1-3,2,3-4", 9, [1, 2, 3, 4]),
        ("1-", 3, [1, 2, 3]),
        ("2", 1, []),
    ],
)
def test_pages_are_read_as_printers_read_them(text: str, count: int, present: list[int]) -> None:
    assert parse_pages(text).of(count)[0] == present
    assert parse_pages(str(parse_pages(text))) == parse_pages(text)


@pytest.mark.parametrize("text", ["", "0", "3-1", "-3", "a", "1,", "1-2-3", "1;2", "1.5", "٣", "9999999999"])
def test_what_is_no_range_of_pages_is_refused_with_one_that_is(text: str) -> None:
    with pytest.raises(SettingError) as caught:
        parse_pages(text)
    (option,) = caught.value.options
    assert option.name == "pages" and parse_pages(str(option.value))


def test_a_page_is_an_item_and_names_file_and_page() -> None:
    found = items(12, "1,10-")
    assert [item.id for item in found] == [f"desk/scan.pdf#page={number}" for number in (1, 10, 11, 12)]
    assert {(item.name, item.directory, item.tags, item.text) for item in found} == {("scan", "desk", None, "")}


def test_a_document_is_one_item_of_its_pages() -> None:
    (item,) = items(3, per_document=True)
    assert item.id == "desk/scan.pdf" and [str(part) for part in item.parts] == ["1", "2", "3"]


def test_a_page_behind_the_end_is_a_broken_one_that_says_how_many_there_are() -> None:
    *found, beyond = items(5, "4-,7")
    assert [item.id for item in found] == ["desk/scan.pdf#page=4", "desk/scan.pdf#page=5"]
    assert problem(beyond.parts[0]) == "desk/scan.pdf#page=7: page 7 was asked for, and it has 5 pages"
    (item,) = items(1, "1-3", per_document=True)
    assert problem(item.parts[1]) == "desk/scan.pdf#page=2: pages 2-3 were asked for, and it has 1 page"


def test_a_huge_range_behind_the_end_is_one_item() -> None:
    assert len(items(2, "1-999999999")) == 3


@pytest.mark.parametrize("per_document", [False, True])
def test_a_document_none_of_whose_pages_is_meant_is_not_passed_over(per_document: bool) -> None:
    (item,) = items(5, "10-", per_document=per_document)
    assert "pages 6- were asked for, and it has 5 pages" in problem(item.parts[0])


def test_an_open_range_that_some_documents_do_not_reach_is_no_fault_beside_others() -> None:
    assert [item.id for item in items(2, "1,10-")] == ["desk/scan.pdf#page=1"]


def test_texts_stand_one_below_the_other_and_end_where_they_are_too_long() -> None:
    assert items(2, per_document=True, text="words")[0].text == "words\n\nwords"
    assert [item.text for item in items(2, text="words")] == ["words", "words"]
    page = "x" * (MOST_CHARACTERS // 2 + 10)
    for found in (items(9, per_document=True, text=page)[0], items(1, text=2 * page)[0]):
        assert len(found.text) == MOST_CHARACTERS and found.text.endswith(CUT)


def test_all_pages_are_the_default() -> None:
    assert str(PageRange()) == "1-" and parse_pages("1-") == PageRange()
