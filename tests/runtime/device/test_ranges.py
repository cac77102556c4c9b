"""PIXTRAL_NVTX=1 names the stages for a profiler; without it, and without the package, nothing changes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from helpers.bundles import exported
from helpers.places import DEMO, IMAGES
from pixtral_runtime import load
from pixtral_runtime.device import ranges
from pixtral_runtime.errors import MissingPackageError


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(ranges.VARIABLE, raising=False)
    ranges._nvtx.cache_clear()
    yield
    ranges._nvtx.cache_clear()


def test_the_stages_of_an_answer_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[str] = []

    @contextmanager
    def annotate(message: str, domain: str) -> Iterator[None]:
        seen.append(f"{domain} {message}")
        yield
        seen.append("end")

    nvtx = SimpleNamespace(annotate=annotate)
    monkeypatch.setattr(ranges, "importlib", SimpleNamespace(import_module=lambda _: nvtx))
    model = load(exported(DEMO, tmp_path / "b").path)
    for asked, image in (("0", "blue_circle_64x64.png"), ("1", "red_triangle_64x64.png")):
        monkeypatch.setenv(ranges.VARIABLE, asked)
        ranges._nvtx.cache_clear()
        model.generate("what is it?", [IMAGES / image], max_new_tokens=3)
        assert bool(seen) == (asked == "1")
    names = [name for name, _ in groupby(name for name in seen if name != "end")]
    assert names == ["pixtral vision", "pixtral prefill", "pixtral decode"]
    assert seen[1::2] == ["end"] * (len(seen) // 2)  # one after the other


def test_without_the_package_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ModuleType:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with ranges.named_range("vision"):
        pass
    monkeypatch.setenv(ranges.VARIABLE, "1")
    ranges._nvtx.cache_clear()
    with pytest.raises(MissingPackageError, match="PIXTRAL_NVTX needs the package 'nvtx'") as raised:
        ranges.named_range("vision")
    assert raised.value.hint == "pip install nvtx"
