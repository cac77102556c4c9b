"""The page of a job, opened in a real browser: errors first, filter, order, and text that stays text."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
from collections.abc import Sequence
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers.browser import QUIET, find_chromium
from pixtral_runtime.batch.page import THUMBNAIL_PX, RecordNotes, thumbnail, write_report
from pixtral_runtime.batch.records import ImageInfo, Record

NASTY = "<b>bold</b> & </script><script>document.title='broken'</script> \u2028 \"quotes\" 'n so on\nsecond line \udcff"


def record(name: str, *, picture: Path | None = None, **changes: Any) -> Record:
    values: dict[str, Any] = {
        "question": "What is shown?", "asked": "0" * 16, "answer": f"answer to {name}", "finish_reason": "stop",
        "prompt_tokens": 90, "image_tokens": 72, "new_tokens": 5, "times_ms": {"vision": 3.25, "decode": 40.0},
        "images": [ImageInfo(str(picture))] if picture else [],
    }  # fmt: skip
    return Record(name, **values | changes)


def failed(name: str) -> Record:
    return record(name, answer=None, finish_reason=None, error=f"{name} is damaged", hint="mend it", new_tokens=None)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.new("RGB", (640, 320), "teal").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def page(records: Sequence[Record], folder: Path) -> Path:
    path = folder / "report.html"
    write_report(records, path, title="run <1>", summary={"requests": 1234, "failed": [], "seconds": 1.5})
    return path


class Loads(HTMLParser):
    """Collects what a page would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [str(value) for name, value in attrs if name in ("src", "href")]


def test_the_page_loads_nothing_and_holds_every_record(tmp_path: Path, photo: Path) -> None:
    path = page([record("a", picture=photo), record(NASTY, answer=NASTY), failed("b")], tmp_path)
    text = path.read_text(encoding="utf-8")
    parser = Loads()
    parser.feed(text)
    assert parser.found == []
    assert "default-src 'none'" in text
    assert text.count("</script>") == 1
    assert "run &lt;1&gt;" in text and "1,234" in text
    held = json.loads(re.search(r"records = (\[.*?\n\]);", text, re.S)[1])  # type: ignore[index]
    assert [one["id"] for one in held] == ["a", NASTY, "b"]
    assert held[0]["images"][0][0] == str(photo)
    assert held[0]["images"][0][1].startswith("data:image/jpeg;base64,")
    assert not list(tmp_path.glob(".report*"))


def test_a_title_may_hold_anything(tmp_path: Path) -> None:
    write_report([record("a")], tmp_path / "r.html", title="\udcff {{summary}}", summary={"output": "\udcfe"})
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "{{summary}}" in text
    assert text.count("<dt>") == 1


def test_thumbnails_are_small_and_upright(tmp_path: Path, photo: Path) -> None:
    picture, exif = Image.open(photo), Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    for apply, size in ((True, (80, 160)), (False, (160, 80))):
        data = thumbnail(tmp_path / "turned.jpg", apply_exif=apply)
        assert data is not None
        assert Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))).size == size
    assert max(size) == THUMBNAIL_PX
    (tmp_path / "broken.png").write_bytes(b"no")
    assert thumbnail(tmp_path / "broken.png") is None
    assert thumbnail(tmp_path / "gone.png") is None


@pytest.fixture(scope="module")
def chromium() -> str:
    return find_chromium()


