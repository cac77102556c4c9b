"""TensorRT-RTX builds every recipe at the real layer widths, and engines are as large as was predicted."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.bundles import exported
from make_synthetic_checkpoint import pixtral_12b, write_checkpoint
from pixtral_engines.build import BuildSettings, build, plan_build
from pixtral_engines.profiles import Shapes
from pixtral_engines.targets import TARGETS
from pixtral_export.plan import ExportSettings
from pixtral_export.quantization import calibrate
from pixtral_runtime.bundle.engine_list import EngineSet
from pixtral_runtime.bundle.manifest import WEIGHTS

SETTINGS = {
    "float16": (ExportSettings(max_context=1024), ("rtx:sm86", "rtx:sm89", "rtx:sm120")),
    "int8": (
        ExportSettings(precision="int8"),
        ("rtx:sm80", "rtx:sm86", "rtx:sm89", "rtx:sm120"),
    ),
    "int4": (ExportSettings(precision="int4", method="rtn"), ("rtx:sm80", "rtx:sm86", "rtx:sm89", "rtx:sm120")),
    "fp8": (ExportSettings(precision="fp8"), ("rtx:sm89", "rtx:sm120")),
    "nvfp4": (ExportSettings(precision="nvfp4", method="rtn"), ("rtx:sm120",)),
}
KERNELS_BYTES = 15_000_000  # code beside the weights; 0.5 to 9 MB seen
ADAPTER_BYTES = 31_457_280  # in int8, which TensorRT-RTX stores as float16 where there are two profiles
LARGER = {(name, "vision"): ADAPTER_BYTES for name in ("int4", "nvfp4")}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two decoder and two vision layers of the 12B's width, with a small vocabulary."""
    folder = tmp_path_factory.mktemp("wide")
    write_checkpoint(folder, pixtral_12b(layers=2, vision_layers=2, vocab_size=4096))
    return folder


@pytest.mark.parametrize("name", list(SETTINGS))
def test_every_recipe_builds_at_full_width_and_at_the_predicted_size(
    name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "SAMPLE_ROWS", 16)  # how good the scales are is not what is asked here
    settings, targets = SETTINGS[name]
    bundle = exported(checkpoint, tmp_path / "b", settings)
    for target in targets:
        plan = plan_build(bundle, TARGETS[target], Shapes(context=1024, batch=2))
        bundle = build(bundle, plan, BuildSettings(), lambda *_: None)
        assert sum(plan.engine_bytes.values()) == pytest.approx(bundle.files[WEIGHTS].bytes, rel=0.01)  # as plan says
        engines = EngineSet.from_dict(bundle.engines[target])
        for graph, predicted in plan.engine_bytes.items():
            seen = engines.graphs[graph].bytes
            print(f"{name} {target} {graph}: {seen:,} bytes, {predicted:,} predicted")
            assert 0.95 * predicted < seen < 1.1 * predicted + LARGER.get((name, graph), 0) + KERNELS_BYTES
            (bundle.path / engines.graphs[graph].file).unlink()  # five recipes and three targets would fill a disk
