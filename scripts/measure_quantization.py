"""What each recipe costs in answers: easy-VQA's official test split, and divergence from float32.

    python scripts/measure_quantization.py artifacts/quantization                  # some 40 minutes
    python scripts/measure_quantization.py artifacts/quantization --questions 500 --images 20

Exports the demo checkpoint to a float32 bundle and to each recipe below, calibrated with the packaged samples or with
pictures of easy-VQA's training split, into the folder. Accuracy counts answers that are the reference's text exactly.
Divergence is that of `pixtral compare` over captions of test pictures, teacher forced: mean KL in millionths of a nat
and the share of positions where both bundles prefer the same token. Prints a table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import easy_vqa

from measure_eval import easy_vqa_examples, evaluate
from pixtral_export.checkpoint.reader import open_checkpoint
from pixtral_export.export import export
from pixtral_export.plan import ExportSettings, plan_export
from pixtral_runtime.bundle.manifest import MANIFEST, Bundle, open_bundle
from pixtral_runtime.compare.compare import CompareSettings, compare_bundles

DEMO = Path(__file__).parents[1] / "tests" / "data" / "tiny-pixtral"
CAPTION = "Describe this image in one short sentence."
OWN_SAMPLES = 32
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
SCORED = ("float32", "float16", "float16, int8 KV cache", "int8", "fp8", "int4", "int4, int8 KV cache")
"""Recipes whose accuracy is measured too; the others differ in how codes are chosen, which divergence shows better."""


def make(name: str, settings: ExportSettings, samples: Path | None, folder: Path) -> Bundle:
    """The bundle of a recipe, exported unless the folder has it."""
    target = folder / f"{name.replace(', ', '-').replace(' ', '-')}{'-own' if samples else ''}"
    if not (target / MANIFEST).is_file():
        checkpoint = open_checkpoint(DEMO)
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


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    args.folder.mkdir(parents=True, exist_ok=True)
    samples = own_samples(args.folder)
    test = easy_vqa.get_test_image_paths()
    pictures = [Path(test[n]) for n in range(0, len(test), max(1, len(test) // args.images))][: args.images]
    reference = make("float32", RECIPES["float32"], None, args.folder)
    rows = []
    for name, settings in RECIPES.items():
        row: dict[str, Any] = {"recipe": name}
        for kind, source in (("packaged", None), ("own", samples)):
            is_calibrated = settings.kv_cache or (settings.precision and settings.method != "rtn")
            if source and not is_calibrated:
                continue
            bundle = make(name, settings, source, args.folder)
            found = compare_bundles(reference, bundle, pictures, [CAPTION], CompareSettings(24), lambda *_: None).logits
            row |= {
                f"kl_{kind}": found.kl_mean_nats,
                f"top1_{kind}": found.top1_agreement,
                "positions": found.positions,
            }
            if kind == "packaged" and name in SCORED:
                score = evaluate(bundle.path, easy_vqa_examples(args.questions)).scores["exact"]
                row |= {"accuracy": score.mean, "interval_95": (score.low, score.high), "questions": score.n}
        rows.append(row)
    for row in rows:
        if "accuracy" in row:
            row["drop_points"] = round(100 * (float(rows[0]["accuracy"]) - float(row["accuracy"])), 2)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| bundle | accuracy | 95 % interval | drop | KL, packaged samples | KL, own samples | same choice |"]
    lines.append("| --- " * 7 + "|")
    for row in rows:
        cells = ["", "", ""]
        if "accuracy" in row:
            low, high = (f"{100 * bound:.2f}" for bound in row["interval_95"])
            cells = [f"{100 * row['accuracy']:.2f} %", f"{low} to {high} %", f"{row['drop_points']:.2f}"]
        kl = [f"{1e6 * row[key]:.3g}" if key in row else "" for key in ("kl_packaged", "kl_own")]
        agreement = f"{100 * row.get('top1_own', row['top1_packaged']):.1f} %"
        lines.append("| " + " | ".join([row["recipe"], *cells, *kl, agreement]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=int, help="ask only this many of the 9,673")
    parser.add_argument("--images", type=int, default=100, help="test pictures to caption")
    args = parser.parse_args()
    rows = measure(args)
    print(markdown(rows))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
