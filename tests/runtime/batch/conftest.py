"""A browser for the pages of results, a picture to show there, and a folder to watch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from helpers.browser import Page, browser


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
def tab(window: Page) -> Iterator[Page]:
    """The window without edits of before; its console must have stayed silent in the end."""
    window.complaints.clear()
    window.warnings.clear()
    yield window
    window.run("localStorage.clear()")
    window.open("about:blank")
    assert window.complaints == []
