"""What the page of an evaluation shows: `batch.page.write_report` writes it."""

from __future__ import annotations

from collections.abc import Mapping

from pixtral_runtime.batch.page import RecordNotes
from pixtral_runtime.batch.records import Record
from pixtral_runtime.evaluation.comparison import Flip, ScoreComparison
from pixtral_runtime.evaluation.metrics import LOSSES
from pixtral_runtime.evaluation.result import Evaluation, Scored

MOST_EXAMPLES = 10_000  # a page of so many has some 80 MB
RIGHT, WRONG, BETTER, WORSE, UNSCORED = "right", "wrong", "better than the other", "worse than the other", "not scored"


def evaluation_page(
    evaluation: Evaluation, comparison: ScoreComparison | None, records: Mapping[str, Record]
) -> tuple[list[Record], dict[str, RecordNotes], dict[str, object]]:
    """Records in the order to show them, what to say of each, and the facts at the top."""
    flips = {} if comparison is None else {flip.id: flip for flip in comparison.flips}
    examples = sorted(evaluation.examples, key=lambda example: _rank(example, flips))
    chosen = [example for example in examples if example.id in records][:MOST_EXAMPLES]
    less_is_better = evaluation.headline in LOSSES
    notes = {example.id: _notes(example, flips.get(example.id), less_is_better) for example in chosen}
    summary: dict[str, object] = {"scored": f"{len(evaluation.scored)} of {evaluation.rows}"}
    for name, score in evaluation.scores.items():
        interval = f"{score.low:.4g} to {score.high:.4g}, " if score.has_interval else ""
        summary[name] = f"{score.mean:.4g} ({interval}{score.n} examples)"
    names = ("fingerprint", "precision", "dtype", "dataset", "split", "window", "shots", "judge")
    summary |= {name: evaluation.setting.get(name) for name in names if evaluation.setting.get(name)}
    if comparison is not None:
        summary["against the other"] = comparison.verdict
    return [records[example.id] for example in chosen], notes, summary


def _rank(example: Scored, flips: Mapping[str, Flip]) -> int:
    """Errors, then what flipped, then what is wrong, then the rest."""
    if example.score is None:
        return 0
    if example.id in flips:
        return 1
    return 2 if example.score == 0 else 3


def _notes(example: Scored, flip: Flip | None, less_is_better: bool) -> RecordNotes:
    marks: list[str] = []
    lines = [("reference", " | ".join(dict.fromkeys(example.references)))] if example.references else []
    if example.score is None:
        marks.append(UNSCORED)
        lines.append(("no score", example.error or "not scored"))
    else:
        marks += [RIGHT] if example.score == 1 else [WRONG] if example.score == 0 else []
        lines.append(("score", ", ".join(f"{name} {value:.4g}" for name, value in example.scores.items())))
    if flip is not None:
        marks.append(BETTER if (flip.new_score > flip.old_score) != less_is_better else WORSE)
        lines.append(("the other's answer", f"{flip.old_answer} (score {flip.old_score:.4g})"))
    return RecordNotes(tuple(marks), tuple(lines))
