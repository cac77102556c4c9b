"""The script's way over a small checkpoint; the real widths take it minutes (docs/engines.md has what it found)."""

from __future__ import annotations

from pathlib import Path

import check_engine_sizes
from helpers.places import DEMO
from pixtral_runtime.bundle.manifest import open_bundle


def test_every_engine_of_a_recipe_is_weighed(tmp_path: Path) -> None:
    sizes = list(check_engine_sizes.engine_sizes("bfloat16", ["rtx:sm89"], DEMO, tmp_path))
    assert [size.graph for size in sizes] == ["vision", "embed", "decoder"]
    assert all(size.bytes > 0.95 * size.predicted_bytes > 0 for size in sizes), sizes
    bundle = open_bundle(tmp_path / "bfloat16")
    assert bundle.dtype == "bfloat16" and bundle.limits.max_context == check_engine_sizes.CONTEXT
    assert not list(bundle.path.glob("**/*.engine"))
