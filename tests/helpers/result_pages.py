"""Pages of results for tests: records made up, the page opened, and what a reader does with it."""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.browser import Page
from pixtral_runtime.batch.page import write_report
from pixtral_runtime.batch.records import ImageInfo, Record

NASTY = "<b>bold</b> & </script><script>document.title='broken'</script> \u2028 \"quotes\" 'n so on\nsecond line \udcff"
ARABIC = "\u202eصورة\u202c قطة \U0001f408"
NAMES = "[...document.querySelectorAll('li h2')].map(one => one.textContent)"
ANSWERS = "[...document.querySelectorAll('p.answer')].map(one => one.textContent)"
FOCUS = "document.activeElement.querySelector('h2')?.textContent ?? document.activeElement.id"


def record(name: str, *, picture: Path | str | None = None, **changes: Any) -> Record:
    values: dict[str, Any] = {
        "question": "What is shown?", "asked": "0" * 16, "answer": f"answer to {name}", "finish_reason": "stop",
        "prompt_tokens": 90, "image_tokens": 72, "new_tokens": 5, "times_ms": {"vision": 3.25, "decode": 40.0},
        "images": [ImageInfo(str(picture))] if picture else [],
    }  # fmt: skip
    return Record(name, **values | changes)


def failed(name: str) -> Record:
    return record(name, answer=None, finish_reason=None, error=f"{name} is damaged", hint="mend it", new_tokens=None)


def pictured(path: str, **changes: Any) -> Record:
    return record(path, picture=path, **changes)


def many(count: int) -> list[Record]:
    """Answers of very different lengths."""
    return [
        pictured(f"photos/{index:05}.jpg", answer=f"number {index}." + " more" * (index * 37 % 400))
        for index in range(count)
    ]


def page(records: Sequence[Record], folder: Path, **options: Any) -> Path:
    path = folder / "report.html"
    summary = {"requests": 1234, "failed": [], "seconds": 1.5}
    write_report(records, path, title="run <1>", summary=summary, **options)
    return path


def show(tab: Page, records: Sequence[Record], folder: Path, **options: Any) -> None:
    tab.open(page(records, folder, **options).as_uri())


def choose(tab: Page, place: str, value: str) -> list[str]:
    """Choose or type something in the bar, and give the names of the rows that are then there."""
    change = f"at('{place}').value = {json.dumps(value)}; at('{place}').dispatchEvent(new Event('input'))"
    names: list[str] = tab.run(f"(() => {{ {change}; return {NAMES}; }})()")
    return names


def rewrite(tab: Page, index: int, text: str) -> None:
    """Edit a record's answer as by hand."""
    tab.run(f"beginEdit({index}), document.activeElement.select()")
    tab.type(text)
    tab.press("Enter", control=True)


def open_again(tab: Page, folder: Path, edits: int) -> None:
    """Load the page anew until so many edits are found: what one process of the browser stores, another hears late."""
    for _ in range(40):
        tab.open((folder / "report.html").as_uri())
        if tab.run("edits.size") == edits:
            break
        time.sleep(0.05)


def archive(tab: Page, folder: Path) -> dict[str, str]:
    """The files of the archive that the page makes, checked by another program."""
    folder.mkdir()
    with zipfile.ZipFile(tab.downloaded(folder, "at('sidecars').click()")) as files:
        assert files.testzip() is None
        assert all(info.compress_type == zipfile.ZIP_STORED for info in files.infolist())
        return {name: files.read(name).decode() for name in files.namelist()}
