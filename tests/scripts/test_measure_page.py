"""What is measured of a page is what it says: that there are pictures of their own, rows to the end, and times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from measure_page import main


def test_a_small_page_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--pictures", "20", "--folder", str(tmp_path), "--rounds", "1"])
    found = json.loads(capsys.readouterr().out)
    pictures = {path.read_bytes() for path in tmp_path.rglob("*.jpg")}
    assert (found["pictures"], len(pictures), found["found"], found["is_last_row_there"]) == (20, 20, 1, True)
    assert found["page_bytes"] == (tmp_path / "page.html").stat().st_size
    for name in ("write_s", "first_rows_ms", "first_pictures_ms", "loaded_ms", "search_ms", "to_the_end_ms"):
        assert found[name] > 0
