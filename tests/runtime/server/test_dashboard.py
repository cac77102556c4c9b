"""The dashboard and the table of metrics in the documents show what the server exports: all of it, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest

from helpers.places import ROOT
from helpers.serving import Served

DASHBOARD = json.loads((ROOT / "docs" / "grafana-dashboard.json").read_text(encoding="utf-8"))
SERVING = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def exported(server: Served) -> set[str]:
    """Names as Prometheus stores them, those of a histogram without its suffixes."""
    kinds = re.findall(r"^# TYPE (\S+) (?:counter|gauge|histogram)$", server.get("/metrics").text, re.MULTILINE)
    return {name for name in kinds if not name.endswith("_created")}


def expressions(value: Any) -> Iterator[str]:
    """Everything that is asked of Prometheus."""
    if isinstance(value, dict):
        yield from (one for key, one in value.items() if key in ("expr", "definition"))
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from expressions(one)


def test_the_dashboard_asks_for_every_metric_and_for_no_other(exported: set[str]) -> None:
    asked = {name for text in expressions(DASHBOARD) for name in re.findall(r"pixtral:\w+", text)}
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in asked} == exported


def test_the_table_of_metrics_is_what_is_exported(exported: set[str]) -> None:
    assert set(re.findall(r"^\| `(pixtral:\w+)` \|", SERVING, re.MULTILINE)) == exported


def test_the_dashboard_can_be_imported_anywhere() -> None:
    panels = DASHBOARD["panels"]
    (source,) = (one["name"] for one in DASHBOARD["templating"]["list"] if one["type"] == "datasource")
    named = re.findall(r'"uid": "([^"]*)"', json.dumps([panels, DASHBOARD["templating"]]))
    assert set(named) == {f"${{{source}}}"}
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    for text in expressions(DASHBOARD):
        assert all(text.count(opening) == text.count(closing) for opening, closing in ("()", "[]", "{}"))
