"""The Mistral 3 family's parts in TensorRT's networks: merged patches, stretched rotary tables, scaled queries."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.bundles import exported
from helpers.family import MEMBERS
from helpers.tiny import write_checkpoint
from pixtral_engines.build import BuildSettings, build
from pixtral_engines.build_plan import plan_build
from pixtral_engines.check import NetworkCheck
from pixtral_engines.plan_judgement import judge_decoder
from pixtral_engines.profiles import Shapes
from pixtral_engines.targets import TARGETS
from pixtral_export.plan import ExportSettings
from pixtral_runtime.backends.trt_package import import_tensorrt
from pixtral_runtime.bundle.engine_list import listed_engines
from pixtral_runtime.inputs.preprocess import default_preprocess
from pixtral_runtime.inputs.prompt import PromptBuilder

RTX = import_tensorrt("rtx")
RECIPES = {
    "float16": ExportSettings(),
    "int4": ExportSettings(precision="int4", group_size=32),
    "int8": ExportSettings(precision="int8"),
    "fp8": ExportSettings(precision="fp8", method="rtn"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("ministral"), MEMBERS["Ministral-3-3B"])


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_networks_agree_and_are_compiled(recipe: str, checkpoint: Path, tmp_path: Path) -> None:
    bundle = exported(checkpoint, tmp_path / "b", RECIPES[recipe])
    check = NetworkCheck(bundle, PromptBuilder(bundle, default_preprocess(bundle)), RTX)
    seen = list(check.run())
    assert all(agreement.passed for agreement in seen), max(seen, key=lambda a: a.error)
    if recipe != "int4":
        return
    target = TARGETS["rtx:sm89"]
    plan = plan_build(bundle, target, Shapes(context=256, batch=2, chunk=64), parts=2)
    built = build(bundle, plan, BuildSettings(optimization_level=0), lambda *_: None)
    judged = judge_decoder(built, listed_engines(built, target.name), RTX)
    assert not [fault for fault in judged.faults if "copies" in fault.kind or "attends" in fault.kind]
