"""TensorRT-RTX compiles every recipe at the real layer widths, for the GPUs that have the types."""

from __future__ import annotations

from pathlib import Path

import pytest

from compiling import compile_with_tensorrt
from make_synthetic_checkpoint import pixtral_12b, write_checkpoint
from pixtral_export.checkpoint import open_checkpoint
from pixtral_export.export import ExportSettings, export, plan_export
from pixtral_runtime.bundle import Bundle
from pixtral_runtime.spec import GRAPHS

TARGETS = {
    "int4": ("SM80", "SM89", "SM120"),
    "int8": ("SM80", "SM89", "SM120"),
    "fp8": ("SM89", "SM120"),
    "nvfp4": ("SM120",),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One decoder and one vision layer of the 12B's width, with a small vocabulary."""
    folder = tmp_path_factory.mktemp("wide")
    write_checkpoint(folder, pixtral_12b(layers=1, vision_layers=1, vocab_size=4096))
    return folder


@pytest.fixture(scope="module", params=list(TARGETS))
def bundle(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    settings = ExportSettings(precision=request.param, calibration_samples=2, max_context=1024)
    opened = open_checkpoint(checkpoint)
    target = tmp_path_factory.mktemp("bundle") / request.param
    return export(opened, plan_export(opened, settings), target, force=False, progress=lambda *_: None)


@pytest.mark.parametrize("graph", GRAPHS)
def test_tensorrt_rtx_compiles_every_recipe_at_full_width(bundle: Bundle, graph: str, tmp_path: Path) -> None:
    engine_bytes, messages = compile_with_tensorrt(bundle, graph, tmp_path, TARGETS[bundle.precision])
    assert engine_bytes > 100_000, messages
    assert not [message for message in messages if "Unused Input" in message or "unused" in message]


def test_fp8_is_refused_for_a_gpu_without_it(bundle: Bundle, tmp_path: Path) -> None:
    """The compilations above prove that the type reached TensorRT."""
    absent = {"fp8": ("SM80", "fp8_e4m3"), "nvfp4": ("SM89", "fp4_e2m1")}
    if bundle.precision not in absent:
        return
    target, name = absent[bundle.precision]
    engine_bytes, messages = compile_with_tensorrt(bundle, "decoder", tmp_path, (target,))
    assert engine_bytes == 0 and any(name in message for message in messages)
