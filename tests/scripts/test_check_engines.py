"""The script's way over a small checkpoint; the real widths take it minutes (docs/engines.md has what it found)."""

from __future__ import annotations

from pathlib import Path

import check_engines
from helpers.places import DEMO
from pixtral_runtime.bundle.manifest import open_bundle


def test_every_engine_of_a_recipe_is_weighed_and_a_decode_step_judged(tmp_path: Path) -> None:
    sizes = list(check_engines.check_engines("bfloat16", ["rtx:sm89"], DEMO, tmp_path))
    assert [size.graph for size in sizes] == ["vision", "embed", "decoder"]
    assert all(size.bytes > 0.95 * size.predicted_bytes > 0 for size in sizes), sizes
    assert sizes[-1].moved_share is not None and sizes[-1].moved_share < 1.1 and not sizes[-1].faults
    bundle = open_bundle(tmp_path / "bfloat16")
    assert bundle.dtype == "bfloat16" and bundle.limits.max_context == check_engines.CONTEXT
    assert not list(bundle.path.glob("**/*.engine"))
