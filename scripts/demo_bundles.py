"""Bundles of the demo checkpoint in every recipe, and easy-VQA's questions: what several measurements start from."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import easy_vqa

from pixtral_export.checkpoint.reader import open_checkpoint
from pixtral_export.export import export
from pixtral_export.plan import ExportSettings, plan_export
from pixtral_runtime.batch.worker import WorkerOptions
from pixtral_runtime.bundle.manifest import MANIFEST, Bundle, open_bundle
from pixtral_runtime.evaluation.dataset import read_examples
from pixtral_runtime.evaluation.row_images import ImageStore
from pixtral_runtime.evaluation.run import EvaluationOptions, Questions
from pixtral_runtime.evaluation.tasks.registry import task_named

DEMO = Path(__file__).parents[1] / "tests" / "data" / "tiny-pixtral"
OWN_SAMPLES = 32
SLOTS = 8
EIGHT_SLOTS = EvaluationOptions(worker=WorkerOptions(batch=SLOTS))
HALF = ExportSettings(dtype="float16", max_context=2048)
RECIPES = {
    "float32": replace(HALF, dtype="float32"),
    "float16": HALF,
    "float16, int8 KV cache": replace(HALF, kv_cache="int8"),
    "int8": replace(HALF, precision="int8"),
    "fp8": replace(HALF, precision="fp8"),
    "int4": replace(HALF, precision="int4"),
    "int4, int8 KV cache": replace(HALF, precision="int4", kv_cache="int8"),
    "int4 by AWQ": replace(HALF, precision="int4", method="awq"),
    "int4 by rounding": replace(HALF, precision="int4", method="rtn"),
}


def make_bundle(name: str, settings: ExportSettings, samples: Path | None, folder: Path, source: Path = DEMO) -> Bundle:
    """The bundle of a checkpoint's recipe, exported unless the folder has it."""
    target = folder / f"{name.replace(', ', '-').replace(' ', '-')}{'-own' if samples else ''}"
    if not (target / MANIFEST).is_file():
        checkpoint = open_checkpoint(source)
        if samples:
            settings = replace(settings, calibration=samples, calibration_samples=OWN_SAMPLES)
        export(checkpoint, plan_export(checkpoint, settings), target, force=False, progress=lambda *_: None)
    return open_bundle(target)


def own_samples(folder: Path) -> Path:
    """Questions about training pictures, one a picture, as a calibration file."""
    paths = easy_vqa.get_train_image_paths()
    asked, _, pictures = easy_vqa.get_train_questions()
    step = len(asked) // OWN_SAMPLES
    rows = [{"image": paths[pictures[n]], "prompt": asked[n]} for n in range(0, step * OWN_SAMPLES, step)]
    target = folder / "own.jsonl"
    target.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return target


def easy_vqa_data() -> Path:
    """The dataset that the package easy-vqa brings."""
    return Path(easy_vqa.__file__).parent / "data"


def easy_vqa_questions(count: int | None = None) -> Questions:
    """Questions of the test split, spread over all of it where only some are wanted."""
    data, task = easy_vqa_data(), task_named("easy_vqa")
    with tempfile.TemporaryDirectory() as unused:
        found, broken = read_examples(task, data, ImageStore(Path(unused), data), None)
    assert not broken
    return Questions(task, found if count is None else found[:: max(1, len(found) // count)][:count])
