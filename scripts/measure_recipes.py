"""What each recipe costs small trained models, in text, answers and image tokens: the figures `pixtral plan` prints.

    python scripts/convert_gguf.py …                                                    # SmolLM2-135M, see there
    python scripts/measure_recipes.py artifacts/recipes artifacts/smollm2/checkpoint    # an hour on 2 cores
    python scripts/measure_recipes.py FOLDER CHECKPOINT --texts 20 --questions 500      # quicker
    python scripts/measure_recipes.py FOLDER CHECKPOINT --write                         # the figures that are packaged

Each recipe, calibrated with the packaged samples, beside float16 weights; activations are float16. Differences are
paired, with their 95 % interval, by the library behind `pixtral eval --against`.

- Text: the perplexity of the checkpoint on documents that a Debian machine with Python holds, the beginning of each.
- Answers: easy-VQA's test questions by the demo checkpoint, about pictures of 48 pixels in a canvas of 128, of which it
  gets 64 tokens: too few to be sure. On easy-VQA as it is nearly all recipes answer everything.
- Image tokens: pictures of 64 pixels in the canvas, with several budgets. Enough is the smallest budget with a score at
  most 2 points below the recipe's own with all tokens.

What was evaluated is kept in the folder, so that a stopped run goes on. Prints a table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from check_tune import ALL_BUDGETS, PICTURES, planted
from demo_bundles import EIGHT_SLOTS, RECIPES, easy_vqa_questions, make_bundle
from measure_text import SAMPLE_LETTERS, split
from pixtral_runtime.bundle import recipe_costs
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.bundle.recipe_costs import Interval, RecipeCost, RecipeCosts, bundle_key
from pixtral_runtime.device.sysfs import cpu_name
from pixtral_runtime.evaluation.comparison import compare_evaluations
from pixtral_runtime.evaluation.result import PERPLEXITY, Evaluation, read_evaluation
from pixtral_runtime.evaluation.run import Questions, evaluate
from pixtral_runtime.evaluation.task import Example
from pixtral_runtime.evaluation.tasks.registry import task_named
from pixtral_runtime.evaluation.tuning import TOLERANCE
from pixtral_runtime.inputs.conversation import Message

REFERENCE = "float16"
MEASURED = (
    "int8",
    "fp8",
    "int4",
    "int4 by AWQ",
    "int4 by rounding",
    "float16, int8 KV cache",
    "int4, int8 KV cache",
)
WINDOW = 512
HARD, HARD_TOKENS = "late cliff", 64
SCALED = "cliff"
TEXTS, QUESTIONS, IMAGE_QUESTIONS = 60, 2000, 1000
PACKAGED = Path(recipe_costs.__file__).with_suffix(".json")


def texts(count: int) -> Questions:
    """The beginnings of documents, mostly a window each. `measure_text.py` calibrates with others."""
    read = split()[1][:count]
    if len(read) < count:
        sys.exit(f"this machine holds {len(read)} documents only; choose fewer with --texts")
    asked = [Example(str(n), (Message("user", (text[:SAMPLE_LETTERS],)),), (), str(n)) for n, text in enumerate(read)]
    return Questions(task_named("perplexity"), asked, window=WINDOW)


def pictures(kind: str, count: int, folder: Path) -> Questions:
    """Questions about small pictures in their canvases."""
    folder = folder / kind.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    plain = easy_vqa_questions(count)
    return replace(plain, examples=[planted(example, PICTURES[kind], folder) for example in plain.examples])


def evaluated(bundle: Bundle, asked: Questions, folder: Path, name: str, image_tokens: int | None = None) -> Evaluation:
    """What the folder holds of this bundle by this name, or else what the bundle makes of the questions now."""
    kept = folder / f"{bundle.path.name}-{name}-{image_tokens or 'full'}-{len(asked.examples)}.json"
    if kept.is_file():
        before = read_evaluation(kept)
        if before.setting["fingerprint"] == bundle.fingerprint:
            return before
    started = time.monotonic()
    found, _ = evaluate(bundle.path, asked, replace(EIGHT_SLOTS, image_tokens=image_tokens))
    if found.missing:
        sys.exit(f"{bundle.path}: {found.missing[0]}")
    folder.mkdir(parents=True, exist_ok=True)
    found.save(kept)
    print(f"{kept.name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return found


class Measurement:
    """Evaluations of recipes, kept in a folder."""

    def __init__(self, folder: Path, checkpoint: Path, asked: argparse.Namespace) -> None:
        self.folder, self.checkpoint = folder, checkpoint
        self.texts = texts(asked.texts)
        self.hard = pictures(HARD, asked.questions, folder)
        self.scaled = pictures(SCALED, min(asked.questions, IMAGE_QUESTIONS), folder)

    def text(self, name: str) -> tuple[Bundle, Evaluation]:
        bundles = self.folder / "text"
        bundles.mkdir(parents=True, exist_ok=True)
        bundle = make_bundle(name, RECIPES[name], None, bundles, self.checkpoint)
        return bundle, evaluated(bundle, self.texts, self.folder / "results", "text")

    def answers(self, name: str) -> Evaluation:
        return evaluated(self.demo(name), self.hard, self.folder / "results", "hard", HARD_TOKENS)

    def budgets(self, name: str) -> list[float]:
        """Scores in percent with each budget."""
        bundle, results = self.demo(name), self.folder / "results"
        found = [evaluated(bundle, self.scaled, results, "scaled", budget) for budget in ALL_BUDGETS]
        return [round(100 * one.scores["exact"].mean, 2) for one in found]

    def demo(self, name: str) -> Bundle:
        bundles = self.folder / "demo"
        bundles.mkdir(parents=True, exist_ok=True)
        return make_bundle(name, RECIPES[name], None, bundles)


def enough(scores: Sequence[float]) -> int | None:
    """The smallest budget whose score in percent is at most the tolerance below that of all tokens."""
    near = [budget for budget, score in zip(ALL_BUDGETS, scores, strict=True) if score >= scores[-1] - 100 * TOLERANCE]
    return near[0]


def change(old: Evaluation, new: Evaluation) -> Interval:
    """In percent of perplexity, or in points of accuracy."""
    found = compare_evaluations(old, new).changes[new.headline]
    values = [found.difference, found.low, found.high]
    if PERPLEXITY in new.scores:
        values = [math.expm1(nats) for nats in values]
    return Interval(*(round(100 * value, 2) for value in values))


def measure(measurement: Measurement, command: str) -> RecipeCosts:
    plain, plain_answers = measurement.text(REFERENCE)[1], measurement.answers(REFERENCE)
    plain_scores = measurement.budgets(REFERENCE)
    costs = []
    for name in MEASURED:
        bundle, text = measurement.text(name)
        scores = measurement.budgets(name)
        costs.append(
            RecipeCost(
                name,
                bundle_key(bundle.precision, bundle.kv_cache, bundle.quantization),
                change(plain, text),
                min(bundle.quantization["fitted_groups"].values(), default=bundle.quantization["group_size"]),
                change(plain_answers, measurement.answers(name)),
                scores,
                enough(scores),
            )
        )
    return RecipeCosts(
        command=command,
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        processor=cpu_name() or "unknown",
        text_model="SmolLM2-135M",
        windows=plain.scores[PERPLEXITY].n,
        tokens=int(sum(one.weights[plain.headline] for one in plain.scored)),
        perplexity=round(plain.scores[PERPLEXITY].mean, 2),
        answer_model="the demo checkpoint",
        questions=len(plain_answers.scored),
        answer_tokens=HARD_TOKENS,
        answer_score=round(100 * plain_answers.scores["exact"].mean, 2),
        image_questions=len(measurement.scaled.examples),
        tolerance_points=100 * TOLERANCE,
        budgets=list(ALL_BUDGETS),
        image_scores=plain_scores,
        enough=enough(plain_scores),
        recipes=costs,
    )


def markdown(costs: RecipeCosts) -> str:
    """The table of docs/quantization.md."""
    budgets = [str(budget or "all") for budget in costs.budgets]
    header = [
        "recipe",
        "perplexity, percent",
        "answers, points",
        f"score with {', '.join(budgets)} image tokens",
        "enough",
    ]
    plain = [
        REFERENCE,
        f"{costs.perplexity:.2f}",
        f"{costs.answer_score:.1f} %",
        *_images(costs.image_scores, costs.enough),
    ]
    rows = [
        [cost.name, cost.text.shown(), cost.answers.shown(), *_images(cost.image_scores, cost.enough)]
        for cost in costs.recipes
    ]
    lines = [header, ["---"] * len(header), plain, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _images(scores: Sequence[float], fewest: int | None) -> list[str]:
    return [f"{', '.join(f'{score:.1f}' for score in scores)} %", str(fewest or "all")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where bundles, pictures and results are kept")
    parser.add_argument("checkpoint", type=Path, help="of the text model, by convert_gguf.py")
    parser.add_argument("--texts", type=int, default=TEXTS)
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    parser.add_argument("--write", action="store_true", help="the packaged figures anew, too")
    args = parser.parse_args()
    sizes = "".join(
        f" --{name} {value}"
        for name, value, usual in (("texts", args.texts, TEXTS), ("questions", args.questions, QUESTIONS))
        if value != usual
    )
    costs = measure(
        Measurement(args.folder, args.checkpoint, args), f"python scripts/measure_recipes.py FOLDER CHECKPOINT{sizes}"
    )
    if args.write:
        PACKAGED.write_text(json.dumps(asdict(costs), indent=1) + "\n", encoding="utf-8")
    print(markdown(costs))
    print(json.dumps(asdict(costs)))


if __name__ == "__main__":
    main()
