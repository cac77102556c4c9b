"""What quantization costs on easy-VQA's official test split, by `pixtral eval`; and what the command itself costs.

    python scripts/measure_eval.py artifacts/quantization                    # some minutes
    python scripts/measure_eval.py artifacts/quantization --questions 500 --rounds 0

Exports the demo checkpoint to a bundle of each recipe unless the folder has it, evaluates all of them and compares each
with float32: accuracy with its 95 % interval, the paired difference, McNemar's p. Then `pixtral eval` and `pixtral run`
answer the same 1,000 questions with 8 slots, in turn. Prints tables; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from demo_bundles import EIGHT_SLOTS, RECIPES, SLOTS, easy_vqa_questions, make_bundle
from pixtral_runtime.evaluation.comparison import compare_evaluations
from pixtral_runtime.evaluation.result import Evaluation
from pixtral_runtime.evaluation.run import evaluate
from pixtral_runtime.evaluation.score import Score
from pixtral_runtime.evaluation.task import Example
from pixtral_runtime.evaluation.tasks.registry import task_named

PRECISIONS = ("float32", "int8", "fp8", "int4")
TIMED = 1000  # questions


def table(evaluations: dict[str, Evaluation]) -> tuple[str, list[dict[str, Any]]]:
    """Accuracy of each, and its paired difference to the first."""
    lines = ["| bundle | accuracy | 95 % interval | against the first, points | p | better, worse |"]
    lines.append("| --- " * 6 + "|")
    rows = []
    reference = next(iter(evaluations.values()))
    for name, evaluation in evaluations.items():
        score: Score = next(iter(evaluation.scores.values()))
        row: dict[str, Any] = {"bundle": name, "score": asdict(score)}
        cells = ["", "", ""]
        if evaluation is not reference:
            found = compare_evaluations(reference, evaluation)
            change = next(iter(found.changes.values()))
            row |= {"change": asdict(change), "verdict": found.verdict}
            spread = f"{100 * change.difference:+.2f} ({100 * change.low:+.2f} to {100 * change.high:+.2f})"
            cells = [spread, f"{change.p_value:.2g}", f"{change.better}, {change.worse}"]
        interval = f"{score.low:.2%} to {score.high:.2%}"
        lines.append("| " + " | ".join([name, f"{score.mean:.2%} of {score.n}", interval, *cells]) + " |")
        rows.append(row)
    return "\n".join(lines), rows


def timed(bundle: Path, asked: Sequence[Example], rounds: int) -> dict[str, Any]:
    """Seconds of both commands over the same questions, in turn: whole processes, and their answering alone."""
    limit = task_named("easy_vqa").max_new_tokens
    seconds: dict[str, list[float]] = {"eval": [], "run": []}
    answering: dict[str, list[float]] = {"eval": [], "run": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [
            {"id": e.id, "images": [str(e.images[0])], "prompt": e.question, "max_new_tokens": limit} for e in asked
        ]
        listed = [
            {"id": e.id, "image": str(e.images[0]), "question": e.question, "answers": list(e.references)}
            for e in asked
        ]
        for file, entries in (("requests.jsonl", rows), ("custom/rows.jsonl", listed)):
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text("".join(f"{json.dumps(entry)}\n" for entry in entries), encoding="utf-8")
        evaluation = ["eval", str(bundle), "--task", "custom", "--data", str(folder / "custom")]
        evaluation += ["--save", str(folder / "e.json"), "--max-new-tokens", str(limit)]
        commands = {
            "eval": evaluation,
            "run": ["run", str(bundle), "--requests", str(folder / "requests.jsonl"), "-o", str(folder / "r.jsonl")],
        }
        for _ in range(rounds):
            for kind, command in commands.items():
                line = [sys.executable, "-m", "pixtral_cli", *command, "--batch", str(SLOTS), "--force", "--json"]
                started = time.monotonic()
                done = subprocess.run(line, check=True, capture_output=True)
                seconds[kind].append(time.monotonic() - started)
                said = json.loads(done.stdout)
                answering[kind].append(said.get("setting", said)["seconds"])
    return {
        "questions": len(asked),
        "slots": SLOTS,
        "seconds": seconds,
        "answering_seconds": answering,
        "eval_over_run": _ratio(seconds),
        "answering_eval_over_run": _ratio(answering),
    }


def _ratio(seconds: dict[str, list[float]]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(one / other for one, other in zip(seconds["eval"], seconds["run"], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=int, help="ask only this many of the 9,673")
    parser.add_argument("--rounds", type=int, default=3, help="of both commands; 0 leaves them out")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    bundles = {name: make_bundle(name, RECIPES[name], None, args.folder).path for name in PRECISIONS}
    questions = easy_vqa_questions(args.questions)
    shown, rows = table({name: evaluate(path, questions, EIGHT_SLOTS)[0] for name, path in bundles.items()})
    result: dict[str, Any] = {"rows": rows}
    print(shown)
    if args.rounds:
        result["time"] = timed(bundles["float32"], questions.examples[:TIMED], args.rounds)
        whole, alone = result["time"]["eval_over_run"], result["time"]["answering_eval_over_run"]
        print(f"\npixtral eval takes {whole:.2f} times as long as pixtral run, its answering alone {alone:.2f} times")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
