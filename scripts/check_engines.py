"""TensorRT-RTX builds every recipe at the real layer widths, as large and as lean as was said. No GPU needed.

    python scripts/check_engines.py artifacts/engine-sizes             # some 10 minutes on two cores
    python scripts/check_engines.py artifacts/engine-sizes --recipes int4

Two decoder and two vision layers of the 12B's width, with random weights, are exported in each recipe and built for
each generation of GPUs that has its types. Sizes are compared with what `pixtral build` predicts; of the decoder's
compiled plan, what a decode step moves is compared with what it must. The last line is JSON; the exit code is 6 where
a size is off, or a step does what it should not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

from make_synthetic_checkpoint import pixtral_12b, write_checkpoint
from pixtral_engines.build import BuildSettings, build_targets
from pixtral_engines.build_plan import plan_build
from pixtral_engines.plan_judgement import judge_decoder
from pixtral_engines.profiles import Shapes
from pixtral_engines.targets import TARGETS
from pixtral_export.checkpoint.reader import open_checkpoint
from pixtral_export.export import export
from pixtral_export.plan import ExportSettings, plan_export
from pixtral_export.quantization import calibrate
from pixtral_runtime.backends.trt_package import import_tensorrt
from pixtral_runtime.bundle.engine_list import EngineSet

ALL = ("rtx:sm80", "rtx:sm86", "rtx:sm89", "rtx:sm120")
RECIPES = {
    "float16": (ExportSettings(), ALL),
    "bfloat16": (ExportSettings(dtype="bfloat16"), ALL),
    "int8": (ExportSettings(precision="int8"), ALL),
    "int4": (ExportSettings(precision="int4", method="rtn"), ALL),
    "fp8": (ExportSettings(precision="fp8", method="rtn"), ("rtx:sm89", "rtx:sm120")),
    "nvfp4": (ExportSettings(precision="nvfp4", method="rtn"), ("rtx:sm120",)),
}
CONTEXT = 1024
KERNELS_BYTES = 15_000_000  # code beside the weights; 0.5 to 9 MB seen
NOT_LEAN = ("nvfp4",)  # TensorRT-RTX 1.7 widens its weights before each product
ADAPTER_BYTES = 31_457_280  # in int8, which TensorRT-RTX stores as float16 where there are two profiles
LARGER = {("int4", "vision"): ADAPTER_BYTES, ("nvfp4", "vision"): ADAPTER_BYTES}


@dataclass(frozen=True)
class EngineFigures:
    """Bytes of one engine, and of a decoder what a decode step moves, as a share of what it must.

    `is_right`: the size is what `pixtral build` said before, and the step does nothing that it should not.
    """

    recipe: str
    target: str
    graph: str
    bytes: int
    predicted_bytes: int
    is_right: bool
    moved_share: float | None = None
    faults: tuple[str, ...] = ()


def check_engines(recipe: str, targets: Sequence[str], checkpoint: Path, folder: Path) -> Iterator[EngineFigures]:
    """Export and build a checkpoint; each engine is deleted once it was looked at."""
    settings = replace(RECIPES[recipe][0], max_context=CONTEXT)
    opened = open_checkpoint(checkpoint)
    if plan_export(opened, settings).recipe.calibrated:
        settings = replace(settings, calibration_samples=2)
    with mock.patch.object(calibrate, "SAMPLE_ROWS", 16):  # how good the scales are is not what is asked here
        bundle = export(opened, plan_export(opened, settings), folder / recipe, force=True, progress=lambda *_: None)
    for target in targets:
        plan = plan_build(bundle, TARGETS[target], Shapes(context=CONTEXT, batch=2))
        bundle = build_targets(bundle, [plan], BuildSettings(), lambda *_: None)
        engines = EngineSet.from_dict(bundle.engines[target])
        for graph, predicted in plan.engine_bytes.items():
            seen = engines.graphs[graph].bytes
            largest = 1.1 * predicted + LARGER.get((recipe, graph), 0) + KERNELS_BYTES
            figures = EngineFigures(recipe, target, graph, seen, predicted, 0.95 * predicted < seen < largest)
            if graph == "decoder":
                judged = judge_decoder(bundle, engines, import_tensorrt("rtx"))
                is_right = figures.is_right and (judged.passed or recipe in NOT_LEAN)
                faults = tuple(sorted({fault.kind for fault in judged.faults}))
                figures = replace(figures, is_right=is_right, moved_share=round(judged.moved_share, 3), faults=faults)
            yield figures
            (bundle.path / engines.graphs[graph].file).unlink()  # five recipes and three targets would fill a disk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    args = parser.parse_args()
    if not (checkpoint := args.folder / "2-layers").is_dir():
        write_checkpoint(checkpoint, pixtral_12b(layers=2, vision_layers=2, vocab_size=4096))
    checked = []
    for recipe in args.recipes:
        for one in check_engines(recipe, RECIPES[recipe][1], checkpoint, args.folder):
            moved = f"; a step moves {one.moved_share} of what it must {list(one.faults)}" if one.moved_share else ""
            print(f"{recipe} {one.target} {one.graph}: {one.bytes:,} bytes, {one.predicted_bytes:,} predicted{moved}")
            checked.append(one)
    print(json.dumps([asdict(one) for one in checked]))
    sys.exit(0 if all(one.is_right for one in checked) else 6)


if __name__ == "__main__":
    main()
