from __future__ import annotations

from pathlib import Path

from check_engine_sizes import engine_sizes


def test_an_engine_of_the_real_width_is_as_large_as_was_predicted(tmp_path: Path) -> None:
    """One recipe for one GPU; the script builds them all."""
    sizes = list(engine_sizes("int4", ["rtx:sm89"], 1, tmp_path))
    assert [size.graph for size in sizes] == ["vision", "embed", "decoder"]
    assert all(size.is_right for size in sizes), sizes
    assert sum(size.bytes for size in sizes) > 100_000_000
