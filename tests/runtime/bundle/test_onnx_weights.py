"""What a graph reads of the weight file, without the package onnx."""

from __future__ import annotations

from pathlib import Path

from helpers.places import DEMO
from pixtral_export.checkpoint.reader import open_checkpoint
from pixtral_export.export import export
from pixtral_export.plan import ExportSettings, plan_export
from pixtral_runtime.bundle.onnx_weights import graph_weight_bytes


def test_a_decode_step_reads_the_weights_that_were_planned_for_the_decoder(tmp_path: Path) -> None:
    opened = open_checkpoint(DEMO)
    plan = plan_export(opened, ExportSettings(precision="int4", method="rtn", max_context=512))
    bundle = export(opened, plan, tmp_path / "b", force=False, progress=lambda *_: None)
    decoder = [item for item in plan.weights if item.name.startswith(("layers.", "norm.", "output."))]
    assert graph_weight_bytes(bundle, "decoder") == sum(item.nbytes for item in decoder)
