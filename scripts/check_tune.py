"""Whether tuning finds how many image tokens a task needs, where that is planted: easy-VQA in larger canvases.

    python scripts/check_tune.py artifacts/tune                  # some minutes
    python scripts/check_tune.py artifacts/tune --questions 1000 --seeds 20

The smaller a picture in its canvas, the more tokens its shape needs. The demo bundle answers every question with every
setting once; the decisions are then replayed over these answers, with the questions in another order for each seed.
Goals: the smallest budget that is enough, or one beside it, in 19 of 20 seeds and by 30 % of the full grid's cost; the
cheapest where there is no cliff; intervals that hold the full grid's value in 90 % of cases. A budget is enough if its
score over all questions is at most 2 points below the best. Cost is counted in tokens of prompts, as seconds of so
small a model are mostly the machine's. Prints JSON; exits 6 where a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from demo_bundles import HALF, SLOTS, easy_vqa_questions, make_bundle
from pixtral_runtime.batch.records import Request
from pixtral_runtime.batch.run import Tally
from pixtral_runtime.batch.worker import Worker, WorkerOptions
from pixtral_runtime.evaluation.run import answer_all
from pixtral_runtime.evaluation.task import Example
from pixtral_runtime.evaluation.tuning import TOLERANCE, Scores, Tuned, tune
from pixtral_runtime.evaluation.tuning_questions import TuneQuestions
from pixtral_runtime.evaluation.tuning_run import Trial, TuneSetting
from pixtral_runtime.inputs.conversation import Message

CANVAS = 128  # pixels: 272 tokens
PICTURES = {"early cliff": 96, "cliff": 64, "late cliff": 48, "no cliff": 128}
"""The side in pixels of easy-VQA's picture in its canvas, by task."""
ALL_BUDGETS = (16, 32, 64, 128, None)
BUDGETS = {"no cliff": (64, 96, 128, 192, None)}  # the fewest show the whole picture at about its own 64 pixels
WITHIN_ONE_STEP, COST, COVERAGE = 0.95, 0.3, 0.9


@dataclass(frozen=True)
class Grid:
    """Every setting's score for every question (settings, questions), and its prompts' mean tokens as its cost."""

    budgets: Sequence[int | None]
    scores: Scores
    costs: Sequence[float]

    @property
    def enough(self) -> int:
        """The smallest budget that is at most the tolerance below the best."""
        means = self.scores.mean(1)
        return int(np.argmax(means >= means.max() - TOLERANCE))


def planted(example: Example, side: int, folder: Path) -> Example:
    """The question about its picture, scaled to a side and put somewhere on a canvas of its background colour."""
    source = example.images[0]
    target = folder / source.name
    if not target.exists():
        place = random.Random(source.name)
        picture = Image.open(source).convert("RGB")
        canvas = Image.new("RGB", (CANVAS, CANVAS), picture.getpixel((0, 0)))
        corner = place.randint(0, CANVAS - side), place.randint(0, CANVAS - side)
        canvas.paste(picture.resize((side, side), Image.Resampling.BICUBIC), corner)
        canvas.save(target)
    return replace(example, messages=(Message("user", (target, example.question)),), metric="exact")


def answer(setting: TuneSetting, worker: Worker, asked: Sequence[Request]) -> Tally:
    return answer_all(worker, asked)


def full_grid(bundle: Path, name: str, count: int, folder: Path) -> Grid:
    """A task's questions answered with every budget; kept in the folder."""
    kept = folder / f"{name.replace(' ', '-')}-{count}.json"
    if kept.exists():
        data = json.loads(kept.read_text())
        return Grid(data["budgets"], np.array(data["scores"]), data["costs"])
    pictures = folder / name.replace(" ", "-")
    pictures.mkdir(exist_ok=True)
    examples = [planted(example, PICTURES[name], pictures) for example in easy_vqa_questions(count).examples]
    budgets = BUDGETS.get(name, ALL_BUDGETS)
    settings = [TuneSetting(bundle, budget) for budget in budgets]
    trial = Trial(
        settings, TuneQuestions(examples, [], True), WorkerOptions(), answer, max_new_tokens=8, batches=[SLOTS]
    )
    scores = np.array([trial(number, count) for number in range(len(settings))])
    grid = Grid(budgets, scores, [prompt_tokens(trial, number) for number in range(len(settings))])
    kept.write_text(json.dumps({"budgets": budgets, "scores": grid.scores.tolist(), "costs": grid.costs}))
    return grid


def prompt_tokens(trial: Trial, setting: int) -> float:
    """Mean of the setting's requests."""
    return statistics.fmean(record.prompt_tokens or 0 for record in trial.replies[setting].values())


def replayed(grid: Grid, seed: int) -> Tuned:
    """The decisions with the questions in one random order."""
    order = np.random.default_rng(seed).permutation(grid.scores.shape[1])
    shuffled = grid.scores[:, order]
    return tune(len(grid.costs), len(order), partial(_first, shuffled), grid.costs.__getitem__)


def _first(scores: Scores, setting: int, count: int) -> Scores:
    return scores[setting, :count]


def covered(grid: Grid, tuned: Tuned) -> list[bool]:
    """Of every interval of scores and differences, whether it holds the value over all questions."""
    means = grid.scores.mean(1)
    held = []
    for standing, mean in zip(tuned.standings, means, strict=True):
        held.append(bool(standing.score.low <= mean <= standing.score.high))
        difference = mean - means[tuned.best]
        held.append(bool(standing.difference.low <= difference <= standing.difference.high))
    return held


def row(name: str, grid: Grid, seeds: int) -> dict[str, Any]:
    """What became of a task, over all seeds."""
    results = [replayed(grid, seed) for seed in range(seeds)]
    steps = [None if one.recommended is None else one.recommended - grid.enough for one in results]
    held = [one for result in results for one in covered(grid, result)]
    near = 0 if name == "no cliff" else 1
    found = float(np.mean([step is not None and abs(step) <= near for step in steps]))
    cost = float(np.mean([one.spent / one.full for one in results]))
    coverage = float(np.mean(held))
    return {
        "task": name,
        "image_tokens": ["full" if budget is None else budget for budget in grid.budgets],
        "scores": [round(float(mean), 4) for mean in grid.scores.mean(1)],
        "prompt_tokens": [round(cost, 1) for cost in grid.costs],
        "enough": grid.enough,
        "steps_off": steps,
        "found": found,
        "cost": round(cost, 3),
        "largest_cost": round(max(one.spent / one.full for one in results), 3),
        "coverage": round(coverage, 4),
        "met": found >= WITHIN_ONE_STEP and cost <= COST and coverage >= COVERAGE,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the bundle, the pictures and the answers are kept")
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=20)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    bundle = make_bundle("float32", replace(HALF, dtype="float32"), None, arguments.folder).path
    rows = []
    for name in PICTURES:
        rows.append(row(name, full_grid(bundle, name, arguments.questions, arguments.folder), arguments.seeds))
        print(json.dumps(rows[-1]), file=sys.stderr)
    print(json.dumps({"questions": arguments.questions, "seeds": arguments.seeds, "tasks": rows}, indent=1))
    if not all(one["met"] for one in rows):
        sys.exit(6)


if __name__ == "__main__":
    main()
