"""Polygraphy, which shares no code with pixtral, reads, runs and builds a bundle's graphs as the page says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.bundles import exported
from helpers.places import DEMO, ROOT
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.bundle.spec import cache_names

PAGE = ROOT / "docs" / "engines.md"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported(DEMO, tmp_path_factory.mktemp("b") / "b")


def commands() -> list[str]:
    """The first block of the page's section."""
    section = PAGE.read_text(encoding="utf-8").partition("## A look inside\n")[2]
    block = re.search(r"```\n(.*?)```", section, re.DOTALL)
    assert block is not None
    return block[1].splitlines()


def test_the_commands_of_the_page_do_what_it_says(bundle: Bundle, tmp_path: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    printed = []
    for command in commands():
        line = command.replace("BUNDLE", str(bundle.path))
        done = subprocess.run(line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        printed.append(done.stdout)
    graph, run, data, _ = printed
    for name in (*cache_names("past", bundle.model.decoder.n_layers), "write_index", "TensorScatter", "Attention"):
        assert name in graph
    assert "PASSED | Output: image_features is valid" in run
    assert f"shape=(1, {64 * 96 // bundle.model.vision.patch_size**2}, {bundle.model.decoder.dim})" in data
    assert json.loads((tmp_path / "features.json").read_text(encoding="utf-8"))
    weights = sum(path.stat().st_size for path in bundle.path.glob("weights.bin"))
    assert 100_000 < (tmp_path / "vision.engine").stat().st_size < weights
