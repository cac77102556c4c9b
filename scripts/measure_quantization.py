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
from pathlib import Path
from typing import Any

import easy_vqa

from demo_bundles import EIGHT_SLOTS, RECIPES, easy_vqa_questions, make_bundle, own_samples
from pixtral_runtime.compare.compare import CompareSettings, compare_bundles
from pixtral_runtime.evaluation.run import evaluate

CAPTION = "Describe this image in one short sentence."
SCORED = ("float32", "float16", "float16, int8 KV cache", "int8", "fp8", "int4", "int4, int8 KV cache")
"""Recipes whose accuracy is measured too; the others differ in how codes are chosen, which divergence shows better."""


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    args.folder.mkdir(parents=True, exist_ok=True)
    samples = own_samples(args.folder)
    test = easy_vqa.get_test_image_paths()
    pictures = [Path(test[n]) for n in range(0, len(test), max(1, len(test) // args.images))][: args.images]
    reference = make_bundle("float32", RECIPES["float32"], None, args.folder)
    rows = []
    for name, settings in RECIPES.items():
        row: dict[str, Any] = {"recipe": name}
        for kind, source in (("packaged", None), ("own", samples)):
            is_calibrated = settings.kv_cache or (settings.precision and settings.method != "rtn")
            if source and not is_calibrated:
                continue
            bundle = make_bundle(name, settings, source, args.folder)
            found = compare_bundles(reference, bundle, pictures, [CAPTION], CompareSettings(24), lambda *_: None).logits
            row |= {
                f"kl_{kind}": found.kl_mean_nats,
                f"top1_{kind}": found.top1_agreement,
                "positions": found.positions,
            }
            if kind == "packaged" and name in SCORED:
                evaluation, _ = evaluate(bundle.path, easy_vqa_questions(args.questions), EIGHT_SLOTS)
                score = evaluation.scores["exact"]
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
