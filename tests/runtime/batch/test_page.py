"""The page of a job in a real browser: what is in view, filters, order, keys, and text that stays text."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from helpers.browser import Page
from helpers.result_pages import (
    ANSWERS,
    ARABIC,
    FOCUS,
    NAMES,
    NASTY,
    choose,
    failed,
    many,
    page,
    record,
    show,
)
from pixtral_runtime.batch.page import THUMBNAIL_PX, RecordNotes, thumbnail, write_report
from pixtral_runtime.batch.records import ImageInfo, Record


class Scripts(HTMLParser):
    """What a page would load from elsewhere, and its scripts by their types."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.scripts: list[tuple[str, str]] = []
        self._type: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [str(value) for name, value in attrs if name in ("src", "href") or name.startswith("on")]
        self._type = str(dict(attrs).get("type")) if tag == "script" else None

    def handle_data(self, data: str) -> None:
        if self._type is not None:
            self.scripts.append((self._type, data))
            self._type = None


def test_the_page_loads_nothing_and_holds_every_record(tmp_path: Path, photo: Path) -> None:
    path = page([record("a", picture=photo), record(NASTY, answer=NASTY), failed("b")], tmp_path)
    text = path.read_text(encoding="utf-8")
    parser = Scripts()
    parser.feed(text)
    assert parser.loaded == []
    assert "run &lt;1&gt;" in text and "1,234" in text
    (_, held), (kind, script), (_, picture) = parser.scripts
    records = json.loads(held)["records"]
    assert [one["id"] for one in records] == ["a", NASTY, "b"]
    assert records[0]["images"][0][:2] == [str(photo), 0]
    assert Image.open(io.BytesIO(base64.b64decode(picture))).size == (160, 80)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert kind == "None" and f"script-src 'sha256-{digest}'\"" in text
    assert "default-src 'none'" in text
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_title_may_hold_anything(tmp_path: Path) -> None:
    write_report([record("a")], tmp_path / "r.html", title="\udcff {{summary}}", summary={"output": "\udcfe"})
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "{{summary}}" in text
    assert text.count("<dt>") == 1


def test_thumbnails_are_small_and_upright(photo: Path) -> None:
    picture, exif = Image.open(photo), Image.Exif()
    exif[0x0112] = 6
    for sides in ((640, 320), (4000, 2000)):
        turned = io.BytesIO()
        picture.resize(sides).save(turned, "JPEG", exif=exif)
        for apply, size in ((True, (80, 160)), (False, (160, 80))):
            data = thumbnail(turned.getvalue(), apply_exif=apply)
            assert data is not None
            assert Image.open(io.BytesIO(data)).size == size
    assert max(size) == THUMBNAIL_PX
    assert thumbnail(b"no") is None
    assert thumbnail(turned.getvalue()[:-2000]) is None


class Again:
    """Records that are made anew each time, as those of a file are."""

    def __iter__(self) -> Iterator[Record]:
        for index in range(40):
            yield record(f"{index}", images=[ImageInfo(f"{index // 2}.png"), ImageInfo("both.png")])


