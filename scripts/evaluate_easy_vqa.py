"""Score a bundle of the demo checkpoint on easy-VQA's official test split.

    python scripts/evaluate_easy_vqa.py artifacts/demo/bundle          # all 9,673 questions, some minutes
    python scripts/evaluate_easy_vqa.py artifacts/demo/bundle --limit 500

Each question is a request of its own through the runtime, answered greedily; an answer counts if it is the reference's
text exactly. Prints JSON: accuracy with its 95 % Wilson interval, by kind of answer, and the always-"yes" baseline.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from pathlib import Path

import easy_vqa
from rich.progress import track

from pixtral_runtime import Model, load
from pixtral_runtime.model import open_image

COLORS = frozenset(("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"))


def questions(limit: int | None) -> list[tuple[Path, str, str]]:
    """Image, question and answer of the test split, spread over all images where `limit` cuts it."""
    paths = easy_vqa.get_test_image_paths()
    rows = [(Path(paths[i]), q, a) for q, a, i in zip(*easy_vqa.get_test_questions(), strict=True)]
    return rows if limit is None else rows[:: max(1, len(rows) // limit)][:limit]


def wilson(right: int, total: int) -> list[float]:
    """95 % confidence interval of a share."""
    z, p = 1.96, right / total
    centre, spread = p + z * z / (2 * total), z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return [round((centre + sign * spread) / (1 + z * z / total), 4) for sign in (-1, 1)]


def kind(answer: str) -> str:
    return "yes/no" if answer in ("yes", "no") else "color" if answer in COLORS else "shape"


def score(model: Model, rows: list[tuple[Path, str, str]]) -> dict[str, object]:
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for path, question, answer in track(rows, "questions"):
        total[kind(answer)] += 1
        right[kind(answer)] += model.generate(question, [open_image(path)], max_new_tokens=8).text == answer
    return {
        "accuracy": round(right.total() / total.total(), 4),
        "interval_95": wilson(right.total(), total.total()),
        "questions": total.total(),
        "by_kind": {name: round(right[name] / total[name], 4) for name in sorted(total)},
        "always_yes": round(sum(answer == "yes" for *_, answer in rows) / len(rows), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--limit", type=int, help="ask only this many questions")
    args = parser.parse_args()
    model = load(args.bundle)
    started = time.monotonic()
    result = score(model, questions(args.limit))
    setting = {"dtype": model.bundle.dtype, "bundle": model.bundle.fingerprint}
    print(json.dumps(result | setting | {"seconds": round(time.monotonic() - started, 1)}))


if __name__ == "__main__":
    main()
