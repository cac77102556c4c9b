"""Answers edited on the page of results: kept, reverted, and downloaded as sidecars or lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.browser import Page
from helpers.result_pages import (
    ANSWERS,
    ARABIC,
    FOCUS,
    NAMES,
    NASTY,
    archive,
    choose,
    failed,
    many,
    open_again,
    pictured,
    record,
    rewrite,
    show,
)
from pixtral_runtime.batch.records import ImageInfo, SidecarNote
from pixtral_runtime.batch.sidecars import SidecarSettings


def test_an_edit_is_marked_kept_found_and_reverted(tab: Page, tmp_path: Path) -> None:
    show(tab, [pictured("a.jpg"), pictured("b.jpg"), failed("c.jpg")], tmp_path)
    assert choose(tab, "text", ", edited") == []
    choose(tab, "text", "")
    tab.click("li:nth-child(2) p.answer")
    assert tab.run("document.activeElement.value") == "answer to a.jpg"
    tab.press("End")
    tab.type(", edited")
    tab.press("Enter", control=True)
    assert tab.run(ANSWERS) == ["answer to a.jpg, edited", "answer to b.jpg"]
    assert tab.run(FOCUS) == "a.jpg"
    assert tab.run("[...document.querySelectorAll('li.edited h2, .badge')].map(one => one.textContent)") == [
        "a.jpg",
        "edited",
    ]
    rewrite(tab, 2, "by hand")
    assert choose(tab, "status", "edited") == ["c.jpg", "a.jpg"]
    assert choose(tab, "text", ", EDITED") == ["a.jpg"]
    assert tab.run("at('edits').hidden") is False
    open_again(tab, tmp_path, edits=2)
    assert tab.warnings == ["beforeunload"]
    assert tab.run(ANSWERS) == ["by hand", "answer to a.jpg, edited", "answer to b.jpg"]
    tab.click("li:nth-child(2) .head button")
    tab.run("focusRow(2)")
    tab.press("u")
    assert tab.run(ANSWERS) == ["answer to a.jpg", "answer to b.jpg"]
    assert tab.run("[edits.size, at('edits').hidden, localStorage.length]") == [0, True, 0]


def test_escape_leaves_an_answer_as_it_was_and_leaving_the_field_keeps_it(tab: Page, tmp_path: Path) -> None:
    text = "line\n" * 20 + "end"  # the field is lower, so that the other row moves when it is left
    show(tab, [record("a", answer=text), record("b")], tmp_path)
    tab.run("beginEdit(0)")
    tab.type("not this")
    tab.press("Escape")
    assert (tab.run(ANSWERS)[0], tab.run(FOCUS)) == (text, "a")
    tab.run("beginEdit(0)")
    tab.type(" but this")
    tab.click("li:nth-child(2) .edit")
    tab.until("editing === 1 && document.activeElement.matches('textarea')")
    assert tab.run(ANSWERS) == [f"{text} but this"]
    tab.press("Escape")
    tab.run("at('lines').click()")


def test_an_edit_that_is_scrolled_away_is_kept(tab: Page, tmp_path: Path) -> None:
    show(tab, many(300), tmp_path)
    tab.run("beginEdit(0), document.activeElement.select()")
    tab.type("far away")
    tab.run("scrollTo(0, 30000)")
    tab.until("edits.get(0) === 'far away' && editing === null")
    tab.run("isDownloaded = true")


def test_looking_into_an_answer_is_no_edit(tab: Page, tmp_path: Path) -> None:
    answers = ["", "ends\r\nof\rlines\n", NASTY, ARABIC, "\0 \x1b[31m\u2029\ufeff", " spaces  ", "\n\nfirst"]
    show(tab, [record(f"{index}", answer=answer) for index, answer in enumerate(answers)], tmp_path)
    for index in range(len(answers)):
        tab.run(f"beginEdit({index})")
        tab.press("Enter", control=True)
    assert tab.run("[edits.size, records.map(record => record.answer)]") == [0, answers]


def test_a_browser_that_keeps_nothing_says_so(tab: Page, tmp_path: Path) -> None:
    show(tab, [record("a")], tmp_path)
    tab.run("Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }, 0")
    rewrite(tab, 0, "new")
    assert (tab.run(ANSWERS), tab.run("at('notice').textContent")[:28]) == (["new"], "This browser keeps nothing f")
    tab.press("u")


@pytest.mark.parametrize("kept", ["5", "null", "[", '{"edits": [["__proto__", "x"], [7, "x"], [0, 1], [-1, "x"]]}'])
def test_what_is_kept_under_its_name_is_no_edit_unless_it_looks_like_one(tab: Page, tmp_path: Path, kept: str) -> None:
    show(tab, [record("a")], tmp_path)
    tab.run(f"localStorage.setItem(STORE, {json.dumps(kept)})")
    tab.open((tmp_path / "report.html").as_uri())
    assert tab.run(f"[edits.size, {NAMES}]") == [0, ["a"]]


def test_edited_sidecars_are_downloaded_as_an_archive(tab: Page, tmp_path: Path) -> None:
    records = [
        pictured(f"photos/{name}")
        for name in ("a.jpg", "sub/b.tar.jpeg", "sub/.hidden", "ü.png", "same.png", "same.jpg")
    ]
    show(tab, [*records, pictured("photos/left.jpg"), failed("photos/x.jpg")], tmp_path)
    for index in range(6):
        rewrite(tab, index, f"caption {index} é\n\n  <b>second</b> line  \n")
    rewrite(tab, 6, "x")
    rewrite(tab, 6, "answer to photos/left.jpg")
    found = archive(tab, tmp_path / "zip")
    names = ["photos/a.txt", "photos/sub/b.tar.txt", "photos/sub/.hidden.txt", "photos/ü.txt", "photos/same.txt"]
    assert list(found) == [*names, "photos/same (2).txt"]
    settings = SidecarSettings()
    texts = [settings.text(tab.run(f"textOf({index})"), None) for index in range(6)]
    assert list(found.values()) == texts
    assert texts[0] == "caption 0 é <b>second</b> line"
    assert "same (2).txt" in tab.run("at('notice').textContent")
    for _ in range(2):  # what is downloaded may be left, and found again
        open_again(tab, tmp_path, edits=6)
        assert (tab.run("edits.size"), tab.warnings) == (6, [])


def test_edits_are_downloaded_as_lines(tab: Page, tmp_path: Path) -> None:
    show(tab, [record(NASTY, images=[]), record("b"), record("c")], tmp_path)
    rewrite(tab, 2, "third")
    rewrite(tab, 0, "first\nof two")
    (tmp_path / "lines").mkdir()
    lines = tab.downloaded(tmp_path / "lines", "at('lines').click()").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines if line] == [
        {"id": NASTY, "answer": "first\nof two"},
        {"id": "c", "answer": "third"},
    ]


@pytest.mark.parametrize(
    "paths, names",
    [
        (["/data/set/a/1.jpg", "/data/set/b/2.jpg"], ["a/1.txt", "b/2.txt"]),
        (["/data/one.jpg"], ["one.txt"]),
        (["../../etc/1.jpg", "../../etc/2.jpg"], ["1.txt", "2.txt"]),
        (["a/../../../x.jpg", "/etc/passwd.png"], ["a/x.txt", "etc/passwd.txt"]),
        ([r"..\..\win.jpg", "line\nbreak.jpg"], [".._.._win.txt", "line_break.txt"]),
        (["A.jpg", "a.jpg", "a.png"], ["A.txt", "a (2).txt", "a (3).txt"]),
        (["bad\udcff.jpg", "dir.d/plain"], ["bad\ufffd.txt", "dir.d/plain.txt"]),
        (
            ["a.pdf#page=3", "a.pdf#page=4", "v.mp4#t=2.0", "a#1.jpg"],
            ["a.pdf#page=3.txt", "a.pdf#page=4.txt", "v.mp4#t=2.0.txt", "a#1.txt"],
        ),
        (
            ["/data/x.tar/01.jpg", "/data/x.tar/02.jpg", "/data/rows.parquet/17"],
            ["x.tar/01.txt", "x.tar/02.txt", "rows.parquet/17.txt"],
        ),
        (["data:image/png;base64,iVBOR", "photos/1.jpg"], ["id_0.txt", "photos/1.txt"]),
    ],
)
def test_names_of_sidecars_stay_in_their_folder(tab: Page, tmp_path: Path, paths: list[str], names: list[str]) -> None:
    show(tab, [record(f"id/{index}", picture=path) for index, path in enumerate(paths)], tmp_path)
    tab.run("records.forEach((_, index) => edit(index, `text ${index}`))")
    found = archive(tab, tmp_path / "zip")
    assert found == {name: f"text {index}" for index, name in enumerate(names)}


def test_what_a_job_wrote_beside_pictures_is_edited(tab: Page, tmp_path: Path) -> None:
    note = SidecarNote("/captions/a/1.caption", "TOK, answer to x")
    records = [record("x", picture="/photos/a/1.jpg", sidecar=note), failed("/photos/b/2.jpg")]
    records[1].images = [ImageInfo("/photos/b/2.jpg")]
    show(tab, records, tmp_path, sidecars=SidecarSettings(".caption", prefix="TOK, ", as_written=True))
    assert tab.run(ANSWERS) == ["TOK, answer to x"]
    assert tab.run(
        "document.querySelector('li:last-child .body').textContent.includes(\"model's answer: answer to x\")"
    )
    rewrite(tab, 0, "TOK, mine\nin two lines\n")
    rewrite(tab, 1, "of a failed one")
    found = archive(tab, tmp_path / "zip")
    assert found == {"captions/a/1.caption": "TOK, mine\nin two lines\n", "photos/b/2.caption": "of a failed one"}