def test_records_are_iterated_and_their_pictures_come_from_wherever_they_are(tmp_path: Path) -> None:
    def picture_of(one: Record, index: int) -> bytes | None:
        if one.id == "7" and index == 0:
            return None
        made = io.BytesIO()
        Image.new("RGB", (8, 8), (5 * int(one.id), 0, 255 * index)).save(made, "PNG")
        return made.getvalue()

    path = tmp_path / "r.html"
    write_report(Again(), path, title="t", summary={}, picture_of=picture_of)
    parser = Scripts()
    parser.feed(path.read_text(encoding="utf-8"))
    thumbnails = re.findall(r'id="p(\d+)" type="text/plain">(.*?)<', path.read_text(encoding="utf-8"))
    assert [int(number) for number, _ in thumbnails] == list(range(80))
    assert thumbnails[14][1] == ""
    for number, data in thumbnails[:14] + thumbnails[15:]:
        red, _, blue = Image.open(io.BytesIO(base64.b64decode(data))).getpixel((4, 4))  # type: ignore[misc]
        assert abs(red - 5 * (int(number) // 2)) < 8 and abs(blue - 255 * (int(number) % 2)) < 8
    with pytest.raises(TypeError, match="gone through twice"):
        write_report(iter(Again()), path, title="t", summary={})


def test_a_picture_of_several_questions_is_there_once(tmp_path: Path, photo: Path) -> None:
    path = page([record("a", picture=photo), record("b", picture=photo), record("c", picture="gone.png")], tmp_path)
    assert re.findall(r'id="p(\d)"', path.read_text(encoding="utf-8")) == ["0", "1"]


def test_a_browser_shows_errors_first_filters_and_sorts(tab: Page, tmp_path: Path, photo: Path) -> None:
    records = [
        record("b", picture=photo, times_ms={"decode": 9.0}),
        record("c", finish_reason="length", new_tokens=64),
        failed("d"),
        record("a", times_ms={"decode": 900.0}, new_tokens=2),
        record("e", answer=NASTY, images=[ImageInfo(str(tmp_path / "gone.png"))]),
        record(ARABIC, answer=ARABIC, question=NASTY, thinking=NASTY),
    ]
    show(tab, records, tmp_path)
    assert tab.run(NAMES) == ["d", "c", "b", "a", "e", ARABIC]
    assert tab.run("[at('count').value, document.title]") == ["6 records", "run <1>"]
    assert tab.run("[...document.images].map(one => [one.src.slice(0, 22), one.naturalWidth])") == [
        ["data:image/jpeg;base64", 160]
    ]
    assert tab.run("document.querySelector('.none').textContent") == "no picture"
    assert tab.run(f"{ANSWERS}[3]") == NASTY
    assert tab.run(f"{ANSWERS}[4]") == ARABIC
    assert tab.run("document.querySelectorAll('li b, li script').length") == 0
    found = {order: choose(tab, "order", order) for order in ("name", "slow", "long", "asked")}
    assert found["name"] == ["a", "b", "c", "d", "e", ARABIC]
    assert found["slow"][0] == "a" and found["slow"][-1] == "b"
    assert found["long"][0] == "c"
    assert found["asked"] == ["b", "c", "d", "a", "e", ARABIC]
    only = {status: choose(tab, "status", status) for status in ("errors", "cut", "whole", "edited")}
    assert only == {"errors": ["d"], "cut": ["c"], "whole": ["b", "a", "e", ARABIC], "edited": []}
    choose(tab, "status", "all")
    assert choose(tab, "text", "ANSWER TO C") == ["c"]
    assert choose(tab, "text", "photo.png") == ["b"]
    assert choose(tab, "text", "قطة") == [ARABIC]
    assert (choose(tab, "text", "nowhere"), tab.run("at('count').value")) == ([], "nothing")
    assert choose(tab, "text", "is damaged") == ["d"]
    assert tab.run("at('count').value") == "1 of 6"


def test_notes_are_shown_and_filter_by_their_marks(tab: Page, tmp_path: Path) -> None:
    notes = {"a": RecordNotes(("wrong",), (("reference", "<i>blue</i>"),)), "b": RecordNotes(("wrong", "flipped"), ())}
    show(tab, [record("a"), record("b"), record("c")], tmp_path, notes=notes)
    options = tab.run("[...at('status').options].map(one => one.value)")
    assert options == ["all", "errors", "cut", "whole", "edited", "wrong", "flipped"]
    assert tab.run("at('status').options[5].textContent") == "wrong (2)"
    assert (choose(tab, "status", "wrong"), choose(tab, "status", "flipped")) == (["a", "b"], ["b"])
    choose(tab, "status", "all")
    assert choose(tab, "text", "<i>blue") == ["a"]
    assert tab.run("document.querySelector('p.note').textContent") == "reference: <i>blue</i>"


def test_only_rows_in_view_are_in_the_document(tab: Page, tmp_path: Path) -> None:
    show(tab, many(2000), tmp_path)
    assert 3 <= tab.run("document.querySelectorAll('li').length") <= 60
    assert tab.run("at('list').firstElementChild.ariaSetSize") == "2000"
    tab.run("scrollTo(0, document.documentElement.scrollHeight)")
    tab.until("at('list').lastElementChild.ariaPosInSet === '2000'")
    tab.until("Math.abs(at('list').lastElementChild.getBoundingClientRect().bottom - innerHeight) < 40")
    assert tab.run("document.querySelectorAll('li').length") <= 60
    assert tab.run(NAMES)[-1] == "photos/01999.jpg"
    assert choose(tab, "order", "asked")[0] == "photos/00000.jpg"
    assert choose(tab, "text", "number 7.") == ["photos/00007.jpg"]
    assert 0 <= tab.run("document.querySelector('li').getBoundingClientRect().top - at('bar').offsetHeight") < 200


IN_VIEW = """(() => {
  const rows = [...document.querySelectorAll('li')].filter(one => one.getBoundingClientRect().bottom > 100);
  return [rows[0].querySelector('h2').textContent, rows[0].getBoundingClientRect().top];
})()"""


def test_what_is_read_stays_where_it_is_while_rows_above_turn_out_higher(tab: Page, tmp_path: Path) -> None:
    show(tab, many(500), tmp_path)
    tab.run("list.heights.fill(20), list.sum(), list.fill(), scrollTo(0, 4000)")  # wrong by far
    tab.until("list.first > 50")
    for _ in range(60):
        name, top = tab.run(IN_VIEW)
        before = tab.run("(scrollBy(0, -120), scrollY)")
        tab.run("new Promise(next => requestAnimationFrame(() => requestAnimationFrame(next)))")
        now = tab.run(f"list.rows.get({int(name[7:12])}).getBoundingClientRect().top")
        if before == 0:
            break
        assert abs(now - (top + 120)) < 2
    tab.run("scrollTo(0, 0)")
    tab.until("list.first === 0 && at('list').style.paddingTop === '0px'")
    tab.run("list.heights.fill(20), list.sum(), list.fill(), scrollTo(0, document.documentElement.scrollHeight)")
    tab.until("at('list').lastElementChild.ariaPosInSet === '500'")
    assert tab.run("at('list').lastElementChild.getBoundingClientRect().top") < 900


def test_rows_follow_one_another_without_gaps_wherever_one_jumps(tab: Page, tmp_path: Path) -> None:
    show(tab, many(1000), tmp_path)
    for share in (0.5, 0.02, 0.97, 0.33, 1.0, 0.0):
        tab.run(f"scrollTo(0, {share} * document.documentElement.scrollHeight)")
        tab.run("new Promise(next => requestAnimationFrame(() => requestAnimationFrame(next)))")
        places = tab.run("[...document.querySelectorAll('li')].map(one => Number(one.ariaPosInSet))")
        assert places == list(range(places[0], places[0] + len(places)))
        top, bottom = tab.run("[at('list').firstElementChild.getBoundingClientRect().top,"
                              " at('list').lastElementChild.getBoundingClientRect().bottom]")  # fmt: skip
        assert (top <= 0 or places[0] == 1) and (bottom >= 900 or places[-1] == 1000)


def test_a_narrow_window_shows_the_same_row(tab: Page, tmp_path: Path) -> None:
    show(tab, many(300), tmp_path)
    tab.run("focusRow(150)")
    name, _ = tab.run(IN_VIEW)
    try:
        tab.size(390, 800)
        tab.until("list.width < 390")
        assert tab.run("document.documentElement.scrollWidth") <= 390
        assert tab.run(IN_VIEW)[0] == name
    finally:
        tab.size(1200, 900)


def test_all_is_done_by_the_keyboard(tab: Page, tmp_path: Path) -> None:
    show(tab, many(200), tmp_path)
    for key, name in (
        ("j", "00000"),
        ("j", "00001"),
        ("j", "00002"),
        ("k", "00001"),
        ("ArrowDown", "00002"),
        ("ArrowUp", "00001"),
    ):
        tab.press(key)
        assert tab.run(FOCUS) == f"photos/{name}.jpg"
    for _ in range(40):
        tab.press("j")
    assert tab.run(FOCUS) == "photos/00041.jpg"
    top, bottom = tab.run("(({top, bottom}) => [top, bottom])(document.activeElement.getBoundingClientRect())")
    assert top >= 0 and bottom <= 901
    tab.press("e", control=True)
    assert tab.run("editing") is None
    tab.press("e")
    assert tab.run("document.activeElement.value").startswith("number 41.")
    tab.press("j")
    tab.press("Escape")
    assert tab.run("[edits.size, editing]") == [0, None]
    tab.press("Enter")
    tab.type("!")
    tab.press("Enter", control=True)
    assert tab.run("edits.get(41)").endswith("!")
    tab.press("/")
    assert tab.run(FOCUS) == "text"
    tab.type("number 7")
    tab.press("j")
    assert tab.run("[at('text').value, at('count').value]") == ["number 7j", "nothing"]
    choose(tab, "text", "number 77.")
    tab.press("Escape")
    assert tab.run(FOCUS) == "photos/00077.jpg"
    assert tab.run("at('help').hidden")
    tab.press("?")
    assert tab.run("[at('help').hidden, at('keys').getAttribute('aria-expanded')]") == [False, "true"]
    tab.run("isDownloaded = true")


def colours(tab: Page) -> tuple[float, int]:
    """The mean brightness of what is shown, and how many colours there are."""
    picture = Image.open(io.BytesIO(tab.screenshot())).convert("RGB")
    grey = picture.convert("L").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    assert isinstance(grey, int | float)
    return grey, len(picture.getcolors(1 << 20) or [])


def test_it_is_dark_where_the_system_is_or_the_reader_wants_it(tab: Page, tmp_path: Path, photo: Path) -> None:
    records = [*many(30), failed("x"), record("y", picture=photo)]
    show(tab, records, tmp_path)
    try:
        tab.prefer("light")
        light, different = colours(tab)
        assert light > 200 and different > 50
        tab.prefer("dark")
        dark, different = colours(tab)
        assert dark < 70 and different > 50
        tab.run("at('theme').click()")
        assert colours(tab)[0] > 200
        tab.open((tmp_path / "report.html").as_uri())
        assert colours(tab)[0] > 200
    finally:
        tab.prefer("light")
