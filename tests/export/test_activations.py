"""What a calibration keeps between units: on the disk before it is counted on, and refused where it is damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from pixtral_export.weights.activations import Activations
from pixtral_runtime.errors import CheckpointError

VALUES = [torch.arange(12.0).reshape(3, 4) + n for n in range(3)]


def test_values_and_their_names_are_brought_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On XFS a power loss after the journal left empty files otherwise, and the calibration could not go on."""
    synced: list[tuple[str, int]] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((path.name, path.stat().st_size if path.is_file() else 0))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    kept = Activations(tmp_path)
    kept.save("layers.0", VALUES)
    files = sorted((tmp_path / "layers.0").iterdir())
    assert [name for name, _ in synced] == [*(path.name for path in files), "layers.0", tmp_path.name]
    assert all((path.name, path.stat().st_size) in synced for path in files)  # when all was written
    for seen, value in zip(kept.load("layers.0"), VALUES, strict=True):
        torch.testing.assert_close(seen, value, rtol=0, atol=0)
    assert len(list(kept.load("layers.0", range(1, 2)))) == 1


@pytest.mark.parametrize("size", [0, 7, 400])
def test_a_damaged_file_is_named_with_what_to_do(size: int, tmp_path: Path) -> None:
    kept = Activations(tmp_path)
    kept.save("layers.0", VALUES)
    os.truncate(tmp_path / "layers.0/000001.pt", size)
    with pytest.raises(CheckpointError, match=r"000001\.pt.* is damaged: .+") as caught:
        list(kept.load("layers.0"))
    assert f"delete {tmp_path}," in caught.value.hint
