"""What the stand-in for TensorRT has is what the script finds in the package."""

from __future__ import annotations

import json
from enum import Enum
from types import ModuleType
from typing import Any

import pytest

from helpers.networks import RTX
from helpers.trt_surface import RECORDED
from record_trt_surface import IMPORTED, compact, surface_of


def test_the_recorded_names_are_those_of_the_installed_package() -> None:
    path = RECORDED / f"tensorrt_rtx-{RTX.__version__}.json"
    if not path.is_file():
        pytest.skip(
            f"tensorrt_rtx {RTX.__version__} was not recorded: python scripts/record_trt_surface.py tensorrt_rtx"
        )
    assert compact(surface_of(RTX, "tensorrt_rtx", IMPORTED)) == path.read_text(encoding="utf-8")


def test_only_public_names_of_the_package_itself_are_recorded() -> None:
    class Kind:
        size = property(lambda self: 1)

        def run(self) -> None: ...

        def _hidden(self) -> None: ...

    def function() -> None: ...

    class Color(Enum):
        RED = 1

    module: Any = ModuleType("package")
    for value in (Kind, function, Color):
        value.__module__ = "package.part"
    vars(module).update(__version__="1.2", Kind=Kind, _Kind=Kind, function=function, Color=Color, json=json, number=3)
    found = surface_of(module, "package", "by hand")
    assert found == {
        "package": "package",
        "version": "1.2",
        "recorded": "by hand",
        "functions": ["function"],
        "enums": {"Color": ["RED"]},
        "classes": {"Kind": ["run", "size"]},
    }
    assert json.loads(compact(found)) == found
