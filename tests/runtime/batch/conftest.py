"""A browser for the pages of results, a picture to show there, and a folder to watch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from helpers.browser import Page, browser

FORGET = """(async () => {
    for (let quiet = 0; quiet < 5; quiet++) {
        if (localStorage.length) { localStorage.clear(); quiet = 0; }
        await new Promise(next => setTimeout(next, 20));
    }
})()"""
"""Clears what pages stored, also what another process of the browser tells of only now."""


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.new("RGB", (640, 320), "teal").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def cam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in the one where the test runs."""
    monkeypatch.chdir(tmp_path)
    Path("cam").mkdir()
    return Path("cam")


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("browser")) as tab:
        tab.size(1200, 900)
        yield tab


@pytest.fixture
def tab(window: Page, tmp_path: Path) -> Iterator[Page]:
    """The window without edits of before; its console must have stayed silent in the end."""
    window.complaints.clear()
    window.warnings.clear()
    yield window
    (tmp_path / "nothing.html").write_text("<title>nothing</title>")
    window.open((tmp_path / "nothing.html").as_uri())
    window.run(FORGET)
    window.open("about:blank")
    assert window.complaints == []