def browse(chromium: str, path: Path, script: str) -> dict[str, Any]:
    """Open the page, run a script in it that returns a value, and give that back. Fails on anything in the console."""
    probe = path.with_name("probe.html")
    text = path.read_text(encoding="utf-8")
    collect = f"<script>document.body.dataset.result = JSON.stringify((() => {{{script}}})())</script>"
    probe.write_text(text.replace("</html>", f"{collect}</html>"), encoding="utf-8")
    profile = f"--user-data-dir={path.parent / 'profile'}"
    command = [chromium, *QUIET, "--enable-logging=stderr", "--dump-dom", profile, probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    result = re.search(r'data-result="([^"]*)"', done.stdout)
    assert result is not None, done.stdout[:500]
    found: dict[str, Any] = json.loads(unescape(result[1]))
    return found


READ = """
const names = () => [...document.querySelectorAll("li h2")].map(one => one.textContent);
const set = (id, value) => { at(id).value = value; at(id).dispatchEvent(new Event("input")); };
"""


def test_a_browser_shows_errors_first_filters_and_sorts(chromium: str, tmp_path: Path, photo: Path) -> None:
    records = [
        record("b", picture=photo, times_ms={"decode": 9.0}),
        record("c", finish_reason="length", new_tokens=64),
        failed("d"),
        record("a", times_ms={"decode": 900.0}, new_tokens=2),
        record("e", answer=NASTY.encode("utf-8", "replace").decode(), images=[ImageInfo(str(tmp_path / "gone.png"))]),
    ]
    seen = browse(
        chromium,
        page(records, tmp_path),
        READ
        + """
        const result = {first: names(), count: at("count").value, title: document.title};
        result.picture = document.querySelector("img").src.slice(0, 22);
        result.literal = [...document.querySelectorAll("p.answer")].map(one => one.textContent);
        result.bold = document.querySelectorAll("li b, li script").length;
        for (const order of ["name", "slow", "long", "asked"]) { set("order", order); result[order] = names(); }
        for (const status of ["errors", "cut", "whole"]) { set("status", status); result["only " + status] = names(); }
        set("status", "all"); set("text", "ANSWER TO C"); result.filtered = names();
        set("text", "photo.png"); result.pictured = names();
        set("text", "nowhere"); result.none = at("count").value;
        return result;
        """,
    )
    assert seen["first"] == ["d", "c", "b", "a", "e"]
    assert (seen["count"], seen["title"], seen["none"]) == ("1-5 of 5", "run <1>", "nothing")
    assert seen["picture"] == "data:image/jpeg;base64"
    assert any("<b>bold</b> & </script>" in text for text in seen["literal"])
    assert seen["bold"] == 0
    assert seen["name"] == ["a", "b", "c", "d", "e"]
    assert seen["slow"][0] == "a" and seen["slow"][-1] == "b"
    assert seen["long"][0] == "c"
    assert seen["asked"] == ["b", "c", "d", "a", "e"]
    assert (seen["only errors"], seen["only cut"]) == (["d"], ["c"])
    assert seen["only whole"] == ["b", "a", "e"]
    assert seen["filtered"] == ["c"]
    assert seen["pictured"] == ["b"]


def test_ten_thousand_records_are_shown_a_page_at_a_time(chromium: str, tmp_path: Path) -> None:
    seen = browse(
        chromium,
        page([record(f"{index:05}") for index in range(10_000)], tmp_path),
        READ
        + """
        set("order", "name");
        at("next").click(); at("next").click();
        return {shown: names().length, first: names()[0], count: at("count").value, back: at("back").disabled};
        """,
    )
    assert seen == {"shown": 50, "first": "00100", "count": "101-150 of 10000", "back": False}


def test_notes_are_shown_and_filter_by_their_marks(chromium: str, tmp_path: Path) -> None:
    notes = {"a": RecordNotes(("wrong",), (("reference", "<i>blue</i>"),)), "b": RecordNotes(("wrong", "flipped"), ())}
    path = tmp_path / "report.html"
    write_report([record("a"), record("b"), record("c")], path, title="t", summary={}, notes=notes)
    seen = browse(
        chromium,
        path,
        READ
        + """
        const result = {options: [...at("status").options].map(one => one.value)};
        for (const mark of ["wrong", "flipped"]) { set("status", mark); result[mark] = names(); }
        set("status", "all"); set("text", "<i>blue"); result.found = names();
        result.note = document.querySelector("p.note").textContent;
        return result;
        """,
    )
    assert seen["options"] == ["all", "errors", "cut", "whole", "wrong", "flipped"]
    assert (seen["wrong"], seen["flipped"], seen["found"]) == (["a", "b"], ["b"], ["a"])
    assert seen["note"] == "reference: <i>blue</i>"
