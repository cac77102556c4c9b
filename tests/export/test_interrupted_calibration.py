"""A calibration that was interrupted goes on, and only for the recipe that it was begun for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from helpers.quantized import SAMPLES, narrow_config, quantized
from helpers.tiny import write_checkpoint
from pixtral_export.checkpoint.reader import open_checkpoint
from pixtral_export.export import export
from pixtral_export.plan import ExportSettings, plan_export
from pixtral_export.weights.layerwise import units
from pixtral_runtime.bundle.manifest import MANIFEST, PARTIAL, open_bundle


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), narrow_config(), dtype=torch.float32)


@pytest.mark.parametrize("after", [1, 4, 6])
def test_an_interrupted_calibration_goes_on_where_it_stopped(after: int, checkpoint: Path, tmp_path: Path) -> None:
    expected = quantized(checkpoint, tmp_path / "whole", precision="int8").fingerprint
    opened = open_checkpoint(checkpoint)
    settings = ExportSettings(dtype="float32", max_context=1024, calibration_samples=SAMPLES, precision="int8")
    seen: list[int] = []

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "calibrating" and done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        export(opened, plan_export(opened, settings), tmp_path / "b", force=False, progress=interrupt)
    assert not (tmp_path / "b" / MANIFEST).exists()
    journal = json.loads((tmp_path / "b" / PARTIAL / "calibration" / "journal.json").read_text())
    assert journal["units"] == [name for name, _ in units(opened.config)][:after]

    def watch(stage: str, done: int, total: int) -> None:
        if stage == "writing weights":
            seen.append(done)

    export(opened, plan_export(opened, settings), tmp_path / "b", force=False, progress=watch)
    assert open_bundle(tmp_path / "b").fingerprint == expected
    assert {path.name for path in (tmp_path / "b").iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}


def test_another_recipe_does_not_go_on_with_the_first(checkpoint: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(checkpoint)
    settings = ExportSettings(dtype="float32", max_context=1024, calibration_samples=SAMPLES, precision="int8")

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "calibrating" and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(opened, plan_export(opened, settings), tmp_path / "b", force=False, progress=interrupt)
    fresh = quantized(checkpoint, tmp_path / "fresh", precision="fp8").fingerprint
    assert quantized(checkpoint, tmp_path / "b", precision="fp8").fingerprint == fresh
